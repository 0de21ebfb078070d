"""No latency is measured here: it takes longer than the recipes."""

from __future__ import annotations

import importlib

import pytest


@pytest.fixture(autouse=True)
def _no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("lamina.report.collect")
    monkeypatch.setattr(module, "measure_latency", lambda *_: (None, "not in these tests"))
