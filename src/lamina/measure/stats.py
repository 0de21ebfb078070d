"""What one calibration pass measured, the costs of things, and the one currency of error."""

from __future__ import annotations

from collections.abc import Mapping
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
    H, G = stats.H, stats.G
    total = 0.0
    # Where tokens do not meet, a table is gone through piece by piece: it may have millions.
    side = 2 if H.dim() == 2 else 1 if G.dim() == 2 else 0
    size = max(1, PIECE * delta.shape[side] // max(1, delta.numel())) if side else 1
    for piece in range(0, delta.shape[side] if side else 1, size):
        cut = slice(piece, piece + size)
        some, h, g = delta, H, G
        if side == 2:
            some, h = delta[:, :, cut], H[:, cut]
        elif side == 1:
            some, g = delta[:, cut], G[:, cut]
        right = some * h[:, None, :] if h.dim() == 2 else some @ h
        left = some * g[:, :, None] if g.dim() == 2 else g @ some
        total += float((left * right).sum())
    return max(0.0, 0.5 * stats.scale * total)


def spectral_norm(matrix: torch.Tensor) -> torch.Tensor:
    """Return the largest singular value of each `[..., out, in]`, from the short side's Gram."""
    if matrix.numel() == 0:
        return torch.zeros(matrix.shape[:-2], dtype=matrix.dtype)
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = matrix.transpose(-1, -2)
    gram = matrix @ matrix.transpose(-1, -2)
    return torch.linalg.eigvalsh(gram)[..., -1].clamp_min(0).sqrt()
