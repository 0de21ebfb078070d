"""Spans of layers in a plan: found, offered, chosen where they are worth it, carried out."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.plan.toy import Glue
from torch import nn

from lamina.artifact import pack, restore, unpack
from lamina.errors import InfeasibleError, PlanError
from lamina.measure.calibrate import calibrate
from lamina.measure.cost import measured_macs, measured_params
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Candidate, Step, find_method, get_method, spanning
from lamina.network.discover import discover
from lamina.network.sites import Site, Sites, cut
from lamina.network.source import Network
from lamina.plan import Budget, Decision, Plan, apply, plan, propose
from lamina.plan.costs import fixed_cost, original_cost
from lamina.plan.decide import choose
from lamina.plan.explain import explain, summarise
from lamina.plan.spans import (
    claims_of,
    find_spans,
    parts_of,
    propose_spans,
    span_line,
    span_refusals,
    spans_in,
)


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 12),
        nn.Softplus(), nn.Linear(12, 4),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(build(), (torch.zeros(2, 6),))


@pytest.fixture(scope="module")
def sites(network: Network) -> Sites:
    return discover(network)


@pytest.fixture(scope="module")
def stats(network: Network, sites: Sites) -> Stats:
    return calibrate(network, sites, [torch.randn(64, 6)], samples=64)


# --- what methods see -----------------------------------------------------------------------------


def test_spans_are_what_methods_find_and_do_not_refuse(sites: Sites, glue: Glue):
    assert spanning() == {"glue": glue} and find_method("glue") is glue
    assert [span.site.name for span in find_spans(sites)] == ["0..2", "2..4"]
    refused = ("4..6", "glue", "nobody glues over a softplus")
    assert span_refusals(sites) == [refused]
    other = replace(glue, name="other")
    both = find_spans(sites, [glue, other])
    assert [[m.name for m in span.methods] for span in both] == [["glue", "other"]] * 2
    families = replace(glue, kinds=("family",))
    assert find_spans(sites, [families]) == ()


def test_a_spanning_method_is_no_method_of_layers(glue: Glue):
    from lamina.errors import MethodError

    with pytest.raises(MethodError, match="it spans several"):
        get_method("glue")


def test_parts_hold_members_passages_and_what_they_have_in_common(network, sites, stats):
    parts = parts_of(network, sites, stats, cut(sites.chains[0], 0, 2))
    assert [leaf.site.name for leaf in parts.members] == ["0", "2", "4"]
    for leaf in parts.members:
        layer = network.module.get_submodule(leaf.site.name)
        assert torch.equal(leaf.weights["weight"], layer.weight)
        assert leaf.stats is stats.of(leaf.site.name)
    assert [[(p.op, p.module) for p in between] for between in parts.passages] == [
        [("relu", "1")],
        [("tanh", "3")],
    ]
    assert parts.cross == (stats.cross["0->2"], stats.cross["2->4"])
    assert parts_of(network, sites, Stats(), sites.chains[0]).cross == (None, None, None)


def test_passages_fold_norms_and_know_slopes():
    norm = nn.BatchNorm1d(4)
    for name in ("running_mean", "weight", "bias"):
        nn.init.uniform_(getattr(norm, name), -1, 1)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    plain = nn.BatchNorm1d(4, affine=False)
    nn.init.uniform_(plain.running_mean, -1, 1)
    blind = nn.BatchNorm1d(4, track_running_stats=False)
    layers = [nn.Linear(3, 4), norm, nn.PReLU(4), nn.LeakyReLU(0.3), plain, blind, nn.Linear(4, 2)]
    net = nn.Sequential(*layers).eval()
    network = Network(net, (torch.randn(5, 3),))
    sites = discover(network)
    (passages,) = parts_of(network, sites, Stats(), sites.chains[0]).passages
    ops = [p.op for p in passages]
    assert ops == ["batch_norm", "prelu", "leaky_relu", "batch_norm", "batch_norm"]
    x = torch.randn(7, 4, dtype=torch.float64)
    for passage, layer in ((passages[0], norm), (passages[3], plain)):
        t = passage.tensors
        wanted = layer.double()(x)
        layer.float()
        torch.testing.assert_close(t["scale"] * x + t["shift"], wanted)
    assert torch.equal(passages[1].tensors["slope"], net[2].weight.detach().double())
    assert passages[2].tensors["slope"].tolist() == pytest.approx([0.3])
    assert passages[4].tensors == {}  # its moments are those of the batch


# --- what is offered ------------------------------------------------------------------------------


def test_offers_of_spans_are_ended_by_later_stages(network, sites, stats, glue):
    found = propose(network, sites, stats, ["glue", "alds", "kmeans"])
    assert list(found) == ["0", "2", "4", "6", "0..2", "2..4"]
    chains = {tuple(s.method for s in c.steps) for c in found["0..2"]}
    assert ("glue", "keep") in chains and ("glue", "kmeans") in chains
    span, methods = find_spans(sites)[0].site, [get_method(m) for m in ("keep", "alds")]
    every = span_line(network, span, glue, parts_of(network, sites, stats, span), methods)
    assert any({"glue", "alds", "keep"} == {s.method for s in c.steps} for c in every)
    for c in (*found["0..2"], *every):
        assert c.steps[0] == Step("glue", "0..2", {"inputs": 6})
        assert c.site == "0..2" and c.error >= glue.error
        assert all(s.at in ("0..2", "2") or s.at.startswith("2.") for s in c.steps)
    alone = propose(network, sites, stats, ["kmeans"])
    assert list(alone) == ["0", "2", "4", "6"], "a method that was not asked"


def test_what_is_kept_costs_what_the_offer_says_and_its_edits_take(network, sites, stats, glue):
    spans = find_spans(sites)
    (only,) = propose_spans(network, sites, stats, [get_method("keep")], spans[:1])["0..2"]
    offer = next(iter(glue.propose(spans[0].site, parts_of(network, sites, stats, spans[0].site))))
    assert only.cost.params == offer.cost.params == 6 * 8 + 8
    assert only.cost.macs == offer.cost.macs and only.error == offer.error
    edits = glue.structure(spans[0].site, offer.steps[0].settings)
    names = sum(8 * len(json.dumps([e.path, e.form, dict(e.settings)])) for e in edits)
    assert only.cost.bits == offer.cost.bits + names


def test_norms_that_go_are_no_longer_paid_for(glue):
    net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4)).eval()
    network = Network(net, (torch.zeros(2, 6),))
    sites = discover(network)
    found = propose(network, sites, Stats(), ["glue"])
    kept = next(c for c in found["0..3"] if c.steps[-1].method == "keep")
    assert kept.cost.params == 6 * 4 + 4 - 24
    whole = sum(p.numel() for p in net.parameters())
    fixed = fixed_cost(network, sites)
    chosen = Plan(network.digest(), {"0..3": Decision(kept.steps, kept.cost, kept.error)})
    edited = apply(network, chosen, sites, Stats())
    assert measured_params(edited.model) == fixed.params + kept.cost.params == 28 < whole


# --- what is chosen -------------------------------------------------------------------------------


@st.composite
def instances(draw):
    """Layers and spans with invented offers: errors, costs and claims."""
    layers = draw(st.integers(2, 4))
    some = st.sets(st.integers(0, layers - 1), min_size=1)
    claims = [{i} for i in range(layers)] + draw(st.lists(some, max_size=4))
    number = st.integers(0, 30).map(float)
    rows = [draw(st.lists(st.tuples(number, number, number), min_size=1, max_size=3))
            for _ in claims]  # fmt: skip
    errors = [np.array([r[0] for r in group]) for group in rows]
    costs = [np.array([r[1:] for r in group]) for group in rows]
    limits = np.array([draw(st.integers(0, 60)), draw(st.integers(0, 60))], dtype=float)
    return errors, costs, limits, claims, layers


def brute(errors, costs, limits, claims, layers, measure) -> float:
    """The least error over all exact covers and all options, by trying each."""
    best = math.inf
    for picked in itertools.product(*[range(-1, len(e)) for e in errors]):
        used = [i for i, k in enumerate(picked) if k >= 0]
        if sorted(layer for i in used for layer in claims[i]) != list(range(layers)):
            continue
        if (sum(costs[i][picked[i]] for i in used) <= limits).all():
            best = min(best, measure(errors[i][picked[i]] for i in used))
    return best


@pytest.mark.parametrize(("objective", "measure"), [("sum", sum), ("minimax", max)])
@given(instances())
def test_the_choice_is_that_of_brute_force(objective, measure, instance):
    errors, costs, limits, claims, layers = instance
    least = brute(errors, costs, limits, claims, layers, measure)
    if least == math.inf:
        with pytest.raises(InfeasibleError):
            choose(errors, costs, limits, objective, claims, layers)
        return
    found = choose(errors, costs, limits, objective, claims, layers)
    used = [i for i, k in enumerate(found.choice) if k >= 0]
    assert sorted(layer for i in used for layer in claims[i]) == list(range(layers))
    spent = sum(costs[i][found.choice[i]] for i in used)
    assert (spent <= limits + 1e-9).all()
    error = measure(errors[i][found.choice[i]] for i in used)
    assert error == pytest.approx(found.error) and error >= least - 1e-9
    assert error <= least * 1.02 + 1e-9, "branch and bound stops within a thousandth"


def invented(**offers: list[tuple[float, float]]) -> dict[str, tuple[Candidate, ...]]:
    """Candidates by site: (bits, error) of each."""
    return {
        name.replace("to", ".."): tuple(
            Candidate(name.replace("to", ".."), (Step("keep", name, {"i": i}),), Cost(1, b, 1), e)
            for i, (b, e) in enumerate(rows)
        )
        for name, rows in offers.items()
    }


LAYERS = Sites(
    tuple(Site(name) for name in "abc"),
    (Site("a..c", "chain", members=("a", "b", "c"), between=((), ()), through=((), ())),),
)


def decide(size: float, **offers: list[tuple[float, float]]) -> Plan:
    whole = Cost(params=100, bits=8000, macs=100)
    return plan(
        Network(nn.Linear(1, 1)), LAYERS, Stats(samples=9), invented(**offers),
        Budget(size=size), original=whole, fixed=Cost(),
    )  # fmt: skip


ALONE = {"a": [(80.0, 0.0), (8.0, 4.0)], "b": [(80.0, 0.0), (8.0, 4.0)], "c": [(80.0, 0.0)]}


def test_a_span_is_taken_where_it_is_better_and_only_there():
    assert set(decide(30, **ALONE, atob=[(40.0, 1.0)]).sites) == {"a", "b", "c"}  # room for all
    made = decide(20, **ALONE, atob=[(40.0, 1.0)])
    assert set(made.sites) == {"a..b", "c"} and made.error == 1.0
    assert made.predicted.bits == 120
    worse = decide(20, **ALONE, atob=[(40.0, 9.0)])
    assert set(worse.sites) == {"a", "b", "c"} and worse.error == 8.0
    assert set(decide(30, **ALONE, atob=[(8.0, 0.0)]).sites) == {"a", "b", "c"}, "nothing gained"


def test_of_overlapping_spans_one_is_taken():
    made = decide(15, **ALONE, atob=[(40.0, 1.0)], btoc=[(40.0, 0.5)], atoc=[(100.0, 3.0)])
    assert set(made.sites) == {"a", "b..c"} and made.error == 0.5
    assert set(decide(13, **ALONE, atob=[(40.0, 1.0)], atoc=[(100.0, 3.0)]).sites) == {"a..c"}


def test_a_span_makes_a_budget_feasible_that_was_not():
    with pytest.raises(InfeasibleError, match="nearest feasible budget is size=12"):
        decide(5, **ALONE)
    assert set(decide(5, **ALONE, atoc=[(40.0, 3.0)]).sites) == {"a..c"}
    with pytest.raises(InfeasibleError, match="nearest feasible budget is size=5") as caught:
        decide(4, **ALONE, atoc=[(40.0, 3.0)])
    assert caught.value.nearest == {"bytes": 5}


def test_names_and_claims_of_offers():
    offers = invented(**ALONE, atoc=[(1.0, 1.0)], btoc=[])
    assert claims_of(LAYERS, offers) == (["a", "b", "c", "a..c"], [{0}, {1}, {2}, {0, 1, 2}])
    assert spans_in(LAYERS, offers) == ["a..c"]


# --- what is carried out --------------------------------------------------------------------------


def glued(network: Network, *more: Step, name: str = "0..2") -> Plan:
    steps = (Step("glue", name, {"inputs": 6 if name == "0..2" else 12}), *more)
    rest = {n: Decision((Step("keep", n),), Cost(), 0.0) for n in ("4", "6")}
    return Plan(network.digest(), {name: Decision(steps, Cost(), 0.0), **rest})


def test_a_plan_with_a_span_is_carried_out_written_and_read(network, sites, stats, glue, tmp_path):
    chain = (Step("alds", "2", {"folds": 1, "rank": 2}), Step("kmeans", "2.0", {"k": 4}))
    made = glued(network, *chain)
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == made
    edited = apply(network, again, sites, stats)
    model = edited.model
    assert [type(m).__name__ for m in model][:4] == ["Identity", "Identity", "Sequential", "Tanh"]
    assert len(model[2][0].weight.unique()) <= 4 and model[2][1].weight.shape == (8, 2)
    assert torch.equal(model[4].weight, network.module[4].weight)
    assert network.digest() == again.network, "the original is unchanged"
    file = pack(model, edited.edits, "module", {})
    loaded = restore(unpack(file), build(1))
    x = torch.randn(5, 6)
    assert torch.equal(loaded(x), model(x))
    stored = sum(record.elements for record in unpack(file).records.values())
    assert stored == measured_params(loaded) == measured_params(model)
    assert [e.form for e in edited.edits][:4] == ["identity", "identity", "resized", "low_rank"]


def test_leaves_of_a_span_nobody_speaks_of_are_kept(network, sites, stats, glue):
    model = apply(network, glued(network), sites, stats).model
    a, b = network.module[0], network.module[2]
    torch.testing.assert_close(model[2].weight, b.weight @ a.weight)
    torch.testing.assert_close(model[2].bias, b.weight @ a.bias + b.bias)


def test_a_planned_span_costs_what_was_predicted(network, sites, stats, glue):
    offers = propose(network, sites, stats, ["glue", "kmeans"])
    original, fixed = original_cost(network, sites), fixed_cost(network, sites)
    made = plan(
        network, sites, stats, offers, Budget(macs="75%"), original=original, fixed=fixed
    )  # fmt: skip
    assert {"0..2"} <= set(made.sites) or {"2..4"} <= set(made.sites)
    edited = apply(network, Plan.from_dict(made.dict()), sites, stats)
    assert measured_params(edited.model) == made.predicted.params
    assert measured_macs(edited.model, network.example_inputs) == made.predicted.macs
    summary = {n: " ".join(s.method for s in d.steps) for n, d in made.sites.items()}
    size = len(pack(edited.model, edited.edits, "module", summary))
    assert abs(size - made.predicted.bits / 8) <= 0.02 * size + 64 + 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0": Decision((Step("keep", "0"),), Cost(), 0.0)}, "decides twice about a layer at 0"),
        (
            {"2..4": Decision((Step("glue", "2..4", {"inputs": 12}),), Cost(), 0.0)},
            r"decides twice.* at [24]: .*claim it",
        ),
        ({"0..6": Decision((Step("glue", "0..6"),), Cost(), 0.0)}, "decides twice"),
        ({"0..9": Decision((Step("glue", "0..9"),), Cost(), 0.0)}, r"does not have at 0\.\.9"),
        ({"2..0": Decision((Step("glue", "2..0"),), Cost(), 0.0)}, r"does not have at 2\.\.0"),
    ],
)
def test_decisions_that_claim_one_layer_are_refused(network, sites, stats, glue, change, words):
    made = glued(network)
    made = replace(made, sites={**made.sites, **change})
    with pytest.raises(PlanError, match=words) as caught:
        apply(network, made, sites, stats)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((), r"no step says what to do at 0\.\.2"),
        (
            (Step("keep", "0..2"),),
            "keep cannot serve the site.*a chain, and",
        ),
        ((Step("glue", "0..2", {"inputs": 6}), Step("keep", "0")), "no layer to work on.*leaves 2"),
        (
            (Step("glue", "0..2", {"inputs": 6}), Step("keep", "2.0")),
            "no step says what to do at 2;",
        ),
    ],
)
def test_steps_that_do_not_fit_a_span_are_refused(network, sites, stats, glue, steps, words):
    made = Plan(network.digest(), {"0..2": Decision(steps, Cost(), 0.0)})
    with pytest.raises(PlanError, match=words):
        apply(network, made, sites, stats)


def test_a_span_the_method_refuses_is_refused(network, sites, stats, glue):
    made = Plan(network.digest(), {"4..6": Decision((Step("glue", "4..6"),), Cost(), 0.0)})
    with pytest.raises(PlanError, match=r"glue cannot serve the site at 4\.\.6: nobody glues"):
        apply(network, made, sites, stats)


def test_a_document_that_names_a_span_survives(network, glue):
    made = glued(network, Step("kmeans", "2", {"k": 4}))
    assert Plan.from_dict(json.loads(json.dumps(made.dict()))) == made


# --- what is said of it ---------------------------------------------------------------------------


def test_members_say_in_which_span_they_are(network, sites, glue):
    lines = glued(network).show(sites).splitlines()
    assert lines[1].startswith("0..2 ") and "glue(inputs=6)" in lines[1]
    assert [line.split() for line in lines[2:4]] == [["0", "in", "0..2"], ["2", "in", "0..2"]]
    assert len(glued(network).show().splitlines()) == len(lines) - 2


def test_a_layer_in_a_span_is_explained_by_the_span(network, sites, stats, glue):
    offers = propose(network, sites, stats, ["glue", "kmeans"])
    made = plan(network, sites, stats, offers, Budget(macs="75%"))
    name = next(n for n in made.sites if ".." in n)
    member = sites[name].members[0]
    of_layer = explain(network, sites, stats, offers, made, member, ["glue", "kmeans"])
    of_span = explain(network, sites, stats, offers, made, name, ["glue", "kmeans"])
    assert of_layer.site == of_span.site == name and of_layer.taken == of_span.taken
    assert of_layer.why == f"{member} is in {name}. {of_span.why}"
    assert of_span.shape.startswith(f"chain of {member}, ")
    assert "layers apart" in {p.chain for p in of_span.points}
    text = of_layer.text()
    assert "layers apart" in text and "glue > k" in text
    json.dumps(of_span.dict(), allow_nan=False)
    apart = next(n for n in ("0", "4") if n in made.sites)
    told = explain(network, sites, stats, offers, made, apart, ["glue", "kmeans"])
    assert all(apart in sites[n].members for n, _ in told.spans) and told.spans
    assert "In a span instead:" in told.text()
    lines = summarise(offers, made, sites).splitlines()
    assert any(line.split() == [member, "in", name] for line in lines)


def test_a_span_the_plan_does_not_take_is_not_explained(network, sites, stats, glue):
    offers = propose(network, sites, stats, ["glue"])
    made = plan(network, sites, stats, offers, Budget(macs="100%"))
    assert set(made.sites) == {"0", "2", "4", "6"}
    with pytest.raises(PlanError, match="does not take this span"):
        explain(network, sites, stats, offers, made, "0..2")
