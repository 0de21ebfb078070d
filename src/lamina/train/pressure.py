"""Rate pressure: a differentiable stand-in for the length of the coded file, and its controller."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

SHARPNESS = 0.25
FLOOR = 0.05


def rate_penalty(levels: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return how costly the levels are to code, in bits up to a constant factor.

    Args:
        levels: per tensor its values in units of the grid step, before rounding.

    Each level costs `log2(1 + |z| / (b/4 + 1/20))`, where `b` is the mean magnitude expected at its
    place: the product of its row's and its column's mean over the tensor's (both detached). Where a
    row or a column is nearly dead a non-zero is dear, as it is for a coder with adaptive contexts,
    so whole rows and columns die out.

    Reference: Oktay et al. 2019, arXiv:1906.06624 (entropy penalised training); Wiedemann et al.
    2019 (DeepCABAC). The rank-one expectation is ours.

    Example:
        >>> float(rate_penalty({"w": torch.zeros(3, 3)}))
        0.0
    """
    total = torch.zeros(())
    for z in levels.values():
        if not z.numel():
            continue
        magnitude = z.abs()
        flat = magnitude.detach().reshape(z.shape[0] if z.dim() > 1 else 1, -1)
        mean = flat.mean()
        expected = flat.mean(1, keepdim=True) * flat.mean(0, keepdim=True) / (mean + 1e-9)
        if z.dim() < 2:
            expected = mean.expand_as(flat)
        scale = (SHARPNESS * expected + FLOOR).reshape(z.shape)
        total = total.to(z.device) + torch.log2(1 + magnitude / scale).sum()
    return total


APPROACH = 1.2  # the size wanted half-way, over the limit: annealing shrinks the file by itself
WARM = 0.1  # share of the training in which the learning rate is too small for any size to move
HALF, REACHED = 0.5, 0.85  # shares of the training at which APPROACH and the limit are due
SLOWEST, FASTEST = 0.5, 1.6  # what one look may do to the price: more, and it overshoots
FIRM = 3.0
RELEASE = 0.1  # the price never falls below this share of where it started


@dataclass(frozen=True)
class Price:
    """The price of a bit, steered so that the size comes down to its limit before training ends.

    After a warm-up the path is geometric from the start to a little over the limit, then straight
    down to it. The price has a floor: the learning rate's rise shrinks a file for a while, and a
    price that had followed it to nothing would come back too late.

    Args:
        value: the price now [loss per bit].
        start: size at the beginning [bytes].
        limit: size to end at [bytes].
        floor: the least price [loss per bit].
    """

    value: float
    start: float
    limit: float
    floor: float = 0.0

    def wanted(self, progress: float) -> float:
        """Return the size wanted at `progress` in [0, 1] [bytes]."""
        above = max(min(APPROACH * self.limit, self.start), self.limit)
        if progress <= HALF:
            share = max(0.0, progress - WARM) / (HALF - WARM)
            return math.exp((1 - share) * math.log(self.start) + share * math.log(above))
        share = min(1.0, (progress - HALF) / (REACHED - HALF))
        return (1 - share) * above + share * self.limit

    def steer(self, size: float, progress: float) -> Price:
        """Return the price after seeing `size` [bytes] at `progress`."""
        ratio = size / self.wanted(progress)
        if progress > HALF:  # a slower learning rate takes a firmer hand
            ratio **= FIRM
        change = max(SLOWEST, min(FASTEST, ratio))
        return replace(self, value=max(self.value * change, self.floor))


def first_price(share: float, start: float, limit: float) -> Price:
    """Return the price to begin with: all bits of the limit together cost `share` of loss."""
    value = share / (8 * max(limit, 1.0))
    return Price(value, start, limit, RELEASE * value)
