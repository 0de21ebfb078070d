"""Raw: any array as its little-endian bytes, in C order. Exact, and never larger than the array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lamina.codecs.symbols import count_elements
from lamina.errors import FileError


def encode(array: NDArray[Any]) -> bytes:
    """Return the little-endian bytes of an array of numbers or truth values.

    Args:
        array: any shape; bool, integer, float or complex.

    Raises:
        ValueError: the array holds objects, strings or dates.

    Example:
        >>> import numpy as np
        >>> encode(np.array([1, 258], dtype=np.int16)).hex()
        '01000201'
    """
    array = np.asarray(array)
    if array.dtype.kind not in "biufc":
        raise ValueError(f"raw codes numbers and truth values, not {array.dtype}")
    return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).tobytes()


def decode(data: bytes, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """Return the array `encode` was given, as a fresh writable array in native byte order.

    Args:
        data: exactly the bytes of the array.
        shape: its shape.
        dtype: its type.

    Raises:
        FileError: the bytes are not as many as shape and type say, or a truth value is not 0 or 1.

    Example:
        >>> decode(bytes.fromhex("01000201"), (2,), "int16").tolist()
        [1, 258]
    """
    kind = np.dtype(dtype)
    if kind.kind not in "biufc":
        raise FileError("cannot decode a raw tensor", str(kind), "it is not a type of numbers")
    needed = count_elements(shape) * kind.itemsize
    if len(data) != needed:
        why = f"shape {tuple(shape)} of {kind} takes {needed} bytes, not {len(data)}"
        raise FileError("cannot decode a raw tensor", "", why)
    if kind.kind == "b" and data and max(data) > 1:  # other bytes are undefined behaviour in numpy
        raise FileError("cannot decode a raw tensor", "", "a truth value is neither 0 nor 1")
    array = np.frombuffer(data, dtype=kind.newbyteorder("<")).reshape(tuple(shape))
    return array.astype(kind.newbyteorder("="), copy=True)


def length(array: NDArray[Any]) -> int:
    """Return the bytes `encode` makes."""
    return int(np.asarray(array).nbytes)
