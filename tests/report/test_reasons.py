"""Rounds, choices and latency in words: against arithmetic on the facts."""

from __future__ import annotations

import math
from typing import Any

import pytest
from tests.report.sample import sample

from lamina.report.reasons import amounts, choices, latency, neighbours, paid, rival, rounds, times


def point(chain: str, size: float, error: float | None, **more: Any) -> dict[str, Any]:
    return {"chain": chain, "steps": f"{chain}()", "bits": 8 * size, "error": error,
            "macs": 10.0, "params": 5.0, "seconds": 0.0, "taken": False, **more}  # fmt: skip


def test_every_round_is_a_row() -> None:
    found = rounds(sample())
    assert found is not None
    assert [row[1] for row in found.rows] == ["latency=0.9x", "max_drop=0.5"]
    assert found.rows[0][2] == "73.1 kB, error 0.0110, 0.270 ms"
    assert [row[3] for row in found.rows] == ["0.290 ms", "0.20 points lost"]
    assert [row[4] for row in found.rows] == ["", "kept"]


def test_amounts_of_every_kind() -> None:
    found = amounts({"macs": 2e6, "params": 10, "max_drop": -0.5, "speed": 2.0}, "points")
    assert found == "2,000,000 MACs, 10 parameters, 0.50 points gained, speed 2.00"
    assert amounts({}) == "-"
    assert amounts({"seconds": None, "error": None}) == "-, error -"


def test_neighbours_are_the_next_corners_of_the_hull() -> None:
    line = [(1, 100.0), (2, 60.0), (3, 20.0), (4, 19.0), (8, 1.0), (9, 0.99), (12, 0.0)]
    curve = [point("a", size, error) for size, error in line]
    smaller, larger = neighbours(curve, curve[2], {})
    assert smaller is curve[0]  # (2, 60) lies on the line from 1 to 3 or above it
    assert larger is curve[4]
    assert neighbours(curve, curve[0], {})[0] is None
    assert neighbours(curve, curve[-1], {})[1] is None
    assert neighbours([point("a", 1, None)], curve[0], {}) == (None, None)


def test_prices_say_what_is_cheaper() -> None:
    few_bytes = point("a", 10, 1.0, macs=100.0)
    few_macs = point("b", 20, 1.0, macs=10.0)
    assert paid(few_bytes, {}) == 10 and paid(few_macs, {"macs": 2.0}) == 20
    both = {"bytes": 1.0, "macs": 1.0}
    assert times([few_macs], few_bytes, {}) == 2
    assert times([few_macs], few_bytes, both) == pytest.approx(30 / 110)
    assert rival([few_bytes, few_macs], few_bytes, {}) == "b, 2.00x the bytes"
    assert rival([few_bytes, few_macs], few_bytes, both) == "b, 0.273x the price"


def test_a_rival_must_reach_the_error() -> None:
    taken = point("a", 10, 1.0)
    assert rival([taken], taken, {}) == "no other chain was offered"
    assert rival([taken, point("b", 1, 1.1)], taken, {}) == "no other chain reaches it"
    assert rival([taken, point("b", 1, None)], taken, {}) == "no other chain reaches it"
    line = [point("b", 30, 1.0), point("b", 25, 0.5), point("c", 26, 0.0)]
    assert rival([taken, *line], taken, {}) == "b, 2.50x the bytes"


def test_every_layer_with_a_taken_point_is_a_choice() -> None:
    facts = sample()
    found = choices(facts)
    assert found is not None
    assert [row[0] for row in found.rows] == list(facts["curves"])
    name, takes, at, smaller, larger, other = found.rows[2]
    assert (name, takes, at) == ("fc1", "rdoq", "50.0 kB, 0.00612")
    assert smaller == "35.0 kB, 0.0122" and larger == "71.5 kB, 0.00306"
    assert other == "alds > rdoq, 2.00x the bytes"
    assert "3.10e-07 per byte" in found.note
    for p in facts["curves"]["fc1"]:
        p["taken"] = False
    left = choices(facts)
    assert left is not None and len(left.rows) == len(found.rows) - 1


def test_latency_adds_up_to_the_network() -> None:
    facts = sample()
    found = latency(facts)
    assert found is not None
    assert [row[0] for row in found.rows] == ["conv2", "fc1", "everything else"]
    assert found.rows[1] == ("fc1", "0.100 ms", "0.0500 ms", "2.00x faster")
    assert found.rows[0][3] == ""
    assert found.rows[-1][1:3] == ("0.0700 ms", "0.0700 ms")  # 0.32 - 0.25, 0.27 - 0.20
    assert found.total == ("the network", "0.320 ms", "0.270 ms", "1.19x faster")
    assert "0.271 ms, 0.270 ms predicted" in found.note
    facts["latency"] = None
    unmeasured = latency(facts)
    assert unmeasured is not None and "then measured" not in unmeasured.note
    facts["seconds"]["sites"] = {}
    assert latency(facts) is None


def test_a_time_of_none_is_no_speed() -> None:
    facts = sample()
    facts["seconds"]["sites"]["fc1"] = {"before": 0.0, "after": 0.0}
    found = latency(facts)
    assert found is not None and found.rows[1][3] == ""
    assert not any(math.isnan(len(cell)) for row in found.rows for cell in row)
