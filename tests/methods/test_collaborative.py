"""collaborative: offers, what it builds, and the statistics of the layers it leaves."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from lamina.artifact.records import encode
from lamina.errors import MethodError, SiteError
from lamina.forms import install
from lamina.measure.low_rank import damp
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.base import Choice, Method, get_method
from lamina.methods.collaborative import method
from lamina.network.layers import describe
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network


class Conv1D(nn.Module):
    """Stored [in, out], as GPT-2 has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


LAYERS = {
    "linear": lambda: (nn.Linear(12, 9), (3, 12)),
    "wide": lambda: (nn.Linear(12, 3, bias=False), (3, 12)),
    "tall": lambda: (nn.Linear(6, 15), (3, 6)),
    "hf": lambda: (Conv1D(9, 12), (3, 12)),
    "stride": lambda: (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 7, 8)),
    "dilation": lambda: (nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 7, 8)),
    "1d": lambda: (nn.Conv1d(6, 6, 3), (2, 6, 7)),
    "3d": lambda: (nn.Conv3d(4, 6, 2, bias=False), (2, 4, 3, 4, 5)),
}


def moment(size: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=g, dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=g, dtype=torch.float64)
    return x.T @ x / len(x)


def setting(name: str, data: bool = True):
    torch.manual_seed(3)
    layer, shape = LAYERS[name]()
    net = nn.Module()
    net.c = layer
    (site,) = describe("c", layer, net)
    site = replace(site, rigid="")  # of a class that is known by its name
    n, N = site.matrix_shape[1:]
    mean = torch.randn(1, N, dtype=torch.float64)
    stats = LayerStats(moment(N, 1)[None], moment(n, 2)[None], mean, 5.0, 2.0, 48)
    return site, layer, shape, stats if data else None


def tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach() for k, v in layer.named_parameters()}


def network(layer: nn.Module) -> Network:
    root = nn.Module()
    root.c = copy.deepcopy(layer)
    return Network(root)


def dense_of(site: Site, leaves, kept: list[int]) -> torch.Tensor:
    """The dense matrix that the leaves compute, by hand."""
    n, N = site.matrix_shape[1:]
    channels = site.shape[0] if site.transposed else site.shape[1]
    whole = torch.zeros(n, channels, N // channels, dtype=torch.float64)
    product = torch.eye(n, dtype=torch.float64)
    for leaf in reversed(leaves):
        product = product @ as_matrix(leaf.site, leaf.weights["weight"])[0].double()
    whole[:, kept] = product.reshape(n, len(kept), -1)
    return whole.flatten(1)


def kept_of(settings) -> list[int]:
    bits = int(settings["kept"], 16)
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_offers_say_what_is_built(name, data):
    site, layer, shape, stats = setting(name, data)
    weights = tensors(layer)
    matrix = as_matrix(site, weights["weight"]).double()
    offers = method.propose(site, weights, stats)
    assert isinstance(method, Method) and get_method("collaborative") is method
    assert offers == method.propose(site, weights, stats)
    assert [c.cost.bits for c in offers] == sorted(c.cost.bits for c in offers)
    errors = [c.error for c in offers]
    assert errors == sorted(set(errors), reverse=True) and min(errors) >= 0
    x = torch.randn(shape)
    for offer in offers[:: max(1, len(offers) // 5)]:
        settings = json.loads(json.dumps(dict(offer.steps[0].settings)))
        kept = kept_of(settings)
        assert len(kept) == settings["channels"]
        leaves = method.leave(site, weights, stats, settings)
        delta = dense_of(site, leaves, kept)[None] - matrix
        assert offer.error == pytest.approx(predict_error(stats, matrix, delta), rel=1e-3, abs=1e-5)
        net = network(layer)
        edits = method.apply(net, Choice(site, settings), stats)
        install(net.module, edits)
        assert offer.cost.params == sum(p.numel() for p in net.module.parameters())
        assert offer.cost.macs == sum(leaf.site.macs for leaf in leaves)
        size = sum(len(encode(e.values)) for e in edits if e.values is not None)
        assert abs(size - offer.cost.bits / 8) <= 0.02 * size + 64
        with torch.no_grad():
            twin = copy.deepcopy(layer)
            rows = (matrix + delta)[0].to(torch.float32)
            twin.weight.copy_((rows.T if site.transposed else rows).reshape(twin.weight.shape))
            torch.testing.assert_close(net.module.c(x), twin(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "stride"])
def test_the_metric_beats_none_and_channels_join_ranks(name):
    site, layer, _, stats = setting(name)
    weights = tensors(layer)
    matrix = as_matrix(site, weights["weight"]).double()
    offers = method.propose(site, weights, stats)
    kinds = {"rank" in c.steps[0].settings for c in offers}
    assert kinds == {False, True}
    for offer in offers[::4]:
        settings = offer.steps[0].settings
        plain = method.leave(site, weights, None, settings)
        loss = predict_error(stats, matrix, dense_of(site, plain, kept_of(settings))[None] - matrix)
        assert offer.error <= loss * (1 + 1e-6)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
def test_leaves_predict_what_a_change_of_theirs_costs(rank, diagonal):
    """Their statistics are exact: the currency of a change inside, carried to the whole matrix."""
    site, layer, _, stats = setting("stride")
    if diagonal:
        stats = LayerStats(
            stats.H.diagonal(dim1=1, dim2=2), stats.G.diagonal(dim1=1, dim2=2), stats.mean,
            5.0, 2.0, 48,
        )  # fmt: skip
    weights = tensors(layer)
    kept = [0, 2, 3, 5]
    settings = {"channels": 4, "kept": "2d"} | ({} if rank is None else {"rank": rank})
    leaves = method.leave(site, weights, stats, settings)
    matrix = as_matrix(site, weights["weight"]).double()
    first = dense_of(site, leaves, kept)
    for i, leaf in enumerate(leaves):
        noise = torch.randn(leaf.site.shape) / 10
        changed = list(leaves)
        more = leaf.weights["weight"] + noise
        changed[i] = type(leaf)(leaf.site, {"weight": more}, leaf.stats)
        own = (
            as_matrix(leaf.site, more).double()
            - as_matrix(leaf.site, leaf.weights["weight"]).double()
        )
        alone = predict_error(leaf.stats, as_matrix(leaf.site, more), own)
        true = predict_error(stats, matrix, (dense_of(site, changed, kept) - first)[None])
        if diagonal and rank is not None:
            assert leaf.stats.H.dim() == (2 if i == 0 else 3)
        assert alone == pytest.approx(true, rel=1e-5)
    assert leaves[0].stats.mean.shape == (1, 4 * 9)
    torch.testing.assert_close(
        leaves[0].stats.mean[0], stats.mean[0].reshape(6, 9)[kept].flatten(), rtol=0, atol=0
    )
    assert leaves[0].bits > 0 and sum(leaf.bits for leaf in leaves[1:]) == 0


def test_full_rank_is_the_gathered_layer():
    site, layer, shape, stats = setting("stride")
    outputs = []
    for more in ({}, {"rank": 8}):
        net = network(layer)
        settings = {"channels": 5, "kept": "3d"} | more
        install(net.module, method.apply(net, Choice(site, settings), stats))
        torch.manual_seed(0)
        outputs.append(net.module.c(torch.randn(shape)))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_a_dead_channel_is_left_out_first_and_costs_nothing():
    site, layer, _, stats = setting("stride")
    with torch.no_grad():
        layer.weight[:, 3] = 0
    for given in (None, LayerStats(stats.H[:, :, :] * 1.0, stats.G)):
        offers = method.propose(site, tensors(layer), given)
        best = offers[-1]
        assert best.steps[0].settings == {"channels": 5, "kept": "37"}
        assert best.error == pytest.approx(0.0, abs=1e-9 if given is None else 1e-6)


def test_refit_uses_what_the_channels_have_in_common():
    """A copied input costs nothing to leave out: its twin takes its weights over."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    (site,) = describe("c", layer, None)
    x = torch.randn(64, 4, dtype=torch.float64)
    x[:, 2] = x[:, 0]
    stats = LayerStats((x.T @ x / 64)[None], torch.eye(3, dtype=torch.float64)[None])
    offers = method.propose(site, tensors(layer), stats)
    three = [c for c in offers if c.steps[0].settings["channels"] == 3][-1]
    whole = predict_error(stats, layer.weight[None], layer.weight[None])
    assert three.error < 1e-3 * whole
    (leaf,) = method.leave(site, tensors(layer), stats, three.steps[0].settings)
    kept = kept_of(three.steps[0].settings)
    assert len({0, 2} & set(kept)) == 1
    twin = kept.index(({0, 2} & set(kept)).pop())
    both = layer.weight[:, 0] + layer.weight[:, 2]
    torch.testing.assert_close(leaf.weights["weight"][:, twin], both, rtol=0.05, atol=0.02)
    assert damp(stats.H[0]).diagonal().min() > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"channels": 4, "kept": "3f"},
        {"channels": 6, "kept": "3f"},
        {"channels": 7, "kept": "7f"},
        {"channels": 0, "kept": "0"},
        {"channels": 2, "kept": "x"},
        {"channels": 2, "kept": "-3"},
        {"channels": 2, "kept": 3},
        {"channels": 2, "kept": "3", "rank": 0},
        {"channels": 2, "kept": "3", "rank": 9},
        {"channels": 2, "kept": "3", "rank": "x"},
        {"kept": "3"},
        {"channels": 2, "kept": "0" * 50 + "3"},
    ],
)
def test_odd_settings_are_refused(settings):
    site, layer, _, _ = setting("stride")
    with pytest.raises(MethodError, match="collaborative"):
        method.apply(network(layer), Choice(site, settings), None)
    with pytest.raises(MethodError, match="collaborative"):
        method.structure(site, settings)


def test_refusals():
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    (site,) = describe("c", grouped, None)
    assert "2 groups" in method.refuse(site)
    (one,) = describe("c", nn.Linear(1, 4), None)
    assert "one input channel" in method.refuse(one)
    with pytest.raises(SiteError, match="c: it has 2 groups"):
        method.apply(network(grouped), Choice(site, {}), None)
    assert method.propose(site, tensors(grouped), None) == ()
