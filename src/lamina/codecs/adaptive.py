"""Adaptive: a context-mixing binary range coder for small tensors whose zeros have structure.

There is no table and no header but four bits inside the coded stream: whether the tensor is coded
by columns instead of rows, and how many columns make a block (a convolution kernel; the pixels of
one channel in a flattened layer). The encoder tries the sensible ones and keeps the shortest. An
all-zero tensor takes no bytes; trailing zero bytes are dropped, and the decoder reads zeros past
the end. The model is in `mixing`. Slow (about a million symbols a second a try, with numba): meant
for up to 2 ** 21 symbols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs.kernels import compiled
from lamina.codecs.mixing import code_symbols
from lamina.codecs.mixing_tables import SETTINGS, make_memory, make_tables
from lamina.codecs.symbols import Symbols, check_symbols, count_elements
from lamina.errors import FileError

LARGEST = 1 << 21  # symbols
TRY_BLOCKS = 1 << 16  # symbols; a longer tensor is not tried with guessed blocks
BLOCKS = (4, 9, 16, 25, 36, 49)  # after none and the kernel's own size


def encode(symbols: NDArray[Any], *, backend: str = "auto") -> bytes:
    """Code integers; a tensor of more than two dimensions is taken as [shape[0], the rest].

    Args:
        symbols: whole numbers that fit into int32, any shape, at most 2 ** 21 of them.
        backend: "auto", "numba" or "numpy" (here plain Python); all write the same bytes.

    Raises:
        ValueError: the values are not whole numbers or do not fit, or there are too many.

    Example:
        >>> import numpy as np
        >>> encode(np.zeros((500, 800), dtype=np.int8))
        b''
        >>> decode(encode(np.array([[0, 3], [0, -1]])), (2, 2)).tolist()
        [[0, 3], [0, -1]]
    """
    array = check_symbols(symbols)
    if array.size > LARGEST:
        raise ValueError(f"adaptive codes up to {LARGEST} symbols, not {array.size}; use rans")
    if not array.any():
        return b""
    rows, cols, own = _lay_out(array.shape)
    grid = array.reshape(rows, cols)
    tries = [_code_grid(grid, prefix, own, backend) for prefix in _prefixes(rows, cols, own)]
    return min(tries, key=len)


def decode(data: bytes, shape: Sequence[int], *, backend: str = "auto") -> Symbols:
    """Return the int32 array [shape] that `encode` was given.

    Raises:
        FileError: the shape is too large for this codec, or a magnitude is out of range.
    """
    size = count_elements(shape)
    if size > LARGEST:
        raise FileError("cannot decode an adaptive tensor", str(tuple(shape)), "it is too large")
    if not data or not size:
        return np.zeros(tuple(shape), dtype=np.int32)
    rows, cols, own = _lay_out(shape)
    width = _prefix_width(rows, cols)
    prefix = _read_prefix(data, width)
    across, block = bool(prefix & 1), _block(prefix, own)
    if across:
        rows, cols = cols, rows
    room = np.frombuffer(data, dtype=np.uint8).copy()  # numba types a read-only array apart
    flat, end = _run(np.zeros(size, np.int64), rows, cols, block, prefix, width, room, 1, backend)
    if end < 0:
        raise FileError("cannot decode an adaptive tensor", "", "a value does not fit into 32 bits")
    grid = flat.astype(np.int32).reshape(rows, cols)
    return np.ascontiguousarray(grid.T if across else grid).reshape(tuple(shape))


def length(symbols: NDArray[Any], *, backend: str = "auto") -> int:
    """Return the bytes `encode` makes, by encoding."""
    return len(encode(symbols, backend=backend))


def _lay_out(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return rows, columns, and the columns of one kernel."""
    rows = int(shape[0]) if len(shape) else 1
    return rows, math.prod(int(n) for n in shape[1:]), math.prod(int(n) for n in shape[2:])


def _prefix_width(rows: int, cols: int) -> int:
    return 0 if rows == cols == 1 else (4 if min(rows, cols) > 1 else 1)


def _prefixes(rows: int, cols: int, own: int) -> list[int]:
    """Return the prefixes to try: bit 0 by columns, bits 1 to 3 the block."""
    if rows == cols == 1:
        return [0]
    if min(rows, cols) == 1:
        return [0, 1]
    tried = [0, 1, 2] if 1 < own < cols else [0, 1]
    if own == 1 and rows * cols <= TRY_BLOCKS:
        tried += [2 * (k + 2) for k, n in enumerate(BLOCKS) if n < cols and cols % n == 0]
    return tried


def _block(prefix: int, own: int) -> int:
    return (1, own, *BLOCKS)[prefix >> 1]


def _read_prefix(data: bytes, width: int) -> int:
    """Decode the first `width` even chances by the coder's own rule, most significant first."""
    span, code, prefix = (1 << 32) - 1, int.from_bytes(data[:4].ljust(4, b"\0"), "big"), 0
    for _ in range(width):
        bound = (span >> 16) * 32768
        bit = int(code >= span - bound)
        if bit:
            code -= span - bound
        span = bound if bit else span - bound
        prefix = prefix << 1 | bit
    return prefix


def _code_grid(grid: Symbols, prefix: int, own: int, backend: str) -> bytes:
    width = _prefix_width(*grid.shape)
    across, block = bool(prefix & 1), _block(prefix, own)
    turned = np.ascontiguousarray(grid.T if across else grid)
    flat, (rows, cols) = turned.reshape(-1).astype(np.int64), turned.shape
    size = 1024 + 2 * flat.size
    while True:
        room = np.zeros(size, dtype=np.uint8)
        data, end = _run(flat, rows, cols, block, prefix, width, room, 0, backend)
        if end >= 0:
            return data.astype(np.uint8)[:end].tobytes()
        size *= 4


def _run(
    flat: NDArray[np.int64],
    rows: int,
    cols: int,
    block: int,
    prefix: int,
    width: int,
    room: NDArray[np.uint8],
    decoding: int,
    backend: str,
) -> tuple[NDArray[Any], int]:
    """Run the kernel; return what it wrote (symbols or bytes) and its verdict."""
    memory = make_memory(cols, -(-cols // block))
    arrays = (*_constants(), *memory)
    fast = compiled(code_symbols, backend)
    if fast is not None:
        end = int(fast(flat, rows, cols, block, prefix, width, room, decoding, *arrays))
        return (flat if decoding else room), end
    line, data = flat.tolist(), room.tolist()
    lists = (*_constant_lists(), *(array.tolist() for array in memory))
    end = code_symbols(line, rows, cols, block, prefix, width, data, decoding, *lists)
    return np.array(line if decoding else data, dtype=np.int64), end


@cache
def _constants() -> tuple[NDArray[np.int64], ...]:
    return (np.array(SETTINGS, dtype=np.int64), *make_tables())


@cache
def _constant_lists() -> tuple[list[int], ...]:
    return tuple(array.tolist() for array in _constants())
