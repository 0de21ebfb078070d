"""Rules of one argument, against scans of the argument."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import InfeasibleError, PlanError
from lamina.plan.baselines import (
    constant_energy,
    constant_ratio,
    hull_slopes,
    l_rank,
    svd_error,
    tail_shares,
)
from lamina.plan.spectral import Spectral, measure_spectra

SHAPES = ((16, 4, 9), (24, 16, 1), (32, 24, 9))  # outputs, channels, taps
RULES = (constant_ratio, constant_energy, svd_error, l_rank)


def network(seed: int = 0) -> list[Spectral]:
    g = torch.Generator().manual_seed(seed)
    found = []
    for i, (f, c, taps) in enumerate(SHAPES):
        u = torch.linalg.qr(torch.randn(f, f, generator=g, dtype=torch.float64)).Q
        v = torch.randn(f, c * taps, generator=g, dtype=torch.float64)
        matrix = u * torch.logspace(0, -1 - i, f, dtype=torch.float64) @ v * (1 + i)
        found.append(measure_spectra(str(i), matrix, c, positions=4.0 ** (2 - i)))
    return found


LAYERS = network()
DENSE = sum(layer.dense for layer in LAYERS)
LEAST = sum(layer.units[0, 1] for layer in LAYERS)


def total(ranks: list[int]) -> int:
    sizes = [j * layer.units[0, 1] for j, layer in zip(ranks, LAYERS, strict=True)]
    return sum(min(size, layer.dense) for size, layer in zip(sizes, LAYERS, strict=True))


def scanned(ranks_at: Callable[[float], list[int]], values: list[float], budget: float) -> int:
    """The most parameters within the budget that any argument gives."""
    return max(t for t in (total(ranks_at(v)) for v in values) if t <= budget)


def singular(layer: Spectral) -> np.ndarray:
    return layer.spectra[0, 1][0].numpy()


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.8, 0.97])
def test_one_ratio_for_all_layers(share: float) -> None:
    picks = constant_ratio(LAYERS, share * DENSE)

    def ranks_at(ratio: float) -> list[int]:
        return [max(1, math.floor(ratio * len(singular(x)) + 0.5)) for x in LAYERS]

    values = [*np.linspace(0, 1, 4001)]
    assert picks.params == scanned(ranks_at, values, share * DENSE)
    ranks = [pick.rank for pick in picks.layers]
    assert any(all(r in (0, w) for r, w in zip(ranks, ranks_at(v), strict=True)) for v in values)


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.8])
def test_one_share_of_the_energy_for_all_layers(share: float, norm: str) -> None:
    picks = constant_energy(LAYERS, share * DENSE, norm)
    power = 2 if norm == "frobenius" else 1

    def ranks_at(limit: float) -> list[int]:
        found = []
        for layer in LAYERS:
            s = singular(layer) ** power
            left = [s[j:].sum() / s.sum() for j in range(len(s) + 1)]
            found.append(max(1, next(j for j, x in enumerate(left) if x <= limit + 1e-12)))
        return found

    values = [v for x in LAYERS for v in tail_shares(singular(x) ** power)]
    assert picks.params == scanned(ranks_at, values, share * DENSE)


@pytest.mark.parametrize("share", [0.15, 0.5, 0.8])
def test_one_error_for_all_layers(share: float) -> None:
    picks = svd_error(LAYERS, share * DENSE)

    def ranks_at(limit: float) -> list[int]:
        found = []
        for layer in LAYERS:
            s = np.append(singular(layer) / singular(layer)[0], 0)
            found.append(max(1, next(j for j, x in enumerate(s) if x <= limit + 1e-12)))
        return found

    values = [v for x in LAYERS for v in singular(x) / singular(x)[0]]
    assert picks.params == scanned(ranks_at, values, share * DENSE)
    assert {p.folds for p in picks.layers} <= {0, 1}
    other = svd_error(LAYERS, share * DENSE, folds=3)
    assert {p.folds for p in other.layers} - {0} <= {4, 3}  # nearest divisors of 4, 16, 24


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_one_price_for_all_layers(share: float) -> None:
    picks = l_rank(LAYERS, share * DENSE)

    def ranks_at(price: float) -> list[int]:
        found = []
        for layer in LAYERS:
            s, unit = singular(layer) ** 2, layer.units[0, 1]
            rows = [(price * layer.dense * layer.positions, 0.0, len(s))]
            for j in range(1, len(s) + 1):
                if j * unit < layer.dense:
                    rows.append((price * j * unit * layer.positions + s[j:].sum(), 1.0, j))
            found.append(min(rows)[2])
        return found

    values = [*np.geomspace(1e-12, 1e6, 20001)]
    assert picks.params == scanned(ranks_at, values, share * DENSE)


@settings(max_examples=40, deadline=None)
@given(shares=st.tuples(st.floats(0, 1), st.floats(0, 1)), rule=st.sampled_from(RULES))
def test_budgets_are_kept_and_more_of_it_never_means_less(
    shares: tuple[float, float], rule: Callable[..., object]
) -> None:
    budgets = [LEAST + s * (DENSE - LEAST) for s in sorted(shares)]
    less, more = (rule(LAYERS, budget) for budget in budgets)
    assert less.params <= budgets[0] and more.params <= budgets[1]
    assert less.params <= more.params
    for layer, a, b in zip(LAYERS, less.layers, more.layers, strict=True):
        assert a.params <= b.params <= layer.dense
        assert all(p.rank == 0 or p.params == p.rank * layer.units[0, 1] for p in (a, b))
    assert rule(LAYERS, DENSE).error == 0


@pytest.mark.parametrize("rule", RULES)
def test_out_of_reach_is_reported_with_the_nearest(rule: Callable[..., object]) -> None:
    with pytest.raises(InfeasibleError) as caught:
        rule(LAYERS, LEAST - 1)
    assert caught.value.nearest == {"params": float(LEAST)}
    assert {p.rank for p in rule(LAYERS, LEAST).layers} == {1}


@pytest.mark.parametrize("rule", RULES)
def test_what_is_reported_is_the_relative_spectral_error(rule: Callable[..., object]) -> None:
    for layer, pick in zip(LAYERS, rule(LAYERS, 0.4 * DENSE).layers, strict=True):
        s = singular(layer)
        assert pick.error == pytest.approx(s[pick.rank] / s[0] if pick.rank else 0.0, abs=1e-12)


def test_slopes_fall_and_belong_to_corners() -> None:
    slopes = hull_slopes(LAYERS[2])
    assert (np.diff(slopes) <= 0).all() and slopes[0] == np.inf


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(PlanError, match="unknown norm"):
        constant_energy(LAYERS, DENSE, "max")
