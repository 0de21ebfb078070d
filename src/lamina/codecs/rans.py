"""Static interleaved rANS over integers: the codec of tensors that are long, or plain.

One table for the whole tensor; the coder is in `segments`, the table in `frequency`. Lanes cost
about three bytes each, so there is one per 1,200 bytes of payload (8 to 4,096): numpy steps over
all lanes at once and writes the same bytes as the compiled loop.

    header | escaped offsets | one lane: words, state (0 to 4 bytes) ; more: states (4 each), words
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs.bits import BitReader, pack_bits
from lamina.codecs.frequency import (
    Ints,
    Table,
    choose_table,
    information_bits,
    read_table,
    write_table,
)
from lamina.codecs.kernels import compiled
from lamina.codecs.segments import Lookup, count_lanes, join, narrow, pull, push, split
from lamina.codecs.symbols import Symbols, check_symbols, count_elements
from lamina.errors import FileError

PIECE = 1 << 20  # symbols that are looked at at a time where 8 bytes each are needed
DENSE_RANGE = 1 << 20  # a wider range of values is counted by sorting instead of by a table


def encode(symbols: NDArray[Any], *, backend: str = "auto") -> bytes:
    """Code integers of any shape; the shape itself is not stored.

    Args:
        symbols: whole numbers that fit into int32, any shape.
        backend: "auto", "numba" or "numpy"; all write the same bytes.

    Raises:
        ValueError: the values are not whole numbers, or do not fit into int32.

    Example:
        >>> import numpy as np
        >>> data = encode(np.array([[0, 0, 1], [0, -1, 0]]))
        >>> decode(data, (2, 3)).tolist()
        [[0, 0, 1], [0, -1, 0]]
    """
    flat = check_symbols(symbols).reshape(-1)
    if not flat.size:
        return b""
    values, counts = count_symbols(flat, backend=backend)
    table, entries, _ = choose_table(values, counts)
    lanes = _count_lanes(table, entries)
    head = pack_bits(write_table(table, lanes))
    if len(entries) == 1 and not table.escaped:
        return head
    index, offsets = _entry_index(flat, table)
    if table.escaped:
        head += _pack_offsets(offsets, table.width)
    if len(entries) == 1:
        return head
    payload = information_bits_of(table, entries)
    return head + join(*push(index, _lookup(table, flat.size), lanes, payload, backend))


def decode(
    data: bytes | memoryview, shape: Sequence[int], *, backend: str = "auto"
) -> NDArray[Any]:
    """Return the array [shape] that `encode` was given, as int8, int16 or int32.

    Raises:
        FileError: the data is damaged in a way that shows.
    """
    size = count_elements(shape)
    if not size:
        if data:
            raise _damaged("an empty tensor has no data")
        return np.zeros(tuple(shape), dtype=np.int8)
    reader = BitReader(data)
    table, lanes = read_table(reader, size)
    rest = reader.rest()
    if table.escaped:
        packed = -(-table.escaped * table.width // 8)
        if packed > len(rest):
            raise _damaged("the escaped values end too early")
        offsets = _unpack_offsets(rest[:packed], table.escaped, table.width) + table.base
        if offsets.max() >= 1 << 31 or offsets.min() < -(1 << 31):
            raise _damaged("an escaped value does not fit into 32 bits")
        rest = rest[packed:]
    if len(table.weights) == 1:
        if rest or (table.escaped not in (0, size)):
            raise _damaged("there is data left over")
        flat = narrow(offsets) if table.escaped else np.repeat(narrow(table.values), size)
        return flat.reshape(tuple(shape))
    entry = np.arange(len(table.weights)) if table.escaped else table.values
    flat = pull(*split(rest, lanes), _lookup(table, size), narrow(entry), backend)
    if table.escaped:
        hit = np.flatnonzero(flat == len(table.values))
        if hit.size != table.escaped:
            raise _damaged("the number of escaped values is another")
        flat = narrow(np.concatenate([table.values, offsets]))[flat]
        flat[hit] = offsets
    return flat.reshape(tuple(shape))


def length(symbols: NDArray[Any], *, backend: str = "auto") -> int:
    """Return the bytes `encode` makes, to within four, from the histogram alone."""
    flat = check_symbols(symbols).reshape(-1)
    if not flat.size:
        return 0
    return length_of_counts(*count_symbols(flat, backend=backend))


def length_of_counts(values: Ints, counts: Ints) -> int:
    """Return the bytes of a tensor with this histogram, to within four bytes."""
    table, entries, _ = choose_table(values, counts)
    lanes = _count_lanes(table, entries)
    size = -(-len(write_table(table, lanes)) // 8) + -(-table.escaped * table.width // 8)
    if len(entries) == 1:
        return size
    payload = information_bits_of(table, entries) / 8
    return size + int(np.ceil(payload)) + (3 * lanes if lanes > 1 else 0)


def information_bits_of(table: Table, entries: Ints) -> float:
    """Return the ideal payload [bits] of the table's entries with these counts."""
    return information_bits(entries, table.frequencies(), table.precision)


def count_symbols(flat: Symbols, *, backend: str = "auto") -> tuple[Ints, Ints]:
    """Return the distinct symbols in rising order and how often each occurs [distinct] twice."""
    low, high = int(flat.min()), int(flat.max())
    if high - low >= DENSE_RANGE:
        values, counts = np.unique(flat, return_counts=True)
        return values.astype(np.int64), counts.astype(np.int64)
    histogram = np.zeros(high - low + 1, dtype=np.int64)
    fast = compiled(count_into, backend) if flat.size > 4096 else None
    if fast is not None:
        fast(flat, low, histogram)
    else:
        for start in range(0, flat.size, PIECE):  # bincount widens to 8 bytes a symbol
            part = flat[start : start + PIECE].astype(np.int64) - low
            histogram += np.bincount(part, minlength=histogram.size)
    found = np.flatnonzero(histogram)
    return found + low, histogram[found]


def count_into(flat: Any, low: Any, histogram: Any) -> None:
    """Kernel: count symbols."""
    for i in range(len(flat)):
        histogram[flat[i] - low] += 1


def _count_lanes(table: Table, entries: Ints) -> int:
    return 1 if len(entries) == 1 else count_lanes(information_bits_of(table, entries) / 8)


def _entry_index(flat: Symbols, table: Table) -> tuple[NDArray[np.int32], Ints]:
    """Return each element's entry, and the offsets of those that escape."""
    values = table.values
    if not table.escaped and values[-1] - values[0] == len(values) - 1:
        low = values[0]
        return (flat - np.int32(low) if low else flat), np.zeros(0, dtype=np.int64)
    index = np.empty(flat.size, np.int32)
    escaped = [np.zeros(0, dtype=np.int64)]
    for start in range(0, flat.size, PIECE):
        cut = slice(start, start + PIECE)
        index[cut] = np.searchsorted(values, flat[cut])
        if table.escaped:
            known = np.zeros(index[cut].shape, bool)
            if len(values):
                known = values[np.minimum(index[cut], len(values) - 1)] == flat[cut]
            index[cut][~known] = len(values)
            escaped.append(flat[cut][~known].astype(np.int64) - table.base)
    return index, np.concatenate(escaped)


def _pack_offsets(offsets: Ints, width: int) -> bytes:
    shifts = np.arange(width - 1, -1, -1)
    bits = (offsets[:, None] >> shifts).astype(np.uint8) & 1
    return np.packbits(bits.reshape(-1)).tobytes()


def _unpack_offsets(packed: bytes | memoryview, count: int, width: int) -> Ints:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=count * width)
    total = np.zeros(count, dtype=np.int64)
    for column in bits.reshape(count, width).T:
        total = total << 1 | column
    return total


def _lookup(table: Table, size: int) -> Lookup:
    freq = table.frequencies()
    zero = np.zeros(1, dtype=np.int64)
    bits, ends = np.array([table.precision]), np.array([size])
    return Lookup(freq, np.cumsum(freq) - freq, zero, zero, bits, ends)


def _damaged(why: str) -> FileError:
    return FileError("cannot decode a rans tensor", "", why)
