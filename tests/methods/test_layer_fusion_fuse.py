"""Groups, shared weights and their statistics, against brute force and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.errors import MethodError
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.layer_fusion.fuse import (
    LINKAGES,
    along,
    combine,
    groups_of,
    joined,
    members_of,
    merge_order,
    mix,
    shared_error,
    shared_stats,
    solve,
)
from lamina.network.sites import Site, as_matrix

SITE = Site("a", shape=(3, 4))
CONV = Site("c", op="conv", shape=(4, 2, 3, 3), groups=2)


def spd(n: int, seed: int, groups: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, n, 2 * n, generator=g, dtype=torch.float64)
    return x @ x.mT / n


def make(site: Site, count: int, seed: int = 0) -> tuple[list[Tensor], list[LayerStats]]:
    groups, out, width = site.matrix_shape
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(site.shape, generator=g, dtype=torch.float64) for _ in range(count)]
    stats = [
        LayerStats(
            H=spd(width, 10 * i + seed, groups), G=spd(out, 10 * i + 5 + seed, groups),
            mean=torch.full((groups, width), float(i)), positions=1.0 + i, scale=0.5 + i,
        )
        for i in range(count)
    ]  # fmt: skip
    return weights, stats


# --- groups ---------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12))
def test_groups_are_the_connected_components(count, pairs) -> None:
    pairs = [(a % count, b % count) for a, b in pairs]
    found = groups_of(count, pairs)
    reach = torch.eye(count, dtype=torch.bool)
    for a, b in pairs:
        reach[a, b] = reach[b, a] = True
    for _ in range(count):
        reach = (reach.int() @ reach.int()) > 0
    for i, j in itertools.product(range(count), repeat=2):
        assert (found[i] == found[j]) == bool(reach[i, j])
    seen = [m for group in members_of(found) for m in group]
    assert sorted(seen) == list(range(count))  # nobody is in two groups, nobody in none
    assert found == groups_of(count, [(b, a) for a, b in pairs] + pairs)


def test_a_pair_of_nobody_is_refused() -> None:
    with pytest.raises(MethodError, match="not there"):
        groups_of(2, [(0, 2)])


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("seed", range(4))
def test_merging_is_the_agglomeration_of_scipy(linkage, seed) -> None:
    from scipy.cluster.hierarchy import cut_tree
    from scipy.cluster.hierarchy import linkage as tree
    from scipy.spatial.distance import pdist, squareform

    g = torch.Generator().manual_seed(seed)
    condensed = pdist(torch.randn(7, 3, generator=g).numpy())
    found = merge_order(torch.tensor(squareform(condensed)), linkage)
    made = tree(condensed, method=linkage)
    assert [height for _, height in found[1:]] == pytest.approx(made[:, 2].tolist())
    for partition, _ in found:
        labels = cut_tree(made, n_clusters=len(set(partition)))[:, 0].tolist()
        assert groups_of(7, _pairs(labels)) == partition


def _pairs(labels) -> list[tuple[int, int]]:
    return [(i, j) for i in range(len(labels)) for j in range(i) if labels[i] == labels[j]]


@given(st.integers(2, 8), st.integers(0, 1000))
@settings(deadline=None)
def test_partitions_grow_from_where_they_start(count, seed) -> None:
    g = torch.Generator().manual_seed(seed)
    apart = torch.rand(count, count, generator=g)
    apart = apart + apart.mT
    start = along(count, (count + 1) // 2, "cycle")
    for options in ({}, {"start": start}, {"neighbours": True}):
        found = [p for p, _ in merge_order(apart, **options)]
        assert found[0] == tuple(options.get("start", range(count))) and len(set(found[-1])) == 1
        for one, two in itertools.pairwise(found):
            assert len(set(two)) == len(set(one)) - 1 and joined(one, two) == two
        if options.get("neighbours"):
            assert all(list(p) == sorted(p) for p in found)  # runs only


def test_patterns_do_not_look_at_weights() -> None:
    assert along(8, 2, "cycle") == (0, 1) * 4
    assert along(8, 2, "neighbours") == (0,) * 4 + (1,) * 4
    assert along(7, 7, "neighbours") == tuple(range(7))
    with pytest.raises(MethodError, match="unknown pattern"):
        along(3, 2, "spiral")
    with pytest.raises(MethodError, match="as many groups"):
        along(3, 4, "cycle")


# --- combining ------------------------------------------------------------------------------------


def test_ways_to_combine() -> None:
    a, b, c = torch.tensor([[1.0, -4.0]]), torch.tensor([[3.0, 1.0]]), torch.tensor([[3.0, 0.0]])
    assert combine([a, b]).tolist() == [[2.0, -1.5]]
    assert combine([a, b, c], "freeze").tolist() == c.tolist()  # nearest to both others
    assert combine([a, b], "freeze").tolist() == a.tolist()  # of equals the first
    assert combine([b, a, c], "first").tolist() == b.tolist()
    assert combine([a, b, c], "max").tolist() == [[3.0, -4.0]]
    with pytest.raises(MethodError, match="choose from"):
        combine([a], "sum")
    with pytest.raises(MethodError, match="one shape"):
        combine([a, a.T])


@pytest.mark.parametrize("how", ["mean", "freeze", "first", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_layers_combine_to_themselves(how, dtype) -> None:
    w = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for count in (2, 3, 7):
        found = combine([w] * count, how, rescale=True)
        assert found.dtype == dtype and torch.equal(found, w)


def test_the_mean_of_unlike_layers_is_small_and_can_be_rescaled() -> None:
    g = torch.Generator().manual_seed(0)
    layers = [torch.randn(64, 64, generator=g) for _ in range(4)]
    norms = torch.stack([w.norm() for w in layers]).mean()
    assert float(combine(layers).norm() / norms) == pytest.approx(0.5, abs=0.02)  # 1 / sqrt(4)
    assert float(combine(layers, rescale=True).norm() / norms) == pytest.approx(1.0, abs=1e-5)
    assert bool((combine([torch.zeros(2, 2)] * 2, rescale=True) == 0).all())


@given(st.integers(2, 6), st.integers(0, 1000), st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_mixing_keeps_every_number(count, seed, share) -> None:
    g = torch.Generator().manual_seed(seed)
    layers = [torch.randn(3, 4, generator=g) for _ in range(count)]
    found = mix(layers, seed, share)
    assert torch.equal(torch.stack(found).sort(0).values, torch.stack(layers).sort(0).values)
    again, other = mix(layers, seed, share), mix(layers, seed + 1, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(mix(layers, seed, 0.5), other, strict=True))


def test_mixing_nothing_all_and_with_noise() -> None:
    a, b = torch.zeros(50, 50), torch.ones(50, 50) + torch.arange(50.0)
    assert all(torch.equal(x, y) for x, y in zip(mix([a, b], 0, 0.0), (a, b), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(mix([a, b], 0, 1.0), (b, a), strict=True))
    noisy = mix([b, b], 0, 0.0, noise=0.01)[0] - b
    assert float(noisy.std() / b.std()) == pytest.approx(0.01, rel=0.1)
    with pytest.raises(MethodError, match="cannot mix"):
        mix([a, b], 0, 2.0)


# --- the shared weight of least loss --------------------------------------------------------------


@pytest.mark.parametrize("site", [SITE, CONV])
def test_solving_gives_the_least_predicted_loss(site) -> None:
    weights, stats = make(site, 3)
    exact = _solved(site, weights, stats)
    found = solve(site, weights, stats)
    least = shared_error(site, weights, stats, exact)
    assert shared_error(site, weights, stats, found) == pytest.approx(least, rel=1e-3)
    assert least < 0.9 * shared_error(site, weights, stats, combine(weights))
    for seed in range(5):  # no small step from the exact one is better
        step = 1e-3 * torch.randn(site.shape, generator=torch.Generator().manual_seed(seed))
        assert shared_error(site, weights, stats, exact + step) > least


def _solved(site: Site, weights: list[Tensor], stats: list[LayerStats]) -> Tensor:
    """The normal equations as one dense system for each group."""
    blocks = []
    for g in range(site.groups):
        _, out, width = site.matrix_shape
        left = torch.zeros(out * width, out * width, dtype=torch.float64)
        right = torch.zeros(out * width, dtype=torch.float64)
        for w, s in zip(weights, stats, strict=True):
            system = s.scale * torch.kron(s.G[g], s.H[g])
            left += system
            right += system @ as_matrix(site, w)[g].flatten()
        blocks.append(torch.linalg.solve(left, right).reshape(out, width))
    return torch.stack(blocks).reshape(site.shape)


def test_solving_with_diagonal_moments_is_a_weighted_mean() -> None:
    weights, stats = make(SITE, 2)
    thin = [
        LayerStats(H=s.H.diagonal(dim1=1, dim2=2), G=s.G.diagonal(dim1=1, dim2=2)) for s in stats
    ]
    parts = [s.G[0][:, None] * s.H[0] for s in thin]
    mean = sum(p * w for p, w in zip(parts, weights, strict=True)) / sum(parts)
    torch.testing.assert_close(solve(SITE, weights, thin), mean, rtol=1e-5, atol=1e-5)


def test_equal_layers_are_solved_by_themselves() -> None:
    weights, stats = make(SITE, 2)
    assert torch.equal(solve(SITE, [weights[0]] * 2, stats), weights[0])
    assert shared_error(SITE, [weights[0]] * 2, stats, weights[0]) == 0.0


def test_data_free_the_worst_member_counts() -> None:
    weights, _ = make(SITE, 3)
    one = combine(weights)
    worst = max(
        float(torch.linalg.matrix_norm(one - w, 2) / torch.linalg.matrix_norm(w, 2))
        for w in weights
    )
    assert shared_error(SITE, weights, [None] * 3, one) == pytest.approx(worst)


# --- statistics of a shared weight ----------------------------------------------------------------


def test_shared_statistics_are_exact_where_they_can_be() -> None:
    _, stats = make(SITE, 3)
    same = [LayerStats(H=s.H, G=stats[0].G, scale=s.scale) for s in stats]  # one G: a Kronecker sum
    both = shared_stats(same)
    for seed in range(3):
        change = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed)).double()
        true = sum(predict_error(s, change, change) for s in same)
        assert predict_error(both, change, change) == pytest.approx(true)
    assert shared_stats(stats[:1]) is stats[0]


@pytest.mark.parametrize("site", [SITE, CONV])
def test_shared_statistics_are_right_for_independent_changes(site) -> None:
    _, stats = make(site, 4)
    both = shared_stats(stats)
    draws = torch.randn(
        4000, *site.matrix_shape, generator=torch.Generator().manual_seed(0)
    ).double()
    changes = list(draws)
    true = sum(predict_error(s, c, c) for s in stats for c in changes[:500]) / 500
    found = sum(predict_error(both, c, c) for c in changes[:500]) / 500
    assert found == pytest.approx(true, rel=0.05)  # in the mean; the same draws
    for moment in (both.H, both.G):
        assert float(torch.linalg.eigvalsh(moment).min()) > 0
    assert both.positions == pytest.approx(float(both.mean.mean()) + 1)  # one mixture for all


def test_shared_statistics_are_nearest_to_the_sum() -> None:
    """No other weights of the members give a product nearer to the sum (a grid of them)."""
    _, stats = make(SITE, 2)
    whole = sum(s.scale * torch.kron(s.G[0], s.H[0]) for s in stats)

    def off(G: Tensor, H: Tensor) -> float:
        product = torch.kron(G, H)
        size = (whole * product).sum() / product.pow(2).sum()
        return float((whole - size * product).norm())

    both = shared_stats(stats)
    best = off(both.G[0], both.H[0])
    for a, b in itertools.product(torch.linspace(0, 1, 21).tolist(), repeat=2):
        G = a * stats[0].G[0] + (1 - a) * stats[1].G[0]
        H = b * stats[0].H[0] + (1 - b) * stats[1].H[0]
        assert best <= off(G, H) + 1e-9


def test_diagonals_make_all_diagonal() -> None:
    _, stats = make(SITE, 2)
    thin = LayerStats(H=stats[1].H.diagonal(dim1=1, dim2=2), G=stats[1].G)
    both = shared_stats([stats[0], thin])
    assert both.H.shape == (1, 4) and both.G.shape == (1, 3, 3) and both.mean is None
