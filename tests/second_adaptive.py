"""The adaptive codec of the second reader, written from docs/format.md alone."""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import cache, partial

PRIORS = [q << 14 for q in (3, 3665, 3, 1337, 169, 54, 9, 919)]
ZERO_WEIGHTS = [2488] * 6 + [46441, 6598, 4521, 10302, 2455, 1673, 779, 18600, 0, 0]
OTHER_WEIGHTS = [9438] * 6 + [908] + [0] * 9


def clip(x, low, high):
    return min(max(x, low), high)


def length(k, most=64):
    return min(k, most).bit_length()


def at(x, cols, i, j):
    return x[i][j] if i >= 0 and 0 <= j < cols else 0


def third(x):
    return 1 if x > 0 else 2 if x < 0 else 0


@cache
def tables():
    """Return squash(n) for n = -3071..3071, and the edges of small(p) for n = -3071..0."""
    one = 1 << 96
    base, term, k = 0, one, 1
    while term:
        base, term, k = base + term, term // (256 * k), k + 1
    powers = [one]
    for _ in range(3071):
        powers.append(powers[-1] * base // one)
    half = [min(p * 65536 // (p + one), 65535) for p in powers]
    return [max(65536 - p, 1) for p in half[:0:-1]] + half, [
        one * (1 << 22) // (one + p) for p in powers[::-1]
    ]


@cache
def stretch(p):
    return -stretch(65536 - p) if p > 32768 else bisect_left(tables()[0], p) - 3071


@cache
def log_odds(p):
    return bisect_left(tables()[1], p) - 3071 if p < 65536 else stretch(p >> 6)


class Coder:
    def __init__(self, data):
        self.data, self.span = iter(data[4:]), (1 << 32) - 1
        self.code = int.from_bytes(data[:4].ljust(4, b"\0"), "big")

    def bit(self, p=32768):
        bound = (self.span >> 16) * p
        bit = int(self.code >= self.span - bound)
        if bit:
            self.code -= self.span - bound
        self.span = bound if bit else self.span - bound
        while self.span < 1 << 24:
            self.span, self.code = self.span << 8, self.code << 8 | next(self.data, 0)
        return bit


class Model:  # all that learns: counters, plain probabilities, weights
    def __init__(self, coder):
        self.coder, self.slots, self.plain = coder, {}, {}
        start = [ZERO_WEIGHTS if n < 32 else OTHER_WEIGHTS for n in range(96)]
        self.weights = [[weights, 0] for weights in start + start]

    def decide(self, kind, group, contexts, sets, zero=None):
        """Decode a decision; `zero` is (density, guess, base, rate inputs) for kind 0."""
        plain = self.plain.setdefault((kind, group), [32768, 0])
        density, guess, base, rates = zero or (0, plain[0] << 6, 0, [0] * 8)
        slots = []
        for k, c in enumerate(contexts):
            first = clip(density if kind == 0 and k > 1 else guess, 16, 4000000)
            slots.append(self.slots.setdefault((k, kind, c), [first, 0]))
        inputs = [log_odds(s[0]) - base for s in slots]
        inputs += [base if zero else stretch(plain[0]), *rates, 256]
        halves = self.weights[sets[0]], self.weights[96 + sets[1]]
        odds = [sum(w * x for w, x in zip(h[0], inputs, strict=True)) >> 16 for h in halves]
        odds, squash = [clip(x, -3071, 3071) for x in odds], tables()[0]
        bit = self.coder.bit(squash[(sum(odds) >> 1) + 3071])
        for half, x in zip(halves, odds, strict=True):
            g = (65536 * bit - squash[x + 3071]) * (292 + 586 * 16 // (16 + half[1]))
            half[0] = [w + (y * g + (1 << 23) >> 24) for w, y in zip(half[0], inputs, strict=True)]
            half[1] += 1
        for s in slots:
            step = (4194303 * bit - s[0]) * 2 // (2 * s[1] + 5)
            s[:] = clip(s[0] + step, 16, 4194240), min(s[1] + 1, 2784)
        step = (65535 * bit - plain[0]) * 2 // (2 * plain[1] + 5)
        plain[:] = clip(plain[0] + step, 16, 65520), min(plain[1] + 1, 60)
        return bit


def adaptive(data, shape):
    if not data:
        return [0] * math.prod(shape)
    rows, cols, own = [*shape, 1][0], math.prod(shape[1:]), math.prod(shape[2:])
    coder, prefix = Coder(data), 0
    for _ in range(0 if rows == cols == 1 else 4 if min(rows, cols) > 1 else 1):
        prefix = prefix << 1 | coder.bit()
    if prefix & 1:
        rows, cols = cols, rows
    x = decode_matrix(coder, rows, cols, (1, own, 4, 9, 16, 25, 36, 49)[prefix >> 1])
    x = list(zip(*x, strict=True)) if prefix & 1 else x
    return [value for row in x for value in row]


def decode_matrix(coder, rows, cols, block):
    model, x, total, density = Model(coder), [], 0, 0
    hits, sums, signs, expect = ([0] * cols for _ in range(4))  # of columns
    seen, r_hits, r_expect = [0] * (cols // block + 1), 0, 0
    for i in range(rows):
        if i:
            rate = min(((r_hits << 22) + PRIORS[1] << 16) // (r_expect + PRIORS[1]), 1 << 24)
            expect = [e + (density * rate >> 16) for e in expect]
        last, r_hits, r_expect, r_sum, r_signs, recent = (r_hits, r_expect), 0, 0, 0, 0, 0
        x.append([0] * cols)
        for j in range(cols):
            if j % block == 0:
                b_hits, b_expect = 0, 0
            get = partial(at, x, cols)
            left, left2, up, up2 = get(i, j - 1), get(i, j - 2), get(i - 1, j), get(i - 2, j)
            behind = get(i, j - block) if block > 1 else 0
            slant = (get(i - 1, j - 1) != 0) + (get(i - 1, j + 1) != 0)
            m, m2, u, u2, part = abs(left), abs(left2), abs(up), abs(up2), j // block
            beside = 2 * ((m > 0) + (u > 0) + (behind != 0)) + (m2 > 0) + (u2 > 0) + slant
            density = ((total << 22) + 8787 * 64 * 19) // (i * cols + j + 19)
            base = log_odds(clip(density, 16, 4194240))
            guess, rates = density, []
            near = [max(j - 1, 0), min(j + 1, cols - 1), max(j - 2, 0), min(j + 2, cols - 1)]
            around = sum(hits[n] for n in near), sum(expect[n] for n in near)
            for r in range(8):
                row, column = (r_hits, r_expect), (hits[j], expect[j])
                in_block = (b_hits, b_expect) if block > 1 else (0, 0)
                close_by = (beside, guess * 723 >> 4)
                h, e = (row, row, column, column, around, close_by, in_block, last)[r]
                rate = min(((h << 22) + PRIORS[r] << 16) // (e + PRIORS[r]), 1 << 24)
                p = density * rate >> 16
                rates.append(log_odds(clip(p, 16, 4194240)) - base)
                if r in (1, 3):
                    guess, col_rate = min(guess * rate >> 16, 1 << 24), p
                elif r == 4:
                    side = length(rate >> 13, 4095)
                elif r == 5:
                    close = length(rate >> 12, 4095)
            r_expect, b_expect = r_expect + col_rate, b_expect + guess
            odds = (clip(log_odds(clip(guess, 16, 4194240)), -2559, 1535) + 2560) // 68
            of_block = (8 * length(b_hits) + length(seen[part])) * 3 + min(abs(behind), 2)
            contexts = [
                odds,
                4 * odds + min(recent, 1) + 2 * min(u, 1),
                min(m, 2) + 3 * min(m2, 2) + 9 * min(u, 2) + 27 * min(u2, 2) + 81 * slant,
                of_block if block > 1 else 0,
                8 * min(close, 7) + min(side, 7),
                16 * min(r_hits, 3) + length(j, 4095),
            ]
            sets = (3 * min(r_hits, 2) + min(hits[j], 2), min(m + u, 2))
            if not model.decide(0, 0, contexts, sets, (density, guess, base, rates)):
                recent = max(recent - (j % 4 == 3), 0)
                continue
            a, b, c = third(left), third(up), third(behind)
            d, e = clip(r_signs, -3, 3) + 3, clip(signs[j], -3, 3) + 3
            contexts = [d, e, 7 * d + e, 9 * a + 3 * b + c, 7 * b + e, 3 * c + a]
            sign = -1 if model.decide(1, 0, contexts, (32, 32)) else 1
            sizes = 4 * r_sum // max(r_hits, 1), 4 * sums[j] // max(hits[j], 1)
            contexts = [length(sizes[0], 4095), length(sizes[1], 4095), 4 * min(m, 3) + min(u, 3)]
            contexts += [min(m + m2 + u + u2, 31), length(r_hits), length(hits[j])]
            size = read_magnitude(model, coder, contexts)
            x[i][j], recent = sign * size, 3
            total, r_hits, r_sum, r_signs = total + 1, r_hits + 1, r_sum + size, r_signs + sign
            b_hits, seen[part] = b_hits + 1, seen[part] + 1
            hits[j], sums[j], signs[j] = hits[j] + 1, sums[j] + size, signs[j] + sign
    return x


def read_magnitude(model, coder, contexts):
    def more(group):
        return model.decide(2, group, [c + 32 * group for c in contexts], (64 + group, 64 + group))

    for size in range(1, 13):
        if not more(size - 1):
            return size
    ones, tail = 0, 1
    while more(12 + min(ones, 3)):
        ones += 1
    for _ in range(ones + 2):
        tail = tail << 1 | coder.bit()
    return tail + 9
