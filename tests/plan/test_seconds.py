"""Seconds of candidates: what runs under a chain, where it may be measured, and the speed gate."""

from __future__ import annotations

import pytest
from torch import nn

from lamina import discover
from lamina.errors import BudgetError, InfeasibleError
from lamina.forms import Edit
from lamina.measure.latency import LatencyTable, structure_key
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Candidate, Step
from lamina.network.source import Network
from lamina.plan import Budget, plan
from lamina.plan.seconds import (
    count_structures,
    inside,
    reshape_edits,
    structure_of,
    structures_of,
    with_seconds,
)

NETWORK = Network(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
SITES = discover(NETWORK)


def pair(at: str, rank: int, *rest: Step) -> tuple[Step, ...]:
    return (Step("alds", at, {"folds": 1, "rank": rank}), *rest)


def candidate(at: str, error: float, *steps: Step) -> Candidate:
    return Candidate(at, steps, Cost(1, 8, 1), error)


def key(at: str, rank: int) -> str:
    return structure_key(at, structure_of(NETWORK, SITES[at], pair(at, rank)))


def test_values_alone_leave_the_structure():
    chain = (Step("magnitude", "0", {"keep": 0.5}), Step("rdoq", "0", {"step": 0.1}))
    assert structure_of(NETWORK, SITES["0"], chain) == ()
    assert structure_of(NETWORK, SITES["0"], ()) == ()


def test_a_chain_has_the_structure_of_its_steps():
    values = (Step("magnitude", "0.0", {"keep": 0.5}), Step("rdoq", "0.0", {"step": 0.1}))
    (edit,) = structure_of(NETWORK, SITES["0"], pair("0", 2, *values))
    assert (edit.path, edit.form, edit.settings["rank"]) == ("0", "low_rank", 2)
    edits = reshape_edits(NETWORK, SITES, {"0": pair("0", 2), "2": (Step("keep", "2"),)})
    assert [e.path for e in edits] == ["0"]


def test_structures_are_told_once_per_site_and_only_inside_it():
    offers = {
        "0": (
            candidate("0", 0, Step("keep", "0")),
            candidate("0", 1, *pair("0", 2, Step("keep", "0.0"))),
            candidate("0", 1, *pair("0", 2, Step("rdoq", "0.0", {"step": 0.1}))),
            candidate("0", 2, *pair("0", 1)),
        ),
        "2": (candidate("2", 0, Step("keep", "2")),),
    }
    found = structures_of(NETWORK, SITES, offers)
    assert set(found) == {"0"} and found["0"][0] == "0" and count_structures(found) == 2
    assert inside(SITES["2"], (Edit("2", "low_rank"), Edit("2.0", "low_rank")))
    assert not inside(SITES["2"], (Edit("20", "low_rank"),))


def test_the_gate_drops_what_is_slow_within_noise_or_unmeasured():
    offers = {
        "0": (
            candidate("0", 0, Step("keep", "0")),
            *(candidate("0", rank, *pair("0", rank)) for rank in (1, 2, 3, 4)),
        ),
        "2": (candidate("2", 0, Step("keep", "2")),),
    }
    ratios = {key("0", 1): (0.5, 0.1), key("0", 2): (0.95, 0.06), key("0", 3): (1.4, 0.02)}
    table = LatencyTable(3.0, {"0": 2.0}, {"0": ratios})
    kept, dropped = with_seconds(NETWORK, SITES, offers, table)
    assert dropped == 3 and table.fixed == 1.0
    assert [(c.error, c.cost.seconds) for c in kept["0"]] == [(0, 2.0), (1, 1.0)]
    assert kept["2"][0].cost.seconds == 0.0  # it is in the fixed time


def test_seconds_are_planned_like_any_other_cost():
    offers = {
        "0": (
            Candidate("0", (Step("keep", "0"),), Cost(1, 80, 1, 2.0), 0.0),
            Candidate("0", pair("0", 2), Cost(1, 800, 1, 1.0), 1.0),
            Candidate("0", pair("0", 1), Cost(1, 80, 1, 0.5), 4.0),
        ),
        "2": (Candidate("2", (Step("keep", "2"),), Cost(1, 80, 1), 0.0),),
    }
    costs = {"original": Cost(2, 1600, 2, 4.0), "fixed": Cost(0, 0, 0, 2.0)}

    def error(**limits: object) -> float:
        budget = Budget(**limits)  # type: ignore[arg-type]
        return plan(NETWORK, SITES, Stats(samples=9), offers, budget, **costs).error

    assert error(latency="100%") == 0
    assert error(latency="0.75x") == error(latency=3.0) == 1
    assert error(latency="0.75x", size="20%") == 4
    with pytest.raises(InfeasibleError, match=r"latency=2500\.000") as caught:
        error(latency="0.5x")
    nearest = caught.value.nearest["seconds"]
    assert nearest == pytest.approx(2.5) and error(latency=nearest) == 4
    with pytest.raises(BudgetError, match="latency budgets need measured candidates"):
        plan(NETWORK, SITES, Stats(samples=9), offers, Budget(latency="0.5x"))
