"""Low rank in the currency: the factors that cost least predicted loss, fold by fold.

`1/2 tr(G E H E^T)` is a Frobenius norm of `L^T E R`, where `G = L L^T` and `H = R R^T`. So the best
rank j approximation of a weight M is the truncated SVD of `L^T M R`, carried back (Eckart, Young
1936, in the metric of Martens, Grosse 2015, arXiv:1503.05671, eq. 1). With k folds of the input
channels (ALDS: Liebenwein et al. 2021, arXiv:2107.11442, section 2) each fold's encoder is found
that way, and the decoder is then solved over all folds at once.

Everything here is float64, on Gram matrices of the short side: an SVD of a wide matrix is many
times slower and no more exact where it matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lamina.measure.stats import LayerStats, predict_error

DAMPING = 0.01  # of the mean diagonal: directions hardly seen in calibration keep some weight


# --- folds and their spectra ---------------------------------------------------------------------


def split_folds(matrix: torch.Tensor, folds: int) -> torch.Tensor:
    """Return `[folds, f, n/folds]` from `[f, n]`: consecutive channels, as grouped layers have."""
    return matrix.unflatten(1, (folds, -1)).transpose(0, 1)


def fold_spectra(matrix: torch.Tensor, folds: int) -> torch.Tensor:
    """Return the singular values of every fold `[folds, r]`, descending, from Gram matrices.

    The Gram of the short side in float64 is many times faster than an SVD of a wide matrix, and
    all folds go through one batched call. Values below 1e-8 of the largest are noise.
    """
    parts = split_folds(matrix.to(torch.float64), folds)
    if parts.shape[1] > parts.shape[2]:
        parts = parts.transpose(1, 2)
    return torch.linalg.eigvalsh(parts @ parts.mT).flip(-1).clamp_min(0).sqrt()


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


# --- the metric ----------------------------------------------------------------------------------


def damp(moment: torch.Tensor) -> torch.Tensor:
    """Add `DAMPING` of the mean diagonal to a second moment `[n, n]` or its diagonal `[n]`.

    A moment that is zero (a layer nothing reaches) becomes the identity.
    """
    moment = moment.to(torch.float64)
    diagonal = moment if moment.dim() == 1 else moment.diagonal()
    level = DAMPING * diagonal.mean()
    if not float(level) > 0:
        return torch.ones_like(moment) if moment.dim() == 1 else torch.eye(len(moment)).to(moment)
    return (
        moment + level if moment.dim() == 1 else moment + level * torch.eye(len(moment)).to(moment)
    )


def fold_blocks(moment: torch.Tensor, folds: int) -> torch.Tensor:
    """Return the folds' own moments: `[k, n/k, n/k]` of `[n, n]`, `[k, n/k]` of a diagonal."""
    if moment.dim() == 1:
        return moment.reshape(folds, -1)
    width = len(moment) // folds
    blocks = moment.reshape(folds, width, folds, width)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _root(moment: torch.Tensor, diagonal: bool) -> torch.Tensor:
    return moment.sqrt() if diagonal else torch.linalg.cholesky(moment)


# --- the decomposition ---------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldBasis:
    """What every rank of one number of folds shares: `encode[:, :j]` is the encoder of rank j.

    Args:
        encode: `[k, r, n/k]` encoding rows, best first.
        spectra: `[k, r]` singular values in the metric, descending.
    """

    encode: torch.Tensor
    spectra: torch.Tensor

    def tail(self, rank: int) -> float:
        """Return the squares left out at a rank, summed over folds that do not see each other."""
        return float(self.spectra[:, rank:].square().sum())


def fold_basis(
    matrix: torch.Tensor, H: torch.Tensor | None, G: torch.Tensor | None, folds: int
) -> FoldBasis:
    """Return the encoders of all ranks: the leading right singular vectors of `L^T M_i R_i`.

    `G = L L^T` and `H_i = R_i R_i^T` (Cholesky), so the Frobenius norm of `L^T E R` is the
    currency, and the encoder of rank j is `V_j^T R_i^-1`.

    Args:
        matrix: `[f, n]`, float64.
        H: `[n, n]` or `[n]` input moment, positive definite; None: identity.
        G: `[f, f]` or `[f]` output-gradient moment, positive definite; None: identity.
        folds: k, a divisor of the input channels.
    """
    seen = matrix
    if G is not None:
        root = _root(G, G.dim() == 1)
        seen = root[:, None] * matrix if G.dim() == 1 else root.mT @ matrix
    parts = split_folds(seen, folds)
    roots = None
    if H is not None:
        roots = _root(fold_blocks(H, folds), H.dim() == 1)
        parts = parts * roots[:, None, :] if H.dim() == 1 else parts @ roots
    if parts.shape[1] < parts.shape[2]:
        values, left = torch.linalg.eigh(parts @ parts.mT)
        # QR, not division by the singular values: it stays orthonormal where they vanish.
        rows = torch.linalg.qr((left.flip(-1).mT @ parts).mT).Q.mT
    else:
        values, right = torch.linalg.eigh(parts.mT @ parts)
        rows = right.flip(-1).mT
    if roots is not None and roots.dim() == 2:
        rows = rows / roots[:, None, :]
    elif roots is not None:
        rows = torch.linalg.solve_triangular(roots, rows, upper=False, left=False)
    return FoldBasis(rows, values.flip(-1).clamp_min(0).sqrt())


def encoded_moments(
    matrix: torch.Tensor, H: torch.Tensor | None, encode: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `M H B^T [f, k, j]` and `B H B^T [k, j, k, j]`, B block-diagonal of `[k, j, n/k]`."""
    folds, rank, width = encode.shape
    if H is not None and H.dim() == 2:
        right = torch.einsum("nka,kja->nkj", H.unflatten(1, (folds, width)), encode)
        inner = torch.einsum("kja,kalm->kjlm", encode, right.unflatten(0, (folds, width)))
        return (matrix @ right.flatten(1)).unflatten(1, (folds, rank)), inner
    # Without cross moments the folds do not see each other.
    scaled = encode if H is None else encode * H.reshape(folds, 1, width)
    product = (split_folds(matrix, folds) @ scaled.mT).transpose(0, 1)
    inner = torch.block_diag(*(encode @ scaled.mT)).reshape(folds, rank, folds, rank)
    return product, inner


def solve_decoder(product: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Return the decoder `[f, k j]` that is best for its encoder: `M H B^T (B H B^T)^-1`.

    The least squares solution over all folds at once; no `G` appears, for it is best for any.

    Args:
        product, inner: what `encoded_moments` returns.
    """
    size = product.shape[1] * product.shape[2]
    return torch.linalg.solve(inner.reshape(size, size), product.flatten(1), left=False)


def balance(encode: torch.Tensor, decode: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same products `A_i B_i` with equal singular values on both sides.

    Both factors then hold values of one scale, which is what quantizes and trains well.

    Args:
        encode: `[k, j, n/k]`; decode: `[f, k j]`.
    """
    folds, rank, _ = encode.shape
    qa, ra = torch.linalg.qr(split_folds(decode, folds))
    qb, rb = torch.linalg.qr(encode.mT)
    u, s, vh = torch.linalg.svd(ra @ rb.mT)
    half = s.sqrt()[:, None, :]
    # The sign of singular vectors is arbitrary; fixing it makes the factors independent of LAPACK.
    sign = torch.where((qa @ u).sum(1, keepdim=True) < 0, -1.0, 1.0).to(half)
    left, right = (qa @ u) * half * sign, half.mT * sign.mT * (vh @ qb.mT)
    return right, left.transpose(0, 1).reshape(decode.shape[0], folds * rank)


def factorize(
    matrix: torch.Tensor, H: torch.Tensor | None, G: torch.Tensor | None, folds: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decompose a matrix into folds of one rank, best for `tr(G E H E^T)` (k = 1: optimal).

    Args:
        matrix: `[f, n]`; H, G: moments (positive definite) or diagonals; None: identity.
        folds: k, a divisor of n; rank: j, at most `min(f, n/k)`.

    Returns:
        encode `[k, j, n/k]` and decode `[f, k j]`, balanced, float64.

    Example:
        >>> B, A = factorize(torch.ones(2, 4), None, None, folds=2, rank=1)
        >>> torch.allclose(A @ torch.block_diag(*B), torch.ones(2, 4, dtype=torch.float64))
        True
    """
    matrix = matrix.to(torch.float64)
    encode = fold_basis(matrix, H, G, folds).encode[:, :rank].contiguous()
    return balance(encode, solve_decoder(*encoded_moments(matrix, H, encode)))


def losses_of_ranks(
    matrix: torch.Tensor,
    stats: LayerStats | None,
    H: torch.Tensor | None,
    basis: FoldBasis,
    ranks: Sequence[int],
) -> list[float]:
    """Return what `predict_error` says of the pairs of several ranks, rounding to a dtype aside.

    With statistics the quadratic form is expanded, `tr(G M H M') - 2 tr(G M H B' A') +
    tr(A' G A B H B')`, so that all ranks share the products with H: no dense difference is made.

    Args:
        matrix: `[f, n]`, float64.
        stats: the layer's statistics as measured; None: data-free.
        H: the damped input moment that the decoders are solved with; None: data-free.
        basis: of one number of folds.
        ranks: rising.
    """
    if not ranks:
        return []
    encode = basis.encode[:, : ranks[-1]]
    product, inner = encoded_moments(matrix, H, encode)
    decoders = [solve_decoder(product[:, :, :j], inner[:, :j, :, :j]) for j in ranks]
    if stats is None:
        return [
            predict_error(None, matrix[None], (A @ torch.block_diag(*encode[:, :j]) - matrix)[None])
            for j, A in zip(ranks, decoders, strict=True)
        ]
    true, G = stats.H[0].to(torch.float64), stats.G[0].to(torch.float64)
    product, inner = encoded_moments(matrix, true, encode)
    whole = predict_error(stats, matrix[None], matrix[None])
    losses = []
    for j, A in zip(ranks, decoders, strict=True):
        left = G[:, None] * A if G.dim() == 1 else G @ A
        cross = float((left * product[:, :, :j].flatten(1)).sum())
        size = A.shape[1]
        square = float(((A.mT @ left) * inner[:, :j, :, :j].reshape(size, size)).sum())
        losses.append(max(0.0, whole + stats.scale * (0.5 * square - cross)))
    return losses
