"""tucker: offers, the three layers it builds, and the statistics of the layers it leaves."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lamina.errors import MethodError, SiteError
from lamina.forms import install
from lamina.measure.cost import measured_macs
from lamina.measure.stats import LayerStats, predict_error
from lamina.measure.tucker import compose
from lamina.methods.base import Choice, Method, get_method
from lamina.methods.tucker import macs_of, method, most_ranks, params_of, rank_grid
from lamina.methods.tucker.leaves import (
    input_positions,
    leaf_sites,
    leaf_stats,
    output_extent,
)
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network

LAYERS = {
    "plain": lambda: (nn.Conv2d(6, 8, 3), (2, 6, 7, 8)),
    "same": lambda: (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 8)),
    "stride": lambda: (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 7, 8)),
    "dilation": lambda: (nn.Conv2d(6, 8, 3, dilation=2, bias=False), (2, 6, 7, 8)),
    "oblong": lambda: (nn.Conv2d(6, 8, (3, 1), padding="same"), (2, 6, 7, 8)),
    "reflect": lambda: (
        nn.Conv2d(6, 8, 3, stride=(1, 2), padding=1, padding_mode="reflect"),
        (2, 6, 7, 8),
    ),
    "1d": lambda: (nn.Conv1d(6, 8, 5, stride=3), (2, 6, 23)),
    "3d": lambda: (nn.Conv3d(6, 8, 2, bias=False), (2, 6, 3, 4, 5)),
}


def site_of(layer: nn.Module, shape: tuple[int, ...]) -> Site:
    with torch.no_grad():
        out = layer(torch.zeros(shape, dtype=layer.weight.dtype))
    return Site(
        "net.c",
        op="conv",
        module="c",
        weight="c.weight",
        bias="c.bias" if layer.bias is not None else "",
        shape=tuple(layer.weight.shape),
        groups=layer.groups,
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        padding=layer.padding if isinstance(layer.padding, tuple) else (layer.padding,),
        dilation=tuple(layer.dilation),
        padding_mode=layer.padding_mode,
        positions=float(out[0, 0].numel()),
        extent=tuple(shape[2:]),
    )


def moment(n: int) -> torch.Tensor:
    x = torch.randn(4 * n, n, dtype=torch.float64) @ torch.randn(n, n).double() + 0.3
    return x.T @ x / len(x)


def stats_for(site: Site, diagonal: bool = False) -> LayerStats:
    f, n = site.matrix_shape[1:]
    H = moment(n)
    return LayerStats(
        H=(H.diagonal() if diagonal else H)[None],
        G=moment(f)[None],
        mean=torch.randn(1, n, dtype=torch.float64),
        positions=site.positions,
        scale=2.0,
        samples=9,
    )


def network(layer: nn.Module) -> Network:
    root = nn.Module()
    root.c = layer
    return Network(root)


def tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach() for k, v in layer.named_parameters()}


def test_it_is_a_method() -> None:
    assert isinstance(method, Method)
    assert get_method("tucker") is method


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_full_ranks_are_the_layer(name: str, data: bool) -> None:
    layer, shape = LAYERS[name]()
    site = site_of(layer, shape)
    f, c = site.shape[:2]
    net = network(copy.deepcopy(layer))
    settings = dict(
        zip(("outputs", "inputs"), most_ranks(f, c, math.prod(site.kernel)), strict=True)
    )
    edits = method.apply(net, Choice(site, settings), stats_for(site) if data else None)
    install(net.module, edits)
    x = torch.randn(shape)
    assert len(net.module.c) == 3
    torch.testing.assert_close(net.module.c(x), layer(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        net.module.c[1].weight.flatten()[0] += 0.1
    assert not torch.allclose(net.module.c(x), layer(x), atol=1e-5)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_offers_keep_the_contract(name: str, data: bool) -> None:
    layer, shape = LAYERS[name]()
    site = site_of(layer, shape)
    stats = stats_for(site) if data else None
    weights = tensors(layer)
    before = {k: v.clone() for k, v in weights.items()}
    offers = method.propose(site, weights, stats)
    assert len(offers) >= 3
    assert offers == method.propose(site, weights, stats)
    assert all(torch.equal(weights[k], before[k]) for k in weights)
    json.dumps([step.settings for c in offers for step in c.steps])
    params, errors = [c.cost.params for c in offers], [c.error for c in offers]
    assert params == sorted(set(params))
    assert errors == sorted(set(errors), reverse=True)
    x = torch.zeros(1, *shape[1:])
    for offer in offers:
        (step,) = offer.steps
        assert offer.cost.params < sum(w.numel() for w in weights.values())
        assert offer.cost.macs < site.macs
        net = network(copy.deepcopy(layer))
        install(net.module, method.apply(net, Choice(site, step.settings), stats))
        assert offer.cost.params == sum(p.numel() for p in net.module.parameters())
        leaves = method.leave(site, weights, stats, step.settings)
        assert offer.cost.macs == sum(leaf.site.macs for leaf in leaves)
        assert offer.cost.macs == measured_macs(net.module.c, (x,))
        # The error offered is that of the weight the three layers compute with.
        encode, core, decode = (leaf.weights["weight"].double().flatten(2) for leaf in leaves)
        product = compose(decode.squeeze(2), core, encode.squeeze(2)).flatten(1)
        matrix = as_matrix(site, weights["weight"]).double()
        true = predict_error(stats, matrix, product[None] - matrix)
        assert offer.error == pytest.approx(true, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_operations_are_those_torch_counts(name: str) -> None:
    layer, shape = LAYERS[name]()
    site = site_of(layer, shape)
    net = network(copy.deepcopy(layer))
    install(net.module, method.structure(site, {"outputs": 3, "inputs": 2}))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net.module.c(torch.zeros(1, *shape[1:]))
    assert macs_of(site, 3, 2) == counter.get_total_flops() / 2
    built = sum(p.numel() for n, p in net.module.named_parameters() if n.endswith("weight"))
    assert params_of(site, 3, 2) == built
    if name in ("stride", "1d"):  # the control: at the output's size it would be less
        assert macs_of(site, 3, 2) > params_of(site, 3, 2) * site.positions


@pytest.mark.parametrize("name", LAYERS)
def test_leave_describes_what_apply_builds(name: str) -> None:
    layer, shape = LAYERS[name]()
    site = site_of(layer, shape)
    stats = stats_for(site)
    settings = {"outputs": 3, "inputs": 4}
    net = network(copy.deepcopy(layer))
    leaves = method.leave(site, tensors(layer), stats, settings)
    install(net.module, method.apply(net, Choice(site, settings), stats))
    assert [leaf.site.name for leaf in leaves] == ["net.c.0", "net.c.1", "net.c.2"]
    x = torch.randn(shape)
    for leaf in leaves:
        real = net.module.get_submodule(leaf.site.module)
        described = replace(site_of(real, tuple(x.shape)), name=leaf.site.name)
        for key in ("module", "weight", "bias"):
            described = replace(described, **{key: getattr(leaf.site, key)})
        assert leaf.site == described
        assert (leaf.site.bias != "") == (real.bias is not None)
        for kind, tensor in leaf.weights.items():
            assert torch.equal(tensor, getattr(real, kind))
        assert leaf.stats is not None
        shapes = leaf.stats.H.shape, leaf.stats.G.shape, leaf.stats.mean.shape
        f, n = leaf.site.matrix_shape[1:]
        assert shapes == ((1, n, n), (1, f, f), (1, n))
        x = real(x)
    assert leaves[0].stats.positions == pytest.approx(math.prod(shape[2:]))


# --- statistics ----------------------------------------------------------------------------------


def columns(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """Patches `[positions of all samples, c K]`, by torch's own unfold."""
    fold = nn.Unfold(layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return fold(x).transpose(1, 2).flatten(0, 1)


def seen_by(layer: nn.Conv2d, x: torch.Tensor) -> LayerStats:
    """The statistics of a layer, from its inputs; gradients at random."""
    patches = columns(x, layer)
    G = moment(layer.out_channels)
    positions = len(patches) / len(x)
    return LayerStats(
        H=(patches.T @ patches)[None] / len(x),
        G=G[None],
        mean=patches.sum(0)[None] / len(x),
        positions=positions,
        samples=len(x),
    )


GEOMETRIES = {
    "same": {"padding": 1},
    "dilation": {"padding": 2, "dilation": 2},
    "stride": {"padding": 1, "stride": 2},
    "valid": {},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_statistics_are_those_measured_on_the_rewritten_layer(name: str) -> None:
    torch.manual_seed(4)
    layer = nn.Conv2d(5, 6, 3, bias=False, **GEOMETRIES[name]).double()
    x = torch.randn(40, 5, 9, 9, dtype=torch.float64).cumsum(2).cumsum(1) / 5 + 0.5
    site, stats = site_of(layer, tuple(x.shape)), seen_by(layer, x)
    net = network(layer)
    first, core, last = method.leave(site, tensors(layer), stats, {"outputs": 3, "inputs": 4})
    install(net.module, method.apply(net, Choice(site, {"outputs": 3, "inputs": 4}), stats))
    with torch.no_grad():
        inside = net.module.c[0](x)
        after = net.module.c[1](inside)
        measured = [seen_by(m, t) for m, t in zip(net.module.c, (x, inside, after), strict=True)]
    for leaf, true in list(zip((first, core, last), measured, strict=True))[1:]:
        torch.testing.assert_close(leaf.stats.H, true.H, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(leaf.stats.mean, true.mean, rtol=1e-8, atol=1e-8)
        assert leaf.stats.positions == true.positions
    decode = net.module.c[2].weight.detach().flatten(1)
    torch.testing.assert_close(last.stats.G, stats.G)
    torch.testing.assert_close(core.stats.G[0], decode.T @ stats.G[0] @ decode)
    assert first.stats.positions == measured[0].positions
    exact = name in ("same", "dilation")  # a tap sees every pixel once
    off = float((first.stats.H - measured[0].H).norm() / measured[0].H.norm())
    assert off < (1e-10 if exact else 0.2)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("name", ["same", "stride"])
def test_errors_in_the_first_layer_are_right_in_the_mean(name: str, diagonal: bool) -> None:
    """What rounding its weights costs, by the dense layer's own statistics."""
    torch.manual_seed(1)
    layer = nn.Conv2d(5, 6, 3, **GEOMETRIES[name])
    site = site_of(layer, (1, 5, 9, 9))
    stats = stats_for(site, diagonal)
    A, C, B = (torch.randn(*s, dtype=torch.float64) for s in ((6, 3), (3, 4, 9), (4, 5)))
    first, core, last = leaf_stats(site, stats, A, C, B)
    g = torch.Generator().manual_seed(2)
    sums = torch.zeros(2)
    for _ in range(400):
        d = torch.randn(4, 5, generator=g, dtype=torch.float64)
        dense = compose(A, C, d).flatten(1)[None]
        sums[0] += predict_error(stats, dense, dense)
        sums[1] += predict_error(first, d[None], d[None])
    assert float(sums[1] / sums[0]) == pytest.approx(1.0, rel=0.1)
    # of core and decoder: every single one
    d = torch.randn(3, 4, 9, generator=g, dtype=torch.float64)
    dense = compose(A, d, B).flatten(1)[None]
    flat = d.flatten(1)[None]
    assert predict_error(core, flat, flat) == pytest.approx(predict_error(stats, dense, dense))
    d = torch.randn(6, 3, generator=g, dtype=torch.float64)
    dense = compose(d, C, B).flatten(1)[None]
    flat = d[None]
    assert predict_error(last, flat, flat) == pytest.approx(predict_error(stats, dense, dense))


def test_without_statistics_there_are_none() -> None:
    layer, shape = LAYERS["same"]()
    site = site_of(layer, shape)
    leaves = method.leave(site, tensors(layer), None, {"outputs": 2, "inputs": 2})
    assert [leaf.stats for leaf in leaves] == [None] * 3


# --- geometry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_sizes_are_those_of_torch(name: str) -> None:
    layer, shape = LAYERS[name]()
    site = site_of(layer, shape)
    assert output_extent(site) == tuple(layer(torch.zeros(shape)).shape[2:])
    assert input_positions(site) == pytest.approx(math.prod(shape[2:]))
    twice = replace(site, positions=2 * site.positions)  # a layer that is called twice
    assert input_positions(twice) == pytest.approx(2 * math.prod(shape[2:]))
    unknown = input_positions(replace(site, extent=()))
    assert unknown == (site.positions if name in ("same", "oblong") else None)


def test_ranks_of_the_grid_are_fast_ones() -> None:
    for n in (1, 7, 16, 17, 64, 100, 512):
        grid = rank_grid(n)
        assert grid[0] == 1 and n - 8 < grid[-1] <= n and grid == sorted(set(grid))
        assert all(r <= 16 or r % 8 == 0 or r == n for r in grid)
        assert len(grid) <= 9


def test_a_stride_makes_the_first_layer_dear() -> None:
    """Where it does, ranks that save parameters but no operations are not offered."""
    layer = nn.Conv2d(16, 8, 3, stride=4)
    site = site_of(layer, (1, 16, 32, 32))
    offers = method.propose(site, tensors(layer), None)
    assert offers and all(o.cost.macs < site.macs for o in offers)
    ranks = [(o.steps[0].settings["outputs"], o.steps[0].settings["inputs"]) for o in offers]
    assert params_of(site, 4, 6) < layer.weight.numel() < macs_of(site, 4, 6)
    assert (4, 6) not in ranks and max(r2 for _, r2 in ranks) < 6


def test_leaves_are_described_for_any_ranks() -> None:
    layer, shape = LAYERS["stride"]()
    first, core, last = leaf_sites(site_of(layer, shape), 3, 2)
    assert (first.positions, core.positions, last.positions) == (56.0, 16.0, 16.0)
    assert (first.extent, core.extent, last.extent) == ((7, 8), (7, 8), (4, 4))
    assert (first.stride, core.stride, last.stride) == ((1, 1), (2, 2), (1, 1))
    assert (first.bias, core.bias, last.bias) == ("", "", "c.2.bias")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"op": "linear"}, "linear"),
        ({"op": "conv_transpose"}, "conv_transpose"),
        ({"kind": "chain"}, "chain"),
        ({"groups": 2}, "groups"),
        ({"kernel": (1, 1)}, "alds"),
        ({"rigid": "someone reads its weight"}, "someone reads"),
        ({"aliases": ("d.weight",)}, "tied"),
        ({"module": ""}, "whole network"),
        ({"extent": (), "stride": (2, 2)}, "not known"),
    ],
)
def test_what_it_refuses(change: dict, why: str) -> None:
    layer, shape = LAYERS["same"]()
    site = replace(site_of(layer, shape), **change)
    assert why in method.refuse(site)
    assert method.propose(site, tensors(layer), None) == ()
    with pytest.raises(SiteError, match=r"net\.c"):
        method.apply(network(layer), Choice(site, {"outputs": 1, "inputs": 1}), None)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"outputs": 2},
        {"outputs": 0, "inputs": 1},
        {"outputs": 9, "inputs": 4},
        {"outputs": 2, "inputs": 7},
        {"outputs": 2.0, "inputs": 2},
        {"outputs": "2", "inputs": 2},
    ],
)
def test_settings_it_does_not_have(settings: dict) -> None:
    layer, shape = LAYERS["same"]()
    with pytest.raises(MethodError, match=r"tucker.*net\.c"):
        method.structure(site_of(layer, shape), settings)


def test_values_that_are_not_finite_are_refused() -> None:
    layer, shape = LAYERS["same"]()
    layer.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(SiteError, match=r"net\.c"):
        method.propose(site_of(layer, shape), tensors(layer), None)
