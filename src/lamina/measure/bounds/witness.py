"""Witnesses: points of the box at which a unit is on, or off; what is seen needs no proof against.

Random points, random corners, given points, and an ascent: where a ReLU network is linear, the
box's corner on the side of the gradient is the best point, and the next gradient is taken there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from lamina.measure.bounds.steps import Bounds, Step, forward, run

BATCH = 256  # points at once


def points_of(box: Bounds, count: int, seed: int = 0) -> Tensor:
    """Return points of a box: half of them anywhere, a quarter corners, a quarter in between.

    The first two are the lowest and the highest corner; of those in between most values are ends.

    Args:
        box: `[*shape]`.
        count: of points, at least 2.
        seed: of the random numbers.

    Returns:
        float64 `[count, *shape]`.
    """
    random = torch.Generator().manual_seed(seed)
    share = torch.rand(count, *box.low.shape, dtype=torch.float64, generator=random)
    level = torch.rand(count, *[1] * box.low.dim(), dtype=torch.float64, generator=random)
    corner = (share < level).double()  # corners with few and with many high values
    inside = torch.rand(share.shape, dtype=torch.float64, generator=random)
    kind = torch.arange(count) % 4
    share[kind == 1] = corner[kind == 1]
    mixed = torch.where(inside < 0.1, inside * 10, corner)
    share[kind == 2] = mixed[kind == 2]
    share[0], share[1] = 0.0, 1.0
    return torch.lerp(box.low, box.high, share).clamp(box.low, box.high)


def seen(
    steps: Sequence[Step], points: Tensor, before: Sequence[int], until: float | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return which units were seen on, and which off, before chosen steps.

    Args:
        steps: of the whole network.
        points: `[n, *shape]`.
        before: indices of steps.
        until: of `time.monotonic`, when to stop; the first few points are always looked at.

    Returns:
        step index -> (on, off), bool `[units]` each; a unit is a channel, on where any position is.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for block in points.split(BATCH if points[0].numel() < 1000 else BATCH // 16):
        if found and until is not None and time.monotonic() > until:
            break
        x = block
        for i, step in enumerate(steps):
            if i in before:
                on, off = signs(x)
                old = found.get(i)
                found[i] = (on, off) if old is None else (old[0] | on, old[1] | off)
            if i > max(before, default=-1):
                break
            x = forward(step, x)
    return found


def signs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return which units of `[n, c, ...]` are positive somewhere, and which are negative."""
    flat = values.flatten(2) if values.dim() > 2 else values.unsqueeze(-1)
    return (flat > 0).any(2).any(0), (flat < 0).any(2).any(0)


def ascend(
    steps: Sequence[Step], box: Bounds, units: Tensor, side: int, rounds: int = 8, seed: int = 0,
    until: float | None = None,
) -> Tensor:  # fmt: skip
    """Return points at which chosen units are large (or small), as far as an ascent finds them.

    Args:
        steps: up to the units.
        box: of the input.
        units: int64 [m].
        side: 1 to go up, -1 to go down.
        rounds: of the ascent.
        seed: of the points it starts from.
        until: of `time.monotonic`, when to stop.

    Returns:
        float64 `[up to m, *shape]`, the best that was met for each, in order.
    """
    best: list[Tensor] = []
    for block in units.split(BATCH if box.low.numel() < 1000 else BATCH // 16):
        if best and until is not None and time.monotonic() > until:
            break
        x = points_of(box, max(2, len(block)), seed)[: len(block)]
        top, kept = torch.full((len(block),), -torch.inf, dtype=torch.float64), x.clone()
        for number in range(rounds):
            if number and until is not None and time.monotonic() > until:
                break
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                values = run(steps, x).flatten(2) if _spatial(steps, x) else run(steps, x)
                goal = side * values[torch.arange(len(block)), block]
                goal = goal if goal.dim() == 1 else goal.max(1).values
                (slope,) = torch.autograd.grad(goal.sum(), x)
            better = goal.detach() > top
            kept[better] = x.detach()[better]
            top = torch.where(better, goal.detach(), top)
            if not bool(better.any()):
                break
            end = torch.where(slope > 0, box.high, box.low)
            x = torch.where(slope == 0, x.detach(), end)
        best.append(kept)
    return torch.cat(best)


def _spatial(steps: Sequence[Step], x: Tensor) -> bool:
    return run(steps, x[:1].detach()).dim() > 2
