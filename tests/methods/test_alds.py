"""alds: offers, the pair it builds, and the statistics of the layers it leaves."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from lamina.errors import MethodError, SiteError
from lamina.forms import install
from lamina.measure.schemes import recompose
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.alds import Alds, leaf_sites, method, rank_grid
from lamina.methods.base import Choice, Method
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network


def second_moment(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def stats_for(f: int, n: int, positions: float = 1.0) -> LayerStats:
    x = torch.randn(4 * n, n, dtype=torch.float64) @ torch.randn(n, n).double() + 1.0
    y = torch.randn(4 * f, f, dtype=torch.float64) @ torch.randn(f, f).double()
    return LayerStats(
        H=second_moment(x)[None],
        G=second_moment(y)[None],
        mean=x.mean(0)[None],
        positions=positions,
        scale=2.0,
        samples=len(x),
    )


def conv_site(layer: nn.Module, positions: float = 1.0) -> Site:
    padding = layer.padding if isinstance(layer.padding, tuple) else (layer.padding,)
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
        padding=padding,
        dilation=tuple(layer.dilation),
        padding_mode=layer.padding_mode,
        positions=positions,
    )


def linear_site(layer: nn.Linear) -> Site:
    bias = "c.bias" if layer.bias is not None else ""
    return Site("net.c", module="c", weight="c.weight", bias=bias, shape=tuple(layer.weight.shape))


def site_of(layer: nn.Module) -> Site:
    return linear_site(layer) if isinstance(layer, nn.Linear) else conv_site(layer)


def tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach() for k, v in layer.named_parameters()}


def network(layer: nn.Module) -> Network:
    root = nn.Module()
    root.c = layer
    return Network(root)


def predicted_with_bias(site, weights, stats, leaves) -> float:
    """The error of the weight and the bias that the pair really has: the bias as one more input."""
    encode, decode = (leaf.weights["weight"] for leaf in leaves)
    composed = recompose(encode.double(), decode.double(), leaves[0].site.groups).flatten(1)
    matrix = as_matrix(site, weights["weight"]).double()
    delta = composed[None] - matrix
    if stats is None or "bias" not in weights:
        return predict_error(stats, matrix, delta)
    moved = (leaves[1].weights["bias"] - weights["bias"]).double()
    delta = torch.cat([delta, moved[None, :, None]], 2)
    n = matrix.shape[2]
    H = torch.zeros(1, n + 1, n + 1, dtype=torch.float64)
    H[0, :n, :n], H[0, n, n] = stats.H[0], stats.positions
    H[0, :n, n] = H[0, n, :n] = stats.mean[0]
    return predict_error(replace(stats, H=H), torch.cat([matrix, delta[:, :, n:]], 2), delta)


LAYERS = {
    "linear": lambda: (nn.Linear(12, 9), (3, 12)),
    "linear-wide": lambda: (nn.Linear(12, 3, bias=False), (3, 12)),
    "stride": lambda: (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 8)),
    "dilation": lambda: (nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 7, 8)),
    "same": lambda: (nn.Conv2d(4, 6, (3, 1), padding="same"), (2, 4, 7, 8)),
    "reflect": lambda: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 8)),
    "1d": lambda: (nn.Conv1d(4, 6, 3), (2, 4, 7)),
    "3d": lambda: (nn.Conv3d(4, 6, 2, bias=False), (2, 4, 3, 4, 5)),
}


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("folds", [1, 2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_the_full_rank_pair_is_the_layer(name: str, folds: int, data: bool) -> None:
    layer, shape = LAYERS[name]()
    layer = layer.double()
    site = site_of(layer)
    f, n = site.matrix_shape[1:]
    stats = stats_for(f, n) if data else None
    net = network(copy.deepcopy(layer))
    settings = {"folds": folds, "rank": min(f, n // folds)}
    install(net.module, method.apply(net, Choice(site, settings), stats))
    x = torch.randn(shape, dtype=torch.float64)
    assert isinstance(net.module.c, nn.Sequential)
    torch.testing.assert_close(net.module.c(x), layer(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_offers_keep_the_contract(name: str, data: bool) -> None:
    layer, _ = LAYERS[name]()
    site = site_of(layer)
    f, n = site.matrix_shape[1:]
    stats = stats_for(f, n) if data else None
    weights = tensors(layer)
    before = {k: v.clone() for k, v in weights.items()}
    offers = method.propose(site, weights, stats)
    assert offers
    assert offers == method.propose(site, weights, stats)
    assert all(torch.equal(weights[k], before[k]) for k in weights)
    json.dumps([step.settings for c in offers for step in c.steps])
    params = [c.cost.params for c in offers]
    errors = [c.error for c in offers]
    assert params == sorted(set(params))
    assert errors == sorted(set(errors), reverse=True)
    assert min(errors) >= 0
    dense = sum(w.numel() for w in weights.values())
    for offer in offers:
        assert offer.cost.params < dense
        (step,) = offer.steps
        net = network(copy.deepcopy(layer))
        install(net.module, method.apply(net, Choice(site, step.settings), stats))
        built = sum(p.numel() for p in net.module.parameters())
        assert offer.cost.params == built
        assert 0.7 * 32 * built <= offer.cost.bits <= 32 * built + 8 * 60  # with the edit itself
        leaves = method.leave(site, weights, stats, step.settings)
        assert offer.cost.macs == sum(leaf.site.macs for leaf in leaves)
        # The error offered is that of the matrix the module computes with.
        true = predicted_with_bias(site, weights, stats, leaves)
        assert offer.error == pytest.approx(true, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("folds", [1, 2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_leave_and_apply_make_the_same_tensors(name: str, folds: int) -> None:
    layer, _ = LAYERS[name]()
    site = site_of(layer)
    stats = stats_for(*site.matrix_shape[1:])
    net = network(copy.deepcopy(layer))
    settings = {"folds": folds, "rank": 2}
    leaves = method.leave(site, tensors(layer), stats, settings)
    edits = method.apply(net, Choice(site, settings), stats)
    assert [e.path for e in edits[:1]] == ["c"]
    install(net.module, edits)
    state = dict(net.module.named_parameters())
    found = {}
    for leaf in leaves:
        found[leaf.site.weight] = leaf.weights["weight"]
        if leaf.site.bias:
            found[leaf.site.bias] = leaf.weights["bias"]
    assert found.keys() == state.keys() == {e.path for e in edits[1:]}
    for key, tensor in found.items():
        assert torch.equal(tensor, state[key])
        assert tensor.dtype == layer.weight.dtype
        assert tensor.is_contiguous()
    for leaf, module in zip(leaves, net.module.c, strict=True):
        assert leaf.site.shape == tuple(module.weight.shape)
        assert leaf.site.groups == getattr(module, "groups", 1)
        for key in ("kernel_size", "stride", "dilation"):
            if hasattr(module, key):
                assert getattr(leaf.site, key.removesuffix("_size")) == getattr(module, key)
    assert [leaf.site.name for leaf in leaves] == ["net.c.0", "net.c.1"]


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("folds", [1, 2, 3])
def test_linear_leaf_statistics_are_those_of_the_real_factors(folds: int, diagonal: bool) -> None:
    layer = nn.Linear(12, 5).double()
    site = linear_site(layer)
    x = torch.randn(40, 12, dtype=torch.float64) + 0.5
    grad = torch.randn(40, 5, dtype=torch.float64)
    H, G = second_moment(x), second_moment(grad)
    stats = LayerStats(H=H[None], G=G[None], mean=x.mean(0)[None], scale=1.5, samples=40)
    first, second = method.leave(site, tensors(layer), stats, {"folds": folds, "rank": 2})
    encode, decode = first.weights["weight"], second.weights["weight"]
    z = x @ torch.block_diag(*encode.reshape(folds, 2, -1)).T
    gz = grad @ decode
    width = 12 // folds
    for i in range(folds):
        xi, gi = x[:, i * width : (i + 1) * width], gz[:, 2 * i : 2 * i + 2]
        torch.testing.assert_close(first.stats.H[i], second_moment(xi))
        torch.testing.assert_close(first.stats.G[i], second_moment(gi))
        torch.testing.assert_close(first.stats.mean[i], xi.mean(0))
    torch.testing.assert_close(second.stats.H[0], second_moment(z))
    torch.testing.assert_close(second.stats.G[0], G)
    torch.testing.assert_close(second.stats.mean[0], z.mean(0))
    assert first.stats.scale == second.stats.scale == 1.5
    if diagonal:
        thin = LayerStats(H=H.diagonal()[None], G=G.diagonal()[None])
        first, second = method.leave(site, tensors(layer), thin, {"folds": folds, "rank": 2})
        encode, decode = first.weights["weight"], second.weights["weight"]
        B = torch.block_diag(*encode.reshape(folds, 2, -1))
        assert first.stats.H.shape == (folds, width)
        torch.testing.assert_close(second.stats.H[0], B * H.diagonal() @ B.T)
        torch.testing.assert_close(first.stats.G[0], decode[:, :2].T * G.diagonal() @ decode[:, :2])
        assert second.stats.G.shape == (1, 5)


@pytest.mark.parametrize("folds", [1, 2])
def test_conv_leaf_statistics_are_those_of_the_real_factors(folds: int) -> None:
    layer = nn.Conv2d(4, 5, 3, stride=2, padding=1).double()
    x = torch.randn(6, 4, 7, 7, dtype=torch.float64)
    patches = nn.functional.unfold(x, 3, padding=1, stride=2)  # [6, 36, 16]
    site = conv_site(layer, positions=16.0)
    H = torch.einsum("bap,bcp->ac", patches, patches) / 6
    grad = torch.randn(96, 5, dtype=torch.float64)
    stats = LayerStats(
        H=H[None], G=second_moment(grad)[None], mean=patches.sum(2).mean(0)[None], positions=16.0
    )
    first, second = method.leave(site, tensors(layer), stats, {"folds": folds, "rank": 3})
    z = nn.functional.conv2d(x, first.weights["weight"], stride=2, padding=1, groups=folds)
    z = z.flatten(2)
    torch.testing.assert_close(second.stats.H[0], torch.einsum("bap,bcp->ac", z, z) / 6)
    torch.testing.assert_close(second.stats.mean[0], z.sum(2).mean(0))
    wide = 36 // folds
    torch.testing.assert_close(first.stats.H[-1], H[-wide:, -wide:])
    torch.testing.assert_close(first.stats.mean.reshape(1, -1), stats.mean)
    assert first.site.positions == second.site.positions == 16.0
    assert second.site.macs == 5 * folds * 3 * 16.0
    assert second.site.padding == (0, 0)


def test_a_change_of_a_factor_costs_what_the_whole_layer_says() -> None:
    """The leaf's currency is the layer's: exact for either factor changed alone."""
    layer = nn.Linear(12, 7).double()
    site = linear_site(layer)
    stats = stats_for(7, 12)
    first, second = method.leave(site, tensors(layer), stats, {"folds": 1, "rank": 3})
    B, A = first.weights["weight"], second.weights["weight"]
    for leaf, other in ((first, lambda d: A @ d), (second, lambda d: d @ B)):
        change = torch.randn_like(leaf.weights["weight"])
        inside = predict_error(leaf.stats, leaf.weights["weight"][None], change[None])
        outside = predict_error(stats, layer.weight[None], other(change)[None])
        assert inside == pytest.approx(outside, rel=1e-9)


def test_data_free_leaves_have_no_statistics() -> None:
    layer = nn.Linear(12, 5)
    leaves = method.leave(linear_site(layer), tensors(layer), None, {"folds": 2, "rank": 1})
    assert [leaf.stats for leaf in leaves] == [None, None]


def test_with_data_the_offers_predict_less_than_the_data_free_pairs() -> None:
    layer = nn.Linear(24, 16)
    site = linear_site(layer)
    stats = stats_for(16, 24)
    matrix = layer.weight.detach()[None].double()
    for settings in ({"folds": 1, "rank": 4}, {"folds": 2, "rank": 3}):
        errors = []
        for given in (stats, None):
            first, second = method.leave(site, tensors(layer), given, settings)
            encode = as_matrix(first.site, first.weights["weight"]).double()
            product = second.weights["weight"].double() @ torch.block_diag(*encode)
            errors.append(predict_error(stats, matrix, product[None] - matrix))
        assert errors[0] < errors[1]


def test_certificates_bound_the_exact_score_and_agree_without_folds() -> None:
    layer = nn.Conv2d(6, 8, 3)
    site = conv_site(layer)
    by = {
        score: {
            tuple(c.steps[0].settings.values()): c.error
            for c in Alds(score=score).propose(site, tensors(layer), None)
        }
        for score in ("exact", "rss", "paper")
    }
    for loose, tight in (("paper", "rss"), ("rss", "exact")):
        common = by[loose].keys() & by[tight].keys()
        assert common
        assert all(by[loose][key] >= by[tight][key] - 1e-6 for key in common)
        for key in common:
            if key[0] == 1:
                assert by[loose][key] == pytest.approx(by[tight][key], abs=1e-6)


def test_scale_changes_no_offer_and_output_rotation_no_error() -> None:
    layer = nn.Linear(12, 8)
    site = linear_site(layer)

    def offers(weight: torch.Tensor) -> list[tuple[object, float]]:
        found = method.propose(site, {"weight": weight.double()}, None)
        return [(c.steps[0].settings, c.error) for c in found]

    plain = offers(layer.weight.detach())
    q = torch.linalg.qr(torch.randn(8, 8)).Q
    for other in (10 * layer.weight.detach(), q @ layer.weight.detach()):
        for (s1, e1), (s2, e2) in zip(plain, offers(other), strict=True):
            assert s1 == s2
            assert e1 == pytest.approx(e2, rel=1e-4)


def test_a_truly_low_rank_layer_costs_nothing() -> None:
    layer = nn.Linear(24, 20, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(20, 2).double() @ torch.randn(2, 24).double())
    for stats in (None, stats_for(20, 24)):
        offers = method.propose(linear_site(layer), tensors(layer), stats)
        whole = predict_error(stats, layer.weight[None], layer.weight[None])
        assert min(c.error for c in offers if c.steps[0].settings["rank"] >= 2) <= 1e-7 * whole


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "chain"}, "not one layer"),
        ({"op": "embedding"}, "embedding"),
        ({"op": "recurrent"}, "recurrent"),
        ({"op": "conv_transpose"}, "conv_transpose"),
        ({"groups": 2}, "2 groups"),
        ({"rigid": "attention reads its weight"}, "attention reads its weight"),
        ({"aliases": ("head.weight",)}, "tied to head.weight"),
        ({"module": ""}, "whole network"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(changes: dict[str, object], match: str) -> None:
    layer = nn.Linear(12, 8)
    site = replace(linear_site(layer), **changes)
    assert match in method.refuse(site)
    assert method.propose(site, tensors(layer), None) == ()
    with pytest.raises(SiteError, match=rf"net\.c.*{match}"):
        method.apply(network(layer), Choice(site, {"folds": 1, "rank": 1}), None)


@pytest.mark.parametrize(
    "settings",
    [{}, {"rank": 0}, {"rank": 9}, {"folds": 5, "rank": 1}, {"folds": 6, "rank": 3}, {"rank": 1.5}],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object]) -> None:
    layer = nn.Linear(12, 8)
    with pytest.raises(MethodError, match=r"net\.c"):
        method.leave(linear_site(layer), tensors(layer), None, settings)


def test_weights_that_are_not_finite_are_refused() -> None:
    layer = nn.Linear(12, 8)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(SiteError, match=r"not finite at net\.c"):
        method.propose(linear_site(layer), tensors(layer), None)


def test_dead_layers_and_layers_too_small_are_no_trouble() -> None:
    layer = nn.Linear(12, 8)
    stats = LayerStats(H=torch.zeros(1, 12, 12).double(), G=torch.zeros(1, 8, 8).double())
    assert all(c.error == 0 for c in method.propose(linear_site(layer), tensors(layer), stats))
    zero = {"weight": torch.zeros(8, 12)}
    for given in (None, stats):
        assert all(c.error == 0 for c in method.propose(linear_site(layer), zero, given))
    tiny = nn.Linear(1, 1)
    assert method.propose(linear_site(tiny), tensors(tiny), None) == ()


def test_large_layers_are_thinned_before_the_exact_error() -> None:
    layer = nn.Linear(1024, 300)
    site = linear_site(layer)
    offers = method.propose(site, tensors(layer), None)
    assert len(offers) > 5
    assert [c.error for c in offers] == sorted({c.error for c in offers}, reverse=True)


def test_rank_grids_rise_and_save() -> None:
    for f, n, folds in ((8, 8, 1), (500, 800, 4), (10, 500, 5), (3, 3, 3)):
        grid = rank_grid(f, n, folds)
        assert grid == sorted(set(grid))
        assert all(j * (folds * f + n) < f * n for j in grid)
        if grid:
            assert grid[-1] * (folds * f + n) > 0.85 * f * n - (folds * f + n)  # nearly all saved
            small = min(5, len(grid))
            assert grid[:small] == list(range(1, small + 1))
            assert all(j <= 16 or j % 4 == 0 for j in grid)
            assert all(j <= 64 or j % 8 == 0 for j in grid)


def test_a_layer_stored_in_out_is_served() -> None:
    site = Site("a", module="a", weight="a.weight", shape=(12, 8), transposed=True)
    weight = torch.randn(12, 8)
    first, second = leaf_sites(site, 2, 3)
    assert (first.shape, second.shape) == ((6, 6), (8, 6))
    assert not first.transposed and not second.transposed
    leaves = method.leave(site, {"weight": weight}, None, {"folds": 1, "rank": 8})
    product = leaves[1].weights["weight"] @ leaves[0].weights["weight"]
    torch.testing.assert_close(product, weight.T)


def test_it_is_a_method_with_a_card() -> None:
    import lamina.methods.alds as module

    assert isinstance(method, Method)
    assert not method.final
    for part in ("**What.**", "**Where.**", "**Costs", "**Does not help**", "**Reference.**"):
        assert part in module.__doc__
