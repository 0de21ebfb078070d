"""Interleaved rANS over segments: stretches of symbols that each have a frequency table.

The state of a lane is a whole number in [2^16, 2^32); coding symbol s with frequency f and
cumulated frequency c of total 2^b is x -> (x // f) 2^b + c + x mod f (Duda 2013, arXiv:1311.2540,
eq. 5), with 16-bit words moved out before. Symbol i belongs to lane i mod lanes, whatever segment
it is in; all lanes share one stream of words. Here live the compiled loops and the numpy way that
writes the same bytes; `rans` and `context` decide about tables and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs.frequency import Ints
from lamina.codecs.kernels import compiled
from lamina.errors import FileError

LANE_BYTES = 1200  # payload of a lane; a lane costs about three bytes
MOST_LANES = 4096


@dataclass(frozen=True)
class Lookup:
    """Frequency tables, one after the other, and the segments that use them.

    Args:
        freq: frequencies of the entries of all tables [entries]; those of a table add up to 2^bits.
        start: cumulated frequencies within the table [entries].
        first: where each segment's table begins among the entries [segments].
        slots: where each segment's table begins among the slots [segments].
        bits: log2 of the total of each segment's table [segments].
        ends: where each segment ends among the symbols [segments].
    """

    freq: Ints
    start: Ints
    first: Ints
    slots: Ints
    bits: Ints
    ends: Ints


def count_lanes(payload: float) -> int:
    """Return the number of lanes for a payload [bytes]: 1, or a multiple of 8.

    Example:
        >>> count_lanes(1e3), count_lanes(1e4), count_lanes(1e9)
        (1, 8, 4096)
    """
    wanted = int(payload) // LANE_BYTES
    return 1 if wanted < 8 else min(wanted, MOST_LANES) // 8 * 8


def push_lanes(
    index: Any, freq: Any, start: Any, inverse: Any, first: Any, bits: Any, ends: Any,
    states: Any, words: Any,
) -> Any:  # fmt: skip
    """Kernel: code entries backwards; return where the words begin, or -1 if they do not fit."""
    lanes, place, k = len(states), len(words), (len(index) - 1) % len(states)
    for g in range(len(ends) - 1, -1, -1):
        low = ends[g - 1] if g > 0 else 0
        base, b = first[g], bits[g]
        for i in range(ends[g] - 1, low - 1, -1):
            s = index[i] + base
            x = states[k]
            f = freq[s]
            if x >= f << (32 - b):
                if place == 0:
                    return -1
                place -= 1
                words[place] = x & 65535
                x >>= 16
            # (x + 1/2) / f is never within rounding of a whole number: exact without a division
            quotient = int((x + 0.5) * inverse[s])
            states[k] = (quotient << b) + (x - quotient * f) + start[s]
            k = k - 1 if k else lanes - 1
    return place


def pull_lanes(
    words: Any, states: Any, packed: Any, entry: Any, slots: Any, bits: Any, ends: Any,
    half: Any, low: Any, out: Any,
) -> Any:  # fmt: skip
    """Kernel: decode; return how many words were read, or -1 where they end too early.

    `words` ends with a spare word for each lane. `half` is 16 and `low` is 65535, of an unsigned
    type, and so is `bits`: with signed shifts, or with indices in place of slices (which numba has
    to check for negative ones), this is a third slower.
    """
    lanes, limit = len(states), len(words) - len(states)
    place = 0
    i = 0
    k = 0
    for g in range(len(ends)):
        b, end = bits[g], ends[g]
        mask = (half // half << b) - half // half
        table, symbols = packed[slots[g] :], entry[slots[g] :]
        while i < end:
            some = min(lanes - k, end - i)
            states_here, out_here = states[k : k + some], out[i : i + some]
            # a single lane starts and ends below the edge: no words, no refill
            edge = low + half // half if lanes > 1 or place < limit else low - low
            for q in range(some):
                x = states_here[q]
                slot = x & mask
                e = table[slot]
                out_here[q] = symbols[slot]
                x = (e >> half) * (x >> b) + (e & low)
                y = (x << half) | words[place]
                if x < edge:
                    x = y
                    place += 1
                states_here[q] = x
            if place > limit:
                return -1
            i += some
            k += some
            if k == lanes:
                k = 0
    return place


def push(
    index: NDArray[Any], look: Lookup, lanes: int, payload: float, backend: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return words and states of coded entries.

    Args:
        index: entries within their segment's table [symbols].
        look: the tables.
        lanes: how many.
        payload: about how long the words are [bits].
    """
    first = 0 if lanes == 1 else 1 << 16
    fast = compiled(push_lanes, backend)
    if fast is None and lanes > 1:
        return _push_rows(index, look, lanes)
    room = min(index.size, int(payload / 16 * 1.01) + 2 * lanes + 64)
    tables: tuple[Any, ...] = (look.freq, look.start, 1.0 / np.maximum(look.freq, 1))
    tables += (look.first, look.bits, look.ends)
    while True:
        words, states = np.zeros(room, dtype=np.uint16), np.full(lanes, first, dtype=np.int64)
        if fast is not None:
            place = fast(index, *tables, states, words)
        else:
            line, state = [0] * room, [first]
            lists = [t.tolist() for t in (index, *tables)]
            place = push_lanes(*[*lists, state, line])
            words, states = np.array(line, dtype=np.uint16), np.array(state)
        if place >= 0:
            return words[place:], states
        room = index.size  # never more than one word a symbol


def _push_rows(index: NDArray[Any], look: Lookup, lanes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    one = len(look.ends) == 1
    where = index if one else index + spread(look.first, look.ends)
    bits = look.bits[0] if one else spread(look.bits, look.ends)
    inverse = 1.0 / np.maximum(look.freq, 1)
    states = np.full(lanes, 1 << 16, dtype=np.int64)
    rows: list[NDArray[Any]] = []
    for begin in range((index.size - 1) // lanes * lanes, -1, -lanes):
        s = where[begin : begin + lanes]
        b = bits if one else bits[begin : begin + lanes]
        x = states[: len(s)]
        f = look.freq.take(s)
        full = np.flatnonzero(x >= f << (32 - b))
        moved = x[full]
        rows.append((moved & 65535).astype(np.uint16))
        x[full] = moved >> 16
        quotient = ((x + 0.5) * inverse.take(s)).astype(np.int64)
        x += look.start.take(s) + quotient * ((1 << b) - f)
    return np.concatenate(rows[::-1]), states


def spread(per_segment: Ints, ends: Ints) -> Ints:
    """Return a segment's number for each of its symbols [symbols]."""
    return np.repeat(per_segment, np.diff(ends, prepend=0))


def pull(
    words: NDArray[Any], states: NDArray[Any], look: Lookup, entry: NDArray[Any], backend: str
) -> NDArray[Any]:
    """Return the symbols of coded words.

    Args:
        words: with a spare for each lane at the end.
        states: of the lanes.
        look: the tables.
        entry: the symbol of each entry [entries].

    Raises:
        FileError: the words do not end where the symbols do.
    """
    packed, by_slot = fill_all(look.freq, entry, backend)
    size = int(look.ends[-1]) if len(look.ends) else 0
    fast = compiled(pull_lanes, backend)
    if fast is None and len(states) > 1:
        out, read = _pull_rows(words, states, packed, by_slot, look, size)
    else:
        out = np.empty(size, dtype=entry.dtype)
        states = states.astype(np.uint32)  # half the bytes: states and tables share the cache
        arrays = (words, states, packed, by_slot, look.slots, look.bits.astype(np.uint32))
        if fast is not None:
            read = fast(*arrays, look.ends, np.uint32(16), np.uint32(65535), out)
        else:  # views, whose items are plain integers
            views = [plain_view(array) for array in (*arrays, look.ends)]
            read = pull_lanes(*[*views, 16, 65535, plain_view(out)])
    check_end(int(read), words, states)
    return out


def check_end(read: int, words: NDArray[Any], states: NDArray[Any]) -> None:
    """Check that decoding ended where coding began: a free check, for damage rarely ends there.

    Raises:
        FileError: it did not.
    """
    first = 0 if len(states) == 1 else 1 << 16
    if read != len(words) - len(states) or (states != first).any():
        raise FileError(
            "cannot decode a tensor", "", "the coded symbols do not end where they should"
        )


def fill_slots(freq: Any, entry: Any, packed: Any, by_slot: Any) -> None:
    """Kernel: give each entry as many slots, one after the other, as its frequency says."""
    at = 0
    for i in range(len(freq)):
        f = freq[i]
        for k in range(f):
            packed[at] = (f << 16) + k
            by_slot[at] = entry[i]
            at += 1


def fill_all(
    freq: Ints, entry: NDArray[Any], backend: str
) -> tuple[NDArray[np.uint32], NDArray[Any]]:
    """Return, for each slot, frequency << 16 | place within its entry, and the entry's symbol."""
    total = int(freq.sum())
    fast = compiled(fill_slots, backend)
    if fast is None:
        offsets = np.arange(total) - np.repeat(np.cumsum(freq) - freq, freq)
        return (np.repeat(freq << 16, freq) + offsets).astype(np.uint32), np.repeat(entry, freq)
    packed, by_slot = np.empty(total, dtype=np.uint32), np.empty(total, dtype=entry.dtype)
    fast(freq, entry, packed, by_slot)
    return packed, by_slot


def _pull_rows(
    words: NDArray[Any], states: NDArray[Any], packed: NDArray[np.uint32], by_slot: NDArray[Any],
    look: Lookup, size: int,
) -> tuple[NDArray[Any], int]:  # fmt: skip
    freq, bias = packed >> np.uint32(16), packed & np.uint32(65535)
    x_all, out = states.astype(np.uint32), np.empty(size, dtype=by_slot.dtype)
    one, edge = len(look.ends) == 1, np.uint32(1 << 16)
    bits = look.bits.astype(np.uint32) if one else spread(look.bits, look.ends).astype(np.uint32)
    base = look.slots if one else spread(look.slots, look.ends).astype(np.uint32)
    mask = (np.uint32(1) << bits) - np.uint32(1)
    lanes = len(states)
    wide, limit, place = words.astype(np.uint32), len(words) - lanes, 0
    for begin in range(0, size, lanes):
        part = slice(None) if one else slice(begin, begin + lanes)
        x = x_all[: min(lanes, size - begin)]
        slot = x & mask[part]
        if not one:
            slot += base[part]
        by_slot.take(slot, out=out[begin : begin + len(x)])
        x >>= bits[part]
        x *= freq.take(slot)
        x += bias.take(slot)
        need = np.flatnonzero(x < edge)
        if place + need.size > limit:
            raise FileError("cannot decode a tensor", "", "the coded symbols end too early")
        x[need] = x[need] << np.uint32(16) | wide[place : place + need.size]
        place += need.size
    states[:] = x_all
    return out, place


def join(words: NDArray[Any], states: NDArray[Any]) -> bytes:
    """Return words and states as bytes.

    One lane: words, then its state in 0 to 4 bytes; more: all states (4 bytes each), then words. A
    single lane starts at 0, not 2^16, so that its flush costs nothing but the state itself.
    """
    if len(states) > 1:
        return states.astype("<u4").tobytes() + words.astype("<u2").tobytes()
    state = int(states[0])
    size = 4 if words.size and state >= 1 << 24 else -(-state.bit_length() // 8)
    return words.astype("<u2").tobytes() + state.to_bytes(size, "little")


def split(rest: bytes | memoryview, lanes: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Undo `join`; the words get a spare zero for each lane at the end.

    Raises:
        FileError: the bytes are too few, or odd.
    """
    if lanes > 1:
        if len(rest) < 4 * lanes or len(rest) % 2:
            raise FileError("cannot decode a tensor", "", "the coded symbols end too early")
        states = np.frombuffer(rest, "<u4", lanes).astype(np.int64)
        count, at = len(rest) // 2 - 2 * lanes, 4 * lanes
    else:
        tail = len(rest) if len(rest) < 5 else 4 - len(rest) % 2
        states = np.array([int.from_bytes(rest[len(rest) - tail :], "little")], np.int64)
        count, at = (len(rest) - tail) // 2, 0
    words = np.zeros(count + lanes, dtype=np.uint16)
    words[:count] = np.frombuffer(rest, "<u2", count, at)
    return words, states


def plain_view(array: Any) -> Any:
    """Return a view whose items are plain integers, and whose slices are views too."""
    whole: Any = np.ascontiguousarray(array)
    return memoryview(whole)


def narrow(values: Ints) -> NDArray[Any]:
    """Return integers in the narrowest of int8, int16 and int32 that holds them.

    Example:
        >>> narrow(np.array([0, 200])).dtype
        dtype('int16')
    """
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for kind in (np.int8, np.int16):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return values.astype(kind)
    return values.astype(np.int32)
