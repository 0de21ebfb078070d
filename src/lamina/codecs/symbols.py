"""What every integer codec accepts: arrays of whole numbers that fit into int32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.errors import FileError

Symbols = NDArray[np.int32]
LARGEST = 1 << 40  # elements; a declared shape beyond this is a damaged file, not a tensor


def check_symbols(symbols: NDArray[Any]) -> Symbols:
    """Return `symbols` as a C-ordered int32 array of the same shape.

    Raises:
        ValueError: the values are not whole numbers, or do not fit into int32.
    """
    array = np.asarray(symbols)
    if array.dtype.kind not in "iub":
        raise ValueError(f"symbols are integers, not {array.dtype}")
    if array.dtype.itemsize >= 4 and array.dtype != np.int32 and array.size:
        low, high = int(array.min()), int(array.max())
        if low < -(1 << 31) or high >= 1 << 31:
            raise ValueError(f"symbols fit into int32, but these span {low} to {high}")
    return np.asarray(array, dtype=np.int32, order="C")


def count_elements(shape: Sequence[int]) -> int:
    """Return the number of elements of a declared shape.

    Raises:
        FileError: a dimension is negative, or the tensor could not exist.
    """
    sides = [int(side) for side in shape]
    if any(side < 0 for side in sides):
        raise FileError("cannot decode a coded tensor", str(tuple(shape)), "a side is negative")
    # numpy refuses too many sides, and too large ones even beside a side of 0
    if len(sides) > 32 or math.prod(max(side, 1) for side in sides) > LARGEST:
        raise FileError("cannot decode a coded tensor", str(tuple(shape)), "it is too large")
    return math.prod(sides)


def matrix_sides(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of a tensor seen as a matrix: its first side, and all the others.

    Example:
        >>> matrix_sides((20, 5, 5)), matrix_sides((7,))
        ((20, 25), (1, 7))
    """
    if len(shape) < 2:
        return 1, math.prod(int(n) for n in shape)
    return int(shape[0]), math.prod(int(n) for n in shape[1:])
