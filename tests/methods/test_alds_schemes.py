"""alds where the decoder owns taps: the same contract, and statistics by another road."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.methods.test_alds import (
    conv_site,
    network,
    predicted_with_bias,
    second_moment,
    stats_for,
    tensors,
)
from torch import nn

from lamina.errors import MethodError
from lamina.forms import install
from lamina.measure.cost import measured_macs
from lamina.measure.schemes import recompose
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.alds import Alds, leaf_sites, method
from lamina.methods.alds.leaves import about_mean
from lamina.methods.base import Choice
from lamina.network.discover import discover
from lamina.network.sites import Site
from lamina.network.source import Network

SHAPE = (2, 4, 9, 8)
LAYERS = {
    "stride": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilation": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=1, bias=False),
    "same": lambda: nn.Conv2d(4, 6, (3, 5), padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, (2, 3), padding=1, padding_mode="reflect", bias=False),
    "oblong": lambda: nn.Conv2d(4, 6, (5, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
}
FOUR = Alds(schemes=(0, 1, 2, 3))


def site_of(layer: nn.Conv2d) -> Site:
    out = layer(torch.zeros(SHAPE, dtype=layer.weight.dtype))
    site = conv_site(layer, positions=float(out[0, 0].numel()))
    return replace(site, extent=SHAPE[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("folds", [1, 2, 4])
@pytest.mark.parametrize("scheme", [0, 1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_the_full_rank_pair_is_the_layer(
    name: str, scheme: int, folds: int, dtype: torch.dtype
) -> None:
    layer = LAYERS[name]().to(dtype)
    site = site_of(layer)
    f, n = site.matrix_shape[1:]
    k1, k2 = layer.kernel_size
    after = {0: 1, 1: k1, 2: k2, 3: k1 * k2}[scheme]
    settings = {"folds": folds, "rank": min(f * after, n // folds // after), "scheme": scheme}
    x = torch.randn(SHAPE, dtype=dtype)
    for stats in (None, stats_for(f, n)):
        net = network(copy.deepcopy(layer))
        install(net.module, method.apply(net, Choice(site, settings), stats))
        pair = net.module.c
        assert isinstance(pair, nn.Sequential)
        close = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=close)
        weight = recompose(pair[0].weight, pair[1].weight, folds)
        torch.testing.assert_close(weight, layer.weight, rtol=0, atol=close)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_offers_keep_the_contract(name: str, number: int, data: bool) -> None:
    layer = LAYERS[name]()
    site = site_of(layer)
    stats = stats_for(*site.matrix_shape[1:], site.positions) if data else None
    weights = tensors(layer)
    offers = Alds(schemes=(number,)).propose(site, weights, stats)
    assert offers
    for offer in offers[:: max(1, len(offers) // 5)]:
        settings = offer.steps[0].settings
        assert settings["scheme"] == number
        net = network(copy.deepcopy(layer))
        edits = method.apply(net, Choice(site, settings), stats)
        assert tuple(edits[:1]) == method.structure(site, settings)
        install(net.module, edits)
        pair = net.module.c
        assert offer.cost.params == sum(p.numel() for p in pair.parameters())
        assert offer.cost.macs == pytest.approx(measured_macs(pair, (torch.zeros(SHAPE),)))
        leaves = method.leave(site, weights, stats, settings)
        for leaf, module in zip(leaves, pair, strict=True):
            assert leaf.site.shape == tuple(module.weight.shape)
            assert leaf.site.kernel == module.kernel_size
            assert (leaf.site.stride, leaf.site.dilation) == (module.stride, module.dilation)
            padding = module.padding
            assert leaf.site.padding == ((padding,) if isinstance(padding, str) else padding)
            assert leaf.site.padding_mode == module.padding_mode
            assert torch.equal(leaf.weights["weight"], module.weight)
        true = predicted_with_bias(site, weights, stats, leaves)
        assert offer.error == pytest.approx(true, rel=1e-3, abs=1e-5)


def test_leaf_sites_are_what_discovery_finds() -> None:
    for make in LAYERS.values():
        root = nn.Sequential(make())
        (site,) = discover(Network(root, (torch.zeros(SHAPE),))).layers
        assert site.extent == SHAPE[2:]
        for scheme in range(4):
            net = Network(copy.deepcopy(root), (torch.zeros(SHAPE),))
            choice = Choice(site, {"folds": 2, "rank": 2, "scheme": scheme})
            install(net.module, method.apply(net, choice, None))
            for made, want in zip(
                leaf_sites(site, 2, 2, scheme), discover(net).layers, strict=True
            ):
                assert made.positions == pytest.approx(want.positions)
                assert replace(made, positions=want.positions) == want


def test_schemes_are_offered_where_they_differ_and_their_cost_is_known() -> None:
    def offered(layer: nn.Conv2d, extent: tuple[int, ...]) -> set[int]:
        site = replace(conv_site(layer), extent=extent)
        offers = FOUR.propose(site, tensors(layer), None)
        return {c.steps[0].settings.get("scheme", 0) for c in offers}

    assert offered(nn.Conv2d(8, 8, 3), (9, 9)) > {0}
    assert offered(nn.Conv2d(8, 8, 3), ()) == {0}
    assert offered(nn.Conv2d(8, 8, 1), (9, 9)) == {0}
    assert offered(nn.Conv2d(8, 8, (1, 5)), (9, 9)) <= {0, 3}
    for bad in ({"scheme": 4}, {"scheme": -1}, {"scheme": 1.0}, {"scheme": True}):
        layer = nn.Conv2d(8, 8, 3)
        with pytest.raises(MethodError, match=r"net\.c"):
            method.structure(conv_site(layer), {"folds": 1, "rank": 1} | bad)
    with pytest.raises(MethodError, match="scheme"):
        Alds(schemes=(4,))
    with pytest.raises(MethodError, match="scheme"):
        Alds(schemes=())


def test_a_separable_layer_is_seen_through() -> None:
    """One scheme costs nothing at rank 1; the usual one needs three times the rank."""
    layer = nn.Conv2d(6, 6, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(
            recompose(torch.randn(2, 6, 1, 3).double(), torch.randn(6, 2, 3, 1).double())
        )
    site = replace(conv_site(layer), extent=(9, 9))
    for stats in (None, stats_for(6, 54)):
        matrix = layer.weight.detach().flatten(1)[None]
        whole = predict_error(stats, matrix, matrix)
        free = [c for c in method.propose(site, tensors(layer), stats) if c.error < 1e-6 * whole]
        assert free[0].steps[0].settings == {"folds": 1, "rank": 2, "scheme": 1}
        plain = Alds(schemes=(0,)).propose(site, tensors(layer), stats)
        least = min((c.cost.params for c in plain if c.error < 1e-6 * whole), default=1e9)
        assert least > 2 * free[0].cost.params


@pytest.mark.parametrize("score", ["rss", "paper"])
def test_certificates_bound_the_error_of_the_pair_that_is_built(score: str) -> None:
    for name in ("stride", "same"):
        layer = LAYERS[name]().double()
        site, weights = site_of(layer), tensors(layer)
        matrix = layer.weight.detach().flatten(1)[None]
        for number in range(4):
            for offer in Alds(score, (number,)).propose(site, weights, None):
                first, second = method.leave(site, weights, None, offer.steps[0].settings)
                weight = recompose(
                    first.weights["weight"], second.weights["weight"], first.site.groups
                )
                true = predict_error(None, matrix, weight.flatten(1)[None] - matrix)
                assert offer.error >= true - 1e-7


def test_the_published_score_is_there_and_is_no_bound() -> None:
    layer = nn.Conv2d(8, 8, 3)
    site = conv_site(layer)

    def errors(score: str) -> dict[tuple[int, ...], float]:
        offers = Alds(score, (0,)).propose(site, tensors(layer), None)
        return {tuple(c.steps[0].settings.values()): c.error for c in offers}

    exact, repo = errors("exact"), errors("repo")
    common = [key for key in exact.keys() & repo.keys() if key[0] > 1]
    assert common and any(repo[key] < exact[key] - 0.01 for key in common)


@pytest.mark.parametrize("folds", [1, 2])
@pytest.mark.parametrize("scheme", [1, 2, 3])
def test_the_decoder_sees_what_the_encoder_gives(scheme: int, folds: int) -> None:
    """Exactly: its patches are encoded patches, at every stride, dilation and padding."""
    layer = nn.Conv2d(4, 5, 3, stride=(2, 1), padding=(1, 0)).double()
    x = torch.randn(6, 4, 7, 7, dtype=torch.float64)
    unfold = torch.nn.functional.unfold
    patches = unfold(x, 3, padding=(1, 0), stride=(2, 1))
    count = patches.shape[2]
    H = torch.einsum("bap,bcp->ac", patches, patches) / 6
    G = second_moment(torch.randn(96, 5, dtype=torch.float64))
    stats = LayerStats(
        H=H[None], G=G[None], mean=patches.sum(2).mean(0)[None], positions=float(count)
    )
    site = replace(conv_site(layer, positions=float(count)), extent=(7, 7))
    settings = {"folds": folds, "rank": 2, "scheme": scheme}
    first, second = method.leave(site, tensors(layer), stats, settings)
    B, at = first.weights["weight"], first.site
    z = torch.nn.functional.conv2d(
        x, B, stride=at.stride, padding=at.padding, dilation=at.dilation, groups=folds
    )
    assert first.site.positions == z[0, 0].numel()
    at = second.site
    seen = unfold(z, at.kernel, padding=at.padding, stride=at.stride, dilation=at.dilation)
    torch.testing.assert_close(second.stats.H[0], torch.einsum("bap,bcp->ac", seen, seen) / 6)
    torch.testing.assert_close(second.stats.mean[0], seen.sum(2).mean(0))
    assert torch.equal(second.stats.G[0], G)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("scheme", [1, 2, 3])
def test_a_change_of_a_factor_costs_what_the_whole_layer_says(scheme: int, diagonal: bool) -> None:
    """The decoder's currency is the layer's; the encoder's too where its moment is a product."""
    layer = nn.Conv2d(4, 5, (3, 2)).double()
    site = replace(conv_site(layer), extent=(7, 7))
    sides = [second_moment(torch.randn(9, size).double()) for size in (4, 3, 2)]
    H = torch.einsum("ab,ij,kl->aikbjl", *sides).reshape(24, 24)
    G = second_moment(torch.randn(9, 5).double())
    if diagonal:
        H, G = H.diagonal(), G.diagonal()
    stats = LayerStats(H=H[None], G=G[None])
    leaves = method.leave(site, tensors(layer), stats, {"folds": 1, "rank": 2, "scheme": scheme})
    B, A = (leaf.weights["weight"] for leaf in leaves)
    matrix = layer.weight.detach().flatten(1)[None]
    for leaf, other in zip(
        leaves, (lambda d: recompose(d, A), lambda d: recompose(B, d)), strict=True
    ):
        change = torch.randn_like(leaf.weights["weight"])
        flat = change.flatten(1)[None]
        inside = predict_error(leaf.stats, flat, flat)
        outside = predict_error(stats, matrix, other(change).flatten(1)[None])
        assert inside == pytest.approx(outside, rel=1e-9)


def test_folds_keep_their_own_moments_in_any_scheme() -> None:
    layer = nn.Conv2d(4, 5, (3, 2)).double()
    site = replace(conv_site(layer), extent=(7, 7))
    stats = stats_for(5, 24)
    first, second = method.leave(site, tensors(layer), stats, {"folds": 2, "rank": 2, "scheme": 1})
    assert first.stats.H.shape == (2, 4, 4) and first.stats.G.shape == (2, 2, 2)
    assert second.stats.H.shape == (1, 12, 12)
    assert bool((torch.linalg.eigvalsh(first.stats.G) > 0).all())


def test_the_bias_takes_up_the_mean_of_what_is_lost() -> None:
    """Outputs keep their mean, and the offer says so; without a bias nothing can be taken up."""
    layer = nn.Conv2d(4, 6, 3).double()
    x = torch.randn(50, 4, 3, 3, dtype=torch.float64) + 2.0
    columns = x.flatten(1)
    stats = LayerStats(
        H=second_moment(columns)[None],
        G=second_moment(torch.randn(20, 6).double())[None],
        mean=columns.mean(0)[None],
    )
    site, settings = conv_site(layer), {"folds": 2, "rank": 2}
    net = network(copy.deepcopy(layer))
    install(net.module, method.apply(net, Choice(site, settings), stats))
    lost = (net.module.c(x) - layer(x)).detach()
    assert float(lost.mean(0).abs().max()) < 1e-10 < 1e-3 < float(lost.abs().max())
    power = lost.flatten(1)
    true = 0.5 * float(torch.einsum("bi,ij,bj->", power, stats.G[0], power)) / 50
    leaves = method.leave(site, tensors(layer), stats, settings)
    assert predicted_with_bias(site, tensors(layer), stats, leaves) == pytest.approx(true)
    none = replace(site, bias="")
    bare = {"weight": layer.weight.detach()}
    kept = method.leave(none, bare, stats, settings)
    assert predicted_with_bias(none, bare, stats, kept) > true


def test_means_that_do_not_fit_their_moment_are_not_used() -> None:
    H = torch.eye(3, dtype=torch.float64)[None]
    good = LayerStats(H=H, G=H, mean=torch.full((1, 3), 0.1).double())
    centred, mean = about_mean(good)
    torch.testing.assert_close(centred.H[0], H[0] - 0.01)
    assert mean is not None
    for wrong in (
        replace(good, mean=None),
        replace(good, mean=torch.full((1, 3), 0.9).double()),  # no moment has this mean
        replace(good, positions=0.0),
        replace(good, H=H[0].diagonal()[None], mean=torch.full((1, 3), 1.1).double()),
    ):
        same, mean = about_mean(wrong)
        assert same is wrong and mean is None
