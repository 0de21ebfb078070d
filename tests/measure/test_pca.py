"""PCA of outputs, against numpy's of the outputs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina.measure.pca import (
    output_covariance,
    output_energies,
    principal_bias,
    principal_pair,
)
from lamina.measure.stats import LayerStats

F, N, POSITIONS, SAMPLES = 6, 10, 5, 40


def case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LayerStats]:
    """A weight, a bias, inputs `[samples * positions, n]` with a mean, and their statistics."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES * POSITIONS, N, generator=g, dtype=torch.float64)
    x = x * torch.linspace(0.2, 3, N) + torch.randn(N, generator=g, dtype=torch.float64)
    W = torch.randn(F, N, generator=g, dtype=torch.float64)
    b = torch.randn(F, generator=g, dtype=torch.float64)
    stats = LayerStats(
        H=(x.mT @ x / SAMPLES)[None],
        G=torch.eye(F, dtype=torch.float64)[None],
        mean=(x.sum(0) / SAMPLES)[None],
        positions=float(POSITIONS),
        samples=SAMPLES,
    )
    return W, b, x, stats


def pair(W: torch.Tensor, b: torch.Tensor | None, stats: LayerStats, rank: int):
    encode, decode = principal_pair(W, stats, rank)
    product = decode @ encode[0]
    return product, principal_bias(b, W, product, stats)


def test_the_covariance_is_that_of_the_outputs() -> None:
    W, b, x, stats = case()
    seen = np.cov((x @ W.mT + b).numpy().T, bias=True)
    assert np.allclose(output_covariance(W, stats).numpy(), seen)
    assert np.allclose(output_energies(W, stats).numpy(), np.linalg.eigvalsh(seen)[::-1])


def test_of_a_diagonal_moment_the_rest_is_taken_for_zero() -> None:
    W, _, x, stats = case()
    thin = LayerStats(H=stats.H.diagonal(dim1=1, dim2=2), G=stats.G, positions=float(POSITIONS))
    H = torch.diag((x * x).mean(0))
    assert torch.allclose(output_covariance(W, thin), W @ H @ W.mT)


@pytest.mark.parametrize("rank", range(1, F + 1))
def test_the_pair_is_the_best_affine_map_of_its_rank(rank: int) -> None:
    W, b, x, stats = case()
    y = x @ W.mT + b
    product, bias = pair(W, b, stats, rank)
    ours = x @ product.mT + bias
    u, s, vh = np.linalg.svd((y - y.mean(0)).numpy(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank] + y.mean(0).numpy()
    assert np.allclose(ours.numpy(), best, atol=1e-9)
    lost = float((y - ours).square().sum()) / len(y)
    assert lost == pytest.approx(float(output_energies(W, stats)[rank:].sum()), abs=1e-9)


@pytest.mark.parametrize("rank", range(1, F + 1))
def test_the_mean_output_stays_with_and_without_a_bias(rank: int) -> None:
    W, b, x, stats = case(1)
    for old in (b, None):
        product, bias = pair(W, old, stats, rank)
        y = x @ W.mT + (0 if old is None else old)
        assert torch.allclose((x @ product.mT + bias).mean(0), y.mean(0), atol=1e-10)


def test_adding_the_bias_in_full_moves_the_mean() -> None:
    """The negative control: the published algebra, `b + mean(y) - U U^T mean(y)`."""
    W, b, x, stats = case()
    y = x @ W.mT + b
    product, bias = pair(W, b, stats, 2)
    kept = torch.linalg.eigh(output_covariance(W, stats)).eigenvectors[:, -2:]
    published = b + y.mean(0) - kept @ (kept.mT @ y.mean(0))
    moved = (x @ product.mT + published).mean(0) - y.mean(0)
    assert float(moved.norm()) > 0.1
    assert torch.allclose(moved, published - bias, atol=1e-10)


def test_full_rank_changes_nothing() -> None:
    W, b, _, stats = case()
    product, bias = pair(W, b, stats, F)
    assert torch.allclose(product, W) and torch.allclose(bias, b)


def test_without_a_mean_the_bias_stays() -> None:
    W, b, _, stats = case()
    blind = LayerStats(H=stats.H, G=stats.G, positions=stats.positions)
    product, bias = pair(W, b, blind, 2)
    assert torch.equal(bias, b) and np.linalg.matrix_rank(product.numpy()) == 2


def test_the_factors_are_balanced() -> None:
    W, _, _, stats = case()
    encode, decode = principal_pair(W, stats, 3)
    assert encode.shape == (1, 3, N) and decode.shape == (F, 3)
    sides = [torch.linalg.svdvals(part) for part in (encode[0], decode)]
    assert torch.allclose(*sides)
