"""Fronts: which candidates nothing beats, joint curves of several layers, and fewer of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lamina.measure.stats import Cost
from lamina.methods.base import Candidate

COMBINED = 24  # points kept of the joint curve of the layers one step leaves

Table = NDArray[np.float64]


def pareto(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Keep candidates that no other beats in error and in every cost; sorted by falling bits."""
    given = sorted(candidates, key=_numbers)
    # Of equal ones always the same is kept, whatever the order was.
    each = [min(equal, key=_words) for _, equal in itertools.groupby(given, _numbers)]
    kept = front(np.array([_numbers(c) for c in each]).reshape(-1, 5))
    return tuple(each[i] for i in reversed(kept))


def _numbers(c: Candidate) -> tuple[float, ...]:
    return (c.cost.bits, c.cost.macs, c.error, c.cost.params, c.cost.seconds)


def _words(c: Candidate) -> str:
    return str(c.steps)


def front(table: Table) -> list[int]:
    """Return the rows that no other row is below or equal to in every column.

    Args:
        table: `[n, 5]`, sorted by rising rows (bits first); of equal rows the first is kept.
    """
    if len(table) and (table[:, [1, 3, 4]] == table[0, [1, 3, 4]]).all():  # bits and error alone
        before = np.minimum.accumulate(np.concatenate([[np.inf], table[:-1, 2]]))
        return [int(i) for i in np.flatnonzero(table[:, 2] < before)]
    kept: list[int] = []
    best = np.empty_like(table)
    for i, row in enumerate(table):
        if not (best[: len(kept)] <= row).all(1).any():
            best[len(kept)] = row
            kept.append(i)
    return kept


def join(curves: Sequence[Sequence[Candidate]], how: str = "sum") -> list[Candidate]:
    """Return the joint curve of several layers that are chosen together (a Pareto list).

    Errors add up (`"sum"`), or the largest counts (`"max"`, data-free); costs add up.
    """
    joint = [Candidate("", (), Cost(), 0.0)]
    for curve in curves:
        left, right = (np.array([_numbers(c) for c in x]).reshape(-1, 5) for x in (joint, curve))
        both = left[:, None] + right
        if how == "max":
            both[:, :, 2] = np.maximum(left[:, None, 2], right[:, 2])
        table = both.reshape(-1, 5)
        order = np.lexsort(table.T[::-1])
        kept = order[front(table[order])][::-1]
        kept = kept[spread_over(table[kept, 0], COMBINED)]
        pairs = [divmod(int(k), len(curve)) for k in kept]
        joint = [
            Candidate(
                "",
                joint[i].steps + curve[j].steps,
                joint[i].cost + curve[j].cost,
                float(both[i, j, 2]),
            )
            for i, j in pairs
        ]
    return joint


def thin(candidates: Sequence[Candidate], count: int) -> tuple[Candidate, ...]:
    """Keep at most `count` candidates, spread evenly over the log of the bits, ends included."""
    picks = spread_over(np.array([c.cost.bits for c in candidates]), count)
    return tuple(candidates[i] for i in picks)


def spread_over(bits: Table, count: int) -> list[int]:
    """Return at most `count` indices of falling numbers of bits, evenly over their logarithm."""
    if len(bits) <= count:
        return list(range(len(bits)))
    if count < 2:
        return list(range(count))
    logs = np.log(np.maximum(bits, 1.0))
    wanted = np.linspace(logs[0], logs[-1], count)[1:-1]
    picks = {int(np.abs(logs - w).argmin()) for w in wanted}
    return sorted(picks | {0, len(bits) - 1})
