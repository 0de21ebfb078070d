"""What the pattern of zeros in a matrix is worth: a closed form beside the adaptive codec."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Noise alone shows a gain of 1; learning the rates on the way costs the rest (fitted, see tests).
LEARNING = 1.3


def structure_bits(live: NDArray[np.bool_]) -> float:
    """Return the bits that unequal row and column densities save over one density for all.

    With n non-zeros, n_i in row i and m_j in column j, the Poisson likelihood of rates that
    multiply is better than that of a single rate by
    sum n_i ln n_i + sum m_j ln m_j - 2 n ln n + n ln(rows cols) nats; what pure chance would give
    is taken off, a little more of it for learning the rates on the way.

    Args:
        live: true where a symbol is not zero [rows, cols].
    """
    by_row, by_col = live.sum(1, dtype=np.int64), live.sum(0, dtype=np.int64)
    total = int(by_row.sum())
    return _gain(by_row, total, live.size) + _gain(by_col, total, live.size)


def _gain(hits: NDArray[np.int64], total: int, size: int) -> float:
    if len(hits) < 2 or not total:
        return 0.0
    found = hits[hits > 0].astype(np.float64)
    mean = total / len(hits)
    nats = float((found * np.log(found / mean)).sum())
    # A binomial spreads less than a Poisson: for dense matrices the same imbalance tells more.
    nats /= max(1 - total / size, 0.05)
    return float(max(nats - LEARNING * len(hits) * _chance(mean), 0.0) / np.log(2))


def _chance(mean: float) -> float:
    """Return E[x ln(x / mean)] of a Poisson variable: the gain that noise alone shows [nats]."""
    if mean > 50:
        return 0.5 + 1 / (12 * mean)
    k = np.arange(1, int(mean + 12 * np.sqrt(mean) + 20))
    log_factorials = np.cumsum(np.log(k))
    probability = np.exp(k * np.log(mean) - mean - log_factorials)
    return float((probability * k * np.log(k / mean)).sum())
