"""Statistics of a merged convolution, from those of the layers it stands for."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from lamina.measure.stats import LayerStats
from lamina.methods.base import Leaf
from lamina.network.sites import Site

WIDEST = 1600  # columns whose moment is made positive semidefinite, which takes its eigenvalues


def leaf_stats(first: Leaf, last: Leaf, left: Site) -> LayerStats | None:
    """Return the statistics of the convolution that stands for a span.

    Its output gradients are the last layer's. Its inputs are the first layer's, over a larger
    patch: how far places go together is known to the width of the first kernel, and beyond it is
    taken to be as at that distance. Exact where the kernel stays the same.

    Args:
        first, last: the layers at the ends of the span.
        left: the merged convolution.
    """
    a, b = first.stats, last.stats
    if a is None or b is None:
        return None
    old = first.site
    scale = left.positions / max(old.positions, 1e-12)
    if (left.kernel, left.padding, left.groups) == (old.kernel, old.padding, old.groups):
        H, mean = a.H * scale, None if a.mean is None else a.mean * scale
    else:
        whole = _joined(a.H if a.H.dim() == 3 else torch.diag_embed(a.H))
        inputs = old.shape[1] * old.groups
        per = _per_axis(whole, inputs, old.kernel, left.kernel)
        H = _split(per * scale, left.groups)
        mean = None
        if a.mean is not None:
            each = a.mean.reshape(inputs, -1).mean(1) * scale
            taps = math.prod(left.kernel)
            mean = each.repeat_interleave(taps).reshape(left.groups, -1)
    return LayerStats(H, _regrouped(b.G, left.groups), mean, b.positions, b.scale, b.samples)


def _per_axis(whole: Tensor, inputs: int, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Return the moment of a larger patch `[in * taps, in * taps]`.

    It is the mean over all pairs of taps at the same distance, and beyond the old kernel that of
    the largest known distance; then what is negative in it is cut off.
    """
    places = list(itertools.product(*map(range, old)))
    blocks = whole.reshape(inputs, len(places), inputs, len(places))
    sums: dict[tuple[int, ...], Tensor] = {}
    counts: dict[tuple[int, ...], int] = {}
    for i, u in enumerate(places):
        for j, v in enumerate(places):
            lag = tuple(q - p for p, q in zip(u, v, strict=True))
            sums[lag] = (
                sums[lag] + blocks[:, i, :, j] if lag in sums else blocks[:, i, :, j].clone()
            )
            counts[lag] = counts.get(lag, 0) + 1
    wide = list(itertools.product(*map(range, new)))
    made = whole.new_zeros(inputs, len(wide), inputs, len(wide))
    for i, u in enumerate(wide):
        for j, v in enumerate(wide):
            lag = tuple(max(1 - k, min(k - 1, q - p)) for p, q, k in zip(u, v, old, strict=True))
            made[:, i, :, j] = sums[lag] / counts[lag]
    flat = made.reshape(inputs * len(wide), -1)
    flat = (flat + flat.T) / 2
    if len(flat) > WIDEST:  # no eigenvalues of that many: what is certain is positive
        return torch.diag(flat.diagonal())
    values, vectors = torch.linalg.eigh(flat)
    return (vectors * values.clamp_min(0)) @ vectors.T


def _joined(H: Tensor) -> Tensor:
    """Return the moment over all groups; groups count as unrelated."""
    return torch.block_diag(*H)


def _split(whole: Tensor, groups: int) -> Tensor:
    """Return the blocks of a moment on the diagonal, by groups."""
    each = len(whole) // groups
    return torch.stack([
        whole[g * each : (g + 1) * each, g * each : (g + 1) * each] for g in range(groups)
    ])  # fmt: skip


def _regrouped(G: Tensor, groups: int) -> Tensor:
    """Return an output moment with other groups; what was in different groups is unrelated."""
    if G.shape[0] == groups:
        return G
    if G.dim() == 2:
        return G.reshape(groups, -1)
    return _split(_joined(G), groups)
