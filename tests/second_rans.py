"""Bit strings and the rans codec of the second reader, written from docs/format.md alone."""

from __future__ import annotations

import math

import numpy as np


class Bits:
    """A bit string, most significant bit of each byte first."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, n):
        self.at, start = self.at + n, self.at
        if self.at > 8 * len(self.data):
            raise ValueError("cut off")
        chunk = int.from_bytes(self.data[start // 8 : -(-self.at // 8)], "big")
        return chunk >> -self.at % 8 & (1 << n) - 1

    def golomb(self, k):
        zeros = 0
        while not self.take(1):
            zeros += 1
        return ((1 << zeros) + self.take(zeros) - 1 << k) + self.take(k)

    def rest(self):
        return self.data[-(-self.at // 8) :]


def unfold(n):
    return -(n + 1) // 2 if n % 2 else n // 2


def varint(data):
    n = next(i for i, byte in enumerate(data) if byte < 128) + 1
    return sum((byte & 127) << 7 * i for i, byte in enumerate(data[:n])), data[n:]


def scale_weights(w, total):
    whole, f = sum(w), [max(x * total // sum(w), 1) for x in w]
    left = total - sum(f)
    if left >= 0:
        extra = sorted(range(len(w)), key=lambda i: -(w[i] * total % whole))[:left]
        return [x + (i in extra) for i, x in enumerate(f)]
    spare = sum(f) - len(f)
    cut = [(x - 1) * -left // spare for x in f]
    order = sorted(range(len(w)), key=lambda i: -((f[i] - 1) * -left % spare))
    extra = order[: -left - sum(cut)]
    return [x - c - (i in extra) for i, (x, c) in enumerate(zip(f, cut, strict=True))]


def rans(data, shape):
    size, bits = math.prod(shape), Bits(data)
    if not size:
        return []
    escape = bits.take(1)
    kept = bits.golomb(1) + 1 - escape
    if kept == 1 and not escape:
        return [unfold(bits.golomb(1))] * size
    values, escaped, precision, lanes = [], [], 12, 1
    if kept:
        values = [unfold(bits.golomb(3))]
        order = -1 if bits.take(1) else bits.take(5)
        while len(values) < kept:
            values.append(values[-1] + (1 if order < 0 else bits.golomb(order) + 1))
    if escape:
        count, base, width = bits.golomb(8), unfold(bits.golomb(3)), bits.take(5) + 1
    if kept + escape > 1:
        precision, delta, order = 12 + bits.take(2), bits.take(1), bits.take(4)
        weights = []
        for _ in range(kept + escape):
            n = bits.golomb(order)
            weights.append((weights or [0])[-1] + unfold(n) if delta else n + 1)
        lanes = max(8 * bits.golomb(0), 1)
    if escape:
        bits = Bits(bits.rest())
        escaped = [base + bits.take(width) for _ in range(count)]
    if kept + escape == 1:
        return escaped
    f = scale_weights(weights, 1 << precision)
    out = [values[e] if e < kept else None for e in pull(bits.rest(), size, lanes, lambda i: f)]
    return [escaped.pop(0) if value is None else value for value in out]


def pull(data, size, lanes, table, out=None):
    """Decode `size` entries; `table(i)` gives the frequencies of element i."""
    tail = len(data) if len(data) < 5 else 4 - len(data) % 2
    x, words = [int.from_bytes(data[-tail:], "little") if tail else 0], data[: len(data) - tail]
    if lanes > 1:
        x, words = np.frombuffer(data[: 4 * lanes], "<u4").tolist(), data[4 * lanes :]
    words, out, slots = np.frombuffer(words, "<u2").tolist()[::-1], [] if out is None else out, {}
    for i in range(size):
        f = table(i)
        if id(f) not in slots:
            starts = [sum(f[:e]) for e in range(len(f))]
            slots[id(f)] = f, starts, [e for e, n in enumerate(f) for _ in range(n)]
        f, starts, entries = slots[id(f)]
        state = x[i % lanes]
        slot = state % len(entries)
        e = entries[slot]
        state = f[e] * (state // len(entries)) + slot - starts[e]
        x[i % lanes] = state << 16 | words.pop() if state < 1 << 16 and words else state
        out.append(e)
    if words or set(x) != {1 << 16 if lanes > 1 else 0}:
        raise ValueError("the end is wrong")
    return out
