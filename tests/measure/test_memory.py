"""Memory: what is told is plausible, and what was freed is given back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lamina.measure.memory import free_memory, give_back


def test_free_memory_is_a_part_of_all() -> None:
    free = free_memory()
    assert free > 1e6
    if Path("/proc/meminfo").is_file():
        whole = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1])
        assert free < 1024 * whole


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="told by /proc alone")
def test_freed_memory_is_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])

    held = [np.ones(100_000, np.uint8) for _ in range(600)]  # each too small for a map of its own
    last = held.pop()
    before = resident()
    held.clear()
    give_back()
    assert resident() <= before
    assert last.all()
