"""Small ReLU networks as steps, and the exact range of their values by brute force."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import torch
from scipy.optimize import linprog

from lamina.measure.bounds import Bounds, Step


def net(widths: Sequence[int], seed: int, bias: float = 0.3) -> list[Step]:
    """Return linear layers with ReLUs between them."""
    random = torch.Generator().manual_seed(seed)
    steps = []
    for a, b in pairwise(widths):
        weight = torch.randn(b, a, generator=random, dtype=torch.float64) / a**0.5
        shift = bias * torch.randn(b, generator=random, dtype=torch.float64)
        steps += [Step("linear", weight, shift), Step("relu")]
    return steps[:-1]


def conv_net(seed: int, pool: str = "max_pool") -> list[Step]:
    """Return conv - relu - pool - conv - relu - flatten - linear, of inputs [1, 4, 4]."""
    random = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64) / 2

    plain = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}
    return [
        Step("conv", values(1, 1, 3, 3), values(1), plain), Step("relu"),
        Step(pool, settings={"kernel_size": 2, "stride": 2}),
        Step("conv", values(2, 1, 2, 2), values(2), {**plain, "padding": 0}), Step("relu"),
        Step("flatten"), Step("linear", values(2, 2), values(2)),
    ]  # fmt: skip


def cube(shape: Sequence[int], low: float = -1.0, high: float = 1.0) -> Bounds:
    """Return a box with the same ends everywhere."""
    return Bounds(
        torch.full(tuple(shape), low, dtype=torch.float64),
        torch.full(tuple(shape), high, dtype=torch.float64),
    )


def brute_force(steps: Sequence[Step], box: Bounds) -> np.ndarray:
    """Return (least, most) of every output over a box, [out, 2].

    Each pattern of the hidden units is one polytope on which the network is affine: linear programs
    on each that is not empty, and no relaxation, no bounds and no integers.
    """
    layers = [(s.weight.numpy(), s.bias.numpy()) for s in steps if s.op == "linear"]
    ends = np.stack([box.low.numpy(), box.high.numpy()], 1)
    found = np.tile([np.inf, -np.inf], (len(layers[-1][0]), 1))

    def solve(goal: np.ndarray, left: np.ndarray, right: np.ndarray) -> float | None:
        made = linprog(goal, left if len(left) else None, right if len(left) else None, bounds=ends)
        return float(made.fun) if made.status == 0 else None

    def walk(
        at: int, value: np.ndarray, shift: np.ndarray, left: np.ndarray, right: np.ndarray
    ) -> None:
        w, b = layers[at]
        value, shift = w @ value, w @ shift + b
        if at == len(layers) - 1:
            for i, (row, c) in enumerate(zip(value, shift, strict=True)):
                low, high = solve(row, left, right), solve(-row, left, right)
                if low is not None and high is not None:
                    found[i] = min(found[i, 0], low + c), max(found[i, 1], c - high)
            return
        for pattern in product((0.0, 1.0), repeat=len(w)):
            on = np.array(pattern)
            side = 1 - 2 * on  # off: g <= 0, on: -g <= 0
            more = np.concatenate([left, side[:, None] * value])
            most = np.concatenate([right, -side * shift])
            if solve(np.zeros(len(ends)), more, most) is not None:
                walk(at + 1, on[:, None] * value, on * shift, more, most)

    width = len(ends)
    walk(0, np.eye(width), np.zeros(width), np.zeros((0, width)), np.zeros(0))
    return found
