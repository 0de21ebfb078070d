"""Distances: against numpy, scipy and brute force; what they do and do not see."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lamina.errors import MethodError
from lamina.methods.layer_fusion.distances import DISTANCES, distances, standardised

SHAPES = [(6, 4), (4, 9), (5, 5)]
BLIND = ("cov", "cov_eig", "moments", "w2", "w1", "emd", "sinkhorn")  # to the order of rows


def draw(rows: int, columns: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g, dtype=torch.float64) + 0.3


def between(name: str, a: Tensor, b: Tensor) -> float:
    return float(distances([a, b], name)[0, 1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DISTANCES)
def test_it_is_zero_for_equal_layers_never_negative_and_symmetric(name, shape) -> None:
    for seed in range(5):
        a, b = draw(*shape, seed), draw(*shape, seed + 100)
        assert DISTANCES[name](a, a) == pytest.approx(0.0, abs=1e-6)
        assert DISTANCES[name](a, b) > 1e-4  # two drawn layers differ to every measure
        assert DISTANCES[name](a, b) == pytest.approx(DISTANCES[name](b, a), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DISTANCES)
def test_the_order_of_rows_is_seen_by_some_and_not_by_others(name, shape) -> None:
    a = draw(*shape, 1)
    turned = a[torch.randperm(shape[0], generator=torch.Generator().manual_seed(3))]
    assert not torch.equal(a, turned)
    if name in BLIND:
        assert between(name, a, turned) == pytest.approx(0.0, abs=1e-6)
    elif name != "kl" or shape != (1, 1):
        assert between(name, a, turned) > 1e-3


def reference(name: str, a: np.ndarray, b: np.ndarray) -> float:
    """Every measure from its textbook definition."""
    from scipy.linalg import sqrtm
    from scipy.spatial.distance import cdist, jensenshannon
    from scipy.stats import wasserstein_distance

    fro = np.linalg.norm
    if name == "euclidean":
        return fro(a - b) / np.sqrt(fro(a) * fro(b))
    if name == "manhattan":
        return np.abs(a - b).sum() / np.sqrt(np.abs(a).sum() * np.abs(b).sum())
    if name == "cosine":
        return 1 - (a * b).sum() / (fro(a) * fro(b))
    if name == "cov":
        one, two = np.corrcoef(a.T), np.corrcoef(b.T)
        return fro(one - two) / (fro(one) + fro(two))
    if name == "cov_eig":
        x, y = ((m - m.mean(0)) / m.std(0) for m in (a, b))
        s, t = (np.linalg.svd(m, compute_uv=False) for m in (x, y))
        return fro(s - t) / np.sqrt(fro(s) * fro(t))
    if name == "cka":
        x, y = (m - m.mean(0) for m in (a, b))
        return 1 - fro(x.T @ y) ** 2 / (fro(x.T @ x) * fro(y.T @ y))
    if name == "kl":
        p, q = (np.exp(m).ravel() / np.exp(m).sum() for m in (a, b))
        return jensenshannon(p, q) ** 2
    if name == "moments":
        return math.hypot(a.mean() - b.mean(), a.std() - b.std())
    if name == "w2":
        s, t = (np.cov(m.T, bias=True) for m in (a, b))
        root = sqrtm(s)
        inner = np.real(np.trace(sqrtm(root @ t @ root)))
        square = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * inner
        return np.sqrt(square)
    if name == "w1":
        return wasserstein_distance(a.ravel(), b.ravel())
    assert name == "emd"
    cost = cdist(a, b, "sqeuclidean")
    orders = itertools.permutations(range(len(a)))
    return np.sqrt(min(np.mean([cost[i, o] for i, o in enumerate(order)]) for order in orders))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [n for n in DISTANCES if n != "sinkhorn"])
def test_it_is_its_definition(name, shape) -> None:
    # sqrtm of a singular covariance (fewer rows than columns) is itself inexact
    close = 1e-4 if name == "w2" and shape[0] <= shape[1] else 1e-9
    for seed in range(3):
        a, b = draw(*shape, seed), draw(*shape, seed + 50)
        assert between(name, a, b) == pytest.approx(
            reference(name, a.numpy(), b.numpy()), abs=close
        )


def test_sinkhorn_is_the_debiased_dual_of_a_plain_iteration() -> None:
    a, b = draw(6, 3, 0), draw(6, 3, 1)

    def cost(x: Tensor, y: Tensor) -> np.ndarray:
        return ((x[:, None] - y[None]) ** 2).sum(-1).numpy()

    blur = 0.05 * cost(a, b).mean()

    def dual(m: np.ndarray) -> float:
        u = v = np.full(len(m), 1.0)
        kernel = np.exp(-m / blur)
        for _ in range(5000):
            u = 1 / (kernel @ (v / len(m)))
            v = 1 / (kernel.T @ (u / len(m)))
        return blur * (np.log(u).mean() + np.log(v).mean())

    square = dual(cost(a, b)) - 0.5 * (dual(cost(a, a)) + dual(cost(b, b)))
    assert between("sinkhorn", a, b) == pytest.approx(math.sqrt(square), rel=0.01)
    # entropy is small: it comes near to the exact transport
    assert between("sinkhorn", a, b) == pytest.approx(between("emd", a, b), rel=0.1)


@given(st.integers(0, 10_000), st.floats(0.1, 20))
@settings(max_examples=25, deadline=None)
def test_what_scale_and_rotation_do_not_change(seed: int, scale: float) -> None:
    a, b = draw(6, 4, seed), draw(6, 4, seed + 1)
    turn = torch.linalg.qr(draw(4, 4, seed + 2)).Q
    assert between("cosine", a, scale * a) == pytest.approx(0.0, abs=1e-12)
    assert between("cosine", scale * a, b) == pytest.approx(between("cosine", a, b), abs=1e-9)
    assert between("cka", a, scale * a @ turn) == pytest.approx(0.0, abs=1e-9)
    assert between("cka", a @ turn, b) == pytest.approx(between("cka", a, b), abs=1e-9)
    assert between("euclidean", scale * a, scale * b) == pytest.approx(between("euclidean", a, b))
    assert between("w2", a @ turn, b @ turn) == pytest.approx(between("w2", a, b), abs=1e-6)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_transports_are_metrics(seed: int) -> None:
    a, b, c = (draw(5, 3, seed + i) for i in range(3))
    for name in ("w2", "w1", "emd", "moments"):
        assert between(name, a, c) <= between(name, a, b) + between(name, b, c) + 1e-9
    # coarser descriptions are no farther apart than what they describe
    assert between("w2", a, b) <= between("emd", a, b) + 1e-9


def test_the_signed_difference_of_norms_is_no_distance() -> None:
    """The reference code's `cov` gives 0 for correlations of equal norm; ours does not."""
    a = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [2.0, 1.0]], dtype=torch.float64)
    b = a * torch.tensor([1.0, -1.0])  # the correlation changes its sign, its norm does not
    x, y = standardised(a), standardised(b)
    assert float((x.mT @ x).norm() - (y.mT @ y).norm()) == pytest.approx(0.0, abs=1e-12)
    assert between("cov", a, b) > 0.5


@pytest.mark.parametrize("name", DISTANCES)
def test_constant_columns_and_zeros_give_numbers(name) -> None:
    zero, flat = torch.zeros(4, 3), torch.ones(4, 3)
    found = distances([zero, flat, draw(4, 3, 0), zero], name)
    assert bool(torch.isfinite(found).all()) and float(found[0, 3]) == 0.0


@pytest.mark.parametrize("name", DISTANCES)
def test_planted_duplicates_are_the_nearest(name) -> None:
    layers = [draw(8, 5, seed) * (1 + 0.5 * seed) + 0.2 * seed for seed in range(5)]
    layers.append(layers[2] + 1e-4 * draw(8, 5, 99))
    apart = distances(layers, name) + torch.eye(6) * 1e9
    assert divmod(int(apart.argmin()), 6) == (2, 5)


def test_what_has_no_distance_is_refused() -> None:
    with pytest.raises(MethodError, match="one shape"):
        distances([torch.zeros(2, 3), torch.zeros(3, 2)])
    with pytest.raises(MethodError, match="not finite"):
        distances([torch.zeros(2, 2), torch.full((2, 2), torch.nan)])
    with pytest.raises(MethodError, match="choose from euclidean"):
        distances([torch.zeros(2, 2)] * 2, "near")
