"""Certificates against float64 SVDs of whatever random layers hypothesis thinks of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.measure.certificates import (
    bound_paper,
    bound_rss,
    exact_errors,
    largest_eigenvalue,
    score_repo,
    unfolded_bound,
)
from lamina.measure.schemes import Scheme, fold
from lamina.measure.spectra import fold_spectra
from lamina.measure.stats import predict_error

NOISE = 1e-7  # of s_1: spectra of Gram matrices in float64


def layer(seed: int, f: int, c: int, taps: int, spectrum: str) -> np.ndarray:
    """Return `[f, c * taps]`: flat, falling, of low rank, or with channels of very unequal size."""
    random = np.random.default_rng(seed)
    matrix = random.standard_normal((f, c * taps))
    if spectrum == "falling":
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        matrix = u * 2.0 ** -np.arange(len(s)) @ vh
    elif spectrum == "low":
        rank = max(1, min(matrix.shape) // 3)
        matrix = matrix[:, :rank] @ random.standard_normal((rank, c * taps))
    elif spectrum == "unequal":
        matrix *= np.repeat(10.0 ** random.uniform(-3, 3, c), taps)
    return matrix * 10.0 ** random.uniform(-4, 4)


def truncated(matrix: np.ndarray, folds: int, rank: int) -> np.ndarray:
    """Return the difference that truncating every fold makes, by numpy alone."""
    parts = []
    for part in np.split(matrix, folds, axis=1):
        u, s, vh = np.linalg.svd(part, full_matrices=False)
        parts.append((u[:, rank:] * s[rank:]) @ vh[rank:])
    return np.concatenate(parts, 1)


SPECTRA = st.sampled_from(["flat", "falling", "low", "unequal"])
SIZES = {"f": st.integers(1, 10), "width": st.integers(1, 4), "taps": st.sampled_from([1, 2, 4, 9])}


@settings(max_examples=1000)
@given(seed=st.integers(0, 2**32 - 1), folds=st.integers(1, 6), spectrum=SPECTRA, **SIZES)
def test_no_certificate_is_below_the_true_error(
    seed: int, f: int, width: int, folds: int, taps: int, spectrum: str
) -> None:
    matrix = layer(seed, f, folds * width, taps, spectrum)
    tensor = torch.from_numpy(matrix)
    spectra = fold_spectra(tensor, [1, folds])
    largest, spectra = float(spectra[1][0, 0]), spectra[folds]
    norm = np.linalg.norm(matrix, 2)
    assert largest == pytest.approx(norm, rel=1e-12)
    u, s, _ = torch.linalg.svd(fold(tensor, folds), full_matrices=False)
    count = spectra.shape[1]
    exact = exact_errors(u * s[:, None], 1, largest, range(count + 1))
    last = np.inf
    for rank in range(count + 1):
        true = np.linalg.norm(truncated(matrix, folds, rank), 2) / norm
        rss, paper = (bound(spectra, largest, rank) for bound in (bound_rss, bound_paper))
        assert paper >= rss - 1e-15
        assert rss >= exact[rank] - NOISE
        assert exact[rank] == pytest.approx(true, abs=NOISE)
        assert rss >= true - NOISE
        assert rss <= last and paper >= 0
        last = rss
        if folds == 1:
            assert rss == paper == pytest.approx(true, abs=NOISE)
    assert paper == rss == exact[-1] == 0.0


def test_the_score_of_the_published_code_is_no_certificate() -> None:
    """The same layers, without sqrt(k): kept so that nobody drops it again."""
    violated = layers = 0
    worst = 0.0
    for seed in range(200):
        matrix = layer(seed, 8, 12, 3, "flat")
        spectra = fold_spectra(torch.from_numpy(matrix), [1, 4])
        largest = float(spectra[1][0, 0])
        below = False
        for rank in range(spectra[4].shape[1]):
            true = np.linalg.norm(truncated(matrix, 4, rank), 2) / np.linalg.norm(matrix, 2)
            score = score_repo(spectra[4], largest, rank)
            assert bound_paper(spectra[4], largest, rank) == pytest.approx(2 * score)
            below |= score < true - 1e-3
            worst = max(worst, true / score)
        violated, layers = violated + below, layers + 1
    assert violated > 0.9 * layers
    assert 1.2 < worst <= 2.0  # never by more than sqrt(k)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    number=st.sampled_from([1, 2, 3]),
    folds=st.integers(1, 3),
    spectrum=SPECTRA,
    f=SIZES["f"],
    width=SIZES["width"],
)
def test_certificates_hold_for_the_usual_matrix_whoever_owns_the_taps(
    seed: int, number: int, folds: int, spectrum: str, f: int, width: int
) -> None:
    scheme, kernel = Scheme(number, (3, 2)), 6
    matrix = torch.from_numpy(layer(seed, f, folds * width, kernel, spectrum))
    whole = fold(matrix, 1, scheme)[0]
    spectra = fold_spectra(whole, [folds])[folds]
    largest = np.linalg.norm(matrix.numpy(), 2)
    u, s, vh = torch.linalg.svd(fold(matrix, folds, scheme), full_matrices=False)
    count = spectra.shape[1]
    exact = exact_errors(u * s[:, None], scheme.after, largest, range(count + 1))
    for rank in range(count + 1):
        lost = (u[:, :, rank:] * s[:, None, rank:]) @ vh[:, rank:]
        delta = unfold(lost, f, folds, scheme)
        true = np.linalg.norm(delta.numpy(), 2) / largest
        assert exact[rank] == pytest.approx(true, abs=NOISE)
        for bound in (bound_paper, bound_rss):
            value = bound(spectra, largest, rank)
            assert unfolded_bound(value, spectra, largest, rank, scheme.after) >= true - NOISE


def unfold(parts: torch.Tensor, f: int, folds: int, scheme: Scheme) -> torch.Tensor:
    """Undo `fold`, by index arithmetic: the places of all elements, folded too."""
    n = parts.numel() // f
    places = fold(torch.arange(f * n).reshape(f, n), folds, scheme)
    flat = torch.empty(f * n, dtype=parts.dtype)
    flat[places.reshape(-1)] = parts.reshape(-1)
    return flat.reshape(f, n)


def test_taps_of_the_decoder_widen_a_bound() -> None:
    """Negative control: the bound of the folded matrix alone does not hold for the usual one."""
    scheme, below = Scheme(3, (3, 3)), 0
    for seed in range(20):
        matrix = torch.from_numpy(layer(seed, 6, 8, 9, "flat"))
        largest = np.linalg.norm(matrix.numpy(), 2)
        u, s, vh = torch.linalg.svd(fold(matrix, 1, scheme), full_matrices=False)
        delta = unfold((u[:, :, 4:] * s[:, None, 4:]) @ vh[:, 4:], 6, 1, scheme)
        true = predict_error(None, matrix[None], delta[None])
        below += bound_rss(s, largest, 4) < true
    assert below > 0


@pytest.mark.parametrize("size", [1, 3, 200])
def test_the_largest_eigenvalue_is_lapacks(size: int) -> None:
    for kind in ("random", "cluster", "zero"):
        x = torch.randn(size, size + 5, dtype=torch.float64)
        gram = x @ x.mT
        if kind == "cluster":
            gram = torch.eye(size, dtype=torch.float64) * 3
        elif kind == "zero":
            gram = torch.zeros_like(gram)
        want = np.linalg.eigvalsh(gram.numpy())[-1]
        assert largest_eigenvalue(gram) == pytest.approx(want, rel=1e-9, abs=1e-12)
        assert largest_eigenvalue(gram) == largest_eigenvalue(gram)


def test_a_large_layer_is_judged_alike_from_either_gram() -> None:
    """Few columns are judged by their own Gram, many by the rows': the border between them."""
    for f, width in ((24, 3), (12, 4), (11, 4)):
        matrix = torch.from_numpy(layer(f, f, 3, width, "flat"))
        u, s, _ = torch.linalg.svd(fold(matrix, 3), full_matrices=False)
        got = exact_errors(u * s[:, None], 1, np.linalg.norm(matrix.numpy(), 2), [0, 1, 2])
        for rank, error in enumerate(got):
            delta = truncated(matrix.numpy(), 3, rank)
            true = np.linalg.norm(delta, 2) / np.linalg.norm(matrix.numpy(), 2)
            assert error == pytest.approx(true, rel=1e-9)
