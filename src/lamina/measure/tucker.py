"""Tucker-2: a convolution cut down on its outputs and its inputs at once, in the error's metric.

A weight `W [f, c, K]` (outputs, input channels, kernel taps) becomes `A C B`: `B [r2, c]` encodes
the input channels, the core `C [r1, r2, K]` keeps the kernel, `A [f, r1]` decodes. `B` comes from
the unfolding along the inputs, in the metric of the Kronecker product nearest to the moment `H`;
given `B`, the decoder and the core are exactly optimal for `tr(G E H E^T)`: the core is least
squares, and the decoders of all ranks are the leading eigenvectors of one matrix. Without data the
metric is the identity, and this is the sequentially truncated HOSVD.

Reference: Tucker 1966; De Lathauwer, De Moor, Vandewalle 2000, SIAM J. Matrix Anal. Appl. 21(4)
(HOSVD); Vannieuwenhoven, Vandebril, Meerbergen 2012, SIAM J. Sci. Comput. 34(2) (truncation in
sequence); Kim et al. 2016, arXiv:1511.06530 (Tucker-2 of convolutions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lamina.measure.low_rank import damp
from lamina.measure.stats import LayerStats, predict_error, spectral_norm

TINY = 1e-9  # of the largest: a channel of the core below this carries nothing


@dataclass(frozen=True)
class Metric:
    """The metric that errors are measured in, positive definite, float64.

    Args:
        H: `[c, K, c, K]` input moment, or `[c, K]`, its diagonal.
        G: `[f, f]` output-gradient moment.
    """

    H: torch.Tensor
    G: torch.Tensor


def metric_of(stats: LayerStats | None, shape: Sequence[int], damped: bool = True) -> Metric:
    """Return the metric of a layer's statistics; data-free the identity.

    Args:
        stats: of an ungrouped convolution.
        shape: `(f, c, K)`.
        damped: keep some weight for directions hardly seen, so that the metric can be inverted.
    """
    f, c, taps = shape
    if stats is None:
        one = torch.ones(c, taps, dtype=torch.float64)
        return Metric(one, torch.eye(f, dtype=torch.float64))
    H, G = stats.H[0].to(torch.float64), stats.G[0].to(torch.float64)
    if damped:
        H, G = damp(H), damp(G)
    return Metric(
        H.reshape((c, taps) * H.dim()),
        torch.diag(G) if G.dim() == 1 else G,
    )


# --- inputs --------------------------------------------------------------------------------------


def input_basis(weight: torch.Tensor, metric: Metric) -> torch.Tensor:
    """Return the encoders of all ranks: row j of `[c, c]` is the j-th best combination of inputs.

    The leading left singular vectors of the unfolding along the inputs, of the weight whitened on
    all three sides: outputs by `G`, channels and taps by the two factors of the Kronecker product
    that has the partial traces of `H`.

    Args:
        weight: `[f, c, K]`, float64.
        metric: positive definite.
    """
    H, G = metric.H, metric.G
    if H.dim() == 2:
        channels, taps = torch.diag(H.sum(1)), torch.diag(H.sum(0))
    else:
        channels, taps = torch.einsum("akbk->ab", H), torch.einsum("akal->kl", H)
    seen = torch.einsum("fak,kl->fal", weight, taps)
    seen = torch.einsum("gf,fal->gal", G, seen)
    gram = torch.einsum("fal,fbl->ab", weight, seen)
    root = torch.linalg.cholesky(channels)
    _, vectors = torch.linalg.eigh(root.mT @ gram @ root)
    rows = vectors.flip(-1).mT
    return torch.linalg.solve_triangular(root, rows, upper=False, left=False)


@dataclass(frozen=True)
class Encoded:
    """What the layer behind an encoder sees: `Y = W H B^T` and `N = B H B^T`.

    Args:
        Y: `[f, r, K]`; N: `[r, K, r, K]`, or `[K, r, r]` where `H` is a diagonal.
    """

    Y: torch.Tensor
    N: torch.Tensor

    def first(self, rank: int) -> Encoded:
        """Return the same of the first `rank` rows of the encoder."""
        if self.N.dim() == 3:
            return Encoded(self.Y[:, :rank], self.N[:, :rank, :rank])
        return Encoded(self.Y[:, :rank], self.N[:rank, :, :rank])

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `Y [b, f, m]` and `N [b, m, m]`: all taps together, or tap by tap."""
        if self.N.dim() == 3:
            return self.Y.permute(2, 0, 1), self.N
        size = self.N.shape[0] * self.N.shape[1]
        return self.Y.reshape(1, -1, size), self.N.reshape(1, size, size)


def encoded(weight: torch.Tensor, H: torch.Tensor, encode: torch.Tensor) -> Encoded:
    """Return `W H B^T` and `B H B^T`, the encoder applied at every tap.

    Args:
        weight: `[f, c, K]`; H: as in `Metric`; encode: `[r, c]`.
    """
    if H.dim() == 2:
        scaled = H.mT[:, :, None] * encode.mT  # [K, c, r]
        return Encoded(torch.einsum("fak,kar->frk", weight, scaled), encode @ scaled)
    c, taps = H.shape[:2]
    right = torch.einsum("xb,rb->xr", H.permute(0, 1, 3, 2).reshape(-1, c), encode)
    right = right.reshape(c, taps, taps, len(encode)).transpose(2, 3)  # [c, K, r, K]
    Y = weight.reshape(len(weight), -1) @ right.reshape(c * taps, -1)
    N = (encode @ right.reshape(c, -1)).reshape(len(encode), taps, len(encode), taps)
    return Encoded(Y.reshape(len(weight), len(encode), taps), N)


# --- outputs and core ----------------------------------------------------------------------------


def decoders(seen: Encoded, G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the best decoders of all ranks for an encoder, their cores, and what each explains.

    With the least squares core the loss of a decoder is what its span leaves of
    `S = Y N^-1 Y^T` in the metric `G = L L^T`: its leading eigenvectors are optimal, for any rank.

    Args:
        seen: of the encoder; G: `[f, f]`.

    Returns:
        decode `[f, f]` (columns, best first), cores `[b, f, m]` (row i belongs to column i), and
        the eigenvalues `[f]`, descending.
    """
    Y, N = seen.parts()
    inside = torch.cholesky_solve(Y.mT, torch.linalg.cholesky(N)).mT  # [b, f, m]
    root = torch.linalg.cholesky(G)
    explained = (inside @ Y.mT).sum(0)
    values, vectors = torch.linalg.eigh(root.mT @ explained @ root)
    vectors = vectors.flip(-1)
    decode = torch.linalg.solve_triangular(root.mT, vectors, upper=True)
    return decode, vectors.mT @ (root.mT @ inside), values.flip(-1).clamp_min(0)


def decompose(
    weight: torch.Tensor,
    stats: LayerStats | None,
    outputs: int,
    inputs: int,
    balanced: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decompose a convolution's weight at given ranks.

    Args:
        weight: `[f, c, K]`.
        stats: the layer's statistics; None: data-free.
        outputs: r1, at most `min(f, K r2)`; inputs: r2, at most `min(c, K r1)`.
        balanced: spread the scale over the factors; else channels are as the metric sorts them.

    Returns:
        decode `[f, r1]`, core `[r1, r2, K]` and encode `[r2, c]`, float64.

    Example:
        >>> A, C, B = decompose(torch.ones(4, 3, 9), None, 1, 1)
        >>> torch.allclose(compose(A, C, B), torch.ones(4, 3, 9, dtype=torch.float64))
        True
    """
    weight = weight.to(torch.float64)
    metric = metric_of(stats, weight.shape)
    encode = input_basis(weight, metric)[:inputs]
    decode, cores, _ = decoders(encoded(weight, metric.H, encode), metric.G)
    core = cores[:, :outputs]
    taps = weight.shape[2]
    core = core[0].unflatten(1, (inputs, taps)) if len(core) == 1 else core.permute(1, 2, 0)
    factors = decode[:, :outputs], core, encode
    return balance(*factors) if balanced else factors


def compose(decode: torch.Tensor, core: torch.Tensor, encode: torch.Tensor) -> torch.Tensor:
    """Return the dense weight `[f, c, K]` of three factors."""
    return torch.einsum("fi,ijk,jc->fck", decode, core, encode)


def balance(
    decode: torch.Tensor, core: torch.Tensor, encode: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the same product with the channels sorted and the scale spread over all factors.

    The outer factors are made orthonormal, the core all-orthogonal (HOSVD of the product), so that
    channels are sorted by what they carry; each channel then gives a share of its norm to the
    factors on its two sides. Values of one scale are what quantizes and trains well.
    """
    left, r_left = torch.linalg.qr(decode)
    right, r_right = torch.linalg.qr(encode.mT)
    core = compose(r_left, core, r_right.mT)
    left, core = _rotated(left, core, 0)
    right, core = _rotated(right, core, 1)
    whole = float(core.norm())
    if whole == 0:
        return left, core, right.mT
    a, b = (_share(core, whole, axis) for axis in (0, 1))
    core = core / a[:, None, None] / b[None, :, None]
    return left * a, core, (right * b).mT


def _rotated(
    side: torch.Tensor, core: torch.Tensor, axis: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn one side so that the core's slices along it are orthogonal, largest first."""
    flat = core.movedim(axis, 0).flatten(1)
    vectors = torch.linalg.eigh(flat @ flat.mT).eigenvectors.flip(-1)
    # The sign of a vector is arbitrary; fixing it makes the factors independent of LAPACK.
    turned = side @ vectors
    vectors = vectors * torch.where(turned.sum(0) < 0, -1.0, 1.0).to(vectors)
    core = (vectors.mT @ flat).unflatten(1, core.movedim(axis, 0).shape[1:]).movedim(0, axis)
    return side @ vectors, core


def _share(core: torch.Tensor, whole: float, axis: int) -> torch.Tensor:
    norms = core.movedim(axis, 0).flatten(1).norm(dim=1).clamp_min(TINY * whole)
    return (norms / whole).sqrt() * whole ** (1 / 3)


# --- errors --------------------------------------------------------------------------------------


def errors_of_ranks(
    weight: torch.Tensor, stats: LayerStats | None, pairs: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """Return what `predict_error` says of `decompose` at several ranks, rounding aside.

    No dense difference is made: the quadratic form is expanded, and as decoders and cores of one
    encoder are nested, running sums give the errors of all its decoder ranks at once. Data-free,
    `E E^T = (W W^T - S) + sum of what the decoder leaves of S`.

    Args:
        weight: `[f, c, K]`.
        stats: of the layer; None: data-free.
        pairs: ranks `(outputs, inputs)`.
    """
    weight = weight.to(torch.float64)
    flat = weight.flatten(1)[None]
    metric = metric_of(stats, weight.shape)
    encode = input_basis(weight, metric)
    encode = encode[: max((r2 for _, r2 in pairs), default=0)]
    damped = encoded(weight, metric.H, encode)
    true = metric_of(stats, weight.shape, damped=False)
    measured = damped if stats is None else encoded(weight, true.H, encode)
    whole = predict_error(stats, flat, flat) if stats is not None else float(spectral_norm(flat))
    found = {}
    for r2 in sorted({r2 for _, r2 in pairs}):
        ranks = sorted(r1 for r1, r in pairs if r == r2)
        decode, cores, values = decoders(damped.first(r2), metric.G)
        if stats is None:
            left = flat[0] @ flat[0].mT - (decode * values) @ decode.mT
            for r1 in ranks:
                rest = left + (decode[:, r1:] * values[r1:]) @ decode[:, r1:].mT
                top = float(torch.linalg.eigvalsh(rest)[-1].clamp_min(0).sqrt())
                found[r1, r2] = top / max(whole, 1e-300)
            continue
        Y, N = measured.first(r2).parts()
        decode, cores = decode[:, : ranks[-1]], cores[:, : ranks[-1]]
        left = true.G @ decode
        cross = ((cores @ Y.mT).sum(0) * left.mT).sum(1).cumsum(0)
        square = (decode.mT @ left) * (cores @ N @ cores.mT).sum(0)
        square = square.cumsum(0).cumsum(1).diagonal()
        losses = whole + stats.scale * (0.5 * square - cross)
        found |= {(r1, r2): max(0.0, float(losses[r1 - 1])) for r1 in ranks}
    return found
