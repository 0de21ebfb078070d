"""magnitude: what is cut, what it predicts, and what it leaves."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lamina.artifact.records import encode
from lamina.errors import MethodError, SiteError
from lamina.forms import Plain, Sparse, install
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.base import Choice, Method
from lamina.methods.magnitude import diagonal_importance, method, prune
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network

SITES = {
    "linear": (lambda: nn.Linear(20, 12), "linear", 1, True),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), "conv", 2, True),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, bias=False), "conv_transpose", 1, False),
    "embedding": (lambda: nn.Embedding(30, 8), "embedding", 1, False),
}


def layer_and_site(kind: str) -> tuple[nn.Module, Site]:
    make, op, groups, bias = SITES[kind]
    layer = make()
    shape = tuple(layer.weight.shape)
    name = "c.bias" if bias else ""
    return layer, Site("net.c", "layer", op, "c", "c.weight", name, shape, groups)


def stats_for(site: Site) -> LayerStats:
    g, f, n = site.matrix_shape
    x = torch.randn(g, 3 * n, n, dtype=torch.float64) * torch.logspace(-1, 1, n).double()
    y = torch.randn(g, 3 * f, f, dtype=torch.float64)
    H, G = x.mT @ x / (3 * n), y.mT @ y / (3 * f)
    if site.op == "embedding":
        H = H.diagonal(dim1=-2, dim2=-1)
    return LayerStats(H=H, G=G, samples=10)


def network(layer: nn.Module) -> Network:
    root = nn.Module()
    root.c = layer
    return Network(root)


@given(st.integers(1, 40), st.floats(0.001, 1.0), st.integers(0, 99))
def test_the_most_important_stay_as_they_are(n: int, keep: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-4, 5, (n,), generator=generator).float()  # many ties and zeros
    pruned = prune(weight, weight.abs(), keep)
    count = max(1, round(keep * n))
    top = weight.abs().sort(descending=True).values[:count]
    assert torch.equal(pruned.abs().sort(descending=True).values[:count], top)
    assert int((pruned != 0).sum()) == int((top != 0).sum())
    assert bool(((pruned == weight) | (pruned == 0)).all())
    assert torch.equal(prune(weight, weight.abs(), keep), pruned)


@pytest.mark.parametrize("kind", SITES)
def test_the_saliency_is_the_predicted_error_of_one_weight(kind: str) -> None:
    layer, site = layer_and_site(kind)
    stats = stats_for(site)
    weight = layer.weight.detach()
    saliency = diagonal_importance(site, weight, stats)
    assert saliency.shape == weight.shape
    for at in (0, 7, weight.numel() - 1):
        change = torch.zeros_like(weight).reshape(-1)
        change[at] = -weight.reshape(-1)[at]
        change = as_matrix(site, change.reshape(weight.shape))
        error = predict_error(stats, as_matrix(site, weight), change)
        assert float(saliency.reshape(-1)[at]) / 2 == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("kind", SITES)
def test_offers_keep_the_contract(kind: str, data: bool) -> None:
    layer, site = layer_and_site(kind)
    stats = stats_for(site) if data else None
    weights = {k: v.detach() for k, v in layer.named_parameters()}
    before = {k: v.clone() for k, v in weights.items()}
    offers = method.propose(site, weights, stats)
    assert offers == method.propose(site, weights, stats)
    assert all(torch.equal(weights[k], before[k]) for k in weights)
    bits, errors = [c.cost.bits for c in offers], [c.error for c in offers]
    assert bits == sorted(bits)
    assert errors == sorted(set(errors), reverse=True)
    assert min(errors) > 0
    assert len(offers) >= 8
    json.dumps([c.steps[0].settings for c in offers])
    scores = {c.steps[0].settings["score"] for c in offers}
    assert ("obd" in scores) == data
    for offer in offers:
        settings = offer.steps[0].settings
        (leaf,) = method.leave(site, weights, stats, settings)
        assert leaf.site == site
        assert leaf.stats is stats
        assert leaf.weights.keys() == weights.keys()
        left = leaf.weights["weight"]
        assert int((left != 0).sum()) == max(1, round(settings["keep"] * left.numel()))
        change = as_matrix(site, left - weights["weight"])
        assert offer.error == predict_error(stats, as_matrix(site, weights["weight"]), change)
        net = network(copy.deepcopy(layer))
        (edit,) = method.apply(net, Choice(site, settings), stats)
        assert isinstance(edit.values, Sparse)
        install(net.module, [edit])
        assert torch.equal(net.module.c.weight, left)
        others = [w for key, w in weights.items() if key != "weight"]
        size = sum(len(encode(held)) for held in (edit.values, *map(Plain, others)))
        assert abs(offer.cost.bits / 8 - size) <= 0.02 * size + 24
        rest = sum(w.numel() for w in others)
        assert offer.cost.params == left.numel() + rest


def test_the_saliency_beats_the_magnitude_where_inputs_differ() -> None:
    layer, site = layer_and_site("linear")
    stats = stats_for(site)
    weights = {"weight": layer.weight.detach()}

    def error(score: str) -> float:
        (leaf,) = method.leave(site, weights, stats, {"keep": 0.3, "score": score})
        change = (leaf.weights["weight"] - weights["weight"])[None]
        return predict_error(stats, weights["weight"][None], change)

    assert error("obd") < 0.7 * error("magnitude")


def test_an_already_sparse_layer_is_not_offered_what_it_has() -> None:
    layer, site = layer_and_site("linear")
    weight = prune(layer.weight.detach(), layer.weight.detach().abs(), 0.35)
    offers = method.propose(site, {"weight": weight}, None)
    assert max(c.steps[0].settings["keep"] for c in offers) == 0.3
    assert method.propose(site, {"weight": torch.zeros(12, 20)}, None) == ()
    assert method.propose(site, {"weight": torch.zeros(0, 20)}, None) == ()


def test_negative_zeros_do_not_survive() -> None:
    weight = torch.tensor([[-0.0, 1.0, 2.0]])
    assert not torch.signbit(prune(weight, weight.abs(), 1.0)).any()


@pytest.mark.parametrize(
    "settings",
    [{}, {"keep": 0}, {"keep": 1.5}, {"keep": "half"}, {"keep": 0.5, "score": "taylor"}],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object]) -> None:
    layer, site = layer_and_site("linear")
    with pytest.raises(MethodError, match="keep in"):
        method.apply(network(layer), Choice(site, settings), None)


def test_bad_input_is_named() -> None:
    layer, site = layer_and_site("linear")
    with pytest.raises(MethodError, match=r"net\.c.*calibration data"):
        method.apply(network(layer), Choice(site, {"keep": 0.5, "score": "obd"}), None)
    with pytest.raises(SiteError, match=r"net\.c.*not one layer"):
        method.apply(network(layer), Choice(Site("net.c", kind="chain"), {"keep": 0.5}), None)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(SiteError, match=r"not finite at net\.c"):
        method.apply(network(layer), Choice(site, {"keep": 0.5}), None)


def test_it_is_a_method_with_a_card() -> None:
    import lamina.methods.magnitude as module

    assert isinstance(method, Method)
    assert not method.final
    for part in ("**What.**", "**Where.**", "**Costs", "**Does not help**", "**Reference.**"):
        assert part in module.__doc__
