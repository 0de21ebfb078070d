"""A layer, ready to be quantized at any step: its matrices, and how errors travel through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lamina.measure.stats import LayerStats, diagonal_of
from lamina.methods.layers import check_finite
from lamina.methods.rdoq.feedback import Array, Side, side_of
from lamina.network.sites import Site, as_matrix

DAMP_INPUT, DAMP_OUTPUT, DAMP_BIAS = 0.1, 1.0, 0.01  # of the mean diagonal; of the bias' own
FREQUENCY_COUNTS = 1.0  # added to every token's count


Sides = list[tuple[torch.Tensor, torch.Tensor, Side]]  # moment, damping and what follows from them


@dataclass(frozen=True)
class Problem:
    """One layer, ready to be quantized at any step.

    Args:
        matrix: `[groups, out, in (+ 1 with bias)]`, float64.
        inputs, outputs: feedback along columns and rows.
        stats: statistics with the constant input, or None.
        biased: the last column is the bias.
        held: same shape as `matrix`: values that stay zero.
    """

    site: Site
    matrix: Array
    inputs: Side
    outputs: Side
    stats: LayerStats | None
    biased: bool
    held: Array
    counts: Array | None = None  # token counts of an embedding


def _damping(diagonal: torch.Tensor, share: float) -> torch.Tensor:
    whole = float(diagonal.mean()) if diagonal.numel() else 0.0
    floor = 1e-6 * whole if whole > 0 else 1.0  # a group that is never used still needs a factor
    mean = diagonal.mean(1, keepdim=True).clamp_min(floor)
    return (share * mean).expand_as(diagonal).clone()


def pose(
    site: Site,
    weights: Mapping[str, torch.Tensor],
    stats: LayerStats | None,
    sides: Sides | None = None,
) -> Problem:
    """Prepare a layer: matrices, bias as an input, and the factors every step shares.

    Args:
        site, weights, stats: of the layer.
        sides: factors of layers alike, which are looked through first, and added to.

    Raises:
        SiteError: the weights are not finite.
    """
    check_finite(site.name, *weights.values())
    matrix = as_matrix(site, weights["weight"].detach().to("cpu", torch.float64))
    g, n, m = matrix.shape
    held = matrix == 0
    bias = weights.get("bias")
    biased = bias is not None and bias.numel() == g * n
    if bias is not None and biased:
        column = bias.detach().to("cpu", torch.float64).reshape(g, n, 1)
        matrix = torch.cat([matrix, column], 2)
        held = torch.cat([held, torch.zeros_like(column, dtype=torch.bool)], 2)
    if stats is None:
        across, down = torch.ones_like(matrix[:, 0, :]), torch.ones_like(matrix[:, :, 0])
        inputs, outputs = side_of(across, 0 * across), side_of(down, 0 * down)
        return Problem(site, matrix.numpy(), inputs, outputs, None, biased, held.numpy())
    H, G = stats.H.to("cpu", torch.float64), stats.G.to("cpu", torch.float64)
    diagonal = diagonal_of(H)
    damping = _damping(diagonal, DAMP_INPUT)
    counts = None
    if site.op == "embedding":
        # Tokens that calibration did not meet must live: a few counts are added to all.
        smooth = FREQUENCY_COUNTS / max(1, stats.samples)
        damping = torch.full_like(diagonal, smooth)
        counts = (diagonal[0] + smooth).numpy()
    else:
        dead = diagonal <= 1e-12 * diagonal.mean()  # inputs that never vary from 0: free to drop
        held[:, :, :m] |= dead[:, None, :]
    if biased:
        H = _with_constant(H, stats)
        own = torch.full((g, 1), DAMP_BIAS * max(stats.positions, 1e-12), dtype=torch.float64)
        damping = torch.cat([damping, own], 1)
    stats = LayerStats(H, G, None, stats.positions, stats.scale, stats.samples)
    inputs = _shared_side(H, damping, sides)
    outputs = _shared_side(G, _damping(diagonal_of(G), DAMP_OUTPUT), sides)
    return Problem(site, matrix.numpy(), inputs, outputs, stats, biased, held.numpy(), counts)


def _shared_side(moment: torch.Tensor, damping: torch.Tensor, sides: Sides | None) -> Side:
    """Return `side_of`, from layers alike where they have the same moment (ranks of one layer)."""
    for known, damped, side in sides or ():
        if torch.equal(known, moment) and torch.equal(damped, damping):
            return side
    side = side_of(moment, damping)
    if sides is not None:
        sides.append((moment, damping, side))
    return side


def _with_constant(H: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    """Return `[[H, mean], [mean^T, positions]]`, or a diagonal one entry longer."""
    g, m = H.shape[:2]
    corner = torch.full((g, 1), stats.positions, dtype=torch.float64)
    if H.dim() == 2:
        return torch.cat([H, corner], 1)
    whole = torch.zeros(g, m + 1, m + 1, dtype=torch.float64)
    whole[:, :m, :m] = H
    whole[:, m, m] = stats.positions
    if stats.mean is not None:
        whole[:, :m, m] = whole[:, m, :m] = stats.mean.to("cpu", torch.float64)
    return whole
