"""Removal of channels and components: closed forms against brute force, and the budget's shares."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.measure.collaborative import (
    Removal,
    Running,
    decompose,
    eliminate_channels,
    fisher,
    fit_sensitivity,
    global_rates,
    refit,
    removals_at,
    remove_units,
    unit_scores,
)
from lamina.measure.stats import LayerStats


def moment(size: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * size, size, generator=g, dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=g, dtype=torch.float64)
    return x.T @ x / len(x)


def problem(n: int, channels: int, taps: int, seed: int = 0):
    """A weight, an elementwise importance, and a state after a removal of each kind."""
    g = torch.Generator().manual_seed(seed)
    whole = torch.randn(n, channels * taps, generator=g, dtype=torch.float64)
    F = torch.rand(whole.shape, generator=g, dtype=torch.float64)
    kept = torch.ones(channels, dtype=torch.bool)
    kept[1] = False
    now = decompose(whole * kept.repeat_interleave(taps), kept, min(whole.shape))
    now = decompose(
        (now.left[:, :-1] * now.values[:-1]) @ now.right[:, :-1].T, kept, len(now.values) - 1
    )
    return whole, F, now


def without(now: Running, unit: int, from_: torch.Tensor | None = None) -> torch.Tensor:
    """The weight without a unit (a channel, or after them a component), element by element."""
    weight = (now.weight if from_ is None else from_).clone()
    channels = len(now.kept)
    taps = weight.shape[1] // channels
    if unit < channels:
        weight[:, unit * taps : (unit + 1) * taps] = 0
        return weight
    i = unit - channels
    piece = now.values[i] * torch.outer(now.left[:, i], now.right[:, i])
    if from_ is not None:  # what is left of the component where channels are gone
        piece = piece * (from_ != 0).any(0)
    return weight - piece


def brute_score(whole, F, now: Running, unit: int, gamma: float) -> float:
    """The definition: one removal, and the mean over all second removals."""
    channels = len(now.kept)
    units = [c for c in range(channels) if now.kept[c]]
    units += [channels + i for i in range(len(now.values))]

    def Q(weight):
        return float((F * (weight - whole) ** 2).sum())

    first = without(now, unit)
    others = [v for v in units if v != unit]
    after = []
    for v in others:
        if unit >= channels:  # both families are of the weight that is left
            second = without(now, v, None) + first - now.weight
            if v < channels:
                taps = whole.shape[1] // channels
                second = first.clone()
                second[:, v * taps : (v + 1) * taps] = 0
        else:
            second = without(now, v, first)
        after.append(Q(second))
    return Q(first) + gamma * sum(after) / len(after)


@pytest.mark.parametrize(("n", "channels", "taps"), [(4, 3, 1), (3, 4, 2), (6, 3, 3), (2, 5, 1)])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_the_closed_form_is_the_average_over_all_second_removals(n, channels, taps, gamma):
    whole, F, now = problem(n, channels, taps)
    of_channels, of_parts = unit_scores(whole, now, F, gamma)
    for c in range(channels):
        if now.kept[c]:
            assert float(of_channels[c]) == pytest.approx(brute_score(whole, F, now, c, gamma))
        else:
            assert math.isinf(of_channels[c])
    for i in range(len(now.values)):
        wanted = brute_score(whole, F, now, channels + i, gamma)
        assert float(of_parts[i]) == pytest.approx(wanted)


def test_the_look_ahead_matters():
    whole, F, now = problem(5, 4, 2)
    plain, ahead = unit_scores(whole, now, F, 0.0), unit_scores(whole, now, F, 0.9)
    assert not torch.allclose(plain[1] / plain[1].sum(), ahead[1] / ahead[1].sum())


@given(st.integers(0, 10_000))
def test_scores_without_look_ahead_are_never_negative(seed):
    whole, F, now = problem(3, 3, 2, seed)
    scores = torch.cat(unit_scores(whole, now, F, 0.0))
    assert bool((scores >= -1e-9).all())


def test_a_channel_of_zeros_costs_nothing_and_goes_first():
    whole, F, _ = problem(4, 5, 2)
    whole[:, 6:8] = 0
    found = list(remove_units(whole, F, 5, gamma=0.0))
    assert found[0].kept == (0, 1, 2, 4)
    assert found[0].loss == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_a_removal_ends_with_one_channel_or_one_component(gamma):
    whole, F, _ = problem(6, 5, 2)
    found = list(remove_units(whole, F, 5, gamma))
    assert min(len(found[-1].kept), found[-1].rank) == 1
    sizes = [len(r.kept) + r.rank for r in found]
    assert sizes == sorted(sizes, reverse=True)
    for r in found:
        assert r.rank <= min(6, 2 * len(r.kept)), "the true bound of the rank"
    assert all(set(b.kept) <= set(a.kept) for a, b in pairwise(found))
    quick = list(remove_units(whole, F, 5, gamma, steps=3))
    assert len(quick) <= 4 < len(found)


def test_targets_are_met_by_the_first_removal_that_can():
    found = [Removal((0, 1), 4, 0.1), Removal((0, 1), 3, 0.2), Removal((0,), 1, 0.3)]
    costs = {4: 8.0, 3: 6.0, 1: 2.0}
    chosen = removals_at(found, lambda r: costs[r.rank], [7.0, 6.5, 3.0, 1.0])
    assert chosen == [found[1], found[2]]
    assert all(costs[r.rank] <= 7.0 for r in chosen)


def test_the_fisher_of_a_weight_is_the_product_of_both_diagonals():
    H, G = moment(6), moment(4)
    F = fisher(LayerStats(H=H[None], G=G[None]), (4, 6))
    assert float(F[2, 3]) == pytest.approx(float(G[2, 2] * H[3, 3]))
    diagonal = LayerStats(H=H.diagonal()[None], G=G.diagonal()[None])
    assert torch.equal(fisher(diagonal, (4, 6)), F)
    assert torch.equal(fisher(None, (4, 6)), torch.ones(4, 6, dtype=torch.float64))


# --- channels by blocks --------------------------------------------------------------------------


def best_loss(matrix, H, G, columns) -> float:
    """Least squares on some columns, by lstsq on square roots, and its loss."""
    root = torch.linalg.cholesky(H)
    solution = torch.linalg.lstsq(root[columns].T, (matrix @ root).T).solution.T
    whole = torch.zeros_like(matrix)
    whole[:, columns] = solution
    delta = whole - matrix
    return float(torch.einsum("ij,ik,kl,jl->", delta, G, delta, H))


@pytest.mark.parametrize("taps", [1, 3])
def test_each_step_removes_the_channel_that_costs_least(taps):
    n, c = 4, 5
    matrix = torch.randn(n, c * taps, dtype=torch.float64)
    H, G = moment(c * taps), moment(n, 1)
    sets = eliminate_channels(matrix, H, G, c, [4, 3, 2, 1])
    left = list(range(c))
    for m in (4, 3, 2, 1):
        losses = {}
        for j in left:
            rest = [i for i in left if i != j]
            columns = torch.tensor([i * taps + t for i in rest for t in range(taps)])
            losses[j] = best_loss(matrix, H, G, columns)
        left.remove(min(losses, key=losses.get))
        assert sets[m] == tuple(left)


def test_without_moments_the_smallest_channels_go():
    matrix = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.0, 1.0, 2.0, 0.1]])
    assert eliminate_channels(matrix, None, None, 4, [2, 3]) == {3: (0, 1, 2), 2: (0, 2)}
    weighed = eliminate_channels(matrix, torch.tensor([0.01, 1.0, 1.0, 1.0]), torch.ones(2), 4, [3])
    assert weighed == {3: (1, 2, 3)}


def test_several_at_a_time():
    matrix, H, G = torch.randn(3, 12, dtype=torch.float64), moment(12), moment(3)
    sets = eliminate_channels(matrix, H, G, 12, [9, 2], steps=4)
    assert sorted(map(len, sets.values())) == [2, 9]
    assert set(sets[2]) < set(sets[9])


def test_refit_is_the_least_squares_solution():
    matrix, H, G = torch.randn(3, 6, dtype=torch.float64), moment(6), moment(3)
    columns = torch.tensor([0, 2, 5])
    whole = torch.zeros_like(matrix)
    whole[:, columns] = refit(matrix, H, columns)
    delta = whole - matrix
    loss = float(torch.einsum("ij,ik,kl,jl->", delta, G, delta, H))
    assert loss == pytest.approx(best_loss(matrix, H, G, columns))
    assert loss < best_loss(matrix, H, G, columns[:2])
    assert torch.equal(refit(matrix, H.diagonal(), columns), matrix[:, columns])


# --- shares of a budget --------------------------------------------------------------------------


@given(st.floats(1e-6, 10), st.floats(0.1, 12))
def test_an_exponential_is_fitted_exactly(a, b):
    rates = [0.1, 0.3, 0.5, 0.8]
    top = a * math.exp(b * 0.8)
    found = fit_sensitivity(rates, [a * math.exp(b * r) for r in rates])
    assert found == pytest.approx((a / top, b), rel=1e-6)


def test_the_fit_is_numpys_and_leaves_out_what_has_no_logarithm():
    import numpy as np

    rates, losses = [-0.2, 0.0, 0.1, 0.4, 0.5, 0.9], [1.0, 1.0, 0.02, 0.1, 0.9, 0.7]
    r, q = np.array(rates[2:]), np.array(losses[2:]) / 0.9
    slope, offset = np.polyfit(r, np.log(q), 1, w=q**0.25)  # polyfit squares its weights
    assert fit_sensitivity(rates, losses) == pytest.approx((math.exp(offset), slope))
    assert fit_sensitivity([0.1, 0.2], [0.0, 0.0]) == (0.0, 1e-6)
    assert fit_sensitivity([0.5], [2.0])[1] == 1e-6
    assert fit_sensitivity([0.1, 0.9], [1.0, 0.5])[1] == 1e-6, "a loss that falls"


layers = st.lists(
    st.tuples(st.floats(1e-3, 1.0), st.floats(0.5, 8.0), st.floats(1.0, 1e6)),
    min_size=1, max_size=6,
)  # fmt: skip


@given(layers, st.floats(0.01, 0.94))
def test_the_budget_is_met_and_the_rates_are_optimal(found, share):
    fits, macs = [(a, b) for a, b, _ in found], [f for *_, f in found]
    rates = global_rates(fits, macs, share)
    assert all(0 <= r <= 0.95 for r in rates)
    removed = sum(f * r for f, r in zip(macs, rates, strict=True))
    assert removed == pytest.approx(share * sum(macs), rel=1e-6)
    # Equal slopes where a rate is free; no gain from moving to or from a clipped one.
    slopes = [a * b * math.exp(b * r) for (a, b), r in zip(fits, rates, strict=True)]
    free = [s for s, r in zip(slopes, rates, strict=True) if 1e-6 < r < 0.95 - 1e-6]
    if free:
        assert max(free) == pytest.approx(min(free), rel=1e-4)
        for s, r in zip(slopes, rates, strict=True):
            assert r >= 1e-6 or s >= min(free) * (1 - 1e-4)
            assert r <= 0.95 - 1e-6 or s <= max(free) * (1 + 1e-4)


def test_more_than_can_be_removed_clips_every_layer():
    assert global_rates([(1.0, 1.0), (0.5, 3.0)], [1.0, 2.0], 0.99) == [0.95, 0.95]
    assert global_rates([], [], 0.5) == []
