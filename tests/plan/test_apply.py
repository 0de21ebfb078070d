"""Applying: a copy is edited as the plan says; what does not fit is refused before it is begun."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tests.contract.checks import bits, case_of, state_of
from tests.network.tiny import Uncopyable

from lamina.artifact import pack, restore, unpack
from lamina.errors import NetworkError, PlanError
from lamina.forms import Edit, Plain
from lamina.measure.stats import Cost
from lamina.methods.base import Step, get_method, weights_of
from lamina.network.source import Network
from lamina.plan import Decision, Plan, apply
from lamina.plan.apply import settle


@pytest.fixture(scope="module")
def case():
    return case_of("mlp")


def decide(case, **steps):
    """A plan of steps (method, settings, at) by site."""
    sites = {
        name: Decision(tuple(Step(m, name + at, s) for m, at, s in chain), Cost(), 0.0)
        for name, chain in steps.items()
    }
    return Plan(case.digest, sites)


CHAIN = [
    ("alds", "", {"folds": 1, "rank": 5}),
    ("rdoq", ".0", {"step": 0.05, "rate": 0.0}),
    ("kmeans", ".1", {"k": 8}),
]


def carry(case, plan):
    return apply(case.network, plan, case.sites, case.stats)


def test_an_edited_copy_comes_back_and_the_original_stays(case):
    edited = carry(case, decide(case, fc1=CHAIN, fc3=[("rdoq", "", {"step": 0.1})]))
    assert case.network.digest() == case.digest
    assert edited.model is edited.network.module is not case.network.module
    assert [type(m).__name__ for m in edited.model.fc1] == ["Linear", "Linear"]
    assert edited.model.fc1[0].weight.shape == (5, 24)
    assert len(edited.model.fc1[1].weight.unique()) <= 8
    assert torch.equal(edited.model.fc2.weight, case.network.module.fc2.weight)
    symbols = edited.model.fc3.weight / 0.1
    assert torch.allclose(symbols, symbols.round(), atol=1e-4)


def test_in_place_edits_the_module_itself(case):
    network = case.entry.network()
    edited = apply(
        network, decide(case, fc3=[("kmeans", "", {"k": 2})]), case.sites, case.stats, inplace=True
    )
    assert edited.network is network
    assert len(network.module.fc3.weight.unique()) <= 2


def test_structure_comes_first_and_each_tensor_once(case):
    chain = [("magnitude", "", {"keep": 0.3}), ("rdoq", "", {"step": 0.05})]
    edits = carry(case, decide(case, fc1=CHAIN, fc2=chain)).edits
    paths = [e.path for e in edits if e.form == "values"]
    assert len(paths) == len(set(paths)) == 5
    assert [e.path for e in edits if e.form != "values"] == ["fc1"]
    assert edits[0].form == "low_rank"


def test_settle_keeps_the_last_values():
    a, b = (Edit("x", "values", values=Plain(torch.full((1,), v))) for v in (1.0, 2.0))
    shape = Edit("y", "low_rank", {"rank": 1})
    assert settle([shape, a, b]) == [shape, b]


def test_floats_are_the_values_before_rounding(case):
    edited = carry(case, decide(case, fc1=CHAIN, fc2=[("rdoq", "", {"step": 0.1})]))
    site, stats = case.sites["fc1"], case.stats.of("fc1")
    leaves = get_method("alds").leave(
        site, weights_of(case.network, site), stats, {"folds": 1, "rank": 5}
    )
    for leaf in leaves:
        assert bits(edited.floats[leaf.site.weight]) == bits(leaf.weights["weight"])
    assert bits(edited.floats["fc2.weight"]) == bits(case.network.module.fc2.weight)
    assert bits(edited.floats["fc2.bias"]) == bits(case.network.module.fc2.bias)


def test_leaves_nobody_speaks_of_are_kept(case):
    edited = carry(case, decide(case, fc1=CHAIN[:1]))
    site = case.sites["fc1"]
    leaves = get_method("alds").leave(
        site, weights_of(case.network, site), case.stats.of("fc1"), {"folds": 1, "rank": 5}
    )
    assert torch.equal(edited.model.fc1[0].weight, leaves[0].weights["weight"])
    assert torch.equal(edited.model.fc1[1].weight, leaves[1].weights["weight"])


def test_a_plan_edited_by_hand_is_carried_out(case, tmp_path):
    path = tmp_path / "plan.json"
    decide(case, fc1=CHAIN).save(path)
    document = json.loads(path.read_text())
    document["sites"]["fc1"]["steps"][0]["settings"]["rank"] = 3
    path.write_text(json.dumps(document))
    edited = carry(case, Plan.load(path))
    assert edited.model.fc1[0].weight.shape == (3, 24)


def test_the_same_plan_gives_the_same_bits_and_loads_back(case):
    plan = decide(case, fc1=CHAIN, fc2=[("rdoq", "", {"step": 0.05})])
    first, second = carry(case, plan), carry(case, plan)
    assert state_of(first.model) == state_of(second.model)
    loaded = restore(unpack(pack(first.model, first.edits, "module", {})), case.entry.build())
    assert state_of(loaded) == state_of(first.model)


def test_it_tells_how_far_it_is(case):
    told = []
    plan = decide(case, fc1=[("keep", "", {})], fc2=[("keep", "", {})])
    apply(case.network, plan, case.sites, case.stats, progress=lambda *a: told.append(a))
    assert told == [(0, 2, "fc1"), (1, 2, "fc2"), (2, 2, "")]


# --- what does not fit ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"fc9": [("keep", "", {})]}, "fc9.*fc1"),
        ({"fc1": []}, "no step says what to do at fc1"),
        ({"fc1": [("keep", ".0", {})]}, "no step says what to do at fc1"),
        ({"fc1": [("keep", "", {}), ("rdoq", "", {"step": 0.1})]}, "keep is the end.*rdoq"),
        ({"fc1": [("kmeans", "", {"k": 2}), ("keep", ".0", {})]}, "kmeans is the end"),
        ({"fc1": [*CHAIN[:2], ("keep", ".7", {})]}, r"fc1\.7"),
        ({"fc1": [("rdoq", "", {"step": 0.1}), ("alds", "", {"rank": 2})]}, "rdoq is the end"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(case, steps, words):
    with pytest.raises(PlanError, match=words) as caught:
        carry(case, decide(case, **steps))
    assert "\n" not in str(caught.value)
    assert case.network.digest() == case.digest


def test_a_method_that_cannot_serve_is_named(case):
    gpt = case_of("gpt")
    plan = Plan(gpt.digest, {"wpe": Decision((Step("alds", "wpe", {"rank": 2}),), Cost(), 0.0)})
    with pytest.raises(PlanError, match=r"alds cannot serve the site at wpe: .*embedding"):
        carry(gpt, plan)


def test_stages_out_of_order_are_refused(case):
    steps = [("magnitude", "", {"keep": 0.5}), ("alds", "", {"rank": 2})]
    with pytest.raises(PlanError, match=r"alds cannot follow magnitude at fc1: stage FACTOR"):
        carry(case, decide(case, fc1=steps))


def test_a_plan_for_another_network_is_refused(case):
    plan = replace(decide(case, fc1=[("keep", "", {})]), network="0" * 16)
    with pytest.raises(PlanError, match="another network"):
        carry(case, plan)
    other = case.entry.network()
    with torch.no_grad():
        other.module.fc1.bias[0] += 1
    with pytest.raises(PlanError, match="another network"):
        apply(other, decide(case), case.sites, case.stats)


def test_a_network_that_cannot_be_copied_is_refused_unless_in_place():
    from lamina.measure.stats import Stats
    from lamina.network.discover import discover

    network = Network(Uncopyable(), (torch.zeros(1, 3),))
    sites = discover(network)
    plan = Plan(network.digest(), {"fc": Decision((Step("keep", "fc"),), Cost(), 0.0)})
    with pytest.raises(NetworkError, match=r"cannot be copied.*inplace"):
        apply(network, plan, sites, Stats())
    assert apply(network, plan, sites, Stats(), inplace=True).network is network
