"""What one calibration pass measured, the costs of things, and the one currency of error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

PIECE = 1 << 22  # elements of a change that are looked at at a time


@dataclass(frozen=True)
class Cost:
    """What a network, a site or an option ends up costing (never a saving).

    Args:
        params: number of stored parameters.
        bits: size in the file [bits].
        macs: multiply-accumulates per sample.
        seconds: measured latency [s]; 0 where it was not measured.
    """

    params: float = 0.0
    bits: float = 0.0
    macs: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.bits + other.bits,
            self.macs + other.macs,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class LayerStats:
    """Second moments of one layer, per sample, in float64.

    Args:
        H: `[groups, in, in]` input second moment, summed over positions; or its diagonal
            `[groups, in]` (embeddings, very wide layers).
        G: `[groups, out, out]` output-gradient second moment of the loss, averaged over positions
            and summed over nothing (Kronecker "expand" form); or its diagonal `[groups, out]`.
        mean: `[groups, in]` input sum over positions, per sample; None where it was not collected.
        positions: positions per sample.
        scale: measured over predicted loss increase of one probe; 1 without a probe.
        samples: number of samples seen.
    """

    H: torch.Tensor
    G: torch.Tensor
    mean: torch.Tensor | None = None
    positions: float = 1.0
    scale: float = 1.0
    samples: int = 0

    def with_scale(self, scale: float) -> LayerStats:
        return replace(self, scale=scale)


@dataclass(frozen=True)
class Cross:
    """How the inputs of two neighbours in a chain go together, per sample, in float64.

    `x` are the input columns of the first layer (a convolution's unfolded patches), `z` the input
    channels of the second at the same position; all are summed over positions.

    Args:
        moment: `[channels of z, columns of x]`: the sum of `z x^T`.
        second: `[channels, channels]`: the sum of `z z^T`.
        mean: `[channels]`: the sum of `z`.
        x_second: `[columns, columns]`: the sum of `x x^T`, at these very positions.
        x_mean: `[columns]`: the sum of `x`.
        positions: per sample.
    """

    moment: torch.Tensor
    second: torch.Tensor
    mean: torch.Tensor
    x_second: torch.Tensor
    x_mean: torch.Tensor
    positions: float


@dataclass(frozen=True)
class Stats:
    """Statistics of a network: per site name its `LayerStats`, and how they were made.

    `cross` holds what neighbours of a chain have in common, by `"a->b"`.

    `samples == 0` means data-free: then no layer has statistics, errors are relative spectral
    errors, and the planner minimises the maximum instead of the sum.
    """

    layers: Mapping[str, LayerStats] = field(default_factory=dict)
    samples: int = 0
    loss: str = "features"
    network: str = ""
    notes: tuple[str, ...] = ()
    cross: Mapping[str, Cross] = field(default_factory=dict)

    def of(self, name: str) -> LayerStats | None:
        return self.layers.get(name)


def predict_error(stats: LayerStats | None, matrix: torch.Tensor, delta: torch.Tensor) -> float:
    """Predict what changing a layer's weight by `delta` costs.

    Args:
        stats: the layer's statistics; None: data-free.
        matrix: the weight as `[groups, out, in]`.
        delta: its change, same shape.

    Returns:
        `scale/2 sum_g tr(G delta H delta^T)` [nats per sample], the Kronecker-factored Gauss-Newton
        form; data-free the relative spectral error `max_g |delta|_2 / |matrix|_2` (ALDS, eq. 2).

    Example:
        >>> one = torch.eye(2, dtype=torch.float64)[None]
        >>> predict_error(LayerStats(H=one, G=one), one, 0.1 * one)
        0.010000000000000002
    """
    delta = delta.detach().to(torch.float64)
    if stats is None:
        whole = spectral_norm(matrix.detach().to(torch.float64))
        return (
            float((spectral_norm(delta) / whole.clamp_min(1e-300)).max()) if delta.numel() else 0.0
        )
    total = math.fsum(
        _quadratic(part, delta[where]) for part, where in _pieces(stats, tuple(delta.shape))
    )
    return max(0.0, 0.5 * stats.scale * total)


def predict_change(stats: LayerStats | None, before: torch.Tensor, after: torch.Tensor) -> float:
    """Predict what exchanging a layer's weight costs: `predict_error` of `after - before`.

    A long table is never held in float64 as a whole, but for what is given so.

    Args:
        stats: the layer's statistics; None: data-free.
        before, after: `[groups, out, in]`, of any dtype.

    Example:
        >>> one = torch.eye(2)[None]
        >>> stats = LayerStats(H=one.double(), G=one.double())
        >>> predict_change(stats, one, 1.5 * one) == predict_error(stats, one, 0.5 * one)
        True
    """
    wide = torch.float64
    if stats is None:
        return predict_error(None, before, after.detach().to(wide) - before.detach().to(wide))
    total = math.fsum(
        _quadratic(part, after[where].detach().to(wide) - before[where].detach().to(wide))
        for part, where in _pieces(stats, tuple(before.shape))
    )
    return max(0.0, 0.5 * stats.scale * total)


def _pieces(
    stats: LayerStats, shape: tuple[int, ...]
) -> Iterator[tuple[LayerStats, tuple[slice, ...]]]:
    """Yield parts of a layer whose errors add: some tokens of a table, for they do not meet."""
    H, G, every = stats.H, stats.G, slice(None)
    side = 2 if H.dim() == 2 else 1 if G.dim() == 2 else 0
    if not side:
        yield stats, (every,)
        return
    size = max(1, PIECE * shape[side] // max(1, math.prod(shape)))
    for first in range(0, shape[side], size):
        cut = slice(first, first + size)
        if side == 2:
            yield replace(stats, H=H[:, cut]), (every, every, cut)
        else:
            yield replace(stats, G=G[:, cut]), (every, cut)


def _quadratic(stats: LayerStats, delta: torch.Tensor) -> float:
    """Return `sum_g tr(G delta H delta^T)`."""
    H, G = stats.H, stats.G
    right = delta * H[:, None, :] if H.dim() == 2 else delta @ H
    left = delta * G[:, :, None] if G.dim() == 2 else G @ delta
    return float((left * right).sum())


def diagonal_of(moment: torch.Tensor) -> torch.Tensor:
    """Return the diagonal `[groups, n]` of a moment, which may be all that is known of it."""
    return moment if moment.dim() == 2 else moment.diagonal(dim1=1, dim2=2)


def spectral_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Return the largest singular value of each `[..., out, in]`, from the short side's Gram."""
    if matrix.numel() == 0:
        return torch.zeros(matrix.shape[:-2], dtype=matrix.dtype)
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = matrix.transpose(-1, -2)
    gram = matrix @ matrix.transpose(-1, -2)
    return torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0).sqrt()
