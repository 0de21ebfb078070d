"""The codecs of version 2 of the second reader, written from docs/format.md alone."""

from __future__ import annotations

import math

import numpy as np
from tests.second_rans import Bits, rans, unfold, varint

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def read_code(bits):
    """Return {(length, codeword): symbol}, or (base, width) of a fixed-width code."""
    if not bits.take(1):
        return unfold(bits.golomb(1)), bits.take(6)
    k, values = bits.golomb(4) + 2, [unfold(bits.golomb(2))]
    order = -1 if bits.take(1) else bits.take(5)
    while len(values) < k:
        values.append(values[-1] + (1 if order < 0 else bits.golomb(order) + 1))
    order, lengths = bits.take(1), [(k - 1).bit_length()]
    for _ in range(k):
        lengths.append(lengths[-1] + unfold(bits.golomb(order)))
    code, last, word = {}, 0, -1
    for length, symbol in sorted(zip(lengths[1:], values, strict=True)):
        word = word + 1 << length - last
        code[length, word], last = symbol, length
    return code


def read_word(bits, code):
    if isinstance(code, tuple):
        return code[0] + bits.take(code[1])
    length, word = 0, 0
    while (length, word) not in code:
        length, word = length + 1, word << 1 | bits.take(1)
    return code[length, word]


def huffman(data, shape):
    size = math.prod(shape)
    out, place, bits = [0] * size, -1, Bits(data)
    back = Bits(bytes(int(f"{byte:08b}"[::-1], 2) for byte in data[::-1]))
    entries = bits.take((size - 1).bit_length()) + 1 if data else 0
    width = bits.take(5) if data else 0
    code = read_code(bits) if data else {}
    gaps = read_code(bits) if width else (0, 0)
    for _ in range(entries):
        place += read_word(back, gaps) + 1
        out[place] = read_word(bits, code)
    if not 0 <= 8 * len(data) - bits.at - back.at < 8:
        raise ValueError("the end is wrong")
    return out


def mix(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & WORD
    return z ^ z >> 31


def bloomier(data, shape):
    if not data:
        return [0] * math.prod(shape)
    bits = Bits(data)
    hashes, width, k = bits.take(1) + 3, bits.take(5) + 1, bits.golomb(3) + 1
    seed, segments, cells = bits.golomb(1), bits.golomb(2) + hashes, bits.golomb(6) + 1
    bits = Bits(bits.rest())
    table, out = [bits.take(width) for _ in range(segments * cells)], []
    start = mix(seed + GOLDEN & WORD)
    for i in range(math.prod(shape)):
        u0 = mix(start + i * GOLDEN & WORD)
        u1, u2 = mix(u0 + GOLDEN & WORD), mix(u0 + 2 * GOLDEN & WORD)
        first = (u0 >> 32) * (segments - hashes + 1) >> 32
        v = u0 & (1 << width) - 1
        for j, h in enumerate((u1 >> 32, u1 & 0xFFFFFFFF, u2 >> 32, u2 & 0xFFFFFFFF)[:hashes]):
            v ^= table[(first + j) * cells + (h * cells >> 32)]
        out.append(v + 1 if v < k else 0)
    return out


def planes(data, count, kind):
    """Return the values of a dtype."""
    whole = np.dtype(kind)
    size = whole.itemsize // (2 if whole.kind == "c" else 1)
    left, words = count * whole.itemsize // size, []
    while left:
        n = min(left, 1 << 19)
        left -= n
        block, data = read_block(data, n, 8 * size, left == 0)
        words += block
    return np.array(words, f"<u{size}").view(whole)


def read_block(data, n, width, last):
    head, data = data[0], data[1:]
    top, mask = 8 + head % 8, 1
    if not head & 32:
        mask, data = data[0], data[1:]
    odd = (width - top) % 8
    planes = [top] + [odd] * (odd > 0) + [8] * ((width - top) // 8)
    sizes = [-(-n * bits // 8) for bits in planes]
    coded = [p for p in range(len(planes)) if mask >> p & 1]
    for p in coded[:-1] if last else coded:
        sizes[p], data = varint(data)
    if last and coded:
        sizes[coded[-1]] = len(data) - sum(s for p, s in enumerate(sizes) if p != coded[-1])
    words = [0] * n
    for p, bits in enumerate(planes):
        payload, data = data[: sizes[p]], data[sizes[p] :]
        if p in coded:
            symbols = rans(payload, (n,)) if payload else [0] * n
        else:
            source = Bits(payload)
            symbols = [source.take(bits) for _ in range(n)]
        words = [word << bits | symbol for word, symbol in zip(words, symbols, strict=True)]
    return undo(words, head >> 3 & 3, width), data


def undo(words, transform, width):
    if transform == 1:
        return [y >> 1 | (y & 1) << width - 1 for y in words]
    if transform == 0:
        return words
    x = [(y >> 1) ^ -(y & 1) & (1 << width) - 1 for y in words]
    if transform == 3:
        for i in range(1, len(x)):
            x[i] = x[i] + x[i - 1] & (1 << width) - 1
    return x
