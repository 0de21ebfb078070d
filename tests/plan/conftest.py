"""A method that spans layers, registered while a test runs."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
from tests.plan.toy import Glue


@pytest.fixture
def glue(monkeypatch: pytest.MonkeyPatch) -> Iterator[Glue]:
    """The toy, the only spanning method there is meanwhile."""
    base = importlib.import_module("lamina.methods.base")
    method = Glue()
    every = {**base.registry(), method.name: method}
    monkeypatch.setattr(base, "_instances", lambda: every)
    for cached in (base.registry, base.spanning):
        cached.cache_clear()
    yield method
    for cached in (base.registry, base.spanning):
        cached.cache_clear()
