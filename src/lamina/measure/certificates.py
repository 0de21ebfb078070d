"""What rank j costs without data: the relative spectral error of folded truncation, and bounds.

Each of k folds of a matrix keeps its j largest singular values. The error `|E|_2 / |M|_2` is exact
from what was left out (`E E^T = sum_i U_i S_i^2 U_i^T`); from the spectra alone it is bounded.

    exact <= rss = sqrt(sum_i s_i[j+1]^2) / s_1 <= paper = sqrt(k) max_i s_i[j+1] / s_1

`paper` is Theorem 1 (eq. 2) of Liebenwein et al. 2021, arXiv:2107.11442. Their code leaves
`sqrt(k)` out; that score is no bound and is here to reproduce published plans only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

ITERATED = 160  # sides above it: the largest eigenvalue by Lanczos, below by a full solver


def bound_paper(spectra: torch.Tensor, largest: float, rank: int) -> float:
    """Return ALDS eq. 2: `sqrt(k) max_i s_i[j+1] / s_1`, a bound of the relative spectral error.

    Args:
        spectra: `[k, r]` singular values of the folds, descending.
        largest: largest singular value of the whole matrix.
        rank: singular values kept per fold, j.
    """
    if rank >= spectra.shape[1]:
        return 0.0
    return float(spectra.shape[0] ** 0.5 * spectra[:, rank].max() / max(largest, 1e-300))


def bound_rss(spectra: torch.Tensor, largest: float, rank: int) -> float:
    """Return `sqrt(sum_i s_i[j+1]^2) / s_1`: tighter, since `E E^T = sum_i E_i E_i^T`."""
    if rank >= spectra.shape[1]:
        return 0.0
    return float(spectra[:, rank].square().sum().sqrt() / max(largest, 1e-300))


def score_repo(spectra: torch.Tensor, largest: float, rank: int) -> float:
    """Return `max_i s_i[j+1] / s_1`, what published plans were made with: no bound for k > 1."""
    if rank >= spectra.shape[1]:
        return 0.0
    return float(spectra[:, rank].max() / max(largest, 1e-300))


def unfolded_bound(
    bound: float, spectra: torch.Tensor, largest: float, rank: int, taps: int
) -> float:
    """Return a bound for the usual matrix `[f, c K]` from one for a folded `[f taps, ...]`.

    Rows of one tap are blocks side by side in the usual matrix, so its norm is at most
    `sqrt(taps)` times larger; and it is never over the Frobenius norm, which folding keeps.

    Args:
        bound: of the folded matrix, relative to `largest`.
        spectra: `[k, r]` of the folds.
        largest: largest singular value of the usual matrix.
        rank: singular values kept per fold.
        taps: of the decoding layer.
    """
    if taps == 1:
        return bound
    frobenius = float(spectra[:, rank:].square().sum().sqrt()) / max(largest, 1e-300)
    return min(taps**0.5 * bound, frobenius)


def exact_errors(
    side: torch.Tensor, taps: int, largest: float, ranks: Sequence[int]
) -> list[float]:
    """Return the relative spectral error of the usual matrix `[f, c K]` at several ranks.

    Args:
        side: `U_i S_i` of the folds, `[k, f * taps, r]`, columns from the largest singular value.
        taps: of the decoding layer; rows of one tap are blocks side by side in the usual matrix.
        largest: largest singular value of the usual matrix.
        ranks: rising; what is left out of `[k, f * taps, r]` is columns j and on.

    Example:
        >>> exact_errors(torch.diag(torch.tensor([4.0, 2.0]))[None].double(), 1, 4.0, [0, 1, 2])
        [1.0, 0.5, 0.0]
    """
    folds, rows, count = side.shape
    f = rows // taps
    # For every rank, `[k * taps, f]` columns: E E^T is the Gram of all that are left out.
    columns = side.reshape(folds, f, taps, count).permute(3, 0, 2, 1).reshape(count, -1, f)
    few = columns.shape[0] * columns.shape[1] < f  # then their own Gram is the smaller one
    whole = side.new_zeros(f, f)
    if few:
        flat = columns.flatten(0, 1)
        whole = flat @ flat.mT
    errors: dict[int, float] = {}
    upper = count
    for rank in reversed(ranks):
        if rank >= count:
            errors[rank] = 0.0
            continue
        if few:
            cut = rank * folds * taps
            square = largest_eigenvalue(whole[cut:, cut:])
        else:
            fresh = columns[rank:upper].flatten(0, 1)
            whole, upper = whole + fresh.mT @ fresh, rank
            square = largest_eigenvalue(whole)
        errors[rank] = square**0.5 / max(largest, 1e-300)
    return [errors[rank] for rank in ranks]


def largest_eigenvalue(gram: torch.Tensor) -> float:
    """Return the largest eigenvalue of a positive semi-definite `[n, n]`, float64.

    Example:
        >>> largest_eigenvalue(torch.diag(torch.tensor([3.0, 5.0], dtype=torch.float64)))
        5.0
    """
    if len(gram) > ITERATED and bool(gram.any()):
        from scipy.sparse.linalg import ArpackError, eigsh

        start = np.cos(1.7 * np.arange(len(gram))) + 1.3  # fixed: the same result at every run
        try:
            found = eigsh(gram.cpu().numpy(), k=1, v0=start, tol=1e-12, return_eigenvectors=False)
            return max(0.0, float(found[0]))
        except ArpackError:  # a cluster of equal eigenvalues may not settle
            pass
    return max(0.0, float(torch.linalg.eigvalsh(gram)[-1]))
