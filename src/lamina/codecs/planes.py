"""Planes: buffers of floats or whole numbers, exact to the bit, cut into planes of bits.

The signs and exponents of trained weights repeat, and so do, a little, their first mantissa bits;
the other bits are noise. So each element is cut: its top bits become one symbol of static rANS, and
the rest lies raw, except for planes that compress too (values that were once of a narrower type).

An element is its `itemsize` little-endian bytes, read as an unsigned number x of w = 8, 16, 32 or
64 bits. Elements go in blocks of 2^19, the last one shorter; a block needs no other block. An empty
buffer has no bytes.

    data    = block...
    block   = head [mask] lengths payloads
    head    = one byte: bits 0-2: t - 8; bits 3-4: transform; bit 5: no mask; bits 6-7: 0
    planes  = plane 0: the top t bits of x, 8 <= t <= min(w, 15); plane 1, if r = (w - t) mod 8 is
              not 0: the next r bits; then the rest, a byte a plane, from high to low
    mask    = one byte: bit p set: plane p is coded, else raw; without a mask, plane 0 alone is
              coded; plane 0 can be raw only where t = 8
    lengths = for each coded plane, in order, the bytes of its payload as unsigned LEB128; but the
              last coded plane of the last block has none: it takes what the others leave
    payloads = of all planes, plane 0 first
    payload = raw: each element's bits as one string, most significant first, zeros after it
              up to a whole byte
              coded: a tensor [elements] of codec `rans`; no bytes at all: every bit is 0

Before it is cut, x was transformed (undone after joining, all modulo 2^w):

    0 none    1 rotate: (x << 1) | (x >> w - 1), so that a float's sign is its lowest bit
    2 zigzag: (x << 1) ^ (x >> w - 1, arithmetic), so that -1 is 1 and 1 is 2
    3 delta: zigzag of x minus the element before it in the block (0 before the first)

Floats use 0 and 1, whole numbers 0, 2 and 3. Which t, which transform and which planes are coded
is the writer's choice alone; readers take any.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs import rans
from lamina.codecs.fields import varint
from lamina.codecs.symbols import LARGEST
from lamina.codecs.words import (
    DELTA,
    NONE,
    ROTATE,
    ZIGZAG,
    Words,
    join,
    join_packed,
    pack,
    packed_size,
    plane_widths,
    restore,
    transform,
)
from lamina.errors import FileError

BLOCK = 1 << 19  # elements; part of the format
TOPS = range(8, 14)  # the widths of plane 0 that the writer tries
TOP_ONLY = 0x20
SHORT = 1 << 14  # elements of a block so short that its time does not matter, only its size
WORTH = 0.99  # a plane of noise is coded where it shrinks at least so far: raw ones cost no time


@dataclass(frozen=True)
class Block:
    """A block of a coded buffer, found but not yet decoded.

    Args:
        start, stop: the bytes of the buffer it holds.
        transform, top: as in the head; `top` is t.
        coded: whether each plane is coded [planes].
        payloads: the bytes of each plane [planes].
    """

    start: int
    stop: int
    transform: int
    top: int
    coded: tuple[bool, ...]
    payloads: tuple[memoryview, ...]


def encode(data: Any, itemsize: int, floating: bool, *, backend: str = "auto") -> bytes:
    """Code a buffer of floats or whole numbers.

    It may be longer than the data, by up to two bytes a block: keep whichever is shorter.

    Args:
        data: little-endian elements, as bytes or anything with a buffer.
        itemsize: bytes of an element: 1, 2, 4 or 8.
        floating: whether they are floats (sign, exponent, mantissa); whole numbers otherwise.
        backend: "auto", "numba" or "numpy"; all write the same bytes.

    Raises:
        ValueError: another itemsize, or the data is not a whole number of elements.

    Example:
        >>> import numpy as np
        >>> bias = np.linspace(-0.1, 0.1, 64, dtype="<f4").tobytes()
        >>> code = encode(bias, 4, True)
        >>> len(code) < 230 and decode(code, 256, 4, True).tobytes() == bias
        True
    """
    flat = np.frombuffer(data, dtype=np.uint8)
    if itemsize not in (1, 2, 4, 8) or flat.size % itemsize:
        raise ValueError(f"{flat.size} bytes are no elements of {itemsize} bytes")
    words = flat.view(f"<u{itemsize}").astype(f"u{itemsize}", copy=False)
    starts = range(0, words.size, BLOCK)
    last = len(starts) - 1
    return b"".join(
        _encode_block(words[start : start + BLOCK], floating, i == last, backend)
        for i, start in enumerate(starts)
    )


def decode(
    data: Any,
    size_bytes: int,
    itemsize: int,
    floating: bool,
    *,
    backend: str = "auto",
    threads: int = 1,
) -> NDArray[np.uint8]:
    """Return the bytes `encode` was given, as a fresh writable array [size_bytes].

    Args:
        data: what `encode` made.
        size_bytes, itemsize, floating: as they were when it was coded.
        backend: "auto", "numba" or "numpy"; all give the same.
        threads: blocks to decode at once.

    Raises:
        FileError: the data is damaged in a way that shows.
    """
    found = blocks(data, size_bytes, itemsize, floating)
    out = np.empty(size_bytes, dtype=np.uint8)  # at most 2^22 bytes a block, and all are there
    if threads > 1 and len(found) > 1:
        with ThreadPoolExecutor(min(threads, len(found))) as pool:
            jobs = [
                pool.submit(read_block, block, out[block.start : block.stop], itemsize, backend)
                for block in found
            ]
        for job in jobs:
            job.result()
    else:
        for block in found:
            read_block(block, out[block.start : block.stop], itemsize, backend)
    return out


def blocks(data: Any, size_bytes: int, itemsize: int, floating: bool) -> tuple[Block, ...]:
    """Find the blocks of a coded buffer; each may be read alone, in any thread.

    Raises:
        FileError: the data does not consist of such blocks.
    """
    view = memoryview(data).cast("B")
    if itemsize not in (1, 2, 4, 8) or not 0 <= size_bytes <= LARGEST or size_bytes % itemsize:
        raise _damaged(f"{size_bytes} bytes are no elements of {itemsize} bytes")
    found, at = [], 0
    for start in range(0, size_bytes, BLOCK * itemsize):
        stop = min(start + BLOCK * itemsize, size_bytes)
        block, at = _find(view, at, start, stop, itemsize, stop == size_bytes)
        if block.transform not in ((NONE, ROTATE) if floating else (NONE, ZIGZAG, DELTA)):
            raise _damaged("its transform is not one of its type")
        found.append(block)
    if at != len(view):
        raise _damaged("there is data left over")
    return tuple(found)


def read_block(block: Block, out: NDArray[np.uint8], itemsize: int, backend: str = "auto") -> None:
    """Decode a block into `out` [stop - start], which is contiguous.

    Raises:
        FileError: the data is damaged in a way that shows.
    """
    bits, size = 8 * itemsize, out.size // itemsize
    words = np.zeros(size, dtype=f"i{itemsize}")
    shift = bits
    for width, coded, payload in zip(
        plane_widths(bits, block.top), block.coded, block.payloads, strict=True
    ):
        shift -= width
        if not coded and width % 8:
            join_packed(words, np.frombuffer(payload, np.uint8), width, shift, backend)
        elif not coded:
            join(words, np.frombuffer(payload, np.uint8), shift, backend)
        elif len(payload):
            symbols = rans.decode(bytes(payload), (size,), backend=backend)
            if int(symbols.min()) < 0 or int(symbols.max()) >> width:
                raise _damaged("a symbol does not fit into its plane")
            join(words, symbols, shift, backend)
    restored = restore(words.view(f"u{itemsize}"), block.transform)
    out.view(f"<u{itemsize}")[:] = restored


def _encode_block(words: Words, floating: bool, last: bool, backend: str) -> bytes:
    if floating:
        kind, top = _choose_cut(words)
        return _write_block(words, kind, top, last, backend)
    return min(
        (_write_block(words, kind, 8, last, backend) for kind in (NONE, ZIGZAG, DELTA)), key=len
    )


def _choose_cut(words: Words) -> tuple[int, int]:
    """Return the transform and the width of plane 0 of floats that give the fewest bytes."""
    bits = 8 * words.dtype.itemsize
    tops = [top for top in TOPS if top <= bits]
    tried: list[tuple[float, int, int, Any, Any]] = []
    for kind in (ROTATE, NONE):
        high = transform(words, kind) >> words.dtype.type(bits - tops[-1])
        values, counts = rans.count_symbols(high.astype(np.int32))
        for top in reversed(tops):  # the counts of a narrower cut are sums of a wider one's
            if top < tops[-1]:
                first = np.flatnonzero(np.diff(values >> 1, prepend=-1))
                values, counts = values[first] >> 1, np.add.reduceat(counts, first)
            bits_saved = words.size * top - _information(counts) - 4 * len(counts)  # 4: a guess
            tried.append((-bits_saved, kind, top, values, counts))
    tried = sorted(tried, key=lambda cut: cut[:3])[: 4 if words.size <= SHORT else 2]
    exact = [
        (rans.length_of_counts(values, counts) - words.size * top / 8, kind, top)
        for _, kind, top, values, counts in tried
    ]
    return min(exact)[1:]


def _information(counts: NDArray[np.int64]) -> float:
    """Return the order-0 information [bits] of symbols that occur so often."""
    return float(counts @ np.log2(counts.sum() / counts))


def _write_block(words: Words, kind: int, top: int, last: bool, backend: str) -> bytes:
    turned = transform(words, kind)
    bits = 8 * words.dtype.itemsize
    widths = plane_widths(bits, top)
    mask, shift, payloads = 0, bits, []
    for p, width in enumerate(widths):
        shift -= width
        symbols = turned >> words.dtype.type(shift) & words.dtype.type((1 << width) - 1)
        code = _code_plane(symbols.astype(np.int16), width, p > 0, backend)
        if code is None and width > 8:
            return _write_block(words, kind, 8, last, backend)
        mask |= (code is not None) << p
        payloads.append(pack(symbols, width) if code is None else code)
    coded = [p for p in range(len(widths)) if mask >> p & 1]
    head = top - 8 | kind << 3
    start = bytes([head | TOP_ONLY]) if mask == 1 else bytes([head, mask])
    sizes = [varint(len(payloads[p])) for p in (coded[:-1] if last else coded)]
    return b"".join([start, *sizes, *payloads])


def _code_plane(symbols: NDArray[np.int16], width: int, noisy: bool, backend: str) -> bytes | None:
    """Return the code of a plane, or None where it stays raw."""
    if not symbols.any():
        return b""
    raw = packed_size(symbols.size, width)
    # The length of a coded plane takes a byte or two itself.
    enough = WORTH * raw if noisy and symbols.size > SHORT else raw - 2
    _, counts = rans.count_symbols(symbols.astype(np.int32), backend=backend)
    if _information(counts) > 8 * enough:
        return None
    code = rans.encode(symbols, backend=backend)
    return code if len(code) <= enough else None


def _find(
    view: memoryview, at: int, start: int, stop: int, itemsize: int, last: bool
) -> tuple[Block, int]:
    """Read one block's head; return it and where the next begins."""
    if at >= len(view):
        raise _damaged("it ends too early")
    head, at = view[at], at + 1
    top, kind = (head & 7) + 8, head >> 3 & 3
    if head >> 6 or top > 8 * itemsize:
        raise _damaged("a block's head says what no writer says")
    widths, mask = plane_widths(8 * itemsize, top), 1
    if not head & TOP_ONLY:
        if at >= len(view):
            raise _damaged("it ends too early")
        mask, at = view[at], at + 1
    if mask >> len(widths) or (top > 8 and not mask & 1):
        raise _damaged("a block's mask is not one of its cut")
    coded = [bool(mask >> p & 1) for p in range(len(widths))]
    sizes = [packed_size((stop - start) // itemsize, width) for width in widths]
    places = [p for p in range(len(widths)) if coded[p]]
    for p in places[:-1] if last else places:
        sizes[p], at = _read_varint(view, at)
    if last and places:
        sizes[places[-1]] = 0
        sizes[places[-1]] = len(view) - at - sum(sizes)
    if min(sizes) < 0 or sum(sizes) > len(view) - at:
        raise _damaged("it ends too early")
    ends = at + np.cumsum(sizes)
    payloads = tuple(view[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True))
    return Block(start, stop, kind, top, tuple(coded), payloads), int(ends[-1])


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for i in range(5):  # a plane of 2^19 elements is shorter than 2^35 bytes
        if at + i >= len(view):
            break
        value |= (view[at + i] & 0x7F) << 7 * i
        if view[at + i] < 0x80:
            return value, at + i + 1
    raise _damaged("a length is cut off")


def _damaged(why: str) -> FileError:
    return FileError("cannot decode a buffer in planes", "", why)
