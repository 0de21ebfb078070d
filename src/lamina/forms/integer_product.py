"""Products of 8-bit integers on the CPU: packed weights, rows rounded on the fly, one epilogue.

`y = x W^T` with `W = scale * q` (a scale per row of W) and, for every row of x by itself,
`x = c + s (u - 128)` with u in 1..255: then `y = s (u - 128) q^T scale + c sum(W)`. The integer
product is exact, so a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.forms.integer_rows import OFFSET, round_rows, scale_rows

ROWS = 128  # the weights are laid out for about so many


@dataclass
class Packed:
    """A weight, ready for integer products.

    Args:
        integers: int8 `[out, in]`.
        scale: float32 `[out]`.
        sums: float32 `[out]`: of the rows of `scale * integers`.
        zeros, blank: zero points, int32 `[out]`, and no bias, float32 `[out]`.
        blob: the integers in the layout of the fast kernel; None where there is none.
        single: the same for one row alone; made when it is first met.
    """

    integers: Tensor
    scale: Tensor
    sums: Tensor
    zeros: Tensor
    blank: Tensor
    blob: Tensor | None = None
    single: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy the integers alone: layouts are of this machine, and cannot be copied."""
        return pack, (self.integers, self.scale)


def pack(integers: Tensor, scale: Tensor) -> Packed:
    """Lay a weight out for the kernel that this machine has.

    Args:
        integers: int8 `[out, in]`.
        scale: float32 `[out]`.
    """
    integers = integers.contiguous()  # the kernel's layout takes no strides
    sums = (integers.sum(1, dtype=torch.int64).double() * scale.double()).float()
    blob = None
    if integers.device.type == "cpu" and integers.numel() and has_kernel():
        blob = torch.ops.onednn.qlinear_prepack(integers, [ROWS, integers.shape[1]])
    return Packed(integers, scale, sums, torch.zeros_like(scale, dtype=torch.int32),
                  torch.zeros_like(scale), blob)  # fmt: skip


def multiply(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """Return `x W^T + bias` by integers.

    Args:
        x: float32 `[rows, in]`.
        packed: the weight.
        bias: float32 `[out]` or None.

    Returns:
        float32 `[rows, out]`. Without a kernel the integers are multiplied as floats, which are
        exact up to 2^24; the results agree to 1e-5 of `|x| |W|^T`. One row alone runs on a kernel
        that rounds zero to an integer: it agrees to one step of the row.
    """
    if packed.blob is not None and x.shape[0] == 1 and has_single():
        y = torch.ops.quantized.linear_dynamic(x, _single(packed))
        return y if bias is None else y.add_(bias)
    u, step, center = round_rows(x)
    if packed.blob is None:
        signed = u.to(torch.float32) - OFFSET
        y = F.linear(signed, packed.integers.to(torch.float32)) * packed.scale
    else:
        y = _qlinear(u, packed.blob, packed.scale, packed.zeros)
    return scale_rows(y, step, center, packed.sums, packed.blank if bias is None else bias)


def _qlinear(u: Tensor, blob: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    product = torch.ops.onednn.qlinear_pointwise
    given: tuple[Any, ...] = (
        u, 1.0, OFFSET, blob, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return product(*given)  # type: ignore[no-any-return]


def _single(packed: Packed) -> Any:
    """Return the weight in the layout of the kernel for one row."""
    if packed.single is None:
        packed.single = _prepack(packed.integers, packed.scale)
    return packed.single


def _prepack(integers: Tensor, scale: Tensor) -> Any:
    zeros = torch.zeros(len(scale), dtype=torch.int64)
    before = torch.backends.quantized.engine
    try:
        with warnings.catch_warnings():
            # Tensors of quantized dtypes will go one day; `has_single` then says so.
            warnings.simplefilter("ignore")
            weight = torch._make_per_channel_quantized_tensor(integers, scale.double(), zeros, 0)
        torch.backends.quantized.engine = "fbgemm"
        return torch.ops.quantized.linear_prepack(weight, None)
    finally:
        torch.backends.quantized.engine = before


@cache
def has_kernel() -> bool:
    """Return whether the fast kernel is there, and right where 16-bit sums would overflow."""
    try:
        ones = torch.full((4, 64), 127, dtype=torch.int8)
        blob = torch.ops.onednn.qlinear_prepack(ones, [ROWS, 64])
        u = torch.full((2, 64), 255, dtype=torch.uint8)
        y = _qlinear(u, blob, torch.ones(4), torch.zeros(4, dtype=torch.int32))
        return bool((y == 64 * 127 * (255 - OFFSET)).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


@cache
def has_single() -> bool:
    """Return whether the kernel for one row is there, and right."""
    try:
        weight = _prepack(torch.full((4, 64), 127, dtype=torch.int8), torch.ones(4))
        y = torch.ops.quantized.linear_dynamic(torch.full((1, 64), 2.0), weight)
        return bool(((y - 64 * 127 * 2.0).abs() < 1.0).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
