"""Every method that spans layers, held to the nine points of the contract."""

from __future__ import annotations

import pytest
from tests.contract import checks, spans
from tests.contract.spans import NETWORKS, case_of, parts_at, served

from lamina.artifact import records
from lamina.errors import MethodError
from lamina.methods.base import Choice, Spanning, Stage, get_method, spanning
from lamina.plan import Plan, apply, chains
from lamina.plan.plan import Decision
from lamina.plan.spans import span_line

NAMES = sorted(spanning())
EVERYWHERE = [pytest.param(m, z, id=f"{m}-{z}") for z in NETWORKS for m in NAMES]
LATER = ("alds", "magnitude", "rdoq")


@pytest.mark.parametrize("method", NAMES)
def test_it_follows_the_protocol(method):
    assert isinstance(spanning()[method], Spanning) and not spanning()[method].final


@pytest.mark.parametrize("method", NAMES)
def test_it_serves_some_network(method):
    """A method that offers nothing anywhere would pass all the rest."""
    assert any(served(spanning()[method], case_of(name)) for name in NETWORKS)


@pytest.mark.parametrize(("method", "model"), EVERYWHERE)
def test_1_propose_is_pure_and_deterministic(method, model):
    spans.check_pure(spanning()[method], case_of(model))


@pytest.mark.parametrize(("method", "model"), EVERYWHERE)
def test_2_predicted_cost_is_the_measured_one(method, model):
    spans.check_cost(spanning()[method], case_of(model))


@pytest.mark.parametrize(("method", "model"), EVERYWHERE)
def test_3_nothing_costs_more_for_no_less_error(method, model):
    spans.check_curve(spanning()[method], case_of(model))


@pytest.mark.parametrize("method", NAMES)
def test_4_predicted_and_measured_loss_rank_alike(method):
    pairs = [
        p for m in NETWORKS for p in spans.predicted_and_measured(spanning()[method], case_of(m))
    ]
    checks.check_ranks(pairs, 0.7)


@pytest.mark.parametrize(("method", "model"), EVERYWHERE)
def test_5_apply_touches_only_members_and_what_lies_between(method, model):
    spans.check_touch(spanning()[method], case_of(model))


@pytest.mark.parametrize(("method", "model"), EVERYWHERE)
def test_6_save_and_load_are_bit_exact(method, model):
    case = case_of(model)
    network, edits = spans.everywhere(spanning()[method], case)
    spans.check_file(case, network, edits)


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize(("method", "model"), EVERYWHERE)
def test_7_it_composes_with_every_later_stage(method, model, later, monkeypatch):
    """Proposed, decided, written, read, applied, saved and loaded as one chain."""
    monkeypatch.setattr(chains, "EXTENDED", (2, 1))
    first, second, case = spanning()[method], get_method(later), case_of(model)
    if not second.final and second.stage <= first.stage:
        return
    for site, _ in served(first, case)[:1]:
        methods = [get_method("keep"), second]
        line = span_line(case.network, site, first, parts_at(case, site), methods)
        chained = [c for c in line if {method, later} <= {s.method for s in c.steps}]
        if not chained:
            leaves = first.leave(site, parts_at(case, site), line[0].steps[0].settings)
            assert all(second.refuse(leaf.site) for leaf in leaves), "nothing follows it"
            return
        offer = chained[len(chained) // 2]
        decided = Plan(case.digest, {site.name: Decision(offer.steps, offer.cost, offer.error)})
        decided = Plan.from_dict(decided.dict())
        edited = apply(case.network, decided, case.sites, case.stats)
        assert case.network.digest() == case.digest
        spans.check_file(case, edited.network, edited.edits)
        size = sum(len(records.encode(e.values)) for e in edited.edits if e.values is not None)
        shaped = sum(e.form != "values" for e in edited.edits)
        around = sum(  # norms that the offer's cost no longer has
            t.numel() * t.element_size()
            for e in edited.edits
            if e.form == "identity" and e.path not in site.members
            for t in case.network.module.get_submodule(e.path).state_dict().values()
        )
        claim = offer.cost.bits / 8 + around
        slack = 0.02 * (size + around) + 64 + 96 * shaped
        assert abs(size - claim) <= slack, f"{offer.steps}: {claim} bytes, really {size}"


@pytest.mark.parametrize(("method", "model"), EVERYWHERE)
def test_8_it_refuses_with_the_site_and_the_reason(method, model):
    spans.check_refusals(spanning()[method], case_of(model))


@pytest.mark.parametrize("method", NAMES)
def test_8_unknown_settings_are_refused(method):
    first = spanning()[method]
    case, (site, _) = next(
        (case_of(name), row) for name in NETWORKS for row in served(first, case_of(name))[:1]
    )
    for settings in ({}, {"fit": "x"}, {"groups": "x"}, {"inputs": -1, "fit": "slope"}):
        with pytest.raises(MethodError) as caught:
            first.apply(case.fresh(), Choice(site, settings), parts_at(case, site))
        assert method in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("method", NAMES)
def test_9_the_card_is_complete(method):
    checks.check_card(spanning()[method])
    assert spanning()[method].stage in (Stage.SHAPE, Stage.FACTOR, Stage.SHARE)
    assert set(spanning()[method].kinds) <= {"chain", "family"}
