"""Spectra and scores of a layer, against the matrices themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina.errors import MethodError, PlanError
from lamina.measure.schemes import Scheme, fold
from lamina.plan.ranks import minimax
from lamina.plan.spectral import SCORES, Spectral, divisors, measure_spectra

KERNEL = (3, 3)


def weight(seed: int = 0, f: int = 6, c: int = 8, taps: int = 9) -> torch.Tensor:
    """A matrix whose folds decay at their own speed."""
    g = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, c, dtype=torch.float64).repeat_interleave(taps)
    return torch.randn(f, c * taps, generator=g, dtype=torch.float64) * scale


def truncated(matrix: torch.Tensor, folds: int, rank: int, scheme: Scheme) -> np.ndarray:
    """The matrix of the pair, by numpy's SVD, fold by fold, laid out as the usual matrix."""
    f, n = matrix.shape
    parts = fold(matrix, folds, scheme).numpy()
    best = np.zeros_like(parts)
    for i, part in enumerate(parts):
        u, s, vh = np.linalg.svd(part, full_matrices=False)
        best[i] = (u[:, :rank] * s[:rank]) @ vh[:rank]
    # fold only moves entries: the same move tells where each came from
    places = torch.arange(f * n, dtype=torch.float64).reshape(f, n)
    out = np.zeros(f * n)
    out[fold(places, folds, scheme).numpy().astype(int).ravel()] = best.ravel()
    return out.reshape(f, n)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_the_exact_score_is_the_error_of_the_truncated_matrix(number: int) -> None:
    matrix, scheme = weight(), Scheme(number, KERNEL)
    layer = measure_spectra("a", matrix, 8, kernel=KERNEL, schemes=(number,))
    whole = np.linalg.norm(matrix.numpy(), 2)
    for folds in (1, 2, 4, 8):
        key = (number, folds)
        ask = layer.ask(key, "exact")
        for rank in range(1, layer.most(key) + 1):
            error = np.linalg.norm(matrix.numpy() - truncated(matrix, folds, rank, scheme), 2)
            assert ask(rank) == pytest.approx(error / whole, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_scores_bound_one_another_and_fall_with_the_rank(number: int) -> None:
    layer = measure_spectra("a", weight(), 8, kernel=KERNEL, schemes=(number,))
    for folds in (1, 2, 4, 8):
        key = (number, folds)
        exact, rss, paper = (layer.ask(key, score) for score in ("exact", "rss", "paper"))
        rows = [[ask(j) for j in range(layer.most(key) + 1)] for ask in (exact, rss, paper)]
        assert (np.diff(rows) <= 1e-9).all()
        assert (np.diff(rows, axis=0) >= -1e-9).all()
        assert np.allclose(np.array(rows)[:, -1], 0)
        if folds == 1 and number == 0:
            assert np.allclose(rows[0], rows[2])


def test_the_published_score_is_no_bound() -> None:
    """The negative control of the root of k: folds that agree add up."""
    matrix = torch.cat([torch.eye(4, dtype=torch.float64)] * 4, 1)
    layer = measure_spectra("a", matrix, 16)
    assert layer.ask((0, 4), "repo")(1) < 0.51 < layer.ask((0, 4), "exact")(1)
    assert layer.ask((0, 4), "paper")(1) == pytest.approx(layer.ask((0, 4), "exact")(1))
    drawn = [measure_spectra(str(s), weight(s), 8) for s in range(30)]
    broken = [x.ask((0, 8), "repo")(3) < x.ask((0, 8), "exact")(3) - 1e-9 for x in drawn]
    assert sum(broken) > 5


def test_units_are_the_parameters_of_a_pair() -> None:
    layer = measure_spectra("a", weight(), 8, kernel=KERNEL, schemes=(0, 1, 2, 3))
    for (number, folds), unit in layer.units.items():
        scheme = Scheme(number, KERNEL)
        encode = folds * (8 // folds) * scheme.before
        decode = 6 * folds * scheme.after
        assert unit == encode + decode, (number, folds)
    assert layer.dense == 6 * 72


@pytest.mark.parametrize("score", SCORES)
def test_a_layer_that_is_ten_times_larger_gets_the_same_ranks(score: str) -> None:
    def picks(scale: float) -> list[tuple[int, int]]:
        layers = [measure_spectra("a", weight(0), 8), measure_spectra("b", scale * weight(1), 8)]
        found = minimax([layer.layer(score) for layer in layers], 432)
        return [(pick.folds, pick.rank) for pick in found.layers]

    assert picks(1.0) == picks(10.0)


def test_a_rotation_of_the_outputs_changes_no_singular_value() -> None:
    turn = torch.linalg.qr(weight(3, 6, 6, 1)).Q
    before, after = (measure_spectra("a", m, 8) for m in (weight(), turn @ weight()))
    for key, values in before.spectra.items():
        assert torch.allclose(values, after.spectra[key], atol=1e-9)


def test_a_layer_of_low_rank_needs_no_more() -> None:
    matrix = weight(0, 12, 2, 9)[:, :2] @ weight(1, 2, 8, 9)
    layer = measure_spectra("a", matrix, 8).layer()
    picks = minimax([layer], layer.dense - 1)
    assert picks.error < 1e-7
    assert minimax([layer], 2 * (12 + 72)).layers[0].rank == 2


def test_a_layer_of_zeros_costs_the_least_and_loses_nothing() -> None:
    layer = measure_spectra("a", torch.zeros(12, 72), 8).layer()
    picks = minimax([layer], layer.dense - 1)
    assert picks.error == 0 and picks.layers[0].rank == 1


def test_folds_can_be_limited_and_the_nearest_is_found() -> None:
    layer = measure_spectra("a", weight(), 8, folds=(2, 4))
    assert sorted(layer.spectra) == [(0, 1), (0, 2), (0, 4)]
    assert [layer.nearest(k)[1] for k in (1, 3, 9)] == [1, 4, 4]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_other_numbers_can_stand_in_a_curve() -> None:
    layer = measure_spectra("a", weight(), 8, folds=(1,))
    curve = layer.with_values((0, 1), np.arange(6.0, -1, -1), base=3).curves[0, 1]
    assert [curve.error(j) for j in (0, 6)] == [6.0, 0.0] and curve.base == 3
    assert curve.params(1) == 3 + 6 + 72


def test_what_cannot_be_scored_is_refused() -> None:
    layer: Spectral = measure_spectra("a", weight(), 8)
    with pytest.raises(PlanError, match="unknown score"):
        layer.layer("best")
    with pytest.raises(MethodError, match="not finite"):
        measure_spectra("a", torch.full((4, 4), float("nan")), 4)
