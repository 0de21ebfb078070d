"""Verify and re-solve: budgets are met as measured, on machines whose times do not add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clocks import Machine, Net, machine_for

from lamina import discover
from lamina.data import as_data
from lamina.errors import InfeasibleError
from lamina.measure.latency import reshaped
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Candidate, Step
from lamina.network.source import Network
from lamina.plan import Budget, Plan
from lamina.plan.seconds import reshape_edits, structures_of
from lamina.run import open_run
from lamina.stages import Way, applied, clocked, packed, solved
from lamina.verify import (
    AIM,
    TOLERANCE,
    corrected,
    fast_enough,
    judged,
    on_grid,
    planned,
    predict,
    refit,
    seconds_limit,
    smallest_working,
    timed,
)


def candidate(site: str, bits: float, error: float, *methods: str) -> Candidate:
    steps = tuple(Step(m, site, {}) for m in methods)
    return Candidate(site, steps, Cost(10, bits, 10), error)


def test_only_single_grids_count_as_squeezable():
    assert on_grid(candidate("a", 8, 0.1, "rdoq"))
    assert not on_grid(candidate("a", 8, 0.1, "magnitude", "rdoq"))
    assert not on_grid(candidate("a", 8, 0.1, "keep"))


def test_smallest_working_reads_the_curve():
    plan = Plan("x", {}, curve=((10.0, 1.0), (20.0, 4e-4), (30.0, 1e-5)))
    assert smallest_working(plan) == 20.0
    assert smallest_working(replace(plan, curve=((10.0, 1.0),))) == 0.0


# --- latency -------------------------------------------------------------------------------------

X = torch.randn(16, 64)


def offers(sites: Any) -> dict[str, tuple[Candidate, ...]]:
    """Keep, and pairs of every rank whose error falls as the rank rises."""
    found = {}
    for site in sites.layers:
        out, inner = site.shape
        whole = Cost(out * inner, 32.0 * out * inner, out * inner)
        rows = [Candidate(site.name, (Step("keep", site.name),), whole, 0.0)]
        for rank in range(1, min(out, inner)):
            size = rank * (out + inner)
            steps = (
                Step("alds", site.name, {"folds": 1, "rank": rank}),
                Step("keep", f"{site.name}.0"), Step("keep", f"{site.name}.1"),
            )  # fmt: skip
            rows.append(Candidate(site.name, steps, Cost(size, 32.0 * size, size), 1 / rank))
        found[site.name] = tuple(rows)
    return found


def run(budget: Budget, machine: Machine, **settings: Any) -> tuple[Way, Any, Stats, Any]:
    torch.manual_seed(0)
    network = Network(Net().eval(), (X,), name="net")
    way = Way(network, None, budget, timer=machine, **settings)
    sites = discover(network)
    return way, sites, Stats(network=network.digest()), clocked(way, sites, offers(sites))


@pytest.mark.parametrize("asked", ["0.75x", "0.5x", "0.3x"])
@pytest.mark.parametrize("whole", [1.0, 1.2, 2.0, 0.8])
def test_the_measured_time_converges_to_the_budget(asked: str, whole: float):
    """Negative control: the plan that only believes the table misses, where times do not add up."""
    way, sites, stats, candidates = run(Budget(latency=asked), machine_for(whole=whole))
    made = planned(way, sites, stats, candidates)
    limit = seconds_limit(way)
    assert limit is not None and 1 <= len(way.rounds) <= 4
    assert [row["kept"] for row in way.rounds].count(True) == 1
    kept = next(row for row in way.rounds if row["kept"])
    assert (1 - TOLERANCE) * limit <= kept["measured"]["seconds"] <= limit
    assert kept["predicted"]["seconds"] == pytest.approx(kept["measured"]["seconds"], rel=0.05)
    assert made.budget == {"latency": asked}
    if whole == 2.0 and asked == "0.3x":
        first = way.rounds[0]["measured"]["seconds"]
        assert not (1 - TOLERANCE) * limit <= first <= limit
    facts: dict[str, Any] = {"budget": {"limits": {}, "met": {}}}
    edits = reshape_edits(way.network, sites, {n: d.steps for n, d in made.sites.items()})
    told = judged(way, facts, reshaped(way.network, edits))
    assert told["budget"]["met"] == {"seconds": True}
    assert told["latency"]["after_s"] == pytest.approx(kept["measured"]["seconds"])
    assert told["latency"]["batch"] == 16 and told["rounds"] is way.rounds
    slow = judged(way, facts, way.network.module)
    assert slow["budget"]["met"] == {"seconds": False} and "over the latency" in way.notes[-1]


def test_no_candidate_survives_that_is_not_faster_than_its_layer():
    machine = machine_for(start=1e-5)  # starting a kernel is dear here: most pairs do not pay
    way, sites, _, candidates = run(Budget(latency="0.9x"), machine)
    assert way.table is not None
    given = structures_of(way.network, sites, offers(sites))
    for name, rows in candidates.items():
        dense = way.table.dense[name]
        for c in rows:
            assert c.cost.seconds == dense or c.cost.seconds <= 0.98 * dense
            assert (c.cost.seconds == dense) == (c.steps[0].method == "keep")
        assert 1 <= len(rows) < 1 + len(given[name][1])
    assert "are not faster than the layer they replace and were dropped" in way.notes[0]


def test_a_budget_nobody_can_meet_names_the_fastest_plan():
    way, sites, stats, candidates = run(Budget(latency="1%"), machine_for())
    with pytest.raises(InfeasibleError, match="the fastest plan was measured at") as caught:
        planned(way, sites, stats, candidates)
    nearest = caught.value.nearest["seconds"]
    again, *rest = run(Budget(latency=nearest * 1.001), machine_for())
    made = planned(again, *rest)
    assert timed(again, rest[0], made).seconds == pytest.approx(nearest, rel=1e-3)


def test_a_latency_that_costs_nothing_keeps_everything():
    way, sites, stats, candidates = run(Budget(latency="100%"), machine_for())
    made = planned(way, sites, stats, candidates)
    assert {d.steps[0].method for d in made.sites.values()} <= {"keep", "alds"}
    way, sites, stats, candidates = run(Budget(latency=1.0), machine_for())
    assert planned(way, sites, stats, candidates).error == 0 and len(way.rounds) == 1


def test_a_latency_and_a_size_hold_together():
    budget = Budget(latency="0.8x", size="40%")
    way, sites, stats, candidates = run(budget, machine_for(whole=1.5))
    made = planned(way, sites, stats, candidates)
    limit = seconds_limit(way)
    assert limit is not None and made.predicted.bits <= 0.4 * made.original.bits
    kept = next(row for row in way.rounds if row["kept"])
    assert kept["measured"]["seconds"] <= limit
    only = run(Budget(latency="0.8x"), machine_for(whole=1.5))
    assert planned(*only).error < made.error


def test_the_size_is_refitted_within_the_latency():
    way, sites, stats, candidates = run(Budget(latency="0.6x", size="35%"), machine_for())
    made = planned(way, sites, stats, candidates)
    edited = applied(way, made, sites, stats)
    file = packed(edited, made)
    limit = 0.97 * len(file)
    chosen, edited, file = refit(way, sites, stats, candidates, made, edited, file, limit)
    assert len(file) <= limit and way.rounds[-1]["why"] in ("size", "latency")
    most = seconds_limit(way)
    assert most is not None and timed(way, sites, chosen).seconds <= most


def test_a_resumed_run_measures_nothing_again(tmp_path: Path):
    made = []
    machines = [machine_for(), machine_for(rate=5e-9, whole=2.0)]
    for machine in machines:
        with open_run(tmp_path / "run") as folder:
            way, *rest = run(Budget(latency="0.5x"), machine, folder=folder)
            made.append((planned(way, *rest).dict(), way.rounds))
    assert made[0] == made[1]
    assert machines[0].timed > 0 == machines[1].timed


def test_two_rounds_are_enough_for_a_line():
    way, sites, stats, candidates = run(Budget(latency="0.4x"), machine_for(whole=1.7))

    def make(budget: Budget) -> Plan:
        return solved(way, sites, stats, candidates, budget)

    fast_enough(way, sites, way.budget, make)
    assert len(way.rounds) <= 3


def test_a_drop_and_a_latency_hold_together():
    for asked, allowed in (("0.7x", 80.0), ("0.5x", 99.0)):
        budget = Budget(latency=asked, max_drop=allowed)
        way, sites, stats, candidates = run(budget, machine_for(whole=1.5), metric="agreement")
        way.data = as_data({"calibration": [X], "validation": [X]})
        made = planned(way, sites, stats, candidates)
        limit = seconds_limit(way)
        assert limit is not None and timed(way, sites, made).seconds <= limit
        drops = [row["measured"]["drop"] for row in way.rounds if row["why"] == "max_drop"]
        assert drops and min(drops) <= allowed
        assert {"latency", "max_drop"} == {row["why"] for row in way.rounds}
        assert [row["round"] for row in way.rounds] == list(range(1, len(way.rounds) + 1))
        assert made.budget == {"latency": asked, "max_drop": allowed}


def test_corrections_follow_the_line_through_the_nearest_rounds():
    assert corrected([(10, 10), (6, 5)], 7.5) == pytest.approx(8)
    assert corrected([(10, 10), (6, 7)], 5.5) == pytest.approx(4)  # beyond: along the line
    assert corrected([(10, 10), (6, 7), (3, 4)], 5.5) == pytest.approx(4.5)
    assert corrected([(10, 10), (6, 11)], 5) == pytest.approx(5.4)  # no line falls: just less
    assert predict([(10, 10), (6, 5)], 8) == pytest.approx(7.5)
    assert predict([(10, 10)], 8) == 8
    assert 0 < AIM < 1
