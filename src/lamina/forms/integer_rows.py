"""Rounding rows to integers, and scaling products of integers back: compiled loops, or torch.

Both ways give the same integers, and the same numbers but for the last bit. Set `LAMINA_NUMBA=0` to
leave numba out. A row that is not finite gets a centre that is none, and so does what comes of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 254  # steps between the least and the largest value of a row: u - 128 is -127..127
OFFSET = 128
SMALLEST = 1e-30  # of a step: rows that are constant
RELATIVE = 2.0**-22  # least step over the centre of a row: below it x - c has no such digits
INFINITE = 0x7F800000  # bits of a float32 infinity


def range_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step and the centre of every row, float32 `[..., 1]`."""
    low, high = x.amin(-1, True), x.amax(-1, True)
    center = low * 0.5 + high * 0.5
    step = high * (1 / LEVELS) - low * (1 / LEVELS)
    return torch.maximum(step, center.abs() * RELATIVE).clamp(min=SMALLEST), center


def round_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a matrix as uint8 integers, with the step and the centre of every row.

    Args:
        x: float32 `[rows, in]`, contiguous.

    Returns:
        integers `[rows, in]`, steps and centres `[rows, 1]`: `x` is about `c + s (u - 128)`.

    Example:
        >>> round_rows(torch.tensor([[-1.0, 0.0, 1.0]]))[0]
        tensor([[  1, 128, 255]], dtype=torch.uint8)
    """
    fast = _compiled(_round) if x.device.type == "cpu" else None
    if fast is None:
        step, center = range_of(x)
        signed = (x - center).mul_(step.reciprocal()).round_()
        # To uint8 is not vectorised, to int8 it is: flip the top bit instead of adding 128.
        return signed.to(torch.int8).view(torch.uint8).bitwise_xor_(OFFSET), step, center
    u = torch.empty(x.shape, dtype=torch.uint8)
    step, center = torch.empty(len(x), 1), torch.empty(len(x), 1)
    values = x.numpy()
    fast(values, values.view(np.int32), u.numpy(), step.numpy(), center.numpy())
    return u, step, center


def scale_rows(y: Tensor, step: Tensor, center: Tensor, sums: Tensor, bias: Tensor) -> Tensor:
    """Return `step y + (center sums + bias)`, written over y.

    Args:
        y: float32 `[rows, out]`.
        step, center: `[rows, 1]`.
        sums, bias: `[out]`.
    """
    fast = _compiled(_scale) if y.device.type == "cpu" else None
    if fast is None:
        return y.mul_(step).add_(torch.addcmul(bias, center, sums))
    fast(y.numpy(), step.numpy(), center.numpy(), sums.numpy(), bias.numpy())
    return y


def _round(x: Any, bits: Any, u: Any, step: Any, center: Any) -> None:
    """Round rows. Floats are compared by their bits, as integers: such loops run in vectors."""
    keys = np.empty(2, np.int32)
    values = keys.view(np.float32)
    mask, shift = np.int32(0x7FFFFFFF), np.int32(31)
    half, one, part = np.float32(0.5), np.float32(1.0), np.float32(1 / LEVELS)
    for i in range(x.shape[0]):
        low, high = np.int32(0x7FFFFFFF), np.int32(-0x7FFFFFFF)
        for j in range(x.shape[1]):
            key = bits[i, j] ^ ((bits[i, j] >> shift) & mask)
            low = min(low, key)
            high = max(high, key)
        if high >= INFINITE or low < -INFINITE:  # or nan
            step[i, 0] = center[i, 0] = np.float32(np.nan)
            u[i] = 0
            continue
        keys[0] = low ^ ((low >> shift) & mask)
        keys[1] = high ^ ((high >> shift) & mask)
        c = values[0] * half + values[1] * half
        s = values[1] * part - values[0] * part
        s = max(s, abs(c) * np.float32(RELATIVE), np.float32(SMALLEST))
        inverse = one / s
        for j in range(x.shape[1]):
            u[i, j] = np.uint8(np.int32(np.rint((x[i, j] - c) * inverse)) + np.int32(OFFSET))
        step[i, 0], center[i, 0] = s, c


def _scale(y: Any, step: Any, center: Any, sums: Any, bias: Any) -> None:
    for i in range(y.shape[0]):
        s, c = step[i, 0], center[i, 0]
        for j in range(y.shape[1]):
            y[i, j] = y[i, j] * s + (c * sums[j] + bias[j])


@cache
def _compiled(loop: Callable[..., None]) -> Callable[..., None] | None:
    """Return a compiled loop; None where there is no numba."""
    if os.environ.get("LAMINA_NUMBA", "1") == "0":
        return None
    try:
        from numba import njit
    except Exception:  # numba also fails with SystemError beside a numpy too new for it
        return None
    try:
        return njit(cache=True, nogil=True)(loop)  # type: ignore[no-any-return]
    except RuntimeError:  # no folder to keep the compiled loop in
        return njit(nogil=True)(loop)  # type: ignore[no-any-return]
