"""Blocks: a long tensor in independent pieces, so that threads can decode them side by side.

    varint       pieces n
    n times      byte codec (1 rans, 3 context), varint(length)
    n times      the code of the piece

A matrix of at least n rows is cut into pieces of ceil(rows / n) rows; any other tensor, seen as a
line, into pieces of ceil(size / n) symbols. The last pieces may be shorter, or empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs import context, rans
from lamina.codecs.fields import FieldReader, varint
from lamina.codecs.segments import narrow
from lamina.codecs.symbols import Symbols, check_symbols, count_elements, matrix_sides
from lamina.errors import FileError

BLOCK = 1 << 24  # symbols
CODECS = {1: rans, 3: context}
Piece = tuple[int, int, Callable[[], NDArray[Any]]]


def encode(symbols: NDArray[Any], *, block: int = BLOCK, backend: str = "auto") -> bytes:
    """Code integers of any shape in pieces of about `block` symbols.

    Args:
        symbols: whole numbers that fit into int32, any shape.
        block: symbols a piece.
        backend: "auto", "numba" or "numpy"; all write the same bytes.

    Raises:
        ValueError: the values are not whole numbers, or do not fit into int32.

    Example:
        >>> code = encode(np.arange(10), block=4)
        >>> decode(code, (10,)).tolist(), [start for start, _, _ in pieces(code, (10,))]
        ([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 4, 8])
    """
    return assemble([encode_piece(p, backend) for p in _split(check_symbols(symbols), block)])


def encode_piece(piece: NDArray[Any], backend: str = "auto") -> tuple[int, bytes]:
    """Return one piece `[rows, cols]` as its codec's byte and its code.

    Whoever cannot hold a whole tensor codes the pieces that `cuts` tells one by one.
    """
    code = (1, rans.encode(piece, backend=backend))
    if context.suits(piece) and context.choose(piece)[1] < len(code[1]):
        code = min(code, (3, context.encode(piece, backend=backend)), key=lambda c: len(c[1]))
    return code


def assemble(codes: Sequence[tuple[int, bytes]]) -> bytes:
    """Return a whole code from those of its pieces."""
    heads = [bytes([codec]) + varint(len(code)) for codec, code in codes]
    return varint(len(heads)) + b"".join(heads) + b"".join(code for _, code in codes)


def decode(data: bytes, shape: Sequence[int], *, backend: str = "auto") -> NDArray[Any]:
    """Return the array [shape] that `encode` was given, as int8, int16 or int32.

    Raises:
        FileError: the data is damaged in a way that shows.
    """
    found = [read() for _, _, read in pieces(data, shape, backend=backend)]
    kind = max((piece.dtype for piece in found), key=lambda dtype: dtype.itemsize)
    return np.concatenate([piece.astype(kind, copy=False) for piece in found]).reshape(tuple(shape))


def length(symbols: NDArray[Any], *, block: int = BLOCK, backend: str = "auto") -> int:
    """Return the bytes `encode` makes, to within four a piece; only `context` has to be run."""
    found = []
    for piece in _split(check_symbols(symbols), block):
        size = rans.length(piece, backend=backend)
        if context.suits(piece) and context.choose(piece)[1] < size:
            size = min(size, context.length(piece, backend=backend))
        found.append(1 + len(varint(size)) + size)
    return len(varint(len(found))) + sum(found)


def pieces(data: bytes, shape: Sequence[int], *, backend: str = "auto") -> list[Piece]:
    """Return (first symbol, symbol after the last, how to read it) of every piece.

    Raises:
        FileError: the pieces do not fit the data or the shape.
    """
    size = count_elements(shape)
    reader = FieldReader(data)
    count = reader.varint()
    if not 0 < count <= max(size, 1) or count > len(data):
        raise _damaged("it has more pieces than symbols or bytes")
    heads = [(reader.byte(), reader.varint()) for _ in range(count)]
    at, whole = reader.position, memoryview(data)
    if at + sum(taken for _, taken in heads) != len(data):
        raise _damaged("its pieces are not as long as its data")
    found: list[Piece] = []
    for (codec, taken), (rows, cols, start) in zip(
        heads, cuts(matrix_sides(shape), count), strict=True
    ):
        if codec not in CODECS:
            raise _damaged(f"a piece has codec {codec}")
        body = whole[at : at + taken]
        found.append((start, start + rows * cols, _reader(codec, body, (rows, cols), backend)))
        at += taken
    return found


def count_pieces(size: int, block: int = BLOCK) -> int:
    """Return into how many pieces a tensor of so many symbols is cut."""
    return max(1, -(-size // block))


def cuts(sides: tuple[int, int], count: int) -> list[tuple[int, int, int]]:
    """Return rows, columns and first symbol of each of `count` pieces.

    Example:
        >>> cuts((5, 4), 2), cuts((1, 9), 2)
        ([(3, 4, 0), (2, 4, 12)], [(1, 5, 0), (1, 4, 5)])
    """
    rows, cols = sides
    across = rows >= count
    whole = rows if across else rows * cols
    each = -(-whole // count)
    found = []
    for k in range(count):
        here = min(each, max(whole - k * each, 0))
        start = min(k * each, whole) * (cols if across else 1)
        found.append((here, cols, start) if across else (1, here, start))
    return found


def _split(array: Symbols, block: int) -> Iterator[Symbols]:
    """Yield the pieces of a tensor as matrices."""
    sides = matrix_sides(array.shape)
    for rows, cols, start in cuts(sides, count_pieces(array.size, block)):
        yield array.reshape(-1)[start : start + rows * cols].reshape(rows, cols)


def _reader(
    codec: int, body: memoryview, shape: tuple[int, int], backend: str
) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        if not shape[0] * shape[1]:
            return narrow(np.zeros(0, dtype=np.int64))
        return CODECS[codec].decode(body, shape, backend=backend).reshape(-1)  # type: ignore[no-any-return]

    return read


def _damaged(why: str) -> FileError:
    return FileError("cannot decode a tensor in blocks", "", why)
