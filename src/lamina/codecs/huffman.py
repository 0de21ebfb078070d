"""Deep Compression's format: relative gaps with fillers, and Huffman codes of gaps and symbols.

A tensor is a list of entries in C order. An entry is a gap code g and a symbol: it stands g + 1
places after the entry before (the first one counts from place -1), and all other places are 0.
With gap width B a gap code is 0 to 2^B - 1; a longer step is reached over fillers, entries of gap
code 2^B - 1 and symbol 0. With B = 0 every place up to the last non-zero one is an entry, and
there are no gaps: plain Huffman of a dense tensor. B is chosen by size.

Byte layout. A tensor of zeros, or of no elements, is no bytes at all. Otherwise the data is one
string of bits, most significant bit of each byte first:

    entries - 1, in as many bits as (elements - 1) needs | B in 5, 0 to 16 |
    table of the symbols' code | table of the gaps' code, only if B > 0 |
    the symbols' codewords in order | 0 to 7 zero bits | the gaps' codewords in order, REVERSED

The tables and codewords are those of `lamina.codecs.prefix`. The gaps are written into the string
from its end: turn the whole string round (last bit first), and it begins with the gaps' codewords.
So neither stream's length is stored, and the two are read at the same time.

Reference: Han, Mao, Dally, "Deep Compression", ICLR 2016, sections 2 to 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs.bits import BitReader, pack_bits
from lamina.codecs.kernels import compiled
from lamina.codecs.prefix import (
    Code,
    Ints,
    bit_windows,
    choose_code,
    entropy_bits,
    lookup_table,
    pack_stream,
    pull_stream,
    read_code,
    turn_bits,
    write_code,
)
from lamina.codecs.rans import count_symbols
from lamina.codecs.symbols import Symbols, check_symbols, count_elements
from lamina.errors import FileError

WIDEST = 16  # bits of a gap code
INT32 = (-(1 << 31), (1 << 31) - 1)


@dataclass(frozen=True)
class Layout:
    """What the header says, and what the streams take.

    Args:
        entries: stored entries, fillers included.
        width: bits of an uncoded gap, B.
        symbols: code of the symbols.
        gaps: code of the gaps; of width 0 where B is 0.
        head: header [bits].
        symbol_bits, gap_bits: the coded streams [bits]; unknown (0) in a layout that was read.
    """

    entries: int
    width: int
    symbols: Code
    gaps: Code
    head: int
    symbol_bits: int = 0
    gap_bits: int = 0

    @property
    def size(self) -> int:
        """Return the length of the data [bytes]."""
        return -(-(self.head + self.symbol_bits + self.gap_bits) // 8)


NO_GAPS = Code(np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64))


def encode(symbols: NDArray[Any], *, width: int | None = None, backend: str = "auto") -> bytes:
    """Code integers of any shape, 0 meaning pruned; the shape itself is not stored.

    Args:
        symbols: whole numbers that fit into int32, any shape.
        width: bits of a gap, 0 to 16; by default the one that makes the fewest bytes.
        backend: "auto", "numba" or "numpy"; all write the same bytes.

    Raises:
        ValueError: the values are not such numbers, or the width is not.

    Example:
        >>> import numpy as np
        >>> data = encode(np.array([[0, 0, 3], [0, 1, 0]]))
        >>> decode(data, (2, 3)).tolist()
        [[0, 0, 3], [0, 1, 0]]
    """
    flat = check_symbols(symbols).reshape(-1)
    places = np.flatnonzero(flat)
    found = _choose_layout(flat, places, width)
    if found is None:
        return b""
    layout, head = found
    entries, gaps = _list_entries(flat, places, layout)
    data = np.zeros(layout.size, dtype=np.uint8)
    front = pack_stream(layout.symbols, entries, layout.symbol_bits, layout.head, backend)
    start = np.frombuffer(pack_bits(head), dtype=np.uint8)
    front[: len(start)] |= start
    data[: len(front)] = front
    if layout.gap_bits:
        back = turn_bits(pack_stream(layout.gaps, gaps, layout.gap_bits, 0, backend))
        data[-len(back) :] |= back
    return data.tobytes()


def decode(data: bytes, shape: Sequence[int], *, backend: str = "auto") -> NDArray[Any]:
    """Return the array [shape] that `encode` was given, as int8, int16 or int32.

    Raises:
        FileError: the data is damaged in a way that shows.
    """
    return _decode(data, shape, backend)[0].reshape(tuple(shape))


def length(symbols: NDArray[Any], *, width: int | None = None) -> int:
    """Return the bytes `encode` makes, exactly, without making them."""
    flat = check_symbols(symbols).reshape(-1)
    found = _choose_layout(flat, np.flatnonzero(flat), width)
    return 0 if found is None else found[0].size


def describe(data: bytes, shape: Sequence[int]) -> dict[str, float]:
    """Return the figures of a coded tensor that the paper's tables show.

    Returns:
        nonzeros and entries (fillers included); gap_bits and value_bits, the widths before
        Huffman coding; mean_gap_bits and mean_value_bits, an entry's after it; and table_bytes,
        value_bytes and gap_bytes, with the fractions of a byte that the bits make.

    Raises:
        FileError: the data is damaged in a way that shows.
    """
    flat, layout = _decode(data, shape, "auto")
    if layout is None:
        names = ("nonzeros", "entries", "gap_bits", "value_bits", "mean_gap_bits")
        rest = ("mean_value_bits", "table_bytes", "value_bytes", "gap_bytes")
        return dict.fromkeys(names + rest, 0)
    low, high = layout.symbols.span()
    return {
        "nonzeros": int(np.count_nonzero(flat)),
        "entries": layout.entries,
        "gap_bits": layout.width,
        "value_bits": (high - low).bit_length(),
        "mean_gap_bits": layout.gap_bits / layout.entries,
        "mean_value_bits": layout.symbol_bits / layout.entries,
        "table_bytes": layout.head / 8,
        "value_bytes": layout.symbol_bits / 8,
        "gap_bytes": layout.gap_bits / 8,
    }


def pull_entries(
    ahead: Any,
    start: Any,
    symbol_code: Any,
    symbols: Any,
    symbol_table: Any,
    back: Any,
    gap_code: Any,
    gaps: Any,
    gap_table: Any,
    entries: Any,
    total: Any,
    out: Any,
) -> Any:
    """Kernel: decode both streams into `out`; return the bits read of each, or (-1, 0) if damaged.

    A code is (longest codeword or 0, width, largest symbol). `ahead` and `back` hold the 64 bits
    from each 32nd bit on.
    """
    p, q, place, size = start, 0, -1, len(out)
    longest, width, top = symbol_code
    gap_longest, gap_width, _ = gap_code
    cut, gap_cut = 63 - max(longest, width), 63 - max(gap_longest, gap_width)
    mask, gap_mask = (1 << max(longest, width)) - 1, (1 << max(gap_longest, gap_width)) - 1
    for _ in range(entries):
        # one place further than needed, then one more: a shift by 64 means nothing
        window = ((ahead[p >> 5] >> (cut - (p & 31))) >> 1) & mask
        if longest:
            entry = symbol_table[window]
            p += entry & 31
            symbol = symbols[entry >> 5]
        else:
            p += width
            symbol = symbols[0] + window
        window = ((back[q >> 5] >> (gap_cut - (q & 31))) >> 1) & gap_mask
        if gap_longest:
            entry = gap_table[window]
            q += entry & 31
            place += gaps[entry >> 5] + 1
        else:
            q += gap_width
            place += gaps[0] + window + 1
        if p + q > total or place >= size or symbol > top:
            return -1, 0
        out[place] = symbol
    return p, q


def _choose_layout(flat: Symbols, places: Ints, width: int | None) -> tuple[Layout, str] | None:
    """Return the shortest layout and its header, or None where there is nothing to store."""
    if width is not None and not 0 <= width <= WIDEST:
        raise ValueError(f"a gap has 0 to {WIDEST} bits, not {width}")
    if not places.size:
        return None
    values, counts = count_symbols(flat[places])
    steps, uses = _count_steps(places)
    zero = int(np.searchsorted(values, 0))
    bounds, options = [], {}
    for bits in range(WIDEST + 1) if width is None else (width,):
        fillers = int((steps >> bits) @ uses)
        gaps, gap_uses = _count_gaps(steps, uses, bits, fillers)
        stored = (values, counts)
        if fillers:
            stored = np.insert(values, zero, 0), np.insert(counts, zero, fillers)
        options[bits] = stored, (gaps, gap_uses), places.size + fillers
        bounds.append((entropy_bits(stored[1]) + entropy_bits(gap_uses), bits))
        if bits and not fillers:
            break  # a wider gap would write the same streams
    best: tuple[Layout, str] | None = None
    room = (flat.size - 1).bit_length()
    for bound, bits in sorted(bounds):
        if best is not None and bound >= 8 * best[0].size:
            break
        stored, gap_counts, entries = options[bits]
        code, symbol_bits = choose_code(*stored)
        gap_code, gap_bits = choose_code(*gap_counts) if bits else (NO_GAPS, 0)
        head = format(entries - 1, f"0{room}b") if room else ""
        head += format(bits, "05b") + write_code(code) + (write_code(gap_code) if bits else "")
        layout = Layout(entries, bits, code, gap_code, len(head), symbol_bits, gap_bits)
        if best is None or (layout.size, bits) < (best[0].size, best[0].width):
            best = layout, head
    return best


def _count_steps(places: Ints) -> tuple[Ints, Ints]:
    """Return the distinct numbers of zeros before a non-zero, and how often each occurs."""
    steps = np.diff(places, prepend=-1) - 1
    if int(steps.max()) > 4 * steps.size + (1 << 16):
        return np.unique(steps, return_counts=True)
    histogram = np.bincount(steps)
    found = np.flatnonzero(histogram)
    return found, histogram[found]


def _count_gaps(steps: Ints, uses: Ints, bits: int, fillers: int) -> tuple[Ints, Ints]:
    """Return the distinct gap codes of a width, and how often each occurs."""
    last = (1 << bits) - 1
    histogram = np.zeros(min(last, int(steps.max())) + 1, dtype=np.int64)
    np.add.at(histogram, steps & last, uses)
    if fillers:
        histogram[last] += fillers
    found = np.flatnonzero(histogram)
    return found, histogram[found]


def _list_entries(flat: Symbols, places: Ints, layout: Layout) -> tuple[Symbols, Ints]:
    """Return each entry's symbol, and its gap code."""
    if not layout.width:
        return flat[: layout.entries], places[:0]
    steps = np.diff(places, prepend=-1) - 1
    last = (1 << layout.width) - 1
    own = np.cumsum((steps >> layout.width) + 1) - 1
    symbols = np.zeros(layout.entries, dtype=np.int32)
    symbols[own] = flat[places]
    gaps = np.full(layout.entries, last, dtype=np.int64)
    gaps[own] = steps & last
    return symbols, gaps


def _read_layout(data: bytes, size: int) -> Layout:
    reader = BitReader(data)
    entries, width = reader.take((size - 1).bit_length()) + 1, reader.take(5)
    if entries > size or width > WIDEST:
        raise _damaged("its header is out of range")
    symbols = read_code(reader, entries, *INT32)
    gaps = read_code(reader, entries, 0, (1 << width) - 1) if width else NO_GAPS
    return Layout(entries, width, symbols, gaps, reader.position)


def _decode(data: bytes, shape: Sequence[int], backend: str) -> tuple[NDArray[Any], Layout | None]:
    size = count_elements(shape)
    if not data:
        return np.zeros(size, dtype=np.int8), None
    if not size:
        raise _damaged("an empty tensor has no data")
    layout = _read_layout(data, size)
    raw = np.frombuffer(data, dtype=np.uint8)
    ahead, back, total = bit_windows(raw), np.zeros(1, dtype=np.int64), 8 * len(data)
    if layout.gaps.longest:
        back = bit_windows(turn_bits(raw))
    low, high = layout.symbols.span()
    for held in (np.int8, np.int16, np.int32):
        if np.iinfo(held).min <= low and min(high, INT32[1]) <= np.iinfo(held).max:
            break
    out = np.zeros(size, dtype=held)
    fast = compiled(pull_entries, backend)
    if fast is None:
        p, q = _pull_rows(ahead, back, layout, total, out)
    else:
        p, q = fast(
            ahead,
            layout.head,
            *_for_kernel(layout.symbols),
            back,
            *_for_kernel(layout.gaps),
            layout.entries,
            total,
            out,
        )
    p, q = int(p), int(q)
    if p < 0 or total - q - p > 7 or _bits_between(data, p, total - q):
        raise _damaged("its codewords do not end where they should")
    return out, replace(layout, symbol_bits=p - layout.head, gap_bits=q)


def _bits_between(data: bytes, start: int, stop: int) -> int:
    chunk = int.from_bytes(data[start // 8 : -(-stop // 8)], "big")
    return (chunk >> (-stop % 8)) & ((1 << (stop - start)) - 1)


def _for_kernel(code: Code) -> tuple[tuple[int, int, int], Ints, NDArray[np.uint32]]:
    longest = code.longest if code.lengths.size else 0
    return (longest, code.width, INT32[1]), code.values, lookup_table(code)


def _pull_rows(
    ahead: Ints, back: Ints, layout: Layout, total: int, out: NDArray[Any]
) -> tuple[int, int]:
    """Decode without numba."""
    symbols, p = pull_stream(ahead, layout.head, layout.symbols, layout.entries, total)
    if not layout.width and p <= total and symbols.max() <= INT32[1]:
        out[: layout.entries] = symbols
        return p, 0
    gaps, q = pull_stream(back, 0, layout.gaps, layout.entries, total)
    places = np.cumsum(gaps + 1) - 1
    if p + q > total or places[-1] >= len(out) or symbols.max() > INT32[1]:
        return -1, 0
    out[places] = symbols
    return p, q


def _damaged(why: str) -> FileError:
    return FileError("cannot decode a huffman tensor", "", why)
