"""kmeans: against exhaustive search, both backends alike, zeros kept, sizes counted."""

from __future__ import annotations

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lamina import codecs
from lamina.errors import MethodError, SiteError
from lamina.forms import Codebook, Plain, install
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.base import Choice, Method
from lamina.methods.kmeans import (
    SIZES,
    assign,
    codebook_bits,
    fit_centroids,
    method,
    shared,
    sizes_of,
)
from lamina.methods.kmeans.centroids import BINS, optimal_cuts
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network


def squares(values: np.ndarray, centroids: np.ndarray, weights: np.ndarray | None = None) -> float:
    gap = (values - centroids.astype(np.float64)[assign(values, centroids)]) ** 2
    return float((gap if weights is None else weights * gap).sum())


def brute_force(values: np.ndarray, k: int, weights: np.ndarray) -> float:
    """Least weighted squares of k clusters, over every way to cut the sorted values."""
    order = np.argsort(values)
    v, w = values[order], weights[order]
    best = np.inf
    for inner in itertools.combinations(range(1, len(v)), k - 1):
        total = 0.0
        for a, b in itertools.pairwise((0, *inner, len(v))):
            mean = np.average(v[a:b], weights=w[a:b])
            total += float((w[a:b] * (v[a:b] - mean) ** 2).sum())
        best = min(best, total)
    return best


def lloyd(values: np.ndarray, k: int, rounds: int = 25) -> float:
    """Plain Lloyd from quantiles, the usual way."""
    centroids = np.quantile(values, (np.arange(k) + 0.5) / k)
    for _ in range(rounds):
        index = np.abs(values[:, None] - centroids).argmin(1)
        centroids = np.array(
            [
                values[index == i].mean() if (index == i).any() else c
                for i, c in enumerate(centroids)
            ]
        )
    return float(((values[:, None] - centroids) ** 2).min(1).sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_few_values_get_the_best_codebook_there_is(k: int, weighted: bool) -> None:
    rng = np.random.default_rng(k)
    for _ in range(10):
        values = rng.normal(size=11) ** 3
        weights = rng.gamma(0.5, size=11) + 0.01 if weighted else np.ones(11)
        (centroids,) = fit_centroids(values, [k], weights if weighted else None)
        got = squares(values, centroids, weights)
        assert got == pytest.approx(brute_force(values, k, weights), rel=1e-4, abs=1e-9)


@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=60, unique=True),
    st.integers(1, 9),
    st.integers(0, 1000),
)
def test_both_backends_make_the_same_cuts(points: list[int], most: int, seed: int) -> None:
    pytest.importorskip("numba")
    rng = np.random.default_rng(seed)
    v, w = np.sort(np.array(points) * 0.37), rng.integers(1, 4, len(points)) * 0.7
    sums = [np.concatenate([[0.0], np.cumsum(s)]) for s in (w, w * v, w * v * v)]
    most = min(most, len(v))
    fast, slow = (optimal_cuts(*sums, most, backend=b) for b in ("numba", "numpy"))
    np.testing.assert_array_equal(fast, slow)


@pytest.mark.parametrize("n", [50, 2000, 30000])
def test_both_backends_make_the_same_codebooks(n: int) -> None:
    pytest.importorskip("numba")
    values = np.random.default_rng(n).standard_t(3, size=n) * 0.02
    fast, slow = (fit_centroids(values, SIZES, backend=b) for b in ("numba", "numpy"))
    for a, b in zip(fast, slow, strict=True):
        np.testing.assert_array_equal(a, b)


def test_many_values_go_through_bins_and_still_beat_lloyd() -> None:
    values = np.random.default_rng(0).normal(size=4 * BINS)
    for k, centroids in zip((8, 16), fit_centroids(values, (8, 16)), strict=True):
        got = squares(values, centroids)
        assert got < lloyd(values, k)
        # Max 1960, table II: the optimal quantizer of a Gaussian (here with sampling noise)
        assert got / len(values) == pytest.approx({8: 0.03454, 16: 0.009497}[k], rel=0.05)


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 8]))
def test_exact_zeros_stay_zero_and_the_zero_centroid_does_not_move(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=60) + 0.3
    values[rng.random(60) < 0.5] = 0.0
    values[0] = 0.0
    (centroids,) = fit_centroids(values, [k])
    assert len(centroids) <= k
    assert np.all(np.diff(centroids) > 0)
    dense = centroids[assign(values, centroids)]
    assert (dense[values == 0] == 0).all()


def test_without_zeros_no_centroid_is_spent_on_zero() -> None:
    values = np.array([-1.0, -1.0, 2.0, 2.0])
    assert fit_centroids(values, [2])[0].tolist() == [-1.0, 2.0]
    assert fit_centroids(np.zeros(5), [2, 4])[1].tolist() == [0.0]


def test_assignment_is_to_the_nearest() -> None:
    rng = np.random.default_rng(1)
    values, centroids = rng.normal(size=200), np.sort(rng.normal(size=7)).astype(np.float32)
    nearest = np.abs(values[:, None] - centroids.astype(np.float64)).argmin(1)
    np.testing.assert_array_equal(assign(values, centroids), nearest)


def test_larger_codebooks_are_never_worse() -> None:
    values = np.random.default_rng(2).laplace(size=9000)
    got = [squares(values, c) for c in fit_centroids(values, SIZES)]
    assert got == sorted(got, reverse=True)
    assert got[-1] < 1e-3 * got[0]


def layer_and_site(kind: str) -> tuple[nn.Module, Site]:
    if kind == "linear":
        layer: nn.Module = nn.Linear(20, 12)
        return layer, Site("net.c", "layer", "linear", "c", "c.weight", "c.bias", (12, 20))
    if kind == "grouped":
        layer = nn.Conv2d(8, 12, 3, groups=2)
        return layer, Site("net.c", "layer", "conv", "c", "c.weight", "c.bias", (12, 4, 3, 3), 2)
    if kind == "transposed":
        layer = nn.ConvTranspose2d(6, 4, 3, bias=False)
        return layer, Site("net.c", "layer", "conv_transpose", "c", "c.weight", "", (6, 4, 3, 3))
    layer = nn.Embedding(30, 8)
    return layer, Site("net.c", "layer", "embedding", "c", "c.weight", "", (30, 8))


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


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("kind", ["linear", "grouped", "transposed", "embedding"])
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
    assert min(errors) >= 0
    assert len(offers) >= 4
    json.dumps([c.steps[0].settings for c in offers])
    params = sum(p.numel() for p in layer.parameters())
    for offer in offers:
        net = network(copy.deepcopy(layer))
        edits = method.apply(net, Choice(site, offer.steps[0].settings), stats)
        install(net.module, edits)
        assert offer.cost.params == params
        assert offer.cost.macs == site.macs
        new = net.module.c.weight.detach()
        change = as_matrix(site, new - weights["weight"])
        assert offer.error == predict_error(stats, as_matrix(site, weights["weight"]), change)
        form = edits[0].values
        assert isinstance(form, Codebook)
        rest = 32 * (params - new.numel())
        assert offer.cost.bits == pytest.approx(codebook_bits(form) + rest, abs=64)
        index = form.index.reshape(form.index.shape[0], -1).numpy()
        assert codebook_bits(form) == 8 * (codecs.length(index) + 4 * len(form.centroids) + 1)
        if "bias" in weights:
            assert isinstance(edits[1].values, Plain)
            assert torch.equal(net.module.c.bias, before["bias"])


def test_weighting_by_the_currency_wins_where_inputs_differ() -> None:
    layer, site = layer_and_site("linear")
    stats = stats_for(site)
    weights = {k: v.detach() for k, v in layer.named_parameters()}
    offers = method.propose(site, weights, stats)
    assert any(c.steps[0].settings["weighted"] for c in offers)

    def error(weighted: bool) -> float:
        (form,) = shared(site, weights["weight"], stats, [8], weighted)
        return predict_error(
            stats, weights["weight"][None], (form.dense() - weights["weight"])[None]
        )

    assert error(True) < error(False)


def test_few_distinct_values_are_kept_exactly() -> None:
    _, site = layer_and_site("linear")
    weight = torch.tensor([-0.1, 0.0, 0.7])[torch.randint(0, 3, (12, 20))]
    offers = method.propose(site, {"weight": weight}, None)
    assert offers[-1].error == 0.0
    (form,) = shared(site, weight, None, [16], False)
    assert torch.equal(form.dense(), weight)
    assert len(form.centroids) == 3


def test_zero_is_the_first_symbol_and_symbols_are_dense() -> None:
    _, site = layer_and_site("linear")
    weight = torch.randn(12, 20) * (torch.rand(12, 20) < 0.4)
    for form in shared(site, weight, None, SIZES, False):
        assert float(form.centroids[0]) == 0.0
        assert torch.equal(form.index == 0, form.dense() == 0)
        assert bool((form.centroids.abs().diff() >= 0).all())
        assert sorted(set(form.index.flatten().tolist())) == list(range(len(form.centroids)))
        assert bool((form.dense()[weight == 0] == 0).all())


def test_sizes_of_long_tensors_are_within_two_percent() -> None:
    site = Site("a", module="a", weight="a.weight", shape=(300, 400))
    weight = torch.randn(300, 400) * (torch.rand(300, 400) < 0.2) * torch.rand(300, 1)
    forms = shared(site, weight, None, SIZES[:6], False)
    for got, form in zip(sizes_of(forms), forms, strict=True):
        assert got == pytest.approx(codebook_bits(form), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    _, site = layer_and_site("linear")
    (form,) = shared(site, torch.randn(12, 20).to(dtype), None, [8], False)
    assert form.dense().dtype == dtype
    assert form.centroids.dtype == torch.float32
    assert int(form.index.max()) == len(form.centroids) - 1


def test_bad_input_is_named() -> None:
    layer, site = layer_and_site("linear")
    net = network(layer)
    for size in (1, 257, 2.0, None):
        with pytest.raises(MethodError, match="k is 2 to 256"):
            method.apply(net, Choice(site, {"k": size}), None)
    with pytest.raises(MethodError, match="needs statistics"):
        method.apply(net, Choice(site, {"k": 4, "weighted": True}), None)
    with pytest.raises(SiteError, match=r"net\.c.*not one layer"):
        method.apply(net, Choice(Site("net.c", kind="chain"), {"k": 4}), None)
    layer.weight.data[0, 0] = float("inf")
    with pytest.raises(SiteError, match=r"not finite at net\.c"):
        method.apply(net, Choice(site, {"k": 4}), None)
    assert method.propose(site, {"weight": torch.zeros(0, 20)}, None) == ()
    assert method.leave(site, {}, None, {}) == ()


def test_it_is_a_method_with_a_card() -> None:
    import lamina.methods.kmeans as module

    assert isinstance(method, Method)
    assert method.final
    for part in ("**What.**", "**Where.**", "**Costs", "**Does not help**", "**Reference.**"):
        assert part in module.__doc__
