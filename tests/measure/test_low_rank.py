"""The decomposition in the currency, against numpy's SVD and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina.measure.low_rank import (
    balance,
    damp,
    encoded_moments,
    factorize,
    fold_basis,
    fold_blocks,
    losses_of_ranks,
    split_moments,
)
from lamina.measure.schemes import PLAIN, Scheme, expand, fold
from lamina.measure.stats import LayerStats, predict_error


def moment(n: int, samples: int = 0) -> torch.Tensor:
    x = torch.randn(samples or 3 * n, n, dtype=torch.float64) @ torch.randn(n, n).double()
    return x.T @ x / len(x)


def product(encode: torch.Tensor, decode: torch.Tensor, scheme: Scheme = PLAIN) -> torch.Tensor:
    return decode @ torch.block_diag(*expand(encode, scheme))


def symmetric_root(m: torch.Tensor) -> np.ndarray:
    full = torch.diag(m) if m.dim() == 1 else m
    values, vectors = np.linalg.eigh(full.numpy())
    return vectors * np.sqrt(values) @ vectors.T


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
    seen = symmetric_root(G) @ matrix.numpy() @ symmetric_root(H)
    s = np.linalg.svd(seen, compute_uv=False)
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


SCHEMES = [Scheme(number, (3, 2)) for number in range(4)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("folds", [1, 2])
@pytest.mark.parametrize("kind", ["full", "diagonal", "none"])
def test_every_scheme_gives_the_matrix_back_and_says_what_smaller_ranks_lose(
    scheme: Scheme, folds: int, kind: str
) -> None:
    f, n = 5, 4 * 6
    matrix = torch.randn(f, n, dtype=torch.float64)
    stats, H, G = None, None, None
    if kind != "none":
        H, G = moment(n), moment(f)
        if kind == "diagonal":
            H, G = H.diagonal(), G.diagonal()
        stats = LayerStats(H=H[None], G=G[None], scale=3.0)
        H, G = damp(H), damp(G)
    ranks = list(range(1, min(f * scheme.after, n // folds // scheme.after) + 1))
    got = losses_of_ranks(matrix, stats, H, fold_basis(matrix, H, G, folds, scheme), ranks)
    assert len(got) == len(ranks) > 1
    for rank, loss in zip(ranks, got, strict=True):
        made = product(*factorize(matrix, H, G, folds, rank, scheme), scheme)
        true = predict_error(stats, matrix[None], (made - matrix)[None])
        assert loss == pytest.approx(true, rel=1e-6, abs=1e-7)
    torch.testing.assert_close(made, matrix, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_a_scheme_is_the_truncated_svd_of_its_own_matrix(scheme: Scheme) -> None:
    matrix = torch.randn(5, 24, dtype=torch.float64)
    for rank in (1, 3):
        got = product(*factorize(matrix, None, None, 2, rank, scheme), scheme)
        want = []
        for part in fold(matrix, 2, scheme).numpy():
            u, s, vh = np.linalg.svd(part, full_matrices=False)
            want.append(u[:, :rank] * s[:rank] @ vh[:rank])
        np.testing.assert_allclose(fold(got, 2, scheme), np.stack(want), atol=1e-9)


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_moments_that_are_kronecker_products_are_split_exactly(scheme: Scheme) -> None:
    """Then the encoder is optimal too: nothing near it is better."""
    sides = {2: moment(4), 3: moment(3), 5: moment(2)}
    c, h, w = sides.values()
    H = torch.einsum("ab,ij,kl->aikbjl", c, h, w).reshape(24, 24)
    inner, taps = split_moments(H, 1, scheme)
    again = torch.einsum("ab,ij->iajb", inner[0], taps[0])
    split = fold(torch.linalg.cholesky(H).mT, 1, scheme)[0].unflatten(0, (24, -1))
    want = torch.einsum("rta,rsb->tasb", split, split)
    torch.testing.assert_close(again, want)
    matrix, G = torch.randn(5, 24, dtype=torch.float64), moment(5)
    stats = LayerStats(H=H[None], G=G[None])
    encode, decode = factorize(matrix, H, G, 1, 3, scheme)

    def loss(B: torch.Tensor, A: torch.Tensor) -> float:
        return predict_error(stats, matrix[None], (product(B, A, scheme) - matrix)[None])

    best = loss(encode, decode)
    # The closed form: the tail of the spectrum in the metric of both sides, by symmetric roots.
    rows = np.kron(symmetric_root(G), symmetric_root(taps[0]))
    seen = rows @ fold(matrix, 1, scheme)[0].numpy() @ symmetric_root(inner[0])
    tail = np.linalg.svd(seen, compute_uv=False)[3:]
    assert best == pytest.approx(0.5 * (tail**2).sum(), rel=1e-8)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(10):
            other = loss(encode + size * torch.randn_like(encode), decode)
            assert other > best
            assert loss(encode, decode + size * torch.randn_like(decode)) > best
    plain = factorize(matrix, None, None, 1, 3, scheme)
    assert loss(*plain) > 1.05 * best  # negative control: the unweighted pair is worse
