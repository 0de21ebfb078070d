"""A sparse matrix as gaps and values: the zeros before each non-zero, and the non-zero.

The rows of a class follow one another as one line, so a gap may run over the ends of rows; zeros
at the end of a line are not coded at all. If every symbol of a line is zero with chance p, gaps
are geometric, so their table is made from p, and p from the number of non-zeros, which is known.
A geometric law has no memory, so long gaps may be cut at no cost: the last entry of the table, the
filler F, stands for F zeros and no value after them; F is the first whose chance p^F is at most
1/64, at most 255.

Where zeros come in bursts gaps are not geometric; then their tables are counted, and F is 255.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lamina.codecs.classes import ENTRY_BITS, entropy_bits
from lamina.codecs.frequency import Ints
from lamina.codecs.kernels import compiled
from lamina.codecs.symbols import Symbols
from lamina.errors import FileError

LONGEST = 255


@dataclass(frozen=True)
class Stream:
    """What is coded of each class, one class after the other.

    Args:
        gaps: of all classes [entries].
        values: of all classes [non-zeros].
        counts: entries (fillers included) and non-zeros of each class [classes, 2].
        sizes: symbols of each class [classes].
    """

    gaps: Ints
    values: Ints
    counts: Ints
    sizes: Ints

    def values_by_class(self, low: int, count: int) -> Ints:
        """Return how often each value from `low` on occurs in each class [classes, count]."""
        owner = np.repeat(np.arange(len(self.counts)), self.counts[:, 1])
        hits = np.bincount(owner * count + self.values - low, minlength=len(self.counts) * count)
        return hits.reshape(len(self.counts), count)

    def gaps_by_class(self) -> Ints:
        """Return how often each gap occurs in each class [classes, 256]."""
        owner = np.repeat(np.arange(len(self.counts)), self.counts[:, 0])
        hits = np.bincount(
            owner * (LONGEST + 1) + self.gaps, minlength=len(self.counts) * (LONGEST + 1)
        )
        return hits.reshape(len(self.counts), LONGEST + 1)

    def gap_bits(self) -> float:
        """Return about how many bits geometric gaps take: each as a place among all symbols."""
        n = self.counts[:, 1]
        return float(entropy_bits(np.stack([n, np.maximum(self.sizes - n, 0)], 1)).sum())

    def bits(self, counted: bool = False) -> float:
        """Return about how many bits the stream and its tables take."""
        low = int(self.values.min()) if self.values.size else 0
        count = int(self.values.max()) - low + 1 if self.values.size else 1
        tables = [self.values_by_class(low, count)]
        tables += [self.gaps_by_class()] if counted else []
        payload = sum(float(entropy_bits(table).sum()) for table in tables)
        payload += 0.0 if counted else self.gap_bits()
        # rare gaps make ragged tables, whose entries cost twice as much
        entries = sum((1 + k) * int((table > 0).sum()) for k, table in enumerate(tables))
        return payload + ENTRY_BITS * entries + 32 * len(self.counts)

    def index(self, low: int) -> Ints:
        """Return all symbols in the order they are coded, as entries of their tables."""
        parts: list[Ints] = []
        gaps = np.split(self.gaps, np.cumsum(self.counts[:-1, 0]))
        values = np.split(self.values - low, np.cumsum(self.counts[:-1, 1]))
        for gap, value in zip(gaps, values, strict=True):
            parts += [gap, value]
        return np.concatenate(parts)


def gap_weights(sizes: Ints, nonzeros: Ints, backend: str = "auto") -> Ints:
    """Return the weights of gaps 0, 1, ..., F - 1 and of the filler F [classes, 256].

    Args:
        sizes: symbols of each line [classes].
        nonzeros: how many of them are not zero [classes].

    Example:
        >>> weights = gap_weights(np.array([1000, 1000]), np.array([100, 1]))
        >>> (weights > 0).sum(1).tolist()
        [41, 256]
    """
    weights = np.zeros((len(sizes), LONGEST + 1), dtype=np.int64)
    fast = compiled(fill_weights, backend)
    (fast or fill_weights)(sizes, nonzeros, weights)
    return weights


def fillers_of(weights: Ints) -> Ints:
    """Return the filler of each class [classes]."""
    return (weights > 0).sum(1) - 1


def fill_weights(sizes: Any, nonzeros: Any, weights: Any) -> None:
    """Kernel: chances of a geometric law, in 2^-30; what is left of the chance is the filler's."""
    one = 1 << 30
    for k in range(len(sizes)):
        zero = ((sizes[k] - nonzeros[k]) << 20) // max(sizes[k], 1)
        left, g = one, 0
        while g == 0 or (g < 255 and left > one >> 6):
            keep = max(left * zero >> 20, 1)
            weights[k, g] = max(left - keep, 1)
            left = keep
            g += 1
        weights[k, g] = left


def gap_stream(grid: Symbols, classes: Ints, counted: bool = False) -> Stream:
    """Return the gaps and values of a matrix [rows, cols] whose rows are in classes [rows]."""
    gaps: list[Ints] = []
    values: list[Ints] = []
    counts = []
    sizes = []
    for k in range(int(classes.max()) + 1):
        line = grid[classes == k].reshape(-1)
        where = np.flatnonzero(line)
        filler = LONGEST
        if not counted:
            filler = int(fillers_of(gap_weights(np.array([line.size]), np.array([where.size])))[0])
        gap = np.diff(where, prepend=-1) - 1
        fillers = gap // filler
        found = np.full(len(gap) + int(fillers.sum()), filler, dtype=np.int64)
        found[np.cumsum(fillers + 1) - 1] = gap % filler
        gaps.append(found)
        values.append(line[where].astype(np.int64))
        counts.append((len(found), len(where)))
        sizes.append(line.size)
    return Stream(
        np.concatenate(gaps), np.concatenate(values), np.array(counts, np.int64), np.array(sizes)
    )


def put(stream: Any, counts: Any, fillers: Any, order: Any, ends: Any, cols: Any, out: Any) -> Any:
    """Kernel: write values where gaps say; return whether they fit the rows."""
    start = 0
    for k in range(len(fillers)):
        entries, values, filler = counts[k, 0], counts[k, 1], fillers[k]
        gaps = stream[start : start + entries]
        found = stream[start + entries : start + entries + values]
        start += entries + values
        row, rows, col, v = ends[k - 1] if k else 0, ends[k], 0, 0
        here = out[order[row] * cols : order[row] * cols + cols] if row < rows else out[:0]
        for i in range(entries):
            gap = gaps[i]
            col += gap
            if gap == filler:
                continue
            if col >= cols:
                row += col // cols
                col %= cols
                if row >= rows:
                    return 0
                here = out[order[row] * cols : order[row] * cols + cols]
            if v >= values or row >= rows:
                return 0
            here[col] = found[v]
            v += 1
            col += 1
        if v != values:
            return 0
    return 1


def expand(
    stream: NDArray[Any],
    counts: Ints,
    fillers: Ints,
    classes: Ints,
    cols: int,
    dtype: DTypeLike,
    backend: str,
) -> NDArray[Any]:
    """Return the matrix [rows, cols] of a decoded stream.

    Args:
        stream: each class's gaps, then its values.
        counts: entries and non-zeros of each class [classes, 2].
        fillers: of each class [classes].
        classes: of the rows [rows].
        cols: columns.
        dtype: of the result.

    Raises:
        FileError: the gaps run past the end, or the values are not as many as the gaps.
    """
    out = np.zeros(len(classes) * cols, dtype=dtype)
    order = np.argsort(classes, kind="stable")
    ends = np.cumsum(np.bincount(classes, minlength=len(counts)))
    fast = compiled(put, backend)
    if fast is not None:
        fits = bool(fast(stream, counts, fillers, order, ends, cols, out))
    else:
        fits, start = True, 0
        for k, (entries, values) in enumerate(counts.tolist()):
            rows = order[ends[k - 1] if k else 0 : ends[k]]
            fits &= _put_all(stream[start:], entries, values, int(fillers[k]), rows, cols, out)
            start += entries + values
    if not fits:
        raise FileError("cannot decode a tensor", "", "its gaps and values do not fit together")
    return out.reshape(len(classes), cols)


def _put_all(
    stream: NDArray[Any], entries: int, values: int, filler: int, rows: Ints, cols: int,
    out: NDArray[Any],
) -> bool:  # fmt: skip
    gaps = stream[:entries].astype(np.int64)
    real = gaps != filler
    where = (np.cumsum(gaps + real) - 1)[real]
    if where.size != values or (values and where[-1] >= rows.size * cols):
        return False
    out[rows[where // cols] * cols + where % cols] = stream[entries : entries + values]
    return True
