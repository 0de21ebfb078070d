"""Linear relaxation with back-substitution to the box (CROWN, Zhang et al. 2018, arXiv:1811.00866).

Between l < 0 < u a ReLU lies below the line `u (g - l) / (u - l)` and above `a g`, a = 1 where
u > -l, else 0. An upper bound on any linear function of a layer's values is carried back step by
step, taking of each ReLU the line that keeps it one, until it is linear in the inputs; there the
box decides. The lower bound is minus the upper bound of minus the function.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.measure.bounds.interval import interval, magnitude
from lamina.measure.bounds.steps import EPS, LINEAR, Bounds, Step, along, terms, transposed

CHUNK = 1 << 24  # numbers held for one block of rows, about


def relaxed(steps: Sequence[Step], known: Sequence[Bounds], rows: Tensor) -> Bounds:
    """Return bounds on chosen values after the last of the steps.

    Args:
        steps: from the input on.
        known: bounds before each of the steps; `known[0]` is the box.
        rows: int64 [m], indices into the flattened output.

    Returns:
        bounds `[m]`. They may be wider than interval bounds at some values: meet the two.

    Example:
        >>> eye = torch.eye(1).double()
        >>> up = Step("linear", torch.cat([eye, -eye]), torch.zeros(2).double())
        >>> add = Step("linear", torch.tensor([[1.0, -1.0]]).double(), torch.zeros(1).double())
        >>> box = Bounds(-torch.ones(1).double(), torch.ones(1).double())
        >>> steps = [up, Step("relu"), add]  # relu(x) - relu(-x) = x
        >>> halves = Bounds(torch.zeros(2).double(), torch.ones(2).double())
        >>> known = [box, interval(up, box), halves]
        >>> relaxed(steps, known, torch.tensor([0])).high.round(decimals=6)
        tensor([1.], dtype=torch.float64)
    """
    after = interval(steps[-1], known[-1]).low.shape
    width = max(after.numel(), *(b.low.numel() for b in known))
    lows, highs = [], []
    for block in rows.split(max(1, CHUNK // (2 * width))):
        unit = torch.zeros(len(block), after.numel(), dtype=torch.float64)
        unit[torch.arange(len(block)), block] = 1.0
        unit = unit.reshape(len(block), *after)
        top = upper(steps, known, torch.cat([unit, -unit]))
        highs.append(top[: len(block)])
        lows.append(-top[len(block) :])
    return Bounds(torch.cat(lows), torch.cat(highs))


def upper(steps: Sequence[Step], known: Sequence[Bounds], rows: Tensor) -> Tensor:
    """Return upper bounds on linear functions of the steps' output.

    Args:
        steps, known: as of `relaxed`.
        rows: float64 `[m, *shape of the output]`, a function each.

    Returns:
        float64 [m].
    """
    total = torch.zeros(len(rows), dtype=torch.float64)
    slack = torch.zeros_like(total)
    for step, before in zip(reversed(steps), reversed(known), strict=True):
        weights = rows.abs()
        if step.op in LINEAR:
            reach = magnitude(step, before) if step.weight is not None else before.reach.max()
            count = terms(step, before.low.shape) + rows[0].numel()
            if step.bias is not None:
                total = total + _dot(
                    rows, along(step.bias, rows.dim() - 1)[0].expand(rows[0].shape)
                )
            slack = slack + 4 * EPS * count * _dot(weights, reach)
            rows = transposed(step, rows, before.low.shape)
        elif step.op == "relu":
            over, under, shift = lines(before)
            plus, minus = rows.clamp(min=0), rows.clamp(max=0)
            total = total + _dot(plus, shift)
            slack = slack + 8 * EPS * rows[0].numel() * _dot(weights, before.reach)
            rows = plus * over + minus * under
        else:  # the poolings that take a maximum: by their ends
            ends = interval(step, before)
            total = total + _dot(rows.clamp(min=0), ends.high) + _dot(rows.clamp(max=0), ends.low)
            slack = slack + 4 * EPS * rows[0].numel() * _dot(weights, ends.reach)
            rows = torch.zeros(len(rows), *before.low.shape, dtype=torch.float64)
    box = known[0]
    total = total + _dot(rows.clamp(min=0), box.high) + _dot(rows.clamp(max=0), box.low)
    slack = slack + 4 * EPS * rows[0].numel() * _dot(rows.abs(), box.reach)
    return total + slack + 4 * EPS * total.abs()


def lines(before: Bounds) -> tuple[Tensor, Tensor, Tensor]:
    """Return slope above, slope below and shift of the line above, for every ReLU.

    Args:
        before: bounds on what the ReLUs read.
    """
    low, high = before.low, before.high
    crossing = (low < 0) & (high > 0)
    active = (low >= 0).double()
    width = torch.where(crossing, high - low, torch.ones_like(low))
    over = torch.where(crossing, high / width, active)
    under = torch.where(crossing, (high > -low).double(), active)
    shift = torch.where(crossing, -over * low, torch.zeros_like(low))
    return over, under, shift


def _dot(rows: Tensor, values: Tensor) -> Tensor:
    """Return the inner product of every row with values of its shape (or one value for all)."""
    return (rows * values).flatten(1).sum(1)
