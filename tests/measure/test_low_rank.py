"""The decomposition in the currency, against numpy's SVD and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina.measure.low_rank import (
    balance,
    bound_paper,
    bound_rss,
    damp,
    encoded_moments,
    factorize,
    fold_basis,
    fold_blocks,
    fold_spectra,
    losses_of_ranks,
)
from lamina.measure.stats import LayerStats, predict_error


def moment(n: int, samples: int = 0) -> torch.Tensor:
    x = torch.randn(samples or 3 * n, n, dtype=torch.float64) @ torch.randn(n, n).double()
    return x.T @ x / len(x)


def product(encode: torch.Tensor, decode: torch.Tensor) -> torch.Tensor:
    return decode @ torch.block_diag(*encode)


def exact(matrix: torch.Tensor, folds: int, rank: int) -> float:
    """Relative operator-norm error of fold-wise truncation, by numpy alone."""
    m = matrix.numpy()
    parts = []
    for part in np.split(m, folds, axis=1):
        u, s, vh = np.linalg.svd(part, full_matrices=False)
        parts.append(u[:, :rank] * s[:rank] @ vh[:rank])
    return np.linalg.norm(np.concatenate(parts, 1) - m, 2) / np.linalg.norm(m, 2)


def repo_score(spectra: torch.Tensor, largest: float, rank: int) -> float:
    """What the authors' code allocates with: eq. 2 without sqrt(k)."""
    return float(spectra[:, rank].max() / largest) if rank < spectra.shape[1] else 0.0


@pytest.mark.parametrize(("f", "n", "folds"), [(5, 12, 1), (5, 12, 3), (9, 8, 2), (3, 12, 6)])
def test_fold_spectra_are_numpys(f: int, n: int, folds: int) -> None:
    matrix = torch.randn(f, n, dtype=torch.float64)
    for got, part in zip(
        fold_spectra(matrix, folds), np.split(matrix.numpy(), folds, 1), strict=True
    ):
        np.testing.assert_allclose(got, np.linalg.svd(part, compute_uv=False), atol=1e-10)


def test_bounds_are_ordered_and_the_one_without_sqrt_k_is_no_bound() -> None:
    violated = 0
    for _ in range(30):
        f, folds, width = (int(torch.randint(lo, 8, ())) for lo in (2, 1, 1))
        matrix = torch.randn(f, folds * width, dtype=torch.float64)
        spectra, largest = fold_spectra(matrix, folds), float(fold_spectra(matrix, 1)[0, 0])
        last = np.inf
        for rank in range(min(f, width) + 1):
            true = exact(matrix, folds, rank)
            rss, paper = (b(spectra, largest, rank) for b in (bound_rss, bound_paper))
            assert paper >= rss - 1e-12
            assert rss >= true - 1e-7  # Gram noise near full rank
            assert rss <= last + 1e-12
            last = rss
            if folds == 1:
                assert rss == pytest.approx(true, abs=1e-7)
                assert paper == pytest.approx(true, abs=1e-7)
            violated += repo_score(spectra, largest, rank) < true - 1e-6
        assert paper == rss == 0.0
    assert violated > 5


@pytest.mark.parametrize(("f", "n"), [(6, 12), (12, 6), (7, 24)])
@pytest.mark.parametrize("folds", [1, 2, 3])
@pytest.mark.parametrize("metric", [False, True])
def test_full_rank_gives_the_matrix_back(f: int, n: int, folds: int, metric: bool) -> None:
    matrix = torch.randn(f, n, dtype=torch.float64)
    H, G = (damp(moment(n)), damp(moment(f))) if metric else (None, None)
    pair = factorize(matrix, H, G, folds, min(f, n // folds))
    torch.testing.assert_close(product(*pair), matrix, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("f", "n", "folds"), [(6, 12, 1), (6, 12, 2), (12, 6, 3), (5, 24, 4)])
def test_without_data_it_is_the_truncated_svd_of_every_fold(f: int, n: int, folds: int) -> None:
    matrix = torch.randn(f, n, dtype=torch.float64)
    for rank in range(1, min(f, n // folds) + 1):
        got = product(*factorize(matrix, None, None, folds, rank))
        parts = []
        for part in np.split(matrix.numpy(), folds, 1):
            u, s, vh = np.linalg.svd(part, full_matrices=False)
            parts.append(u[:, :rank] * s[:rank] @ vh[:rank])
        np.testing.assert_allclose(got, np.concatenate(parts, 1), atol=1e-9)


@pytest.mark.parametrize("diagonal", [False, True])
def test_one_fold_is_optimal_for_the_predicted_loss(diagonal: bool) -> None:
    f, n, rank = 7, 10, 3
    matrix = torch.randn(f, n, dtype=torch.float64)
    H, G = moment(n), moment(f)
    if diagonal:
        H, G = H.diagonal().contiguous(), G.diagonal().contiguous()
    stats = LayerStats(H=H[None], G=G[None])

    def loss(m: torch.Tensor) -> float:
        return predict_error(stats, matrix[None], (m - matrix)[None])

    encode, decode = factorize(matrix, H, G, 1, rank)
    best = loss(product(encode, decode))
    # The closed form: the tail of the whitened spectrum, by another root than Cholesky's.

    def root(m: torch.Tensor) -> np.ndarray:
        full = torch.diag(m) if m.dim() == 1 else m
        values, vectors = np.linalg.eigh(full.numpy())
        return vectors * np.sqrt(values) @ vectors.T

    s = np.linalg.svd(root(G) @ matrix.numpy() @ root(H), compute_uv=False)
    assert best == pytest.approx(0.5 * (s[rank:] ** 2).sum(), rel=1e-8)
    u, s, vh = torch.linalg.svd(matrix)
    plain = loss(u[:, :rank] * s[:rank] @ vh[:rank])
    assert plain > best * 1.05  # negative control: the unweighted SVD is worse here
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(20):
            B = encode + size * torch.randn_like(encode)
            A = decode + size * torch.randn_like(decode)
            assert loss(product(B, A)) > best


def test_the_joint_decoder_beats_the_decoders_of_single_folds() -> None:
    f, n, folds, rank = 6, 12, 3, 2
    matrix, H, G = torch.randn(f, n, dtype=torch.float64), moment(n), moment(f)
    stats = LayerStats(H=H[None], G=G[None])
    encode, decode = factorize(matrix, H, G, folds, rank)
    best = predict_error(stats, matrix[None], (product(encode, decode) - matrix)[None])
    blocks = torch.block_diag(*fold_blocks(H, folds))  # what each fold knows alone
    alone = factorize(matrix, blocks, G, folds, rank)
    other = predict_error(stats, matrix[None], (product(*alone) - matrix)[None])
    assert best < other
    for _ in range(30):
        A = decode + 0.01 * torch.randn_like(decode)
        assert predict_error(stats, matrix[None], (product(encode, A) - matrix)[None]) > best


@pytest.mark.parametrize("folds", [1, 2])
def test_balancing_keeps_the_product_and_evens_the_factors(folds: int) -> None:
    encode = torch.randn(folds, 3, 8, dtype=torch.float64) * 100
    decode = torch.randn(6, folds * 3, dtype=torch.float64) / 100
    B, A = balance(encode, decode)
    torch.testing.assert_close(product(B, A), product(encode, decode))
    for i in range(folds):
        torch.testing.assert_close(
            torch.linalg.svdvals(B[i]), torch.linalg.svdvals(A[:, 3 * i : 3 * i + 3])
        )


@pytest.mark.parametrize("diagonal", [False, True])
def test_encoded_moments_are_those_of_the_block_diagonal_matrix(diagonal: bool) -> None:
    matrix, encode = torch.randn(5, 12).double(), torch.randn(3, 2, 4).double()
    H = moment(12)
    given = H.diagonal().contiguous() if diagonal else H
    full = torch.diag(given) if diagonal else H
    B = torch.block_diag(*encode)
    product_, inner = encoded_moments(matrix, given, encode)
    torch.testing.assert_close(product_.flatten(1), matrix @ full @ B.T)
    torch.testing.assert_close(inner.reshape(6, 6), B @ full @ B.T)


@pytest.mark.parametrize("folds", [1, 2, 4])
@pytest.mark.parametrize("kind", ["full", "diagonal", "none"])
def test_losses_of_ranks_are_the_predicted_errors_of_the_pairs(folds: int, kind: str) -> None:
    f, n = 5, 8
    matrix = torch.randn(f, n, dtype=torch.float64)
    stats, H, G = None, None, None
    if kind != "none":
        H, G = moment(n), moment(f)
        if kind == "diagonal":
            H, G = H.diagonal(), G.diagonal()
        stats = LayerStats(H=H[None], G=G[None], scale=3.0)
        H, G = damp(H), damp(G)
    ranks = range(1, min(f, n // folds) + 1)
    got = losses_of_ranks(matrix, stats, H, fold_basis(matrix, H, G, folds), list(ranks))
    for rank, loss in zip(ranks, got, strict=True):
        change = product(*factorize(matrix, H, G, folds, rank)) - matrix
        true = predict_error(stats, matrix[None], change[None])
        assert loss == pytest.approx(true, rel=1e-6, abs=1e-7)


def test_a_layer_of_low_rank_is_found_and_survives_ranks_beyond_it() -> None:
    matrix = torch.randn(8, 2).double() @ torch.randn(2, 12).double()
    H, G = damp(moment(12)), damp(moment(8))
    for rank in (2, 3, 5):
        got = product(*factorize(matrix, H, G, 1, rank))
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, matrix, rtol=0, atol=1e-7)


@pytest.mark.parametrize("diagonal", [False, True])
def test_damping_makes_any_moment_usable(diagonal: bool) -> None:
    dead = torch.zeros(4) if diagonal else torch.zeros(4, 4)
    assert torch.equal(damp(dead), torch.ones(4) if diagonal else torch.eye(4))
    thin = moment(4, samples=2)
    thin = thin.diagonal() if diagonal else thin
    values = damp(thin) if diagonal else torch.linalg.eigvalsh(damp(thin))
    mean = float(thin.mean() if diagonal else thin.diagonal().mean())
    assert float(values.min()) >= 0.0099 * mean
