"""Curves and prices: against the whole network's curve, brute force, and methods asked alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.checks import case_of

from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Candidate, Step, get_method, weights_of
from lamina.plan import Budget, Decision, Plan, propose
from lamina.plan.allocate import curve
from lamina.plan.chains import propose_site
from lamina.plan.curves import (
    POINTS,
    Point,
    chain_of,
    curves,
    key_of,
    limits_of,
    method_offers,
    priced,
    prices,
    report_curves,
    sparse,
    timed_alike,
)

WHOLE = Cost(params=1000, bits=80_000, macs=1000, seconds=1.0)


def offer(site: str, i: int, size: float, error: float, macs: float = 1.0) -> Candidate:
    cost = Cost(params=1, bits=8 * size, macs=macs)
    return Candidate(site, (Step("rdoq", site, {"step": float(i)}),), cost, error)


def plan_of(taken: dict[str, Candidate], budget: dict[str, object], objective: str = "sum") -> Plan:
    spent = Cost(params=10, bits=800, macs=5)  # 100 bytes outside the sites
    for c in taken.values():
        spent = spent + c.cost
    sites = {n: Decision(c.steps, c.cost, c.error) for n, c in taken.items()}
    error = sum(c.error for c in taken.values())
    return Plan("x", sites, budget, objective, WHOLE, spent, 800.0, error)


STEPS = st.lists(
    st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=6
)  # growth of size and fall of error
SITES = st.lists(STEPS, min_size=1, max_size=3)


def line_of(name: str, steps: list[tuple[int, int]]) -> tuple[Candidate, ...]:
    sizes = np.cumsum([s for s, _ in steps])
    errors = np.cumsum([e for _, e in steps])[::-1]
    return tuple(
        offer(name, i, float(s), float(e))
        for i, (s, e) in enumerate(zip(sizes, errors, strict=True))
    )


@given(SITES, st.floats(0, 1))
def test_the_price_is_the_slope_of_the_whole_curve(sites, where):
    """Independent of the allocator: the segment of the network's curve that holds the limit."""
    found = {f"s{i}": line_of(f"s{i}", steps) for i, steps in enumerate(sites)}
    sizes, errors = curve(
        [[c.error for c in line] for line in found.values()],
        [[c.cost.bits / 8 for c in line] for line in found.values()],
    )
    limit = sizes[0] + where * (sizes[-1] - sizes[0]) * 1.2 + 0.25  # never on a corner
    smallest = {n: line[0] for n, line in found.items()}
    price = prices(found, plan_of(smallest, {"size": float(limit + 100)}))
    at = int(np.searchsorted(sizes, limit, side="right")) - 1
    slope = 0.0
    if at + 1 < len(sizes):
        slope = (errors[at] - errors[at + 1]) / (sizes[at + 1] - sizes[at])
    assert price == {"bytes": pytest.approx(slope, rel=1e-6)}


def test_a_limit_with_room_has_no_price():
    line = (offer("s", 0, 10, 5.0, macs=20), offer("s", 1, 30, 1.0, macs=20))
    made = plan_of({"s": line[0]}, {"size": 120.0, "macs": 500.0})
    found = prices({"s": line}, made)
    assert found["macs"] == 0 and found["bytes"] == pytest.approx(4 / 20)
    assert limits_of(made, ["s"]) == {"bytes": 20.0, "macs": 495.0}


def test_limits_are_at_least_what_is_spent():
    """A search for a drop goes over the size; pressure in training starts beyond the limit."""
    line = (offer("s", 0, 10, 5.0), offer("s", 1, 30, 1.0))
    assert limits_of(plan_of({"s": line[1]}, {"max_drop": 0.5}), ["s"]) == {"bytes": 30.0}
    searched = plan_of({"s": line[0]}, {"max_drop": 0.5, "size": "100%"})
    assert limits_of(searched, ["s"]) == {"bytes": 10.0}
    assert limits_of(plan_of({"s": line[1]}, {"size": 105.0}), ["s"]) == {"bytes": 30.0}
    untimed = replace(
        plan_of({"s": line[0]}, {"latency": "50%"}), original=replace(WHOLE, seconds=0)
    )
    assert limits_of(untimed, ["s"]) == {"seconds": 0.0}


def test_without_a_sum_there_are_no_prices():
    line = (offer("s", 0, 10, 5.0), offer("s", 1, 30, 1.0))
    assert prices({"s": line}, plan_of({"s": line[0]}, {"size": 120.0}, "minimax")) == {"bytes": 0}
    assert prices({}, plan_of({"s": line[0]}, {"size": 120.0})) == {"bytes": 0}
    assert priced(Cost(bits=80, macs=3), {"bytes": 0.0}) == 10
    assert priced(Cost(bits=80, macs=3), {"bytes": 2.0, "macs": 1.0}) == 23


def test_chains_are_named_by_what_shapes_and_what_ends_them():
    steps = [Step("alds", "a"), Step("magnitude", "a.0"), Step("rdoq", "a.0"), Step("keep", "a.1")]
    assert chain_of(steps) == "alds > magnitude > keep | rdoq"
    assert chain_of([Step("keep", "a")]) == "keep"


def test_the_taken_point_is_found_after_a_round_trip():
    settings = {"folds": (1, 2), "step": 0.1}
    steps = (Step("rdoq", "s", settings),)
    again = (Step("rdoq", "s", json.loads(json.dumps(settings))),)
    assert key_of(steps) == key_of(again) != key_of((Step("rdoq", "s", {"step": 0.1}),))
    line = [Candidate("s", steps, Cost(bits=8), 1.0), offer("s", 1, 2, 0.5)]
    assert [p.taken for p in curves(line, Decision(again, Cost(bits=8), 1.0))] == [False, True]
    edited = Decision((Step("keep", "s"),), Cost(bits=80), 0.0)
    first = curves(line, edited)[0]
    assert (first.chain, first.taken) == ("keep", True)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 10**6)), min_size=1, max_size=200),
    st.integers(3, 40),
    st.data(),
)
def test_few_points_keep_every_chain_and_the_taken_one(rows, most, data):
    taken = data.draw(st.integers(0, len(rows) - 1))
    points = [
        Point(chain, "", Cost(bits=bits), 0.0, taken=i == taken)
        for i, (chain, bits) in enumerate(rows)
    ]
    kept = sparse(points, most)
    assert len(kept) <= max(most, len({p.chain for p in points}))
    assert {p.chain for p in kept} == {p.chain for p in points}
    assert sum(p.taken for p in kept) == 1
    assert len(kept) == len(points) or len(kept) >= most // 4
    if len(points) <= 3:
        assert len(kept) == len(points)


def test_a_reports_curves_are_few_and_json():
    line = tuple(offer("s", i, 1.2**i, 1.3**-i) for i in range(90))
    found = report_curves({"s": line, "gone": line}, plan_of({"s": line[7]}, {"size": 500.0}))
    assert list(found) == ["s"] and len(found["s"]) == POINTS
    (taken,) = [p for p in found["s"] if p["taken"]]
    assert taken["bits"] == line[7].cost.bits and taken["chain"] == "rdoq"
    json.dumps(found, allow_nan=False)
    assert report_curves({}, plan_of({"s": line[7]}, {"size": 500.0})) == {}


@pytest.fixture(scope="module")
def mlp():
    case = case_of("mlp")
    site = case.sites["fc2"]
    return site, weights_of(case.network, site), case.stats.of("fc2")


def test_methods_that_are_beaten_are_there(mlp):
    asked = [get_method(n) for n in ("keep", "kmeans", "rdoq", "magnitude")]
    offers = method_offers(*mlp, asked)
    chains = {chain_of(c.steps) for c in offers}
    assert chains == {
        "keep", "kmeans", "rdoq", "magnitude > keep", "magnitude > kmeans", "magnitude > rdoq",
    }  # fmt: skip
    survived = {chain_of(c.steps) for c in propose_site(*mlp, asked)}
    assert survived < chains, "the control: of the planner's offers some methods are missing"
    for name in ("kmeans", "rdoq"):
        alone = {key_of(c.steps) for c in get_method(name).propose(*mlp)}
        assert {key_of(c.steps) for c in offers if chain_of(c.steps) == name} <= alone
    assert len({key_of(c.steps) for c in offers}) == len(offers)


def test_no_curve_beats_itself(mlp):
    offers = method_offers(*mlp, [get_method(n) for n in ("keep", "kmeans", "magnitude")])
    for chain in {chain_of(c.steps) for c in offers}:
        line = [c for c in offers if chain_of(c.steps) == chain]
        for a in line:
            for b in line:
                no_more = b.error <= a.error and b.cost.bits <= a.cost.bits
                fewer = b.cost.macs <= a.cost.macs and b.cost.params <= a.cost.params
                assert a is b or not (no_more and fewer)


def test_time_is_that_of_the_structure():
    pair = (Step("alds", "s", {"rank": 3}), Step("rdoq", "s.0"), Step("rdoq", "s.1"))
    other = (Step("alds", "s", {"rank": 4}), Step("keep", "s.0"), Step("keep", "s.1"))
    timed = [
        Candidate("s", pair, Cost(bits=1, seconds=2.0), 0.0),
        Candidate("s", (Step("keep", "s"),), Cost(bits=9, seconds=5.0), 0.0),
    ]
    asked = [
        Candidate("s", (pair[0], Step("kmeans", "s.0"), Step("keep", "s.1")), Cost(bits=2), 0.0),
        Candidate("s", (Step("magnitude", "s"), Step("rdoq", "s")), Cost(bits=3), 0.0),
        Candidate("s", other, Cost(bits=4), 0.0),
    ]
    assert [c.cost.seconds for c in timed_alike(asked, timed)] == [2.0, 5.0, 0.0]
    assert [c.cost.seconds for c in timed_alike(asked, [])] == [0.0, 0.0, 0.0]


def test_candidates_of_a_real_network_have_a_price():
    case = case_of("mlp")
    found = propose(case.network, case.sites, Stats(), ["rdoq"])
    from lamina.plan import plan

    made = plan(case.network, case.sites, Stats(), found, Budget(size="60%"), objective="sum")
    assert prices(found, made)["bytes"] > 0
