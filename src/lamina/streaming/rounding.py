"""Plain rounding of long tensors, a few rows at a time: the integers `rdoq` gives without data.

Without statistics nothing is fed forward, so every weight is rounded by itself, and the record of a
tensor can be made from pieces that are read, rounded and coded one after another. It is the same
record to the byte.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamina import codecs
from lamina.artifact import records
from lamina.codecs import blocks
from lamina.codecs.fields import varint
from lamina.errors import MethodError, SiteError
from lamina.measure.memory import give_back
from lamina.network.lazy import Lazy

Array = NDArray[Any]
MOST = 1 << 26  # the largest integer asked for, as `rdoq`
CHUNK = 1 << 22  # weights that are read at a time
CACHED = 1 << 16  # weights that are rounded at a time: all that is needed stays in the cache


def round_to(values: Array, step: float) -> NDArray[np.int32]:
    """Return of every value the integer `rdoq` rounds it to: of its two neighbours and 0 the best.

    Args:
        values: any shape; computed in float64, as `rdoq` does.
        step: of the grid.

    Example:
        >>> round_to(np.array([-0.9, -0.5, 0.5, 0.6, 1.5]), 1.0).tolist()
        [-1, 0, 0, 1, 1]
    """
    found = np.empty(values.shape, dtype=np.int32)
    flat, out = values.reshape(-1), found.reshape(-1)
    for at in range(0, flat.size, CACHED):
        t = flat[at : at + CACHED].astype(np.float64)
        low = np.floor(t / step)
        near, far = t - low * step, t - (low + 1) * step
        near, far = near * near, far * far
        q = np.where(far < near, low + 1, low)
        q[np.minimum(near, far) >= t * t] = 0
        out[at : at + CACHED] = q
    return found


def grid_record(lazy: Lazy, name: str, step: float) -> tuple[bytes, str]:
    """Return the record of a tensor rounded to a grid, and the codec of its symbols.

    Raises:
        SiteError: it has values that are not finite.
        MethodError: the step is too fine for it.
        NetworkError: its shard cannot be read.
    """
    shape = tuple(lazy.state[name].shape)
    rows, cols = records.view_shape(shape)
    if math.prod(shape) <= blocks.BLOCK:
        codec, data = codecs.best(_symbols(lazy, name, step, (rows, cols, 0)))
    else:
        places = blocks.cuts((rows, cols), blocks.count_pieces(rows * cols, blocks.BLOCK))
        codes = []
        for place in places:
            codes.append(blocks.encode_piece(_symbols(lazy, name, step, place)))
            give_back()
        codec, data = "blocks", blocks.assemble(codes)
    head = bytes([3 | records.CODEC_IDS.index(codec) << 3]) + struct.pack("<f", step)
    return varint(len(head) + len(data)) + head + data, codec


def _symbols(lazy: Lazy, name: str, step: float, place: tuple[int, int, int]) -> NDArray[np.int32]:
    """Return a piece of a tensor as integers; of its values a few rows are there at a time.

    Args:
        place: rows and columns of the piece, and its first element, as `blocks.cuts` tells.
    """
    rows, cols, start = place
    found = np.empty((rows, cols), dtype=np.int32)
    width = records.view_shape(tuple(lazy.state[name].shape))[1]
    if cols != width or name not in lazy.stored:  # a line that is cut anywhere, or values at hand
        line = lazy.tensor(name).reshape(-1)[start : start + rows * cols]
        _round_into(found, line.reshape(rows, cols), step, name)
        return found
    first, some = start // max(1, width), max(1, CHUNK // max(1, width))
    for at in range(0, rows, some):
        last = min(at + some, rows)
        _round_into(found[at:last], lazy.rows(name, first + at, first + last), step, name)
    return found


def _round_into(out: NDArray[np.int32], values: torch.Tensor, step: float, name: str) -> None:
    array = numbers(values)
    most = float(np.abs(array).max()) if array.size else 0.0
    if not math.isfinite(most):
        raise SiteError("the weights are not finite", name, "NaN or inf has no grid point")
    if most > step * MOST:
        raise MethodError("rdoq cannot use this step", name, f"{step} is too fine")
    out[:] = round_to(array, step)


def numbers(values: torch.Tensor) -> Array:
    """Return floats as an array: numpy does not know bfloat16."""
    wide = values.dtype in (torch.float32, torch.float64)
    return (values if wide else values.float()).detach().cpu().numpy()
