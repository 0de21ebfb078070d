"""Static interleaved rANS over integers: the codec of tensors that are long, or plain.

The state of a lane is a whole number in [2^16, 2^32); coding symbol s with frequency f and
cumulated frequency c of total 2^b is x -> (x // f) 2^b + c + x mod f (Duda 2013, arXiv:1311.2540,
eq. 5), with 16-bit words moved out before. Element i belongs to lane i mod lanes; all lanes share
one stream of words. Lanes cost about three bytes each, so there is one per 1,200 bytes of payload
(8 to 4,096): numpy steps over all lanes at once and writes the same bytes as the compiled loop.

    header | escaped offsets | one lane: words, state (0 to 4 bytes) ; more: states (4 each), words

A single lane starts at 0, not 2^16, so that its flush costs nothing but the state itself.
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
from lamina.codecs.symbols import Symbols, check_symbols, count_elements
from lamina.errors import FileError

LANE_BYTES = 1200
MOST_LANES = 4096
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
    lanes = _lane_count(table, entries)
    head = pack_bits(write_table(table, lanes))
    if len(entries) == 1 and not table.escaped:
        return head
    index, offsets = _entry_index(flat, table)
    if table.escaped:
        head += _pack_offsets(offsets, table.width)
    if len(entries) == 1:
        return head
    words, states = _push(index, table, lanes, information_bits_of(table, entries), backend)
    if lanes > 1:
        return b"".join([head, states.astype("<u4").tobytes(), words.astype("<u2").tobytes()])
    state = int(states[0])
    size = 4 if words.size and state >= 1 << 24 else -(-state.bit_length() // 8)
    return b"".join([head, words.astype("<u2").tobytes(), state.to_bytes(size, "little")])


def decode(data: bytes, shape: Sequence[int], *, backend: str = "auto") -> Symbols:
    """Return the int32 array [shape] that `encode` was given.

    Raises:
        FileError: the data is damaged in a way that shows.
    """
    size = count_elements(shape)
    if not size:
        if data:
            raise _damaged("an empty tensor has no data")
        return np.zeros(tuple(shape), dtype=np.int32)
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
        flat = offsets if table.escaped else np.full(size, table.values[0])
        return flat.astype(np.int32).reshape(tuple(shape))
    words, states = _split(rest, lanes)
    entry = np.arange(len(table.weights)) if table.escaped else table.values
    flat = _pull(words, states, table, entry, size, backend)
    if table.escaped:
        hit = np.flatnonzero(flat == len(table.values))
        if hit.size != table.escaped:
            raise _damaged("the number of escaped values is another")
        flat = np.append(table.values, 0)[flat]
        flat[hit] = offsets
    return flat.astype(np.int32, copy=False).reshape(tuple(shape))


def length(symbols: NDArray[Any], *, backend: str = "auto") -> int:
    """Return the bytes `encode` makes, to within four, from the histogram alone."""
    flat = check_symbols(symbols).reshape(-1)
    if not flat.size:
        return 0
    return length_of_counts(*count_symbols(flat, backend=backend))


def length_of_counts(values: Ints, counts: Ints) -> int:
    """Return the bytes of a tensor with this histogram, to within four bytes."""
    table, entries, _ = choose_table(values, counts)
    lanes = _lane_count(table, entries)
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
        for start in range(0, flat.size, 1 << 20):  # pieces: bincount widens to 8 bytes a symbol
            part = flat[start : start + (1 << 20)].astype(np.int64) - low
            histogram += np.bincount(part, minlength=histogram.size)
    found = np.flatnonzero(histogram)
    return found + low, histogram[found]


def count_into(flat: Any, low: Any, histogram: Any) -> None:
    """Kernel: count symbols."""
    for i in range(len(flat)):
        histogram[flat[i] - low] += 1


def push_lanes(
    index: Any, freq: Any, start: Any, inverse: Any, bits: Any, states: Any, words: Any
) -> Any:
    """Kernel: code entries backwards; return where the words begin, or -1 if they do not fit."""
    lanes, place, k = len(states), len(words), (len(index) - 1) % len(states)
    for i in range(len(index) - 1, -1, -1):
        s = index[i]
        x = states[k]
        f = freq[s]
        if x >= f << (32 - bits):
            if place == 0:
                return -1
            place -= 1
            words[place] = x & 65535
            x >>= 16
        # (x + 1/2) / f is never within rounding of a whole number: exact without a division
        quotient = int((x + 0.5) * inverse[s])
        states[k] = (quotient << bits) + (x - quotient * f) + start[s]
        k = k - 1 if k else lanes - 1
    return place


def pull_lanes(words: Any, states: Any, packed: Any, entry: Any, bits: Any, out: Any) -> Any:
    """Kernel: decode; `words` ends with one spare; returns how many words were read."""
    lanes, size, limit = len(states), len(out), len(words) - 1
    mask = (1 << bits) - 1
    place = 0
    i = 0
    while i < size:
        some = min(lanes, size - i)
        for k in range(some):
            x = states[k]
            slot = x & mask
            e = packed[slot]
            out[i + k] = entry[slot]
            x = (e >> 16) * (x >> bits) + (e & 65535)
            need = (x < 65536) & (place < limit)  # arithmetic, not a branch: it is a coin toss
            x = (x << (need << 4)) | (words[place] * need)
            place += need
            states[k] = x
        i += some
    return place


def _lane_count(table: Table, entries: Ints) -> int:
    if len(entries) == 1:
        return 1
    wanted = int(information_bits_of(table, entries)) // (8 * LANE_BYTES)
    return 1 if wanted < 8 else min(wanted, MOST_LANES) // 8 * 8


def _entry_index(flat: Symbols, table: Table) -> tuple[NDArray[np.int32], Ints]:
    """Return each element's entry, and the offsets of those that escape."""
    values = table.values
    if not table.escaped and values[-1] - values[0] == len(values) - 1:
        low = values[0]
        return (flat - np.int32(low) if low else flat), np.zeros(0, dtype=np.int64)
    index = np.searchsorted(values, flat).astype(np.int32)
    if not table.escaped:
        return index, np.zeros(0, dtype=np.int64)
    if len(values):
        known = values[np.minimum(index, len(values) - 1)] == flat
        index[~known] = len(values)
        return index, flat[~known].astype(np.int64) - table.base
    return index, flat.astype(np.int64) - table.base


def _pack_offsets(offsets: Ints, width: int) -> bytes:
    shifts = np.arange(width - 1, -1, -1)
    bits = (offsets[:, None] >> shifts).astype(np.uint8) & 1
    return np.packbits(bits.reshape(-1)).tobytes()


def _unpack_offsets(packed: bytes, count: int, width: int) -> Ints:
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=count * width)
    total = np.zeros(count, dtype=np.int64)
    for column in bits.reshape(count, width).T:
        total = total << 1 | column
    return total


def _push(
    index: NDArray[np.int32], table: Table, lanes: int, payload: float, backend: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    freq = table.frequencies()
    start = np.cumsum(freq) - freq
    first = 0 if lanes == 1 else 1 << 16
    fast = compiled(push_lanes, backend)
    if fast is None and lanes > 1:
        return _push_rows(index, freq, start, table.precision, lanes)
    room = min(index.size, int(payload / 16 * 1.01) + 2 * lanes + 64)
    while True:
        words, states = np.zeros(room, dtype=np.uint16), np.full(lanes, first, dtype=np.int64)
        inverse = 1.0 / freq
        if fast is not None:
            place = fast(index, freq, start, inverse, table.precision, states, words)
        else:
            line, state = [0] * room, [first]
            tables = (index.tolist(), freq.tolist(), start.tolist(), inverse.tolist())
            place = push_lanes(*tables, table.precision, state, line)
            words, states = np.array(line, dtype=np.uint16), np.array(state)
        if place >= 0:
            return words[place:], states
        room = index.size  # never more than one word an element


def _push_rows(
    index: NDArray[np.int32], freq: Ints, start: Ints, bits: int, lanes: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    inverse, top = 1.0 / freq, freq << (32 - bits)
    states = np.full(lanes, 1 << 16, dtype=np.int64)
    rows: list[NDArray[Any]] = []
    for begin in range((index.size - 1) // lanes * lanes, -1, -lanes):
        s = index[begin : begin + lanes]
        x = states[: len(s)]
        full = np.flatnonzero(x >= top.take(s))
        moved = x[full]
        rows.append((moved & 65535).astype(np.uint16))
        x[full] = moved >> 16
        f = freq.take(s)
        quotient = ((x + 0.5) * inverse.take(s)).astype(np.int64)
        x += start.take(s) + quotient * ((1 << bits) - f)
    return np.concatenate(rows[::-1]), states


def _split(rest: bytes, lanes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return words (with a spare zero at the end) and states."""
    if lanes > 1:
        if len(rest) < 4 * lanes or len(rest) % 2:
            raise _damaged("the coded symbols end too early")
        states = np.frombuffer(rest[: 4 * lanes], "<u4").astype(np.int64)
        return np.frombuffer(rest[4 * lanes :] + b"\0\0", "<u2"), states
    tail = len(rest) if len(rest) < 5 else 4 - len(rest) % 2
    state = int.from_bytes(rest[len(rest) - tail :], "little")
    return np.frombuffer(rest[: len(rest) - tail] + b"\0\0", "<u2"), np.array([state], np.int64)


def _pull(
    words: NDArray[Any],
    states: NDArray[Any],
    table: Table,
    entry: Ints,
    size: int,
    backend: str,
) -> NDArray[np.int32]:
    bits, freq = table.precision, table.frequencies()
    slots = np.arange(1 << bits)
    packed = (np.repeat(freq, freq) << 16) + slots - np.repeat(np.cumsum(freq) - freq, freq)
    by_slot = np.repeat(entry, freq).astype(np.int32)
    fast = compiled(pull_lanes, backend)
    if fast is not None:
        out = np.empty(size, dtype=np.int32)
        states = states.astype(np.uint32)  # half the bytes: states and tables share the cache
        read = fast(words, states, packed.astype(np.uint32), by_slot, bits, out)
    elif len(states) > 1:
        out, read = _pull_rows(words, states, packed, by_slot, bits, size)
    else:
        state, row = states.tolist(), [0] * size
        read = pull_lanes(words.tolist(), state, packed.tolist(), by_slot.tolist(), bits, row)
        states, out = np.array(state), np.array(row, dtype=np.int32)
    first = 0 if len(states) == 1 else 1 << 16
    if read != len(words) - 1 or (states != first).any():  # a free check: damage rarely ends here
        raise _damaged("the coded symbols do not end where they should")
    return out


def _pull_rows(
    words: NDArray[Any],
    states: NDArray[Any],
    packed: NDArray[Any],
    by_slot: NDArray[np.int32],
    bits: int,
    size: int,
) -> tuple[NDArray[np.int32], int]:
    freq, bias = (packed >> 16).astype(np.uint32), (packed & 65535).astype(np.uint32)
    x_all, out = states.astype(np.uint32), np.empty(size, dtype=np.int32)
    mask, shift, edge = np.uint32((1 << bits) - 1), np.uint32(bits), np.uint32(1 << 16)
    wide, limit, place, lanes = words.astype(np.uint32), len(words) - 1, 0, len(states)
    for begin in range(0, size, lanes):
        x = x_all[: min(lanes, size - begin)]
        slot = x & mask
        by_slot.take(slot, out=out[begin : begin + len(x)])
        x >>= shift
        x *= freq.take(slot)
        x += bias.take(slot)
        need = np.flatnonzero(x < edge)
        if place + need.size > limit:
            raise _damaged("the coded symbols end too early")
        x[need] = x[need] << np.uint32(16) | wide[place : place + need.size]
        place += need.size
    states[:] = x_all
    return out, place


def _damaged(why: str) -> FileError:
    return FileError("cannot decode a rans tensor", "", why)
