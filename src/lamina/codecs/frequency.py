"""The frequency table of static rANS: choosing it, writing it in few bits, reading it back.

A table lists the values that occur, in rising order, with small integer weights; both sides scale
the weights to a power of two by the same integer rule (`scale_weights`). The encoder tries several
coarsenesses of the weights, so that a tensor of ten symbols gets a table of a few bytes, and may
drop rare values into an escape, whose values follow verbatim as offsets of fixed width.

Header bits, most significant first (eg(k): exp-Golomb of order k; signs folded):
    escape 1 | values eg(1), minus one without escape |
    only one value and no escape: that value eg(1), end |
    first value eg(3) | consecutive 1, else order 5 and every gap - 1 |
    escape: escaped elements eg(8), least of them eg(3), width - 1 in 5 |
    more than one entry: precision - 12 in 2, delta 1, order 4, weights | lanes / 8 eg(0)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lamina.codecs.bits import (
    BitReader,
    Ints,
    fold_sign,
    fold_signs,
    golomb_bits,
    golomb_length,
    unfold_sign,
)
from lamina.errors import FileError

PRECISIONS = (12, 13, 14)
LARGEST_TABLE = 1 << PRECISIONS[-1]
ORDERS = 12


@dataclass(frozen=True)
class Table:
    """What coder and decoder share.

    Args:
        values: kept symbols in rising order [kept].
        weights: integers > 0, one an entry; with `escaped` the escape is the last entry [entries].
        precision: log2 of the scaled total.
        escaped: elements coded through the escape.
        base: least escaped symbol.
        width: bits of an escaped symbol's offset from `base`.
    """

    values: Ints
    weights: Ints
    precision: int = PRECISIONS[0]
    escaped: int = 0
    base: int = 0
    width: int = 1

    def frequencies(self) -> Ints:
        """Return the weights scaled to 2 ** precision [entries]."""
        return scale_weights(self.weights, self.precision)


def scale_weights(weights: Ints, precision: int) -> Ints:
    """Scale positive weights to positive integers that add up to 2 ** precision.

    Integer arithmetic only: coder and decoder must agree on every machine.
    """
    total = 1 << precision
    whole = weights * total
    scaled = np.maximum(whole // weights.sum(), 1)
    left = total - int(scaled.sum())
    if left > 0:  # fewer than there are entries: flooring loses less than one each
        most = np.argsort(-(whole % weights.sum()), kind="stable")[:left]
        scaled[most] += 1
    elif left < 0:  # raising to 1 took too much: take it back in proportion to what is above 1
        spare = scaled - 1
        cut = spare * -left // spare.sum()
        rest = -left - int(cut.sum())
        most = np.argsort(-(spare * -left % spare.sum()), kind="stable")[:rest]
        cut[most] += 1
        scaled -= cut
    return scaled


def _weight_numbers(weights: Ints, delta: bool) -> Ints:
    if not delta:
        return weights - 1
    return fold_signs(np.diff(weights, prepend=0))


def _best_order(numbers: Ints, orders: int = ORDERS) -> tuple[int, int]:
    """Return the cheapest exp-Golomb order and its bits; the cost has one valley in the order."""
    guess = max(int(numbers.mean()).bit_length() - 1, 0) if numbers.size else 0
    tried = range(max(guess - 2, 0), min(guess + 2, orders - 1) + 1) or (orders - 1,)
    bits, order = min((golomb_length(numbers, order), order) for order in tried)
    return order, bits


def _weight_style(weights: Ints) -> tuple[bool, int, int]:
    """Return (delta, order, bits) of the cheapest way to write the weights."""
    plain = _best_order(_weight_numbers(weights, False))
    moves = _best_order(_weight_numbers(weights, True))
    delta = moves[1] < plain[1]
    order, bits = moves if delta else plain
    return delta, order, bits


def information_bits(counts: Ints, frequencies: Ints, precision: int) -> float:
    """Return the ideal code length [bits] of `counts` under the table."""
    return float(counts @ (precision - np.log2(frequencies)))


def choose_table(values: Ints, counts: Ints) -> tuple[Table, Ints, float]:
    """Choose the table with the fewest bits in all.

    Args:
        values: the distinct symbols in rising order [distinct].
        counts: how often each occurs, all > 0 [distinct].

    Returns:
        the table, the counts of its entries [entries], and the bits of weights, values, payload
        and escapes together, which is what was minimised.
    """
    total = int(counts.sum())
    best: tuple[float, Table, Ints] | None = None
    for limit in _escape_limits(counts):
        kept = counts > limit
        escaped = total - int(counts[kept].sum())
        entries = np.append(counts[kept], escaped) if escaped else counts[kept]
        lost = values[~kept]
        base = int(lost[0]) if escaped else 0
        width = max(int(lost[-1]) - base, 1).bit_length() if escaped else 1
        fixed = float(escaped * width) + (30 if escaped else 0)
        if kept.any():
            fixed += sum(len(part) for part in _value_bits(values[kept]))
        ideal = fixed + float(entries @ (np.log2(entries.sum()) - np.log2(entries)))
        if best is not None and ideal >= best[0]:
            continue  # no table can be that good
        for precision, weights in _weightings(entries):
            table = Table(values[kept], weights, precision, escaped, base, width)
            bits = fixed + information_bits(entries, table.frequencies(), precision)
            bits += _weight_style(weights)[2] if len(entries) > 1 else 0
            # A wider table misses the first-level cache: it must save 0.05 % a step to be taken.
            bits *= 1 + 0.0005 * (precision - PRECISIONS[0])
            if best is None or bits < best[0]:
                best = bits, table, entries
    assert best is not None
    return best[1], best[2], best[0]


def _escape_limits(counts: Ints) -> list[int]:
    """Return the counts up to which symbols may escape; each choice leaves a table that fits."""
    must = 0
    if len(counts) > LARGEST_TABLE - 1:
        must = int(np.partition(counts, len(counts) - LARGEST_TABLE)[len(counts) - LARGEST_TABLE])
    limits = [must]
    for limit in (1, 2, 4, 16):
        rare = int((counts <= limit).sum())
        if limit > must and rare >= 4 and rare > int((counts <= limits[-1]).sum()):
            limits.append(limit)
    if len(counts) > 64 and counts.max() > limits[-1]:
        limits.append(int(counts.max()))
    return limits


def _weightings(counts: Ints) -> list[tuple[int, Ints]]:
    """Return (precision, weights) to try: fine ones for long tensors, coarse ones for short."""
    total, entries = int(counts.sum()), len(counts)
    if entries == 1:
        return [(PRECISIONS[0], np.ones(1, dtype=np.int64))]
    fits = [p for p in PRECISIONS if entries <= 1 << p]
    if total > 1 << 16 or entries > 1 << 11:
        return [(p, scale_weights(counts, p)) for p in fits]
    tried: list[tuple[int, Ints]] = []
    for scale in (8, 16, 32, 64, 128, 256, 512, 1024, 4096):
        if entries <= scale < total * 2:
            tried.append((fits[0], np.maximum((2 * counts * scale + total) // (2 * total), 1)))
    return [*tried, (fits[0], scale_weights(counts, fits[0]) if total > 1 << 12 else counts)]


def _value_bits(values: Ints) -> list[str]:
    parts = [golomb_bits(fold_sign(int(values[0])), 3)]
    gaps = np.diff(values) - 1
    if not gaps.any():
        return [*parts, "1"]
    order, _ = _best_order(gaps, 32)
    return [*parts, "0", format(order, "05b"), *(golomb_bits(int(gap), order) for gap in gaps)]


def write_table(table: Table, lanes: int) -> str:
    """Return the header as bits."""
    kept, escape = len(table.values), bool(table.escaped)
    parts = [str(int(escape)), golomb_bits(kept if escape else kept - 1, 1)]
    if kept == 1 and not escape:
        return "".join([*parts, golomb_bits(fold_sign(int(table.values[0])), 1)])
    if kept:
        parts += _value_bits(table.values)
    if escape:
        parts += [golomb_bits(table.escaped, 8), golomb_bits(fold_sign(table.base), 3)]
        parts.append(format(table.width - 1, "05b"))
    if len(table.weights) > 1:
        delta, order, _ = _weight_style(table.weights)
        numbers = _weight_numbers(table.weights, delta).tolist()
        parts += [format(table.precision - PRECISIONS[0], "02b"), str(int(delta))]
        parts += [format(order, "04b"), *(golomb_bits(number, order) for number in numbers)]
        parts.append(golomb_bits(lanes // 8, 0))
    return "".join(parts)


def read_table(reader: BitReader, size: int) -> tuple[Table, int]:
    """Read a header; return the table and the number of lanes.

    Args:
        reader: at the start of the header.
        size: the elements of the tensor.

    Raises:
        FileError: the header contradicts itself or the tensor's size.
    """
    escape = reader.take(1)
    kept = reader.golomb(1) + (0 if escape else 1)
    if kept > LARGEST_TABLE or kept > size:
        raise _damaged("the table is larger than any codec writes")
    if kept == 1 and not escape:
        only = _whole([unfold_sign(reader.golomb(1))])
        return Table(only, np.ones(1, dtype=np.int64)), 1
    values = _read_values(reader, kept)
    escaped, base, width = 0, 0, 1
    if escape:
        escaped, base = reader.golomb(8), unfold_sign(reader.golomb(3))
        width = reader.take(5) + 1
        if not 0 < escaped <= size:
            raise _damaged("more elements escape than there are")
    entries = kept + escape
    if entries == 1:
        return Table(values, np.ones(1, dtype=np.int64), PRECISIONS[0], escaped, base, width), 1
    precision = PRECISIONS[0] + reader.take(2)
    delta, order = reader.take(1), reader.take(4)
    if precision not in PRECISIONS or entries > 1 << precision:
        raise _damaged("the table does not fit its precision")
    weights, last = [], 0
    for _ in range(entries):
        number = reader.golomb(order)
        last = last + unfold_sign(number) if delta else number + 1
        if not 0 < last < 1 << 33:
            raise _damaged("a weight is out of range")
        weights.append(last)
    lanes = max(8 * reader.golomb(0), 1)
    if lanes > 1 and lanes > size:
        raise _damaged("there are more lanes than elements")
    table = Table(values, np.array(weights, np.int64), precision, escaped, base, width)
    return table, lanes


def _read_values(reader: BitReader, kept: int) -> Ints:
    if not kept:
        return np.zeros(0, dtype=np.int64)
    value = unfold_sign(reader.golomb(3))
    values = [value]
    if reader.take(1):
        return _whole(list(range(value, value + kept)))
    order = reader.take(5)
    for _ in range(kept - 1):
        value += reader.golomb(order) + 1
        values.append(value)
    return _whole(values)


def _whole(values: list[int]) -> Ints:
    if values and not -(1 << 31) <= values[0] <= values[-1] < 1 << 31:
        raise _damaged("a value does not fit into 32 bits")
    return np.array(values, dtype=np.int64)


def _damaged(why: str) -> FileError:
    return FileError("cannot decode a rans tensor", "", why)
