"""The codecs context and blocks of the second reader, written from docs/format.md alone."""

from __future__ import annotations

import math

import numpy as np
from tests.second_rans import pull, rans, unfold, varint


def part(data):
    n, data = varint(data)
    return data[:n], data[n:]


def share(weights, total):
    """Return frequencies of weights."""
    spare = total - sum(w > 0 for w in weights)
    f = [(w > 0) + w * spare // sum(weights) for w in weights]
    f[weights.index(max(weights))] += total - sum(f)
    return f


def weight(e, r):
    """Return the whole part of 2^(15 + e / r), by bisection."""
    low, high = 0, 1 << 31
    while e and high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**r <= 1 << 15 * r + e else (low, middle)
    return low


def gap_table(size, n, total):
    zero, left, weights = ((size - n) << 20) // max(size, 1), 1 << 30, []
    while not weights or (len(weights) < 255 and left > 1 << 24):
        keep = max(left * zero >> 20, 1)
        weights.append(max(left - keep, 1))
        left = keep
    return share([*weights, left], total)


def context(data, shape):
    rows, cols = (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
    if not rows * cols:
        return []
    head, most, data = data[0], data[1] + 1, data[2:]
    way, across, r, total = head & 3, head >> 2 & 1, 4 << (head >> 3 & 3), 2048 << (head >> 5 & 3)
    if across:
        rows, cols = cols, rows
    lanes, data = varint(data)
    lanes, classes = max(8 * lanes, 1), [0] * rows
    if most > 1:
        coded, data = part(data)
        classes = list(rans(coded, (rows,)))
    low, data = varint(data)
    count, data = varint(data)
    low, count, counts = unfold(low), count + 1, []
    for _ in range(most if way in (1, 3) else 0):
        n, data = varint(data)
        m, data = varint(data)
        counts.append((n, m))
    freq, data = read_tables(data, most * (5 if way == 2 else 1), count, r, total)
    if way in (1, 3):
        sizes = [classes.count(k) * cols for k in range(most)]
        if way == 3:
            gaps, data = read_tables(data, most, 256, r, total)
        else:
            gaps = [gap_table(size, n, total) for size, (n, _) in zip(sizes, counts, strict=True)]
        out = read_gaps(data, rows, cols, lanes, classes, counts, freq, gaps, low)
    else:
        found = []
        kind = (lambda i: classes[i // cols]) if way == 0 else above(found, cols, classes, low)
        pull(data, rows * cols, lanes, lambda i: freq[kind(i)], found)
        out = np.array(found).reshape(rows, cols) + low
    return (out.T if across else out).reshape(-1)


def read_tables(data, tables, count, r, total):
    coded, data = part(data)
    e = np.array(rans(coded, (tables, count)), object).reshape(tables, count)
    e[0] = np.cumsum(e[0])
    freq = []
    for line in np.cumsum(e, axis=0):
        weights = [weight(int(x), r) for x in line]
        freq.append(share(weights if any(weights) else [1, *weights[1:]], total))
    return freq, data


def above(found, cols, classes, low):
    def table(i):
        row, j = divmod(i, cols)
        up = [
            (j + k, abs(found[i - cols + k] + low)) for k in (-1, 0, 1) if row and 0 <= j + k < cols
        ]
        a = sum(size * (2 if place == j else 1) for place, size in up)
        return 5 * classes[row] + (0, 1, 2, 3, 3, 4)[min(a, 5)]

    return table


def read_gaps(data, rows, cols, lanes, classes, counts, freq, gaps, low):
    order = []
    for k, (n, m) in enumerate(counts):
        order += [gaps[k]] * (n + m) + [freq[k]] * n
    found, out = pull(data, len(order), lanes, order.__getitem__), np.zeros((rows, cols), int)
    for k, (n, m) in enumerate(counts):
        places = iter((row, j) for row in range(rows) if classes[row] == k for j in range(cols))
        values = iter(found[n + m :][:n])
        for gap in found[: n + m]:
            for _ in range(gap):
                next(places)
            if gap < len(gaps[k]) - 1:
                out[next(places)] = next(values) + low
        found = found[2 * n + m :]
    return out


def blocks(data, shape):
    size = math.prod(shape)
    rows, cols = (1, size) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
    n, data = varint(data)
    if rows < n:
        rows, cols = size, 0
    heads, out = [], []
    for _ in range(n):
        codec, (length, data) = data[0], varint(data[1:])
        heads.append((codec, length))
    for k, (codec, length) in enumerate(heads):
        here = max(min(-(-rows // n), rows - k * -(-rows // n)), 0)
        piece = (here, cols) if cols else (1, here)
        if math.prod(piece):
            out += list((rans if codec == 1 else context)(data[:length], piece))
        data = data[length:]
    return out
