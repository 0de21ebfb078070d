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

from lamina.measure.certificates import exact_errors
from lamina.measure.schemes import PLAIN, Scheme, expand, fold, split_taps
from lamina.measure.stats import LayerStats, predict_error, spectral_norm

DAMPING = 0.01  # of the mean diagonal: directions hardly seen in calibration keep some weight


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
        encode: `[k, r, c/k * before]` encoding rows, best first.
        spectra: `[k, r]` singular values in the metric, descending.
        scheme: who owns which taps.
    """

    encode: torch.Tensor
    spectra: torch.Tensor
    scheme: Scheme = PLAIN

    def tail(self, rank: int) -> float:
        """Return the squares left out at a rank, summed over folds that do not see each other."""
        return float(self.spectra[:, rank:].square().sum())


def fold_basis(
    matrix: torch.Tensor,
    H: torch.Tensor | None,
    G: torch.Tensor | None,
    folds: int,
    scheme: Scheme = PLAIN,
) -> FoldBasis:
    """Return the encoders of all ranks: the leading right singular vectors of `L^T M_i R_i`.

    `G = L L^T` and `H_i = R_i R_i^T` (Cholesky), so the Frobenius norm of `L^T E R` is the
    currency, and the encoder of rank j is `V_j^T R_i^-1`. Where the decoder owns taps, `H_i` is
    taken for a Kronecker product of a moment of each side (`split_moments`); only the directions of
    the encoder rest on that, the decoder is solved with H itself.

    Args:
        matrix: `[f, n]`, float64.
        H: `[n, n]` or `[n]` input moment, positive definite; None: identity.
        G: `[f, f]` or `[f]` output-gradient moment, positive definite; None: identity.
        folds: k, a divisor of the input channels.
        scheme: who owns which taps.
    """
    seen = matrix
    if G is not None:
        root = _root(G, G.dim() == 1)
        seen = root[:, None] * matrix if G.dim() == 1 else root.mT @ matrix
    parts = fold(seen, folds, scheme)
    roots = None
    if H is not None:
        inner, taps = split_moments(H, folds, scheme)
        roots = _root(inner, H.dim() == 1)
        parts = parts * roots[:, None, :] if H.dim() == 1 else parts @ roots
        if scheme.after > 1:
            apart = parts.unflatten(1, (len(matrix), -1))
            parts = torch.einsum("kftm,kts->kfsm", apart, torch.linalg.cholesky(taps)).flatten(1, 2)
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
    return FoldBasis(rows, values.flip(-1).clamp_min(0).sqrt(), scheme)


def split_moments(
    moment: torch.Tensor, folds: int, scheme: Scheme
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split every fold's input moment into one of what the encoder sees and one of decoder taps.

    Args:
        moment: `[n, n]` or its diagonal `[n]`.

    Returns:
        the moment at one of the decoder's taps, their mean, `[k, m, m]` (`[k, m]` of a diagonal)
        with m = c/k * before; and how the taps go together, `[k, after, after]`: the best Kronecker
        factor beside the first, and positive definite as the moment is.
    """
    blocks = fold_blocks(moment, folds)
    if scheme.after == 1:
        return blocks, blocks.new_ones(folds, 1, 1)
    both = split_taps(blocks, scheme)
    if moment.dim() == 1:
        same = both.mean(1)
        taps = torch.einsum("ktm,km->kt", both, same).diag_embed()
        return same, taps / same.square().sum(1)[:, None, None]
    both = split_taps(both.permute(0, 2, 3, 1), scheme)  # [k, after, m, after, m]
    same = both.diagonal(dim1=1, dim2=3).mean(-1)
    taps = torch.einsum("ktasb,kab->kts", both, same)
    return same, taps / same.square().sum((1, 2))[:, None, None]


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
    product = (fold(matrix, folds) @ scaled.mT).transpose(0, 1)
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


def balance(
    encode: torch.Tensor, decode: torch.Tensor, taps: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same products `A_i B_i` with equal singular values on both sides.

    Both factors then hold values of one scale, which is what quantizes and trains well.

    Args:
        encode: `[k, j, m]`; decode: `[f, k j taps]`.
        taps: of the decoding layer.
    """
    folds, rank, _ = encode.shape
    shape = (len(decode), folds, rank, taps)
    left = decode.reshape(shape).permute(1, 0, 3, 2).flatten(1, 2)
    qa, ra = torch.linalg.qr(left)
    qb, rb = torch.linalg.qr(encode.mT)
    u, s, vh = torch.linalg.svd(ra @ rb.mT)
    half = s.sqrt()[:, None, :]
    # The sign of singular vectors is arbitrary; fixing it makes the factors independent of LAPACK.
    sign = torch.where((qa @ u).sum(1, keepdim=True) < 0, -1.0, 1.0).to(half)
    left, right = (qa @ u) * half * sign, half.mT * sign.mT * (vh @ qb.mT)
    return right, left.unflatten(1, (-1, taps)).permute(1, 0, 3, 2).reshape(decode.shape)


def factorize(
    matrix: torch.Tensor,
    H: torch.Tensor | None,
    G: torch.Tensor | None,
    folds: int,
    rank: int,
    scheme: Scheme = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decompose a matrix into folds of one rank, best for `tr(G E H E^T)` (k = 1: optimal).

    Args:
        matrix: `[f, n]`; H, G: moments (positive definite) or diagonals; None: identity.
        folds: k, a divisor of the input channels; rank: j, at most `min(f * after, n/k / after)`.
        scheme: who owns which taps; the encoder is then best only if `H` is a Kronecker product.

    Returns:
        encode `[k, j, c/k * before]` and decode `[f, k j after]`, balanced, float64: the weights of
        the two layers, reshaped.

    Example:
        >>> B, A = factorize(torch.ones(2, 4), None, None, folds=2, rank=1)
        >>> torch.allclose(A @ torch.block_diag(*B), torch.ones(2, 4, dtype=torch.float64))
        True
    """
    matrix = matrix.to(torch.float64)
    encode = fold_basis(matrix, H, G, folds, scheme).encode[:, :rank].contiguous()
    decode = solve_decoder(*encoded_moments(matrix, H, expand(encode, scheme)))
    return balance(encode, decode, scheme.after)


def losses_of_ranks(
    matrix: torch.Tensor,
    stats: LayerStats | None,
    H: torch.Tensor | None,
    basis: FoldBasis,
    ranks: Sequence[int],
    largest: float | None = None,
) -> list[float]:
    """Return what `predict_error` says of the pairs of several ranks, rounding to a dtype aside.

    All ranks cost little more than the largest. Rows of the encoder in the order of their rank make
    every smaller pair a leading block; in the basis that one Cholesky factor of `B H B^T` gives,
    the solved decoders of all ranks are the leading columns of one matrix Y, and the quadratic form
    `tr(G M H M') - 2 tr(G M H B' A') + tr(A' G A B H B')` is a running sum.

    Args:
        matrix: `[f, n]`, float64.
        stats: the layer's statistics as measured; None: data-free.
        H: the damped input moment that the decoders are solved with; None: data-free.
        basis: of one number of folds, in one scheme.
        ranks: rising.
        largest: singular value of the matrix, where it is known; only used without data.
    """
    if not ranks:
        return []
    folds, taps = len(basis.encode), basis.scheme.after
    if stats is None:
        largest = float(spectral_norm(matrix)) if largest is None else largest
        side = fold(matrix, folds, basis.scheme) @ basis.encode.mT
        return exact_errors(side, taps, largest, ranks)
    encode = expand(basis.encode[:, : ranks[-1]], basis.scheme)
    product, inner = _by_rank(*encoded_moments(matrix, H, encode), taps)
    root = torch.linalg.cholesky(inner)
    Y = torch.linalg.solve_triangular(root, product.mT, upper=False).mT
    true, G = stats.H[0].to(torch.float64), stats.G[0].to(torch.float64)
    product, inner = _by_rank(*encoded_moments(matrix, true, encode), taps)
    right = torch.linalg.solve_triangular(root, inner, upper=False)
    right = torch.linalg.solve_triangular(root, right.mT, upper=False)
    left = G[:, None] * Y if G.dim() == 1 else G @ Y
    cross = (left.mT * torch.linalg.solve_triangular(root, product.mT, upper=False)).sum(1)
    square = (Y.mT @ left) * right
    square = 2 * square.tril(-1).sum(1) + square.diagonal()
    running = (0.5 * square - cross).cumsum(0)
    whole = predict_error(stats, matrix[None], matrix[None])
    step = folds * taps
    return [max(0.0, whole + stats.scale * float(running[j * step - 1])) for j in ranks]


def _by_rank(
    product: torch.Tensor, inner: torch.Tensor, taps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reorder what `encoded_moments` returns from (fold, rank, tap) to (rank, fold, tap)."""
    folds, size = product.shape[1:]
    order = torch.arange(folds * size).reshape(folds, -1, taps).transpose(0, 1).reshape(-1)
    flat = inner.reshape(folds * size, folds * size)
    return product.flatten(1)[:, order], flat[order][:, order]
