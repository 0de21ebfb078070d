"""Merging convolutions that follow each other without an activation between: the arithmetic.

Everything is exact in exact arithmetic, and computed in the dtype that is given; the callers give
float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.errors import MethodError


@dataclass(frozen=True)
class Conv:
    """A convolution of dilation 1 with padding by zeros, as plain data.

    Args:
        weight: `[out, in / groups, *kernel]`.
        bias: `[out]`.
        stride, padding: per axis; the padding is the same on both sides.
        groups: of channels.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1] * self.groups

    def __call__(self, x: Tensor) -> Tensor:
        """Return the convolution of `x [samples, in, *size]`."""
        run = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        return run(x, self.weight, self.bias, self.stride, self.padding, 1, self.groups)


def scaled(conv: Conv, scale: Tensor, shift: Tensor) -> Conv:
    """Return the convolution followed by `y -> scale * y + shift` per channel (a BatchNorm)."""
    rows = scale.reshape(-1, *[1] * (conv.weight.dim() - 1))
    return replace(conv, weight=conv.weight * rows, bias=conv.bias * scale + shift)


def regrouped(conv: Conv, groups: int) -> Conv:
    """Return the same convolution with fewer groups, zeros where there were none.

    Args:
        groups: divides the convolution's own.

    Example:
        >>> one = Conv(torch.ones(4, 1, 3), torch.zeros(4), (1,), (1,), 4)
        >>> regrouped(one, 1).weight[:, :, 0].diag()
        tensor([1., 1., 1., 1.])
    """
    if groups == conv.groups:
        return conv
    assert conv.groups % groups == 0, (conv.groups, groups)
    inside = conv.groups // groups  # of the old groups that become one
    out, each = conv.outputs // conv.groups, conv.weight.shape[1]
    old = conv.weight.reshape(groups, inside, out, each, *conv.kernel)
    new = old.new_zeros(groups, inside, out, inside, each, *conv.kernel)
    for i in range(inside):
        new[:, i, :, i] = old[:, i]
    return replace(
        conv, weight=new.reshape(conv.outputs, inside * each, *conv.kernel), groups=groups
    )


def merge_two(first: Conv, second: Conv) -> Conv:
    """Return the one convolution that does what two do: `M = W2 * W1`, of `k1 + s1 (k2 - 1)` taps.

    Its padding is `p1 + s1 p2`: where the second one pads, the two agree inside only, unless all
    padding is moved to the first before (`padded_first`), which makes them equal. The groups are
    the greatest common divisor of both, so that depthwise layers stay depthwise among themselves.

    Raises:
        MethodError: the second one does not take the channels of the first.

    Reference: Kim et al. 2024, arXiv:2406.12837, section 3.
    """
    if first.outputs != second.inputs:
        why = f"the first gives {first.outputs} channels, the second takes {second.inputs}"
        raise MethodError("these convolutions do not follow each other", "", why)
    groups = math.gcd(first.groups, second.groups)
    first, second = regrouped(first, groups), regrouped(second, groups)
    kernel = grown((first.kernel, second.kernel), (first.stride, second.stride))
    a = first.weight.reshape(groups, first.outputs // groups, -1, *first.kernel)
    b = second.weight.reshape(groups, second.outputs // groups, -1, *second.kernel)
    merged = a.new_zeros(groups, b.shape[1], a.shape[2], *kernel)
    for tap in itertools.product(*map(range, second.kernel)):
        place = (
            slice(s * u, s * u + k)
            for u, s, k in zip(tap, first.stride, first.kernel, strict=True)
        )  # fmt: skip
        # y[o, i, v] += sum_h W2[o, h, u] W1[h, i, v] at the tap s1 u + v
        at: Any = (..., *tap)
        part = torch.einsum("goh,ghi...->goi...", b[at], a)
        whole: Any = (slice(None), slice(None), slice(None), *place)
        merged[whole] += part
    bias = first.bias.reshape(groups, -1)
    taps = b.flatten(3).sum(-1)
    shift = torch.einsum("goh,gh->go", taps, bias).reshape(-1)
    return Conv(
        merged.reshape(second.outputs, a.shape[2], *kernel),
        second.bias + shift,
        tuple(s * t for s, t in zip(first.stride, second.stride, strict=True)),
        tuple(
            p + s * q for p, s, q in zip(first.padding, first.stride, second.padding, strict=True)
        ),
        groups,
    )


def merge(convs: Sequence[Conv]) -> Conv:
    """Return the one convolution of several, in the order they run.

    Example:
        >>> one = Conv(torch.ones(1, 1, 3), torch.zeros(1), (1,), (1,))
        >>> merge([one, one]).weight
        tensor([[[1., 2., 3., 2., 1.]]])
    """
    return reduce(merge_two, convs)


def padded_first(convs: Sequence[Conv]) -> list[Conv]:
    """Return the convolutions with all padding at the first: `P = p1 + s1 p2 + s1 s2 p3 ...`."""
    if not convs:
        return []
    whole = total_padding([c.padding for c in convs], [c.stride for c in convs])
    none = (0,) * len(whole)
    return [replace(convs[0], padding=whole), *(replace(c, padding=none) for c in convs[1:])]


def with_identity(conv: Conv) -> Conv:
    """Return the convolution plus its input: 1 is added at the tap that reads the same place.

    Raises:
        MethodError: its output is not of the shape of its input.
    """
    if why := no_identity(conv.inputs, conv.outputs, conv.kernel, conv.stride, conv.padding):
        raise MethodError("a skip does not fit into this convolution", "", why)
    weight = conv.weight.clone()
    rows = torch.arange(conv.outputs)
    columns = rows % weight.shape[1]
    here: Any = (rows, columns, *conv.padding)
    weight[here] += 1
    return replace(conv, weight=weight)


def no_identity(
    inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> str:
    """Return why what a convolution gives cannot be added to what it takes, or `""`."""
    if inputs != outputs:
        return f"{inputs} channels become {outputs}"
    if any(s != 1 for s in stride):
        return f"its stride is {tuple(stride)}"
    if any(2 * p != k - 1 for p, k in zip(padding, kernel, strict=True)):
        return f"a kernel of {tuple(kernel)} with padding {tuple(padding)} changes the size"
    return ""


def grown(kernels: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the taps of the merged kernel: `k1 + s1 (k2 - 1) + s1 s2 (k3 - 1) + ...` per axis.

    Example:
        >>> [grown(((3,), (3,)), ((s,), (1,))) for s in (1, 2, 3)]
        [(5,), (7,), (9,)]
    """
    sizes, step = [1] * len(kernels[0]), [1] * len(kernels[0])
    for kernel, stride in zip(kernels, strides, strict=True):
        for axis, (k, s) in enumerate(zip(kernel, stride, strict=True)):
            sizes[axis] += step[axis] * (k - 1)
            step[axis] *= s
    return tuple(sizes)


def total_padding(
    paddings: Sequence[Sequence[int | str]], strides: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """Return the padding of the first layer that does what all of them do."""
    sizes, step = [0] * len(paddings[0]), [1] * len(paddings[0])
    for padding, stride in zip(paddings, strides, strict=True):
        for axis, (p, s) in enumerate(zip(padding, stride, strict=True)):
            sizes[axis] += step[axis] * int(p)
            step[axis] *= s
    return tuple(sizes)
