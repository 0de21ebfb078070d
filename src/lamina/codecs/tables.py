"""Several frequency tables over one alphabet, held as small whole exponents.

Entry v of table t has weight 2^(e / r) where e > 0, and does not occur where e = 0; r is 4, 8 or
16 steps an octave. An octave cut in four costs about .002 bits a symbol, in eight a quarter of
that. Exponents of alike tables are alike, so the matrix is coded as differences: each table from
the one before, the first from entry to entry.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from lamina.codecs.frequency import Ints

STEPS = (4, 8, 16)  # an octave
OCTAVES = 15
LARGEST = 1 << 30  # weight


@cache
def weights_of(steps: int) -> Ints:
    """Return the weight of each exponent 0 .. OCTAVES * steps [OCTAVES * steps + 1].

    Weight e is the whole part of 2^(15 + e / steps), found by whole roots: no float library
    decides what a file means. Weight 0 is 0.

    Example:
        >>> weights_of(4)[[0, 1, 4, 60]].tolist()
        [0, 38967, 65536, 1073741824]
    """
    found = [0]
    for e in range(1, OCTAVES * steps + 1):
        found.append(_whole_root(1 << (15 * steps + e), steps))
    return np.array(found, dtype=np.int64)


def _whole_root(number: int, degree: int) -> int:
    """Return the largest whole number whose power is not above `number`."""
    low, high = 0, 1 << (number.bit_length() // degree + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**degree <= number else (low, middle)
    return low


def fit_exponents(counts: Ints, steps: int) -> Ints:
    """Return exponents for the counts of each table [tables, entries]; absent entries get 0."""
    top = np.maximum(counts.max(1, keepdims=True), 1)
    octaves = np.log2(np.maximum(counts, 1) / top)
    exponents = np.rint((OCTAVES + octaves) * steps).astype(np.int64)
    return np.where(counts > 0, np.maximum(exponents, 1), 0)


def frequencies(exponents: Ints, steps: int, bits: int) -> Ints:
    """Return whole frequencies that add up to 2 ** bits in each table [tables, entries].

    Args:
        exponents: none above OCTAVES * steps; a table without entries is taken as the first alone.
    """
    weights = weights_of(steps)[exponents]
    weights[:, 0] += weights.max(1) == 0
    return share(weights, bits)


def share(weights: Ints, bits: int) -> Ints:
    """Share 2 ** bits by weights: one for every entry that is present, and of the rest its part,
    rounded down; what is left goes to the first of the heaviest.

    Args:
        weights: up to 2 ** 45, 0 for what is not present [tables, entries].

    Example:
        >>> share(np.array([[1, 0, 2]]), 4).tolist()
        [[5, 0, 11]]
    """
    present = weights > 0
    spare = (1 << bits) - present.sum(1, keepdims=True)
    found = present + weights * spare // weights.sum(1, keepdims=True)
    found[np.arange(len(found)), weights.argmax(1)] += (1 << bits) - found.sum(1)
    return found


def difference(exponents: Ints) -> Ints:
    """Return the matrix as it is coded [tables, entries]."""
    coded = np.diff(exponents, axis=0, prepend=0)
    coded[0] = np.diff(exponents[0], prepend=0)
    return coded


def undo_difference(coded: NDArray[np.signedinteger]) -> Ints:
    """Undo `difference`."""
    wide = coded.astype(np.int64)
    wide[0] = np.cumsum(wide[0])
    return np.cumsum(wide, axis=0)
