"""The steps of a feed-forward ReLU network, as plain data in float64, and how to run them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LINEAR = ("linear", "conv", "avg_pool", "adaptive_avg_pool", "flatten", "scale")  # no bias: linear
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Step:
    """One step of a network: an affine map, a ReLU, a pooling, a flattening.

    Args:
        op: `"linear"`, `"conv"`, `"scale"` (a factor and a shift per channel), `"relu"`,
            `"max_pool"`, `"avg_pool"`, `"adaptive_avg_pool"`, `"adaptive_max_pool"` or `"flatten"`.
        weight: float64: `[out, in]`, `[out, in / groups, *kernel]`, or `[channels]` of a scale.
        bias: float64 `[out]`.
        settings: of a convolution `stride, padding, dilation, groups`; of a pooling the keyword
            arguments of its function.
    """

    op: str
    weight: Tensor | None = None
    bias: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bounds:
    """Lower and upper ends of every value of one sample, float64 `[*shape]`."""

    low: Tensor
    high: Tensor

    @property
    def reach(self) -> Tensor:
        """The largest magnitude of every value."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def meet(self, other: Bounds) -> Bounds:
        """Return what both say."""
        return Bounds(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high))


def run(steps: Sequence[Step], x: Tensor) -> Tensor:
    """Return the output of steps for inputs `[n, *shape]`.

    Example:
        >>> eye = Step("linear", torch.eye(2).double(), torch.zeros(2).double())
        >>> run([eye, Step("relu")], torch.tensor([[-1.0, 2.0]]).double())
        tensor([[0., 2.]], dtype=torch.float64)
    """
    for step in steps:
        x = forward(step, x)
    return x


def forward(step: Step, x: Tensor) -> Tensor:
    """Return one step's output for inputs `[n, *shape]`."""
    if step.op in LINEAR:
        y = linear(step, x)
        return y if step.bias is None else y + along(step.bias, y.dim() - 1)
    if step.op == "relu":
        return x.relu()
    return _pool(step, x)


def linear(step: Step, x: Tensor, absolute: bool = False) -> Tensor:
    """Return the linear part of a step, `W x`, or with `absolute` `|W| x`, for `[n, *shape]`."""
    if step.op == "flatten":
        return x.flatten(1)
    if step.weight is None:
        return _pool(step, x)
    weight = step.weight.abs() if absolute else step.weight
    if step.op == "scale":
        return x * along(weight, x.dim() - 1)
    if step.op == "linear":
        return x @ weight.T
    return CONVS[weight.dim() - 2](x, weight, None, **step.settings)


def transposed(step: Step, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Return `rows W` for a linear step: rows `[m, *shape out]` to `[m, *shape]`."""
    if step.op == "linear":
        assert step.weight is not None
        return rows @ step.weight
    if step.op == "flatten":
        return rows.reshape(len(rows), *shape)
    with torch.enable_grad():
        x = torch.zeros(len(rows), *shape, dtype=rows.dtype, requires_grad=True)
        (found,) = torch.autograd.grad(linear(step, x), x, rows)
    return found


def along(values: Tensor, dims: int) -> Tensor:
    """Return values of channels `[c]` as `[1, c, 1, ...]`, to meet samples of `dims` dimensions."""
    return values.reshape(1, -1, *[1] * (dims - 1))


def terms(step: Step, shape: Sequence[int]) -> int:
    """Return how many products one output of a linear step sums at most."""
    if step.op in ("flatten", "scale"):
        return 1
    if step.weight is not None:
        return step.weight[0].numel()
    return max(1, torch.Size(shape).numel())


def shapes_of(steps: Sequence[Step], shape: Sequence[int]) -> list[torch.Size]:
    """Return the shape of one sample before each step, and after the last.

    Example:
        >>> shapes_of([Step("relu"), Step("flatten")], (3, 4))
        [torch.Size([3, 4]), torch.Size([3, 4]), torch.Size([12])]
    """
    x = torch.zeros(1, *shape, dtype=torch.float64)
    found = [x.shape[1:]]
    for step in steps:
        x = forward(step, x)
        found.append(x.shape[1:])
    return found


def _pool(step: Step, x: Tensor) -> Tensor:
    function = getattr(F, f"{step.op}{x.dim() - 2}d")
    result: Tensor = function(x, **step.settings)
    return result
