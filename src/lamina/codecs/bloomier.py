"""Weightless: a Bloomier filter that keeps the symbols of a sparse tensor without their places.

Every non-zero symbol comes back exactly. A zero comes back as a symbol by chance, always the same
ones for the same bytes: at a rate of k / 2^t with k symbols and cells of t bits. Exact gaps
(`huffman`) are as short where about one zero comes back wrong for each non-zero. Place i of the
flat tensor asks K cells of a table X and a mask,

    v(i) = mask(i) xor X[c_0(i)] xor ... xor X[c_(K-1)(i)],    symbol v + 1 if v < k, else 0.

The table has S segments of L cells; the K cells of a place lie in K consecutive segments (with
S = K that is one cell from each third or quarter; more segments need fewer cells). Numbers are
unsigned, modulo 2^64; hi and lo are the upper and lower 32 bits; G = 0x9E3779B97F4A7C15, and mix is
SplitMix64's: z ^= z >> 30, z *= 0xBF58476D1CE4E5B9, z ^= z >> 27, z *= 0x94D049BB133111EB,
z ^= z >> 31.

    u0 = mix(mix(seed + G) + i G)    u1 = mix(u0 + G)    u2 = mix(u0 + 2 G)
    h = hi u1, lo u1, hi u2, lo u2        mask = the lowest t bits of u0
    first segment s = hi u0 * (S - K + 1) >> 32        c_j = (s + j) L + (h_j L >> 32)

Byte layout. A tensor without non-zero symbols is no bytes at all. Otherwise, bits most significant
first, eg(k) exp-Golomb of order k:

    K - 3 in 1 | t - 1 in 5 | k - 1 eg(3) | seed eg(1) | S - K eg(2) | L - 1 eg(6) | zero bits up
    to a whole byte | S L cells of t bits each | zero bits up to a whole byte

Reference: Reagen et al., "Weightless", ICML 2018; Chazelle et al., "The Bloomier filter", SODA
2004; for segments, Graf and Lemire, "Binary fuse filters", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs.bits import BitReader, golomb_bits, pack_bits
from lamina.codecs.kernels import compiled
from lamina.codecs.symbols import check_symbols, count_elements
from lamina.errors import FileError

MOST_BITS = 32
CHUNK = 1 << 16  # places hashed, or cells packed, at once; a multiple of 8
TRIES = 12  # seeds for each size of the table
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
U27, U30, U31, U32 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
LOW = np.uint64(0xFFFFFFFF)
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Filter:
    """A table and how it is asked.

    Args:
        hashes: cells a place asks, K, 3 or 4.
        bits: of a cell, t.
        symbols: k; the symbols are 1 to k.
        seed: of the hashes.
        segments: S.
        segment: cells of a segment, L.
    """

    hashes: int
    bits: int
    symbols: int
    seed: int
    segments: int
    segment: int

    @property
    def cells(self) -> int:
        """Return the cells of the table."""
        return self.segments * self.segment


def encode(symbols: NDArray[Any], *, bits: int, seed: int = 0, backend: str = "auto") -> bytes:
    """Store where a tensor is not 0, and what it is there; ask `decode` what comes back.

    Args:
        symbols: whole numbers from 0 (absent) to k, any shape.
        bits: of a cell, 1 to 32, with k <= 2^bits; a bit more halves the false positives.
        seed: first one tried, 0 to 2^32 - 1; another seed gives other false positives.
        backend: "auto", "numba" or "numpy"; all write the same bytes.

    Raises:
        ValueError: the symbols are not such numbers, or bits or seed is out of range.

    Example:
        >>> import numpy as np
        >>> data = encode(np.array([[0, 0, 3], [0, 1, 0]]), bits=20)
        >>> decode(data, (2, 3)).tolist()
        [[0, 0, 3], [0, 1, 0]]
    """
    flat = check_symbols(symbols).reshape(-1)
    if not 1 <= bits <= MOST_BITS or not 0 <= seed <= int(LOW):
        raise ValueError(f"bits are 1 to 32 and the seed has 32 bits, not {bits} and {seed}")
    places = np.flatnonzero(flat)
    if not places.size:
        return b""
    values = flat[places]
    if int(values.min()) < 0:
        raise ValueError("a bloomier filter holds symbols of 0 (absent) and more")
    most = int(values.max())
    if most > 1 << bits:
        raise ValueError(f"{most} symbols do not fit into cells of {bits} bits")
    hashes, segments, segment = _least_table(places.size)
    while True:
        for _ in range(TRIES):
            tried = Filter(hashes, bits, most, seed, segments, segment)
            table = _build(tried, places, values.astype(np.int64) - 1, backend)
            if table is not None:
                return pack_bits(_write_header(tried)) + _pack_cells(table, bits)
            seed = (seed + 1) & int(LOW)
        segment += -(-segment // 100)


def decode(data: bytes, shape: Sequence[int], *, backend: str = "auto") -> NDArray[Any]:
    """Return the array [shape] as int8, int16 or int32, false positives included.

    Raises:
        FileError: the data is damaged in a way that shows.
    """
    size = count_elements(shape)
    if not data:
        return np.zeros(tuple(shape), dtype=np.int8)
    asked, table = _read(data, size)
    held = np.int8 if asked.symbols < 128 else np.int16 if asked.symbols < 1 << 15 else np.int32
    out = np.empty(size, dtype=held)
    fast = compiled(ask_places, backend)
    if fast is not None:
        numbers = (asked.segments - asked.hashes + 1, asked.segment, (1 << asked.bits) - 1)
        start = _mix(np.array([asked.seed], dtype=np.uint64) + GOLDEN)
        fast(table, start, np.array(numbers, np.uint64), asked.hashes, asked.symbols, out)
        return out.reshape(tuple(shape))
    for begin in range(0, size, CHUNK):
        places = np.arange(begin, min(begin + CHUNK, size))
        value, cells = _hash(asked, places)
        for row in cells:
            value ^= table[row]
        out[begin : begin + len(places)] = np.where(value < asked.symbols, value + 1, 0)
    return out.reshape(tuple(shape))


def length(symbols: NDArray[Any], *, bits: int, seed: int = 0) -> int:
    """Return the bytes `encode` makes; it has to make them."""
    return len(encode(symbols, bits=bits, seed=seed))


def false_positive_rate(k: int, bits: int) -> float:
    """Return how likely a zero comes back as a symbol, with k symbols and cells of `bits` bits.

    Example:
        >>> false_positive_rate(15, 8)
        0.05859375
    """
    return min(k / 2**bits, 1.0)


def describe(data: bytes, shape: Sequence[int]) -> dict[str, float]:
    """Return the figures of a coded tensor.

    Returns:
        nonzeros (false positives included), symbols k, hashes K, bits of a cell t, cells,
        segments, seed, false_positive_rate, table_bytes (the cells) and head_bytes.

    Raises:
        FileError: the data is damaged in a way that shows.
    """
    if not data:
        names = ("nonzeros", "symbols", "hashes", "bits", "cells", "segments", "seed")
        rest = ("false_positive_rate", "table_bytes", "head_bytes")
        return dict.fromkeys(names + rest, 0)
    asked, _ = _read(data, count_elements(shape))
    table_bytes = -(-asked.cells * asked.bits // 8)
    return {
        "nonzeros": int(np.count_nonzero(decode(data, shape))),
        "symbols": asked.symbols,
        "hashes": asked.hashes,
        "bits": asked.bits,
        "cells": asked.cells,
        "segments": asked.segments,
        "seed": asked.seed,
        "false_positive_rate": false_positive_rate(asked.symbols, asked.bits),
        "table_bytes": table_bytes,
        "head_bytes": len(data) - table_bytes,
    }


def ask_places(table: Any, start: Any, numbers: Any, hashes: Any, symbols: Any, out: Any) -> None:
    """Kernel (numba only: its integers wrap): ask for every place of the flat tensor."""
    state, starts, segment, mask = start[0], numbers[0], numbers[1], numbers[2]
    for i in range(len(out)):
        z = state
        z = (z ^ (z >> U30)) * MIX_1
        z = (z ^ (z >> U27)) * MIX_2
        u = z ^ (z >> U31)
        z = u + GOLDEN
        z = (z ^ (z >> U30)) * MIX_1
        z = (z ^ (z >> U27)) * MIX_2
        z = z ^ (z >> U31)
        base = (((u >> U32) * starts) >> U32) * segment
        value = u & mask
        value ^= table[base + (((z >> U32) * segment) >> U32)]
        base += segment
        value ^= table[base + (((z & LOW) * segment) >> U32)]
        base += segment
        z = u + GOLDEN + GOLDEN
        z = (z ^ (z >> U30)) * MIX_1
        z = (z ^ (z >> U27)) * MIX_2
        z = z ^ (z >> U31)
        value ^= table[base + (((z >> U32) * segment) >> U32)]
        if hashes == 4:
            value ^= table[base + segment + (((z & LOW) * segment) >> U32)]
        found = np.int64(value)
        out[i] = found + 1 if found < symbols else 0
        state += GOLDEN


def peel(cells: Any, hashes: Any, values: Any, degree: Any, owner: Any, queue: Any) -> Any:
    """Kernel: solve the table into `owner`; return whether every key found a cell of its own.

    Args:
        cells: of key i, at K i to K i + K - 1 [keys * K].
        hashes: K.
        values: what the cells of a key must make together [keys].
        degree, owner: zeros [table].
        queue: scratch [table].
    """
    for i in range(len(cells)):
        degree[cells[i]] += 1
        owner[cells[i]] ^= i // hashes
    tail = 0
    for c in range(len(degree)):
        if degree[c] == 1:
            queue[tail] = c
            tail += 1
    head, done = 0, 0
    while head < tail:
        cell = queue[head]
        head += 1
        if degree[cell] != 1:  # its key has left by another cell
            continue
        key = owner[cell]
        queue[done] = (
            cell  # never past `head`: what was read is overwritten by the order of peeling
        )
        done += 1
        for j in range(key * hashes, key * hashes + hashes):
            other = cells[j]
            degree[other] -= 1
            if other != cell:
                owner[other] ^= key
                if degree[other] == 1:
                    queue[tail] = other
                    tail += 1
    if done * hashes != len(cells):
        return False
    for c in range(len(owner)):
        if degree[c] != 0:
            return False
        degree[c] = owner[c]
        owner[c] = 0
    for i in range(done - 1, -1, -1):
        cell = queue[i]
        key = degree[cell]
        value = values[key]
        for j in range(key * hashes, key * hashes + hashes):
            value ^= owner[cells[j]]
        owner[cell] = value
    return True


def _least_table(keys: int) -> tuple[int, int, int]:
    """Return K, S and L of the smallest table worth trying; measured: one in a few seeds works.

    Four cells in many segments come to 1.02 cells a key as the table grows, three cells in thirds
    to 1.22, but short tables with segments are wasted at their ends.
    """
    if keys < 2500:
        return 3, 3, max(-(-keys * 6 // 15), 1)
    segments = max(int(2.5 * keys ** (1 / 3)), 4)
    return 4, segments, int((1.02 + 1.3 * keys**-0.245) * keys / segments) + 1


def _build(asked: Filter, places: Ints, values: Ints, backend: str) -> Ints | None:
    """Return the cells of the table [S L], or None where the hashes allow none."""
    if asked.cells < places.size:
        return None
    masks, rows = _hash(asked, places)
    cells, wanted = rows.T.reshape(-1), values ^ masks
    fast = compiled(peel, backend)
    if fast is not None:
        degree, owner, queue = (np.zeros(asked.cells, dtype=np.int64) for _ in range(3))
        return owner if fast(cells, asked.hashes, wanted, degree, owner, queue) else None
    lists = ([0] * asked.cells, [0] * asked.cells, [0] * asked.cells)
    if not peel(cells.tolist(), asked.hashes, wanted.tolist(), *lists):
        return None
    return np.array(lists[1], dtype=np.int64)


def _mix(z: Hashes) -> Hashes:
    z = (z ^ (z >> U30)) * MIX_1
    z = (z ^ (z >> U27)) * MIX_2
    return z ^ (z >> U31)


def _hash(asked: Filter, places: Ints) -> tuple[Ints, Ints]:
    """Return the mask of each place [places], and its cells [K, places]."""
    start = _mix(np.array([asked.seed], dtype=np.uint64) + GOLDEN)
    first = _mix(start + places.astype(np.uint64) * GOLDEN)
    second, third = _mix(first + GOLDEN), _mix(first + GOLDEN + GOLDEN)
    starts, segment = np.uint64(asked.segments - asked.hashes + 1), np.uint64(asked.segment)
    base = ((first >> U32) * starts >> U32) * segment
    parts = (second >> U32, second & LOW, third >> U32, third & LOW)[: asked.hashes]
    cells = [base + np.uint64(j) * segment + (h * segment >> U32) for j, h in enumerate(parts)]
    mask = first & np.uint64((1 << asked.bits) - 1)
    return mask.astype(np.int64), np.stack(cells).astype(np.int64)


def _write_header(asked: Filter) -> str:
    fixed = str(asked.hashes - 3) + format(asked.bits - 1, "05b")
    numbers = golomb_bits(asked.symbols - 1, 3) + golomb_bits(asked.seed, 1)
    shape = golomb_bits(asked.segments - asked.hashes, 2) + golomb_bits(asked.segment - 1, 6)
    return fixed + numbers + shape


def _read(data: bytes, size: int) -> tuple[Filter, NDArray[Any]]:
    reader = BitReader(data)
    hashes, bits = reader.take(1) + 3, reader.take(5) + 1
    symbols, seed = reader.golomb(3) + 1, reader.golomb(1)
    segments, segment = reader.golomb(2) + hashes, reader.golomb(6) + 1
    asked = Filter(hashes, bits, symbols, seed, segments, segment)
    if symbols > min(1 << bits, (1 << 31) - 1) or max(seed, segments, segment) > int(LOW):
        raise _damaged("its header is out of range")
    if not size:
        raise _damaged("an empty tensor has no data")
    if asked.cells > 2 * size + 256:
        raise _damaged("it has more cells than any tensor of this shape needs")
    filled = reader.take(-reader.position % 8)
    rest = reader.rest()
    if len(rest) != -(-asked.cells * bits // 8):
        raise _damaged("it has another length than its header says")
    if filled or rest[-1] & ((1 << (-asked.cells * bits % 8)) - 1):
        raise _damaged("there is something between its parts")
    return asked, _unpack_cells(rest, asked.cells, bits)


def _pack_cells(table: Ints, bits: int) -> bytes:
    shifts, parts = np.arange(bits - 1, -1, -1), []
    for begin in range(0, len(table), CHUNK):
        part = table[begin : begin + CHUNK, None] >> shifts & 1
        parts.append(np.packbits(part.astype(np.uint8).reshape(-1)).tobytes())
    return b"".join(parts)


def _unpack_cells(data: bytes | memoryview, cells: int, bits: int) -> NDArray[Any]:
    held = np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32
    table, raw = np.zeros(cells, dtype=held), np.frombuffer(data, dtype=np.uint8)
    for begin in range(0, cells, CHUNK):
        part = table[begin : begin + CHUNK]
        stored = raw[begin * bits // 8 : -(-(begin + len(part)) * bits // 8)]
        for column in np.unpackbits(stored, count=len(part) * bits).reshape(-1, bits).T:
            np.left_shift(part, 1, out=part)
            np.bitwise_or(part, column, out=part)
    return table


def _damaged(why: str) -> FileError:
    return FileError("cannot decode a bloomier tensor", "", why)
