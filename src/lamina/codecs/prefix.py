"""Prefix codes: optimal length-limited Huffman codes, kept as lengths alone, and fixed-width ones.

A code is chosen for a stream of integers by its whole cost, table included. Bits are written most
significant first; eg(k) is the exp-Golomb code of order k, and signs are folded (0, -1, 1, -2, ...
become 0, 1, 2, 3 ...), both as in `lamina.codecs.bits`. A code's table is

    fixed-width: 0 | folded base eg(1) | width in 6, 0 to 32
        a symbol is base + the next `width` bits; a stream of one symbol alone has width 0
    Huffman: 1 | distinct symbols k - 2 eg(4) | folded least symbol eg(2) |
        1 if the k symbols are consecutive, else 0, order in 5 and every gap - 1 in eg(order) |
        order o in 1 | k length differences, folded, in eg(o)

Symbols rise. The first difference is from the bits of k - 1, the others from the length before;
lengths are 1 to 16 and fill the code (the sum of 2^-length is 1). Codewords are canonical: in
order of (length, symbol) the first is zeros, and each next is the last plus 1, then shifted left
to its own length.

Reference: Huffman 1952; package-merge of Larmore and Hirschberg 1990.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs.bits import (
    BitReader,
    Ints,
    fold_sign,
    fold_signs,
    golomb_bits,
    golomb_length,
    unfold_sign,
)
from lamina.codecs.kernels import compiled
from lamina.errors import FileError

LONGEST = 16  # bits of a codeword: the decoder looks codewords up in a table of 2^longest
HANDY = 12  # a table of 2^12 stays in the first-level cache; taken where it costs next to nothing
CHUNK = 1 << 18  # symbols or bits that numpy works on at once
_TURNED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)).reshape(256, 8)[:, ::-1])


@dataclass(frozen=True)
class Code:
    """How the symbols of one stream are written.

    Args:
        values: distinct symbols, rising [k]; of a fixed-width code its base alone [1].
        lengths: bits of each symbol [k]; empty for a fixed-width code.
        width: bits of every symbol of a fixed-width code.
    """

    values: Ints
    lengths: Ints
    width: int = 0

    @property
    def longest(self) -> int:
        """Return the bits of the longest codeword."""
        return int(self.lengths.max()) if self.lengths.size else self.width

    def span(self) -> tuple[int, int]:
        """Return the least and the largest symbol the code can write."""
        if self.lengths.size:
            return int(self.values[0]), int(self.values[-1])
        return int(self.values[0]), int(self.values[0]) + (1 << self.width) - 1


def choose_code(values: Ints, counts: Ints) -> tuple[Code, int]:
    """Return the code with the fewest bits for such a stream, and the bits of the stream alone.

    Args:
        values: its distinct symbols, rising [k].
        counts: how often each occurs, all > 0 [k].
    """
    width = int(values[-1] - values[0]).bit_length()
    total = int(counts.sum())
    fixed = Code(values[:1], np.zeros(0, dtype=np.int64), width)
    if not 1 < len(values) <= 1 << LONGEST:
        return fixed, width * total
    lengths = limited_lengths(counts, LONGEST)
    bits = int(counts @ lengths)
    if len(values) <= 1 << HANDY < 1 << int(lengths.max()):
        shorter = limited_lengths(counts, HANDY)
        handy_bits = int(counts @ shorter)
        if handy_bits * 5000 <= bits * 5001:
            lengths, bits = shorter, handy_bits
    coded = Code(values, lengths)
    if bits + len(write_code(coded)) < width * total + len(write_code(fixed)):
        return coded, bits
    return fixed, width * total


def entropy_bits(counts: Ints) -> float:
    """Return the order-0 entropy of a stream [bits]: no prefix code of it is shorter."""
    return float((counts * (np.log2(counts.sum()) - np.log2(counts))).sum())


def limited_lengths(counts: Ints, limit: int) -> Ints:
    """Return the codeword lengths of the best prefix code with none longer than `limit` [k].

    Args:
        counts: how often each of k >= 2 symbols occurs, k <= 2^limit.
        limit: bits.

    Example:
        >>> import numpy as np
        >>> limited_lengths(np.array([1, 1, 2, 4]), 16).tolist()
        [3, 3, 2, 1]
        >>> limited_lengths(np.array([1, 1, 2, 4]), 2).tolist()
        [2, 2, 2, 2]
    """
    order = np.argsort(counts, kind="stable")
    leaves = counts[order].astype(np.int64)
    size = len(leaves)
    merged, levels = leaves, [np.ones(size, dtype=bool)]
    for _ in range(limit - 1):
        half = len(merged) // 2
        both = np.concatenate([leaves, merged[0 : 2 * half : 2] + merged[1 : 2 * half : 2]])
        place = np.argsort(both, kind="stable")
        merged = both[place]
        levels.append(place < size)
    rising, take = np.zeros(size, dtype=np.int64), 2 * size - 2
    for leaf in reversed(levels):
        chosen = int(leaf[:take].sum())
        rising[:chosen] += 1
        take = 2 * (take - chosen)
    lengths = np.empty(size, dtype=np.int64)
    lengths[order] = rising
    return lengths


def canonical_codes(lengths: Ints) -> Ints:
    """Return the codeword of each symbol as a number [k].

    Example:
        >>> import numpy as np
        >>> [format(c, f"0{n}b") for c, n in zip(canonical_codes(np.array([2, 1, 2])), (2, 1, 2))]
        ['10', '0', '11']
    """
    longest = int(lengths.max())
    order = np.argsort(lengths, kind="stable")
    room = np.int64(1) << (longest - lengths[order])
    codes = np.empty(len(lengths), dtype=np.int64)
    codes[order] = (np.cumsum(room) - room) >> (longest - lengths[order])
    return codes


def lookup_table(code: Code) -> NDArray[np.uint32]:
    """Return `index << 5 | length` of the codeword that begins each window [2^longest]."""
    if not code.lengths.size:
        return np.zeros(1, dtype=np.uint32)
    order = np.argsort(code.lengths, kind="stable")
    lengths = code.lengths[order]
    entries = (order << 5 | lengths).astype(np.uint32)
    return np.repeat(entries, np.int64(1) << (code.longest - lengths))


def write_code(code: Code) -> str:
    """Return a code's table as bits."""
    first = fold_sign(int(code.values[0]))
    if not code.lengths.size:
        return "0" + golomb_bits(first, 1) + format(code.width, "06b")
    size = len(code.values)
    gaps = np.diff(code.values) - 1
    parts = ["1", golomb_bits(size - 2, 4), golomb_bits(first, 2)]
    if gaps.any():
        order = min(range(32), key=lambda order: golomb_length(gaps, order))
        parts += ["0", format(order, "05b"), *(golomb_bits(gap, order) for gap in gaps.tolist())]
    else:
        parts.append("1")
    moves = np.diff(code.lengths, prepend=(size - 1).bit_length())
    folded = fold_signs(moves)
    order = int(golomb_length(folded, 1) < golomb_length(folded, 0))
    return "".join([*parts, str(order), *(golomb_bits(move, order) for move in folded.tolist())])


def read_code(reader: BitReader, entries: int, low: int, high: int) -> Code:
    """Read a code's table.

    Args:
        reader: at its start.
        entries: symbols in the stream; no table of a Huffman code is longer.
        low, high: the symbols that are allowed.

    Raises:
        FileError: the table contradicts itself.
    """
    if not reader.take(1):
        base, width = unfold_sign(reader.golomb(1)), reader.take(6)
        if not low <= base <= high or width > max(high - low, 1).bit_length():
            raise _damaged("a fixed-width code is out of range")
        return Code(np.array([base], dtype=np.int64), np.zeros(0, dtype=np.int64), width)
    size = reader.golomb(4) + 2
    if size > min(entries, 1 << LONGEST):
        raise _damaged("the table is larger than any codec writes")
    values = [unfold_sign(reader.golomb(2))]
    if reader.take(1):
        values = list(range(values[0], values[0] + size))
    else:
        order = reader.take(5)
        for _ in range(size - 1):
            values.append(values[-1] + reader.golomb(order) + 1)
    if values[0] < low or values[-1] > high:
        raise _damaged("a symbol is out of range")
    order, lengths, last, room = reader.take(1), [], (size - 1).bit_length(), 0
    for _ in range(size):
        last += unfold_sign(reader.golomb(order))
        if not 0 < last <= LONGEST:
            raise _damaged("a codeword is too long")
        lengths.append(last)
        room += 1 << (LONGEST - last)
    if room != 1 << LONGEST:
        raise _damaged("the codewords do not fill their code")
    return Code(np.array(values, dtype=np.int64), np.array(lengths, dtype=np.int64))


def pack_stream(
    code: Code, symbols: NDArray[Any], bits: int, start: int, backend: str
) -> NDArray[np.uint8]:
    """Return the codewords as bytes that begin with `start` zero bits."""
    words = np.zeros(-(-(start + bits) // 32) + 1, dtype=np.uint32)
    if bits:
        codes = canonical_codes(code.lengths) if code.lengths.size else code.values
        fast = compiled(push_codes, backend)
        for begin in range(0, len(symbols), CHUNK):
            part = symbols[begin : begin + CHUNK].astype(np.int64)
            index = part - code.values[0]
            if code.lengths.size and code.values[-1] - code.values[0] >= len(code.values):
                index = np.searchsorted(code.values, part)
            used = code.lengths[index] if code.lengths.size else np.full(len(part), code.width)
            size = int(used.sum())
            room = words[start >> 5 : ((start + size) >> 5) + 1]
            kept = int(room[0])
            if fast is not None:
                fast(index, codes, code.lengths, code.width, start & 31, room)
                room[0] |= kept
            else:
                room |= _pack_words(codes[index] if code.lengths.size else index, used, start & 31)
            start += size
    return words.astype(">u4").view(np.uint8)[: -(-start // 8)]


def push_codes(index: Any, codes: Any, lengths: Any, width: Any, start: Any, words: Any) -> Any:
    """Kernel: write codewords into 32-bit words from bit `start` on; a fixed width if not 0."""
    buffer, have, place = 0, start & 31, start >> 5
    for i in range(len(index)):
        code, bits = index[i], width
        if not width:
            bits = lengths[code]
            code = codes[code]
        buffer = (buffer << bits) | code
        have += bits
        if have >= 32:
            have -= 32
            words[place] = buffer >> have
            place += 1
            buffer &= (1 << have) - 1
    if have:
        words[place] = buffer << (32 - have)


def bit_windows(data: NDArray[np.uint8]) -> Ints:
    """Return the 64 bits from every 32nd bit on, zeros after the end."""
    padded = np.zeros(-(-len(data) // 4) * 4 + 12, dtype=np.uint8)
    padded[: len(data)] = data
    words = padded.view(">u4").astype(np.uint64)
    return (words[:-1] << np.uint64(32) | words[1:]).view(np.int64)


def turn_bits(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the bits in the opposite order."""
    return _TURNED[data[::-1]]


def pull_stream(windows: Ints, p: int, code: Code, entries: int, total: int) -> tuple[Ints, int]:
    """Return the next symbols of one stream and where it ends; short if the data is."""
    if not code.lengths.size:
        symbols = np.full(entries, code.values[0])
        if p + code.width * entries > total:
            return symbols, total + 1
        for begin in range(0, entries if code.width else 0, CHUNK):
            part = symbols[begin : begin + CHUNK]
            places = p + code.width * np.arange(begin, begin + len(part))
            part += _look(windows, places, code.width)
        return symbols, p + code.width * entries
    table, symbols, done = lookup_table(code).astype(np.int64), np.zeros(entries, np.int64), 0
    while done < entries:
        if p >= total:
            return symbols, total + 1
        look = table[_look(windows, np.arange(p, min(p + CHUNK, total)), code.longest)]
        # where the codeword after the one at each bit begins: a list is the fastest to walk
        following = ((look & 31) + np.arange(len(look))).tolist()
        starts: list[int] = []
        place = 0
        while place < len(following):
            starts.append(place)
            place = following[place]
        starts = starts[: entries - done]
        symbols[done : done + len(starts)] = code.values[look[starts] >> 5]
        done += len(starts)
        p += following[starts[-1]]
    return symbols, p


def _pack_words(codes: Ints, lengths: Ints, start: int) -> NDArray[np.uint32]:
    """Write codewords without numba: no two share a bit, so adding (exactly) is writing."""
    ends = np.cumsum(lengths) + start
    begins = ends - lengths
    pairs = codes.astype(np.uint64) << (64 - lengths - (begins & 31)).astype(np.uint64)
    size = (int(ends[-1]) >> 5) + 1
    words = np.bincount(begins >> 5, (pairs >> np.uint64(32)).astype(np.float64), size + 1)
    low = (pairs & np.uint64((1 << 32) - 1)).astype(np.float64)
    words += np.bincount((begins >> 5) + 1, low, size + 1)
    return words[:size].astype(np.uint32)


def _look(windows: Ints, places: Ints, width: int) -> Ints:
    """Return the `width` bits from each place on; width 1 to 32."""
    return (windows[places >> 5] >> (64 - width - (places & 31))) & ((1 << width) - 1)


def _damaged(why: str) -> FileError:
    return FileError("cannot decode a huffman tensor", "", why)
