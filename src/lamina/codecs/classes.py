"""Rows in classes: rows whose symbols are distributed alike share a frequency table."""

from __future__ import annotations

import numpy as np

from lamina.codecs.frequency import Ints
from lamina.codecs.symbols import Symbols

ROUNDS = 12
ENTRY_BITS = 4.0  # about what an entry of a table costs


def histograms(symbols: Symbols, low: int, count: int) -> Ints:
    """Return how often each of the values low .. low + count - 1 occurs in each row [rows, count].

    Args:
        symbols: within those values [rows, cols].
    """
    rows = len(symbols)
    found = np.zeros((rows, count), dtype=np.int64)
    step = max(1, (1 << 22) // max(symbols.shape[1], 1))
    for start in range(0, rows, step):  # pieces: bincount widens to 8 bytes a symbol
        part = symbols[start : start + step].astype(np.int64) - low
        part += np.arange(len(part))[:, None] * count
        hits = np.bincount(part.reshape(-1), minlength=len(part) * count)
        found[start : start + len(part)] = hits.reshape(-1, count)
    return found


def entropy_bits(counts: Ints) -> Ints:
    """Return the bits of coding each row's counts with its own frequencies [rows]."""
    whole = counts.sum(1, keepdims=True)
    safe = np.maximum(counts, 1)
    return (counts * (np.log2(np.maximum(whole, 1)) - np.log2(safe))).sum(1)


def cluster(counts: Ints, classes: int) -> tuple[Ints, float]:
    """Put rows in classes of fewest bits, by turns of tables and assignments (Lloyd with code
    lengths, i.e. k-means in Kullback-Leibler divergence).

    Args:
        counts: of each row [rows, values].
        classes: at most this many.

    Returns:
        the class of each row, in rising order of bits a symbol, none empty [rows]; and about how
        many bits payload, tables and classes take.
    """
    rows = len(counts)
    mean = np.log2(counts.sum(0) + 0.5)
    order = np.argsort(-(counts @ mean) / np.maximum(counts.sum(1), 1), kind="stable")
    ids = np.empty(rows, dtype=np.int64)
    ids[order] = np.arange(rows) * classes // rows
    for _ in range(ROUNDS):
        smooth = _sums(counts, ids, classes) + 0.3
        prior = np.log2(np.bincount(ids, minlength=classes) + 0.5)
        chance = np.log2(smooth / smooth.sum(1, keepdims=True))
        found = (counts @ chance.T + prior).argmax(1)
        if (found == ids).all():
            break
        ids = found
    table = _sums(counts, ids, classes)
    each = entropy_bits(table)
    rising = np.argsort(each / np.maximum(table.sum(1), 1), kind="stable")
    rising = rising[np.isin(rising, ids)]
    rank = np.zeros(classes, dtype=np.int64)
    rank[rising] = np.arange(len(rising))
    sizes = np.bincount(ids, minlength=classes)[None]
    bits = float(each.sum() + entropy_bits(sizes)[0]) + ENTRY_BITS * int((table > 0).sum())
    return rank[ids], bits


def _sums(counts: Ints, ids: Ints, classes: int) -> Ints:
    table = np.zeros((classes, counts.shape[1]), dtype=np.int64)
    np.add.at(table, ids, counts)
    return table
