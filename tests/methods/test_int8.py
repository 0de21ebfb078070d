"""int8: its prediction against Monte Carlo, its chains, and the gate for what is not faster."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from tests.contract.checks import case_of, check_file
from torch import nn

from lamina.artifact.records import encode
from lamina.errors import MethodError, SiteError
from lamina.forms import Grid, install
from lamina.forms.integer import Integer
from lamina.measure.latency import LatencyTable, measure_table, structure_key
from lamina.measure.stats import Cost, LayerStats
from lamina.methods.base import Choice, Method, get_method, weights_of
from lamina.methods.int8 import input_error, method, reach
from lamina.methods.keep import hold
from lamina.network.discover import discover
from lamina.network.sites import Site
from lamina.network.source import Network
from lamina.plan.seconds import structures_of, with_seconds

apply = importlib.import_module("lamina.plan.apply")
chains = importlib.import_module("lamina.plan.chains")
plans = importlib.import_module("lamina.plan.plan")


def linear(inputs: int = 96, outputs: int = 40, seed: int = 0) -> tuple[Network, Site]:
    torch.manual_seed(seed)
    root = nn.Module()
    root.fc = nn.Linear(inputs, outputs)
    site = Site("fc", module="fc", weight="fc.weight", bias="fc.bias", shape=(outputs, inputs))
    return Network(root), site


def stats_of(x: torch.Tensor, outputs: int) -> LayerStats:
    """Of one position per sample, where the loss is half the squared change of the output."""
    wide = x.double()
    eye = torch.eye(outputs, dtype=torch.float64)[None]
    return LayerStats((wide.T @ wide / len(x))[None], eye, wide.mean(0)[None], 1.0, 1.0, len(x))


def test_it_follows_the_protocol():
    assert isinstance(method, Method) and not method.final


@pytest.mark.parametrize("kind", ["equal", "skewed", "offset"])
def test_the_error_is_that_of_the_rounded_layer(kind):
    network, site = linear()
    x = torch.randn(4000, 96, generator=torch.Generator().manual_seed(1))
    x = x * torch.logspace(-1, 1, 96) if kind == "skewed" else x + 5 * (kind == "offset")
    stats = stats_of(x, 40)
    weights = weights_of(network, site)
    (offer,) = method.propose(site, weights, stats)
    with torch.no_grad():
        before = network.module.fc(x)
        install(network.module, method.apply(network, Choice(site, {"bits": 8}), stats))
        measured = float((network.module.fc.eval()(x) - before).double().square().sum() / 8000)
    assert 0.6 * measured < offer.error < 1.6 * measured
    # Negative control: without the input's part it is less than half; but a mean that is large
    # makes most of the weight's.
    rounded = input_error(weights["weight"], stats)
    assert (offer.error - rounded < 0.6 * measured) == (kind != "offset")


def test_the_reach_of_gaussians_is_the_median_of_their_largest():
    source = torch.Generator().manual_seed(0)
    mean = torch.randn(50, generator=source).double()
    spread = torch.rand(50, generator=source).double()
    drawn = mean + spread * torch.randn(4000, 50, generator=source).double()
    largest = drawn.amax(1)
    assert reach(mean, spread) == pytest.approx(float(largest.median()), rel=0.03)
    assert reach(mean, spread) != pytest.approx(float((-drawn).amax(1).median()), rel=0.03)
    assert reach(mean, 0 * spread) == pytest.approx(float(mean.max()), abs=1e-6)


def test_without_data_the_error_is_relative():
    network, site = linear(384, 64)
    (offer,) = method.propose(site, weights_of(network, site), None)
    x = torch.randn(500, 384)
    with torch.no_grad():
        before = network.module.fc(x) - network.module.fc.bias
        install(network.module, method.apply(network, Choice(site, {"bits": 8}), None))
        after = network.module.fc.eval()(x) - network.module.fc.bias
    measured = float((after - before).norm() / before.norm())
    assert measured / 2 < offer.error < 3 * measured


def test_its_size_is_that_of_the_integers():
    network, site = linear(300, 50)
    weights = weights_of(network, site)
    (offer,) = method.propose(site, weights, None)
    edits = method.apply(network, Choice(site, {"bits": 8}), None)
    assert [edit.form for edit in edits] == ["int8", "values"]
    size = len(encode(edits[1].values)) + 4 * 50
    assert offer.cost.bits / 8 == pytest.approx(size, rel=0.02, abs=64)
    assert offer.cost.bits < 0.28 * 32 * 15_050
    dense = edits[1].values.dense()
    assert isinstance(hold(dense)[0], Grid), "what keep finds after it"
    assert hold(dense)[1] == pytest.approx(len(encode(edits[1].values)), rel=0.02, abs=64)
    assert not isinstance(hold(weights["weight"])[0], Grid)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"op": "conv", "kernel": (1, 1), "shape": (4, 4, 1, 1)}, "operation conv"),
        ({"op": "embedding"}, "operation embedding"),
        ({"groups": 2}, "blocks"),
        ({"rigid": "read raw by nn.MultiheadAttention"}, "MultiheadAttention"),
        ({"kind": "chain"}, "not one layer"),
        ({"module": ""}, "whole network"),
    ],
)
def test_refusals(change, why):
    network, site = linear()
    bad = replace(site, **change)
    assert why in method.refuse(bad)
    with pytest.raises(SiteError, match="fc"):
        method.apply(network, Choice(bad, {"bits": 8}), None)


def test_tied_layers_and_conv1d_are_served():
    _, site = linear()
    assert not method.refuse(replace(site, rigid="tied with table.weight", aliases=("table",)))
    assert not method.refuse(replace(site, transposed=True, rigid="no form replaces a Conv1D"))
    assert method.refuse(replace(site, rigid="no form replaces a Mine"))


def test_settings_that_do_not_fit():
    network, site = linear()
    for settings in ({}, {"bits": 4}, {"bits": 8, "rank": 1}):
        with pytest.raises(MethodError, match="bits=8"):
            method.apply(network, Choice(site, settings), None)


def test_low_rank_then_integers_then_rdoq(monkeypatch):
    monkeypatch.setattr(chains, "EXTENDED", (1, 1))
    case = case_of("mlp")
    methods = [get_method(name) for name in ("alds", "int8", "rdoq")]
    site = case.sites.layers[0]
    weights, stats = weights_of(case.network, site), case.stats.of(site.name)
    found = chains._chains(site, weights, stats, methods, ())
    whole = [c for c in found if {s.method for s in c.steps} == {"alds", "int8", "rdoq"}]
    assert whole, "no chain of three stages"
    decided = plans.Plan(case.digest, {site.name: plans.Decision(whole[0].steps, Cost(), 0.0)})
    edited = apply.apply(case.network, decided, case.sites, case.stats)
    changed = [m for m in edited.network.module.modules() if isinstance(m, Integer)]
    assert changed and [e.form for e in edited.edits].count("int8") == len(changed)
    check_file(case, edited.network, edited.edits)


def test_integers_then_rdoq_are_computed_with_exactly():
    case = case_of("mlp")
    site = case.sites.layers[0]
    steps = (chains.Step("int8", site.name, {"bits": 8}),
             chains.Step("rdoq", site.name, {"step": 0.02, "rate": 0.0}))  # fmt: skip
    decided = plans.Plan(case.digest, {site.name: plans.Decision(steps, Cost(), 0.0)})
    edited = apply.apply(case.network, decided, case.sites, case.stats)
    layer = edited.network.module.get_submodule(site.name)
    integers, scale = layer.integers()
    assert torch.equal(integers * scale[:, None], layer.weight.detach())
    check_file(case, edited.network, edited.edits)


def test_what_is_not_faster_is_left_out():
    network, _ = linear()
    network = replace(network, module=nn.Sequential(network.module.fc), name="one")
    sites = discover(network)
    offers = chains.propose_layers(network, sites, case_of("mlp").stats,
                                   [get_method("keep"), method])  # fmt: skip
    (name,) = offers
    key = structure_key(sites[name].module, method.structure(sites[name], {"bits": 8}))
    for ratio, noise, stays in ((0.3, 0.02, True), (0.99, 0.02, False), (1.4, 0.02, False)):
        table = LatencyTable(1e-3, {name: 4e-4}, {name: {key: (ratio, noise)}})
        found, dropped = with_seconds(network, sites, offers, table)
        chained = [c for c in found[name] if c.steps[0].method == "int8"]
        assert bool(chained) == stays and dropped == (not stays)
        assert all(c.cost.seconds == pytest.approx(ratio * 4e-4) for c in chained)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_transformers_are_timed_by_their_keywords(kind):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
            vocab_size=40,
        )  # fmt: skip
        model = transformers.BertModel(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=32, **small)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=64, tie_word_embeddings=True, **small,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    network = Network(model.eval(), example_kwargs={"input_ids": ids, "attention_mask": mask})
    sites = discover(network)
    offers = {
        site.name: tuple(method.propose(site, weights_of(network, site), None))
        for site in sites.layers
        if not method.refuse(site)
    }
    assert len(offers) >= 4
    if kind != "bert":
        assert "lm_head" in offers, "a tied head is served"
    structures = structures_of(network, sites, offers)
    table = measure_table(network, structures, seconds=0.01)
    called = [n for n in offers if n != "pooler.dense"]
    assert set(called) <= set(table.dense) and all(table.dense[n] > 0 for n in called)
    assert set(table.ratios) == set(table.dense) and table.whole > 0
    before = network.forward(input_ids=ids, attention_mask=mask)
    tied = model.get_input_embeddings().weight
    install(model, [e for n in offers for e in structures[n][1][0]])
    after = network.forward(input_ids=ids, attention_mask=mask)
    assert 0 < float((after - before).norm() / before.norm()) < 0.05
    assert model.get_input_embeddings().weight is tied
