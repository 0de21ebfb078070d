"""Interval arithmetic: what a step can give, each value for itself.

For an affine step with centre m and radius r of its input: `W m + b -+ |W| r`. A ReLU and the
poolings are monotone. Every end is moved outwards by what float64 may have rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lamina.measure.bounds.steps import EPS, LINEAR, Bounds, Step, along, forward, linear, terms


def interval(step: Step, given: Bounds) -> Bounds:
    """Return bounds on a step's output from bounds on its input.

    Example:
        >>> import torch
        >>> step = Step("linear", torch.tensor([[1.0, -2.0]]).double(), torch.zeros(1).double())
        >>> found = interval(step, Bounds(torch.zeros(2).double(), torch.ones(2).double()))
        >>> round(found.low.item(), 6), round(found.high.item(), 6)
        (-2.0, 1.0)
    """
    if step.op not in LINEAR or step.weight is None:
        low, high = forward(step, given.low[None])[0], forward(step, given.high[None])[0]
        if step.op in LINEAR and step.op != "flatten":
            slack = 4 * EPS * terms(step, given.low.shape) * forward(step, given.reach[None])[0]
            return Bounds(low - slack, high + slack)
        return Bounds(low, high)
    middle, radius = (given.high + given.low) / 2, (given.high - given.low) / 2
    centre = forward(step, middle[None])[0]
    spread = linear(step, radius[None], absolute=True)[0]
    slack = 4 * EPS * terms(step, given.low.shape) * magnitude(step, given)
    return Bounds(centre - spread - slack, centre + spread + slack)


def magnitude(step: Step, given: Bounds) -> Tensor:
    """Return the most that the sums inside an affine step can reach: `|W| max|x| + |b|`."""
    most = linear(step, given.reach[None], absolute=True)[0]
    if step.bias is not None:
        most = most + along(step.bias.abs(), most.dim())[0]
    return most


def intervals(steps: Sequence[Step], box: Bounds) -> list[Bounds]:
    """Return bounds before each step, and after the last."""
    found = [box]
    for step in steps:
        found.append(interval(step, found[-1]))
    return found
