"""Explaining: every method's curve, the point taken, the price, and a reason that is true."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from tests.contract.checks import case_of

from lamina.errors import PlanError, SiteError
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Step
from lamina.plan import Budget, Decision, plan, propose
from lamina.plan.curves import Point, priced, prices
from lamina.plan.explain import explain, layer_of, reason, silent, summarise

METHODS = ("kmeans", "rdoq", "alds")


@pytest.fixture(scope="module")
def run():
    """A network, its candidates, and a plan for two thirds of its bytes."""
    case = case_of("mlp")
    found = propose(case.network, case.sites, case.stats, METHODS)
    made = plan(case.network, case.sites, case.stats, found, Budget(size="30%"))
    return case, found, made


@pytest.fixture(scope="module")
def why(run):
    case, found, made = run
    return explain(case.network, case.sites, case.stats, found, made, "fc2", METHODS)


def test_one_point_is_taken_and_it_is_the_plans(run, why):
    decision = run[2].sites["fc2"]
    (taken,) = [p for p in why.points if p.taken]
    assert taken is why.taken
    assert (taken.cost, taken.error, taken.steps) == (
        decision.cost, decision.error, decision.describe(),
    )  # fmt: skip


def test_offered_and_beaten_points_are_told_apart(run, why):
    found = run[1]
    offered = [p for p in why.points if p.offered]
    assert len(offered) == len(found["fc2"])
    beaten = [p for p in why.points if not p.offered]
    assert {p.chain for p in beaten} >= {"kmeans"}
    for p in beaten:  # nothing was hidden from the planner that it could have used
        assert any(
            o.error <= p.error and o.cost.bits <= p.cost.bits and o.cost.macs <= p.cost.macs
            and o.cost.params <= p.cost.params
            for o in offered
        ) or p.chain.startswith("alds")  # fmt: skip


def test_the_reason_is_true(run, why):
    assert why.price["bytes"] > 0
    worth = [p.error + priced(p.cost, why.price) for p in why.points if p.offered]
    here = why.taken.error + priced(why.taken.cost, why.price)
    least = here <= min(worth) * (1 + 1e-9)
    assert ("least error and price together" in why.why) == least
    assert "For the same error other chains take, in bytes: " in why.why


def test_neighbours_are_around_the_point(why):
    assert why.cheaper is not None and why.dearer is not None
    assert why.cheaper.cost.bits < why.taken.cost.bits < why.dearer.cost.bits
    assert why.cheaper.error > why.taken.error > why.dearer.error
    slope = (why.cheaper.error - why.dearer.error) / (why.dearer.bytes - why.cheaper.bytes)
    assert why.price["bytes"] / 30 < slope < 30 * why.price["bytes"]


def test_an_edited_plan_is_told_what_was_better(run):
    case, found, made = run
    worst = max(found["fc2"], key=lambda c: c.cost.bits)
    sites = dict(made.sites) | {"fc2": Decision(worst.steps, worst.cost, worst.error)}
    said = explain(
        case.network, case.sites, case.stats, found, replace(made, sites=sites), "fc2", ["rdoq"]
    )
    assert said.taken.cost == worst.cost
    assert "another point would be" in said.why and said.dearer is None
    foreign = Decision((Step("magnitude", "fc2", {"keep": 0.123}), Step("keep", "fc2")),
                       Cost(bits=8e3), 1.0)  # fmt: skip
    sites["fc2"] = foreign
    said = explain(
        case.network, case.sites, case.stats, found, replace(made, sites=sites), "fc2", ["rdoq"]
    )
    assert said.taken.chain == "magnitude > keep" and said.taken.error == 1.0


def test_text_and_json_say_all_of_it(why):
    text = why.text()
    assert text.startswith("fc2: linear 24 x 32\ntakes ")
    assert text.count("\n*") == 1 and f"Price at this budget: {why.price['bytes']:.3g}" in text
    for chain in {p.chain for p in why.points}:
        assert f"{chain} " in text or f"{chain}\n" in text
    assert all(line == line.rstrip() for line in text.splitlines())
    again = json.loads(json.dumps(why.dict(), allow_nan=False))
    assert len(again["points"]) == len(why.points) and again["taken"]["taken"] is True


def test_refusals_have_their_reasons(run):
    case = run[0]
    grouped = case_of("grouped")
    site = grouped.sites["depthwise"]
    from lamina.plan.chains import choose_methods

    said = dict(silent(site, choose_methods(None), [], None))
    assert set(said) >= {"alds", "keep"}
    assert said["keep"] == "it has no offer for it"
    for name, words in said.items():
        method = next(m for m in choose_methods(None) if m.name == name)
        assert words == (method.refuse(site) or words)
    heard = [Point("alds > keep | rdoq", "", Cost(), 0.0)]
    assert not {"keep", "rdoq", "alds"} & set(dict(silent(case.sites["fc1"], choose_methods(None),
                                                          heard, None)))  # fmt: skip


def test_an_unknown_layer_is_refused_with_the_nearest(run):
    case, found, made = run
    with pytest.raises(SiteError, match=r"the layers are fc1, fc2, fc3; did you mean 'fc\d'"):
        explain(case.network, case.sites, case.stats, found, made, "fc9")
    with pytest.raises(SiteError, match="give one of them, or all"):
        layer_of(case.sites, "Zyx")
    short = replace(made, sites={n: d for n, d in made.sites.items() if n != "fc1"})
    with pytest.raises(PlanError, match="says nothing of this layer at fc1"):
        explain(case.network, case.sites, case.stats, found, short, "fc1")


def test_all_layers_in_a_line_each(run):
    _, found, made = run
    lines = summarise(found, made).splitlines()
    assert lines[0].split()[:4] == ["layer", "takes", "bytes", "error"]
    assert [line.split()[0] for line in lines[1:4]] == ["fc1", "fc2", "fc3"]
    price = prices(found, made)["bytes"]
    assert lines[4] == f"price at this budget, nats: {price:.3g} per byte"
    assert "no other chain is offered" in summarise({}, made)


def test_data_free_the_rule_is_the_largest_error():
    case = case_of("mlp")
    found = propose(case.network, case.sites, Stats(), ["rdoq"])
    made = plan(case.network, case.sites, Stats(), found, Budget(size="30%"))
    said = explain(case.network, case.sites, Stats(), found, made, "fc1", ["rdoq"])
    assert said.objective == "minimax" and said.price == {"bytes": 0}
    assert f"The largest relative error in the plan is {made.error:.3g}" in said.why
    assert said.taken.error <= made.error


def test_what_was_not_timed_does_not_count_as_fast(run):
    made = run[2]
    taken = Point("rdoq", "", Cost(bits=800, seconds=1e-3), 1.0, taken=True)
    untimed = Point("alds > rdoq", "", Cost(bits=800), 0.5)
    timed = Point("tucker > rdoq", "", Cost(bits=800, seconds=5e-4), 0.5)
    price = {"seconds": 1.0}
    said = reason(taken, [taken, untimed, timed], price, made)
    assert "tucker > rdoq 0.50x" in said and "alds" not in said


def test_nothing_scarce_is_said(run):
    taken = Point("keep", "", Cost(bits=800), 0.0, taken=True)
    said = reason(taken, [taken], {"bytes": 0.0}, run[2])
    assert said == "Nothing the budget limits is scarce, so it is a point of least error."
    said = reason(taken, [taken, Point("rdoq", "", Cost(bits=8), 1.0)], {"bytes": 0.0}, run[2])
    assert said.endswith("No other chain reaches this error.")
