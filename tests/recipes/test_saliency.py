"""What channels are worth: against brute force, and against a regression done afresh."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.recipes.thin import chain, params
from torch import Tensor

from lamina.errors import DataError
from lamina.forms import find_tensor
from lamina.measure.stats import LayerStats, Stats, predict_error
from lamina.network.discover import discover
from lamina.recipes.compensation import regress
from lamina.recipes.saliency import (
    channel_params,
    count_params,
    covariance,
    filter_norms,
    greedy_order,
    order_removals,
    regressed_order,
    removal_losses,
    with_ridge,
)
from lamina.recipes.widths import Width, find_widths

NETWORK = chain()
WIDTHS, _ = find_widths(NETWORK, discover(NETWORK))


def make_stats(width: Width, diagonal: bool = False, seed: int = 0) -> LayerStats:
    """Statistics of inputs that are correlated and not centred."""
    g = torch.Generator().manual_seed(seed)
    weight = find_tensor(NETWORK.module, width.consumer.weight).flatten(1)
    outputs, inputs = weight.shape
    mixed = torch.randn(inputs, inputs, generator=g, dtype=torch.float64)
    x = torch.randn(4 * inputs, inputs, generator=g, dtype=torch.float64) @ mixed / 9 + 0.7
    y = torch.randn(3 * outputs, outputs, generator=g, dtype=torch.float64)
    H, G = 5 * x.T @ x / len(x), y.T @ y / len(y)
    H, G = (H.diagonal(), G.diagonal()) if diagonal else (H, G)
    return LayerStats(H[None], G[None], 5 * x.mean(0)[None], positions=5.0, scale=0.8, samples=9)


def test_norms_of_filters() -> None:
    weight = NETWORK.module.conv1.weight.detach().double().numpy()
    norms = {"l1": abs(weight).sum((1, 2, 3)), "l2": (weight**2).sum((1, 2, 3)) ** 0.5}
    for name, wanted in norms.items():
        found = filter_norms(NETWORK, WIDTHS[0], name)
        assert torch.allclose(found, torch.from_numpy(wanted))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("width", WIDTHS, ids=lambda w: w.name)
def test_losses_are_the_predicted_errors_of_centred_inputs(width: Width, diagonal: bool) -> None:
    stats = make_stats(width, diagonal)
    weight = find_tensor(NETWORK.module, width.consumer.weight).detach()
    centred = LayerStats(covariance(stats)[None], stats.G, None, 5.0, 0.8, 9)
    losses = removal_losses(stats, weight, width)
    for gone in ([0], [1, 4], [0, 2, 3, 7]):
        change = torch.zeros_like(weight)
        change[:, width.inputs(torch.tensor(gone))] = -weight[:, width.inputs(torch.tensor(gone))]
        matrix, delta = weight.flatten(1)[None], change.flatten(1)[None]
        wanted = predict_error(centred, matrix, delta)
        assert float(losses[gone][:, gone].sum()) == pytest.approx(wanted, rel=1e-6)
        raw = predict_error(stats, matrix, delta)
        assert raw > wanted * 1.01  # the mean would have to be paid for too


def test_greedy_takes_what_costs_least_next() -> None:
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    losses = root @ root.T
    order, costs = greedy_order(losses)
    gone: list[int] = []
    before = highest = 0.0
    for i, cost in zip(order, costs, strict=True):
        rest = [j for j in range(6) if j not in gone]
        sums = {j: float(losses[[*gone, j]][:, [*gone, j]].sum()) for j in rest}
        assert i == min(rest, key=lambda j: sums[j])
        highest = max(highest, sums[i] - before)
        assert cost == pytest.approx(highest)
        before = sums[i]
        gone.append(i)
    assert sorted(order) == list(range(6))


def residual(width: Width, stats: LayerStats, weight: Tensor, gone: list[int]) -> float:
    """The loss after channels are gone and the others were fitted afresh to stand in for them."""
    matrix = weight.double().flatten(1)
    taps = matrix.shape[1] // width.channels
    columns = (torch.tensor(gone)[:, None] * taps + torch.arange(taps)).flatten()
    spread = with_ridge(covariance(stats))
    new = regress(matrix, covariance(stats), torch.zeros(matrix.shape[1]).double(), columns).weight
    assert new is not None
    change = new - matrix
    change[:, columns] = -matrix[:, columns]
    return predict_error(LayerStats(spread[None], stats.G, None, 5.0, 0.8), matrix, change[None])


@pytest.mark.parametrize("width", WIDTHS, ids=lambda w: w.name)
def test_the_regressed_order_is_the_greedy_one_of_fits_done_afresh(width: Width) -> None:
    stats = make_stats(width)
    weight = find_tensor(NETWORK.module, width.consumer.weight).detach()
    order, costs = regressed_order(stats, weight, width)
    assert sorted(order) == list(range(width.channels)) and costs == sorted(costs)
    gone: list[int] = []
    before = highest = 0.0
    for i, cost in list(zip(order, costs, strict=True))[:4]:
        rest = [j for j in range(width.channels) if j not in gone]
        left = {j: residual(width, stats, weight, [*gone, j]) for j in rest}
        assert left[i] == pytest.approx(min(left.values()), rel=1e-6)
        highest = max(highest, left[i] - before)
        assert cost == pytest.approx(highest, rel=1e-5)
        before = left[i]
        gone.append(i)
    alone = removal_losses(stats, weight, width)
    assert before < float(alone[gone][:, gone].sum())  # standing in helps


def test_parameters_are_counted_as_modules_count_them() -> None:
    for counts in itertools.product((8, 5), (12, 1), (10, 3)):
        names = {w.name: n for w, n in zip(WIDTHS, counts, strict=True)}
        a, b, c = counts
        wanted = 27 * a + 2 * a + 9 * a * b + 2 * b + 4 * b * c + c + 4 * c + 4
        assert count_params(NETWORK, WIDTHS, names) == wanted
    whole = params(NETWORK.module)
    for width in WIDTHS:
        less = count_params(NETWORK, WIDTHS, {width.name: width.channels - 1})
        assert whole - less == channel_params(NETWORK, width)


def test_orders() -> None:
    uniform = order_removals(NETWORK, WIDTHS, Stats(), "l1", "uniform")
    assert [r[0] for r in uniform] == sorted(r[0] for r in uniform)
    first = [r for r in uniform if r[0] <= 0.5]
    assert [sum(r[1] == i for r in first) for i in range(3)] == [4, 6, 5]
    ranked = order_removals(NETWORK, WIDTHS, Stats(), "l1", "global")
    for number, width in enumerate(WIDTHS):
        norms = filter_norms(NETWORK, width, "l1")
        wanted = norms.sort().indices.tolist()
        assert [r[2] for r in ranked if r[1] == number] == wanted
        assert [r[0] for r in ranked if r[1] == number] == pytest.approx(
            (norms.sort().values / norms.mean()).tolist()
        )
    with pytest.raises(DataError, match="needs calibration data"):
        order_removals(NETWORK, WIDTHS, Stats(), "l1", "currency")
