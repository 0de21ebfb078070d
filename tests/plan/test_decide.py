"""Deciding: all limits at once, the nearest feasible budget, the size of the file."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.contract import checks
from tests.contract.checks import case_of
from torch import nn

from lamina.artifact import pack
from lamina.errors import BudgetError, InfeasibleError
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Candidate, Step
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan import Budget, Plan, apply, chains, plan, propose
from lamina.plan.costs import fixed_cost, original_cost

NETWORK = Network(nn.Linear(1, 1))
FIXED = Cost(params=10, bits=800, macs=5)  # 100 bytes


def offer(site, i, bits, error, macs=1.0, params=1.0):
    return Candidate(site, (Step("keep", site, {"i": i}),), Cost(params, bits, macs), error)


def decide(offers, budget, samples=100, fixed=FIXED):
    """Plan over invented candidates: {site: [(bits, error, macs, params)]}."""
    sites = Sites(tuple(Site(name) for name in offers))
    candidates = {
        name: tuple(offer(name, i, *row) for i, row in enumerate(rows))
        for name, rows in offers.items()
    }
    whole = Cost(params=1000, bits=80_000, macs=1000)
    return plan(
        NETWORK, sites, Stats(samples=samples), candidates, budget, original=whole, fixed=fixed
    )


def brute(offers, fits, measure=sum):
    """The least error over all choices that fit, by trying each."""
    best = math.inf
    for rows in itertools.product(*offers.values()):
        cost = [sum(r[i] for r in rows) for i in (0, 2, 3)]
        if fits(cost[0] / 8 + 100, cost[1] + 5, cost[2] + 10):
            best = min(best, measure([r[1] for r in rows]))
    return best


ROW = st.tuples(*[st.integers(1, 60).map(float)] * 4)
TABLES = st.dictionaries(
    st.sampled_from("abcd"), st.lists(ROW, min_size=1, max_size=4), min_size=1, max_size=3
)


@given(TABLES, st.integers(100, 125), st.integers(5, 130), st.integers(10, 130))
def test_it_keeps_to_all_limits_at_once_with_the_least_error(offers, size, macs, params):
    def fits(*cost):
        return cost[0] <= size and cost[1] <= macs and cost[2] <= params

    least = brute(offers, fits)
    budget = Budget(size=size, macs=macs, params=params)
    if least == math.inf:
        with pytest.raises(InfeasibleError):
            decide(offers, budget)
        return
    found = decide(offers, budget)
    assert fits(found.predicted.bits / 8, found.predicted.macs, found.predicted.params)
    assert found.error == pytest.approx(least, rel=0.02)
    assert found.error == pytest.approx(sum(d.error for d in found.sites.values()))
    whole = sum(d.cost.bits for d in found.sites.values()) + FIXED.bits
    assert found.predicted.bits == pytest.approx(whole)


@given(TABLES, st.integers(100, 125))
def test_without_data_the_largest_error_counts(offers, size):
    least = brute(offers, lambda b, m, p: b <= size, max)
    assume(least < math.inf)
    found = decide(offers, Budget(size=size), samples=0)
    assert found.objective == "minimax"
    assert found.error == least == max(d.error for d in found.sites.values())
    assert found.predicted.bits / 8 <= size


def test_sum_and_minimax_choose_differently():
    offers = {"a": [(80.0, 0.0), (40.0, 5.0), (8.0, 9.0)], "b": [(80.0, 0.0), (40.0, 5.0)]}
    fit = Budget(size=100 + 11)
    assert decide(offers, fit).error == 9.0
    assert decide(offers, fit, samples=0).error == 5.0


@given(TABLES, st.integers(1, 110), st.integers(1, 60), st.integers(1, 60))
def test_the_nearest_budget_really_is_feasible(offers, size, macs, params):
    try:
        decide(offers, Budget(size=size, macs=macs, params=params))
        return
    except InfeasibleError as error:
        nearest, text = error.nearest, str(error)
    assert set(nearest) == {"bytes", "macs", "params"}
    assert all(math.isfinite(v) and v > 0 for v in nearest.values())
    wanted = {"bytes": size, "macs": macs, "params": params}
    assert any(nearest[r] > wanted[r] for r in nearest), "it asks for nothing more"
    found = decide(
        offers, Budget(size=nearest["bytes"], macs=nearest["macs"], params=nearest["params"])
    )
    assert found.predicted.bits / 8 <= nearest["bytes"]
    assert f"size={nearest['bytes']:.0f}" in text and "\n" not in text


def test_a_budget_below_what_is_fixed_is_infeasible():
    offers = {"a": [(80.0, 0.0, 1.0, 1.0)]}
    with pytest.raises(InfeasibleError, match="nearest feasible budget is size=110") as caught:
        decide(offers, Budget(size=50))
    assert caught.value.nearest == {"bytes": 110}


def test_relative_budgets_refer_to_the_original():
    offers = {"a": [(72_000.0, 0.0, 900.0, 900.0), (7200.0, 1.0, 90.0, 90.0)]}
    assert decide(offers, Budget(size="95%")).error == 0
    assert decide(offers, Budget(size="20%")).error == 1
    assert decide(offers, Budget(size="95%", macs="50%")).error == 1


def test_other_limits_are_not_planned_in_silence():
    with pytest.raises(BudgetError, match="latency"):
        decide({"a": [(8.0, 0.0)]}, Budget(latency="0.5x"))


def test_max_drop_alone_takes_the_least_error():
    offers = {"a": [(80.0, 0.0), (8.0, 1.0)]}
    assert decide(offers, Budget(max_drop=1.0)).error == 0


def test_a_network_without_sites_has_a_plan():
    found = decide({}, Budget(size=200))
    assert (found.error, found.predicted) == (0, FIXED)
    with pytest.raises(InfeasibleError):
        decide({}, Budget(size=99))


def test_the_curve_is_the_networks_and_falls():
    offers = {"a": [(80.0, 0.0), (40.0, 1.0), (8.0, 4.0)], "b": [(80.0, 0.0), (8.0, 2.0)]}
    found = decide(offers, Budget(size=1000))
    sizes, errors = zip(*sorted(found.curve), strict=True)
    assert (sizes[0], errors[0]) == (102, 6)
    assert (sizes[-1], errors[-1]) == (120, 0)
    assert list(errors) == sorted(errors, reverse=True)


def test_the_document_survives():
    found = decide({"a": [(80.0, 0.0), (8.0, 1.0)]}, Budget(size=105))
    assert Plan.from_dict(found.dict()) == found


# --- the size of the real file --------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "residual", "lstm"])
def test_the_file_is_as_large_as_planned(model, monkeypatch):
    """Within 2 % and 64 bytes, with the real structure costs and the plan's summary inside."""
    monkeypatch.setattr(chains, "EXTENDED", (1, 1))
    case = case_of(model)
    original, fixed = original_cost(case.network, case.sites), fixed_cost(case.network, case.sites)
    offers = propose(case.network, case.sites, case.stats, ["rdoq", "kmeans", "alds"])
    for size in ("60%", "35%"):
        found = plan(
            case.network, case.sites, case.stats, offers, Budget(size=size),
            original=original, fixed=fixed,
        )  # fmt: skip
        edited = apply(case.network, found, case.sites, case.stats)
        summary = {n: " ".join(s.method for s in d.steps) for n, d in found.sites.items()}
        file = pack(edited.model, edited.edits, "module", summary)
        claim = found.predicted.bits / 8
        assert abs(len(file) - claim) <= 0.02 * len(file) + 64, f"{claim} bytes, really {len(file)}"
        assert claim <= float(size.rstrip("%")) / 100 * original.bits / 8


def test_a_smaller_budget_loses_more_in_truth():
    """Whole plans, measured: the order of budgets is the order of losses."""
    case = case_of("mlp")
    original, fixed = original_cost(case.network, case.sites), fixed_cost(case.network, case.sites)
    offers = propose(case.network, case.sites, case.stats, ["rdoq"])
    measured, predicted = [], []
    for size in ("60%", "35%", "25%", "20%"):
        found = plan(
            case.network, case.sites, case.stats, offers, Budget(size=size),
            original=original, fixed=fixed,
        )  # fmt: skip
        edited = apply(case.network, found, case.sites, case.stats)
        measured.append(checks.loss_increase(case, edited.model, case.entry.inputs(192)))
        predicted.append(found.error)
    assert measured == sorted(measured) and predicted == sorted(predicted)
    assert torch.isfinite(torch.tensor(measured)).all() and measured[0] < 0.1 * measured[-1]
