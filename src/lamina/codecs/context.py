"""Rans with tables for rows that differ, or for what stands nearby.

Four ways to code, and the encoder takes the one it expects to be shortest. `ROWS` codes every
symbol with its row's table: rows (or columns) whose symbols are distributed alike form a class.
`GAPS`, for sparse matrices, goes through the rows class by class and codes, for each non-zero, the
zeros before it and its value. So many zeros cost no time: a tenth of the symbols takes a fifth of
the steps. `BURSTS` is the same with counted tables of gaps. `ABOVE` takes the table by the row's
class and the size of the symbols above.

    byte         bits 0-1 way (ROWS, GAPS, ABOVE, BURSTS), bit 2 columns instead of rows,
                 bits 3-4 steps of the exponents (4, 8, 16 an octave),
                 bits 5-6 log2 of the tables' total less 11
    byte         classes K - 1
    varint       lanes / 8 (0: one lane)
    K > 1        varint(length), rans code of the rows' classes [rows]
    varints      first value (sign folded), values V - 1
    GAPS, BURSTS for each class: varint non-zeros, varint fillers
    tables       varint(length), rans code of the exponents' differences [K, V]; see `tables`;
                 ABOVE: [5 K, V], five contexts of each class
                 BURSTS: after them the same for gaps [K, 256]
    stream       as `rans`: ROWS and ABOVE all rows in order, by their tables
                 GAPS, BURSTS for each class its gaps, then its values; see `gaps`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs import rans
from lamina.codecs.above import CONTEXTS, contexts_above, pull_rows_above
from lamina.codecs.bits import fold_sign, unfold_sign
from lamina.codecs.classes import ENTRY_BITS, cluster, entropy_bits, histograms
from lamina.codecs.fields import FieldReader, sized, varint
from lamina.codecs.frequency import Ints
from lamina.codecs.gaps import LONGEST, expand, fillers_of, gap_stream, gap_weights
from lamina.codecs.segments import Lookup, count_lanes, join, narrow, pull, push, split
from lamina.codecs.symbols import Symbols, check_symbols, count_elements, matrix_sides
from lamina.codecs.tables import (
    OCTAVES,
    STEPS,
    difference,
    fit_exponents,
    frequencies,
    share,
    undo_difference,
)
from lamina.errors import FileError

ROWS, GAPS, ABOVE, BURSTS = 0, 1, 2, 3
PRECISIONS = (11, 12, 13, 14)
MOST_VALUES = 512  # distinct values; a tensor with more is left to rans
CLASSES = (2, 4, 8)
MOST_COUNTS = 1 << 24  # in the histograms of rows; a longer side is not split into classes
LEAST = 4096  # symbols; below, tables and classes cost more than they save
SMALLEST_ABOVE = 1024  # symbols
PIECE = 1 << 20  # symbols whose contexts are in memory at a time
SPARSE = 0.5  # density up to which gaps are considered
FASTER = 1.01  # gaps may be this much longer than rows, because they decode faster
SLOWER = 0.99  # what stands above must save this much, because it decodes slower


@dataclass(frozen=True)
class Layout:
    """How a matrix is coded.

    Args:
        way: ROWS, GAPS, ABOVE or BURSTS.
        across: by columns instead of rows.
        classes: of the rows [rows].
        low: first value.
        count: how many values.
    """

    way: int
    across: bool
    classes: Ints
    low: int
    count: int


def encode(symbols: NDArray[Any], *, backend: str = "auto") -> bytes:
    """Code integers; a tensor of more than two dimensions is taken as [shape[0], the rest].

    Args:
        symbols: whole numbers that fit into int32, any shape, at most 512 values apart.
        backend: "auto", "numba" or "numpy"; all write the same bytes.

    Raises:
        ValueError: the values are not whole numbers, do not fit, or are too far apart.

    Example:
        >>> rows = np.arange(60)[:, None] % 3 * (np.arange(90) % 7 == 0)
        >>> np.array_equal(decode(encode(rows), rows.shape), rows)
        True
    """
    array = check_symbols(symbols)
    grid = array.reshape(matrix_sides(array.shape))
    if not grid.size:
        return b""
    if not suits(grid, 1):
        raise ValueError(f"context codes values at most {MOST_VALUES} apart; use rans")
    layout, _ = choose(grid)
    turned = np.ascontiguousarray(grid.T if layout.across else grid)
    return _encode_rows(turned, layout, backend)


def decode(
    data: bytes | memoryview, shape: Sequence[int], *, backend: str = "auto"
) -> NDArray[Any]:
    """Return the array [shape] that `encode` was given, as int8, int16 or int32.

    Raises:
        FileError: the data is damaged in a way that shows.
    """
    size = count_elements(shape)
    if not size:
        if data:
            raise _damaged("an empty tensor has no data")
        return np.zeros(tuple(shape), dtype=np.int8)
    rows, cols = matrix_sides(shape)
    reader = FieldReader(data)
    head, most = reader.byte(), reader.byte() + 1
    way, across, precision = head & 3, bool(head & 4), PRECISIONS[head >> 5 & 3]
    if head >> 3 & 3 > 2 or head >> 7:
        raise _damaged("its first byte says nothing this version knows")
    steps = STEPS[head >> 3 & 3]
    if across:
        rows, cols = cols, rows
    lanes = max(8 * reader.varint(), 1)
    if most * (1, 2, CONTEXTS, 2)[way] << precision > _most_slots(size):
        raise _damaged("it has more tables than its size allows")
    if most > rows or lanes > max(size, 1):
        raise _damaged("it has more classes than rows, or more lanes than symbols")
    classes = np.zeros(rows, dtype=np.int64)
    if most > 1:
        classes = rans.decode(reader.part(), (rows,), backend=backend).astype(np.int64)
        if classes.min() < 0 or classes.max() >= most:
            raise _damaged("a row's class is out of range")
    low, count = unfold_sign(reader.varint()), reader.varint() + 1
    if count > MOST_VALUES or not -(1 << 31) <= low <= (1 << 31) - count:
        raise _damaged("its values are out of range")
    values = np.arange(low, low + count)
    if way == ROWS:
        freq = _read_tables(reader, most, count, steps, precision, backend)
        ends = np.arange(1, rows + 1) * cols
        look = _lookup(freq, classes, precision, ends)
        entry = np.tile(narrow(values), most)
        out = pull(*split(reader.rest(), lanes), look, entry, backend).reshape(rows, cols)
    elif way == ABOVE:
        freq = _read_tables(reader, most * CONTEXTS, count, steps, precision, backend)
        entry = np.tile(narrow(values), len(freq))
        words, states = split(reader.rest(), lanes)
        tables = classes * CONTEXTS
        out = pull_rows_above(
            words, states, freq.reshape(-1), entry, tables, precision, cols, backend
        ).reshape(rows, cols)
    else:
        found = [(reader.varint(), reader.varint()) for _ in range(most)]
        sizes = np.bincount(classes, minlength=most) * cols
        if any(n > size or f > size for (n, f), size in zip(found, sizes, strict=True)):
            raise _damaged("it has more non-zeros than symbols")
        counts = np.array([(n + f, n) for n, f in found], dtype=np.int64)
        freq = _read_tables(reader, most, count, steps, precision, backend)
        if way == BURSTS:
            gaps = _read_tables(reader, most, LONGEST + 1, steps, precision, backend)
            fillers = np.full(most, LONGEST)
        else:
            weights = gap_weights(sizes, counts[:, 1], backend)
            gaps, fillers = share(weights, precision), fillers_of(weights)
        look = _gap_lookup(gaps, freq, counts, precision)
        lengths = np.tile(np.arange(LONGEST + 1), most)
        entry = narrow(np.concatenate([lengths, np.tile(values, most)]))
        flat = pull(*split(reader.rest(), lanes), look, entry, backend)
        out = expand(flat, counts, fillers, classes, cols, narrow(values).dtype, backend)
    return np.ascontiguousarray(out.T if across else out).reshape(tuple(shape))


def length(symbols: NDArray[Any], *, backend: str = "auto") -> int:
    """Return the bytes `encode` makes, by encoding."""
    return len(encode(symbols, backend=backend))


def suits(grid: NDArray[Any], least: int = LEAST) -> bool:
    """Return whether a matrix is one this codec takes, and may code shorter than rans."""
    if grid.ndim != 2 or grid.size < least or (least > 1 and min(grid.shape) < 8):
        return False
    return int(grid.max()) - int(grid.min()) < MOST_VALUES


def choose(grid: Symbols) -> tuple[Layout, float]:
    """Return the layout of fewest bits, and about how many bytes it takes.

    Args:
        grid: [rows, cols].
    """
    low = int(grid.min())
    count = int(grid.max()) - low + 1
    best: tuple[float, Layout] | None = None
    for across in (False, True):
        turned = grid.T if across else grid
        if len(turned) * count > MOST_COUNTS and len(turned) > min(grid.shape):
            continue
        counts = histograms(turned, low, count)
        for most in (1, *CLASSES):
            if most > 1 and len(counts) < 4 * most:
                continue
            ids, bits = cluster(counts, most)
            layout = Layout(ROWS, across, ids, low, count)
            if best is None or bits < best[0]:
                best = (bits, layout)
    assert best is not None
    bits, layout = best
    if float((grid != 0).mean()) <= SPARSE:
        by_gaps, gaps = _best_gaps(grid, layout)
        if by_gaps <= FASTER * bits:
            bits, layout = by_gaps, gaps
    if grid.size < SMALLEST_ABOVE:
        return layout, bits / 8
    above = _best_above(grid, layout)
    return above if above[1] * 8 < SLOWER * bits else (layout, bits / 8)


def _best_gaps(grid: Symbols, layout: Layout) -> tuple[float, Layout]:
    """Return about how many bits the best layout with gaps takes, and that layout."""
    rows, cols = (np.zeros(n, dtype=np.int64) for n in grid.shape)
    tries = [
        replace(layout, way=GAPS),
        replace(layout, way=BURSTS),
        replace(layout, way=BURSTS, across=False, classes=rows),
        replace(layout, way=BURSTS, across=True, classes=cols),
    ]
    found = []
    for tried in tries:
        counted = tried.way == BURSTS
        view = np.ascontiguousarray(grid.T if tried.across else grid)
        bits = gap_stream(view, tried.classes, counted).bits(counted)
        found.append((bits + float(entropy_bits(np.bincount(tried.classes)[None])[0]), tried))
    return min(found, key=lambda pair: pair[0])


def _best_above(grid: Symbols, layout: Layout) -> tuple[Layout, float]:
    """Return the best layout with contexts from above, and about how many bytes it takes."""
    one = np.zeros(grid.shape[1], dtype=np.int64)
    tries = [
        replace(layout, way=ABOVE),
        replace(layout, way=ABOVE, across=False, classes=one[:1].repeat(len(grid))),
        replace(layout, way=ABOVE, across=True, classes=one),
    ]
    found = []
    for tried in tries:
        view = grid.T if tried.across else grid
        counts = _above_counts(view, tried)
        bits = float(entropy_bits(counts).sum()) + ENTRY_BITS * int((counts > 0).sum())
        bits += float(entropy_bits(np.bincount(tried.classes)[None])[0])
        found.append((bits / 8, tried))
    size, best = min(found, key=lambda pair: pair[0])
    return best, size


def _above_counts(grid: Symbols, layout: Layout) -> Ints:
    """Return how often each value occurs in each class and context [classes * contexts, values]."""
    most = int(layout.classes.max()) + 1
    hits = np.zeros(most * CONTEXTS * layout.count, dtype=np.int64)
    for _, index in _indices_above(grid, layout):
        hits += np.bincount(index, minlength=hits.size)
    return hits.reshape(-1, layout.count)


def _indices_above(grid: Symbols, layout: Layout) -> Iterator[tuple[int, Ints]]:
    """Yield the first symbol and the table entries of a few rows at a time, class by context."""
    rows, cols = grid.shape
    step = max(1, PIECE // max(cols, 1))
    for start in range(0, rows, step):
        stop, above = min(start + step, rows), min(start, 1)
        contexts = contexts_above(grid[start - above : stop])[above:]
        table = (layout.classes[start:stop, None] * CONTEXTS + contexts) * layout.count
        table += grid[start:stop] - np.int64(layout.low)
        yield start * cols, table.reshape(-1)


def _encode_rows(grid: Symbols, layout: Layout, backend: str) -> bytes:
    rows, cols = grid.shape
    classes, low, count = layout.classes, layout.low, layout.count
    most = int(classes.max()) + 1
    parts = [b""]
    if most > 1:
        parts += [sized(rans.encode(classes, backend=backend))]
    parts += [varint(fold_sign(low)), varint(count - 1)]
    extra = 0.0
    if layout.way == ROWS:
        matrices = [np.zeros((most, count), dtype=np.int64)]
        np.add.at(matrices[0], classes, histograms(grid, low, count))
    elif layout.way == ABOVE:
        matrices = [_above_counts(grid, layout)]
    else:
        stream = gap_stream(grid, classes, layout.way == BURSTS)
        matrices = [stream.values_by_class(low, count)]
        if layout.way == BURSTS:
            matrices += [stream.gaps_by_class()]
        else:
            extra = stream.gap_bits()
        parts += [varint(n) + varint(e - n) for e, n in stream.counts.tolist()]
    tables = len(matrices[0]) * (2 if layout.way in (GAPS, BURSTS) else 1)
    steps, precision, exponents, payload = _choose_tables(matrices, tables, grid.size)
    freqs = [frequencies(e, steps, precision) for e in exponents]
    parts += [sized(rans.encode(difference(e), backend=backend)) for e in exponents]
    payload += extra
    lanes = count_lanes(payload / 8)
    if layout.way == ABOVE:
        look = _lookup(freqs[0], np.zeros(1, np.int64), precision, np.array([grid.size]))
        index = np.empty(grid.size, dtype=np.int64)
        for start, part in _indices_above(grid, layout):
            index[start : start + part.size] = part
    elif layout.way == ROWS:
        look = _lookup(freqs[0], classes, precision, np.arange(1, rows + 1) * cols)
        index = grid.reshape(-1) - np.int32(low)
    else:
        weights = gap_weights(stream.sizes, stream.counts[:, 1], backend)
        gaps = freqs[1] if layout.way == BURSTS else share(weights, precision)
        look = _gap_lookup(gaps, freqs[0], stream.counts, precision)
        index = stream.index(low)
    head = (
        layout.way
        | int(layout.across) << 2
        | STEPS.index(steps) << 3
        | PRECISIONS.index(precision) << 5
    )
    parts[0] = bytes([head, most - 1]) + varint(lanes // 8)
    return b"".join(parts) + join(*push(index, look, lanes, payload, backend))


def _most_slots(size: int) -> int:
    """Return how many slots the tables of a tensor may have: a small file must not cost much."""
    return (1 << 16) + 16 * size


def _choose_tables(
    matrices: list[Ints], tables: int, size: int
) -> tuple[int, int, list[Ints], float]:
    """Return steps, precision, exponents and payload [bits] of fewest bits in all."""
    best: tuple[float, int, int, list[Ints], float] | None = None
    most = max(int((counts > 0).sum(1).max()) for counts in matrices)
    room = [p for p in PRECISIONS if tables << p <= _most_slots(size)]
    roomy = [p for p in room if 4 * most <= 1 << p] or room[-1:]
    for steps in STEPS:
        exponents = [fit_exponents(counts, steps) for counts in matrices]
        head = sum(8 * rans.length(difference(e)) for e in exponents)
        for precision in roomy:
            payload = 0.0
            for counts, e in zip(matrices, exponents, strict=True):
                freq = np.maximum(frequencies(e, steps, precision), 1)
                payload += float((counts * (precision - np.log2(freq))).sum())
            # a bit more precision is a larger table to build and to keep in the cache
            whole = head + payload * (1 + 0.002 * (precision - PRECISIONS[0]))
            if best is None or whole < best[0]:
                best = (whole, steps, precision, exponents, payload)
    assert best is not None
    return best[1:]


def _lookup(freq: Ints, tables: Ints, precision: int, ends: Ints) -> Lookup:
    """Return the lookup of segments that use the tables named [segments]."""
    start = np.cumsum(freq, axis=1) - freq
    first, bits = tables * freq.shape[1], np.full(len(ends), precision)
    return Lookup(freq.reshape(-1), start.reshape(-1), first, tables << precision, bits, ends)


def _gap_lookup(gaps: Ints, values: Ints, counts: Ints, precision: int) -> Lookup:
    """Return the lookup of each class's gaps and values, by turns; gap tables come first."""
    most = len(gaps)
    start = [(np.cumsum(freq, axis=1) - freq).reshape(-1) for freq in (gaps, values)]
    k = np.arange(most)
    first = np.stack([k * gaps.shape[1], most * gaps.shape[1] + k * values.shape[1]], 1)
    slots = np.stack([k, most + k], 1) << precision
    return Lookup(
        np.concatenate([gaps.reshape(-1), values.reshape(-1)]), np.concatenate(start),
        first.reshape(-1), slots.reshape(-1), np.full(2 * most, precision),
        np.cumsum(counts.reshape(-1)),
    )  # fmt: skip


def _read_tables(
    reader: FieldReader, tables: int, count: int, steps: int, precision: int, backend: str
) -> Ints:
    coded = rans.decode(reader.part(), (tables, count), backend=backend)
    exponents = undo_difference(coded)
    if exponents.min() < 0 or exponents.max() > OCTAVES * steps:
        raise _damaged("an exponent of a table is out of range")
    if int((exponents > 0).sum(1).max()) > 1 << precision:
        raise _damaged("a table does not fit its precision")
    return frequencies(exponents, steps, precision)


def _damaged(why: str) -> FileError:
    return FileError("cannot decode a context tensor", "", why)
