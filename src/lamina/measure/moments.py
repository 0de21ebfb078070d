"""Second moments of one layer, summed up over calls and batches in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.measure.columns import Columns
from lamina.measure.stats import LayerStats, diagonal_of

WIDE = 8192  # wider sides keep the diagonal only: a full float64 moment would pass 512 MiB
DEAR = 256  # from this width on float32 columns are multiplied in float32, and summed up in float64
ROWS = 4096  # columns that are multiplied at a time there


@dataclass(frozen=True)
class Moment:
    """A running sum of `x x^T` (or its diagonal) over columns.

    Args:
        total: `[groups, width, width]`, or `[groups, width]` where the layer is wide.
        first: `[groups, width]`, the sum of the columns themselves.
        count: number of columns.
    """

    total: Tensor
    first: Tensor
    count: float = 0.0


def empty_moment(groups: int, width: int, device: torch.device, diagonal: bool) -> Moment:
    """Return a moment of nothing yet; the diagonal only where asked or where the side is wide."""
    diagonal = diagonal or width > WIDE
    shape = (groups, width) if diagonal else (groups, width, width)
    return Moment(
        torch.zeros(shape, dtype=torch.float64, device=device),
        torch.zeros(groups, width, dtype=torch.float64, device=device),
    )


def add_columns(moment: Moment, parts: Iterable[Columns]) -> Moment:
    """Return the moment with columns added; `moment`'s own tensors are reused.

    Where columns are not exact, only their power is known, and the identity carries it.
    """
    count = moment.count
    for part in parts:
        x = part.values
        if x.shape[1] == 0:
            continue
        count += x.shape[1] * part.weight
        diagonal = moment.total.dim() == 2
        if part.exact and not diagonal and x.dtype == torch.float32 and x.shape[2] >= DEAR:
            # Half the time. What it loses is 1e-7 of the diagonal, far below any damping.
            for some in x.split(ROWS, 1):
                moment.total.add_((some.transpose(1, 2) @ some).double(), alpha=part.weight)
            moment.first.add_(x.sum(1, dtype=torch.float64), alpha=part.weight)
            continue
        x = x.double()
        if diagonal or not part.exact:
            power = x.square().sum(1)
            diagonal_of(moment.total).add_(power, alpha=part.weight)
        else:
            moment.total.baddbmm_(x.transpose(1, 2), x, alpha=part.weight)
        if part.exact:
            moment.first.add_(x.sum(1), alpha=part.weight)
    return Moment(moment.total, moment.first, count)


def is_finite(moment: Moment) -> bool:
    """Return whether no column held NaN or infinity (any would show on the diagonal)."""
    return bool(diagonal_of(moment.total).sum().isfinite())


def layer_stats(inputs: Moment, gradients: Moment, samples: int) -> LayerStats:
    """Return a layer's statistics: inputs summed over positions, gradients averaged over them.

    Reference: Grosse and Martens 2016, A Kronecker-factored approximate Fisher matrix for
    convolution layers, eq. 25 and 27.
    """
    mean = inputs.first.cpu() / samples
    return LayerStats(
        H=inputs.total.cpu() / samples,
        G=gradients.total.cpu() / max(1.0, gradients.count),
        mean=mean,
        positions=inputs.count / samples,
        samples=samples,
    )
