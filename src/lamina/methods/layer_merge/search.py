"""Which layers to merge: subsets of kept layers per kernel, and the choice of spans under a time.

A network is a row of layers 1..L. A span (i, j] of it is replaced by what one entry of a table
says, which takes a known time and costs a known error; the spans of a solution follow each other
without a gap. The least total error within a budget of time comes from dynamic programming over
discretised time:

    E[j, t] = min over spans (i, j] and entries of E[i, t - T] + error,    E[0, t] = 0.

The paper maximises a sum of importances instead; here an importance is minus an error in nats.

Reference: Kim et al. 2024, arXiv:2406.12837, section 4 and Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lamina.errors import InfeasibleError

TICKS = 1000  # of the budget, where no precision is given


@dataclass(frozen=True)
class Layer:
    """What the choice of kept layers needs to know of one convolution.

    Args:
        kernel, stride, groups: its geometry.
        norm: L1 norm of its weight, BatchNorm folded in.
        reducible: it may become the identity: it keeps channels and size.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    norm: float
    reducible: bool


@dataclass(frozen=True)
class Subset:
    """The layers of a span that are kept, and what they merge into; none: the identity.

    Args:
        kept: positions in the span, ascending.
        kernel, groups: of the merged convolution; of the identity 1 and 0.
        norm: sum of the kept layers' L1 norms.
    """

    kept: tuple[int, ...]
    kernel: tuple[int, ...]
    groups: int
    norm: float


def best_subsets(layers: Sequence[Layer]) -> list[Subset]:
    """Return the subset of largest norm for every kernel size and grouping a span can merge into.

    Layers that are not reducible are in every subset. Of equal norms the one with more layers is
    taken. In order of kernel size, then of groups.

    Example:
        >>> three = Layer((3,), (1,), 1, 2.0, True)
        >>> [(s.kept, s.kernel) for s in best_subsets([three, three])]
        [((), (1,)), ((0,), (3,)), ((0, 1), (5,))]
    """
    axes = len(layers[0].kernel)
    one = (1,) * axes
    # A subset's future depends on its kernel, its stride so far, and its groups alone.
    states: dict[tuple[Any, ...], Subset] = {(one, one, 0): Subset((), one, 0, 0.0)}
    for i, layer in enumerate(layers):
        found: dict[tuple[Any, ...], Subset] = dict(states) if layer.reducible else {}
        for (kernel, step, groups), subset in states.items():
            now = tuple(k + s * (n - 1) for k, s, n in zip(kernel, step, layer.kernel, strict=True))
            after = tuple(s * t for s, t in zip(step, layer.stride, strict=True))
            both = math.gcd(groups, layer.groups)
            new = Subset((*subset.kept, i), now, both, subset.norm + layer.norm)
            old = found.get((now, after, both))
            if old is None or (new.norm, len(new.kept)) > (old.norm, len(old.kept)):
                found[now, after, both] = new
        states = found
    best: dict[tuple[Any, ...], Subset] = {}
    for subset in states.values():
        key = math.prod(subset.kernel), subset.kernel, subset.groups
        if key not in best or subset.norm > best[key].norm:
            best[key] = subset
    return [best[key] for key in sorted(best)]


@dataclass(frozen=True)
class Entry:
    """One row of the tables: what may stand in the place of layers first..last - 1.

    Args:
        first, last: the span (first, last] in the paper's count: layers `first` to `last - 1` when
            they are counted from 0.
        seconds: what it takes [s].
        error: what it costs [nats per sample].
        what: whatever the caller wants back.
    """

    first: int
    last: int
    seconds: float
    error: float
    what: Any = None


@dataclass(frozen=True)
class Solution:
    """The chosen entries in order, with their true time and error."""

    entries: tuple[Entry, ...]
    seconds: float
    error: float


def solve(
    layers: int, entries: Sequence[Entry], budget: float, precision: float | None = None
) -> Solution:
    """Return the entries of least total error whose true times keep to the budget.

    Times are rounded to the nearest multiple of `precision`, so that errors cancel instead of
    adding up; since a rounded sum may then be within the budget while the true one is not, and the
    other way round, the table runs a little beyond the budget and true sums decide. The least
    error is thus exact for entries that are multiples of the precision, and else to within it.

    Args:
        layers: how many there are.
        entries: rows of the tables.
        budget: for all layers together [s]; may be infinite.
        precision: one step of time [s]; default: a thousandth of the budget.

    Raises:
        InfeasibleError: the fastest row of spans is over the budget; `nearest` holds its seconds.
    """
    fastest = quickest(layers, entries)
    if fastest > budget:
        raise InfeasibleError(
            "no plan fits the budget", f"{1000 * budget:.4g} ms for the layers that can be merged",
            f"the fastest choice takes {1000 * fastest:.4g} ms",
            "give a roomier budget", {"seconds": fastest},
        )  # fmt: skip
    slowest = math.fsum(e.seconds for e in entries)
    tick = precision or max(min(budget, slowest), 1e-12) / TICKS
    by_end: list[list[tuple[Entry, int]]] = [[] for _ in range(layers + 1)]
    for entry in entries:
        by_end[entry.last].append((entry, round(entry.seconds / tick)))
    most = [0] + [-1] * layers  # ticks of the slowest way to each layer
    for j in range(1, layers + 1):
        most[j] = max((most[e.first] + t for e, t in by_end[j] if most[e.first] >= 0), default=-1)
    # A sum of L roundings is off by half a tick each at most.
    limit = most[layers]
    if math.isfinite(budget):
        limit = min(limit, math.ceil(budget / tick) + (layers + 1) // 2)
    # By ticks: (error, true seconds, entry, ticks before it); of equal errors the faster.
    Row = tuple[float, float, Entry | None, int]
    table: list[dict[int, Row]] = [{0: (0.0, 0.0, None, 0)}, *({} for _ in range(layers))]
    for j in range(1, layers + 1):
        for entry, ticks in by_end[j]:
            for before, (error, seconds, _, _) in table[entry.first].items():
                now = before + ticks
                if now > limit:
                    continue
                row = (error + entry.error, seconds + entry.seconds, entry, before)
                old = table[j].get(now)
                if old is None or row[:2] < old[:2]:
                    table[j][now] = row
    fits = [(row[:2], t) for t, row in table[layers].items() if row[1] <= budget]
    if not fits:  # what the rounding hid: the fastest row itself
        return _fastest(layers, by_end)
    return _walk(table, layers, min(fits)[1])


def quickest(layers: int, entries: Sequence[Entry]) -> float:
    """Return the least time in which the whole row can run [s]; infinite: it has a gap."""
    best = [0.0] + [math.inf] * layers
    for entry in sorted(entries, key=lambda e: e.last):
        best[entry.last] = min(best[entry.last], best[entry.first] + entry.seconds)
    return best[layers]


def _fastest(layers: int, by_end: Sequence[Sequence[tuple[Entry, int]]]) -> Solution:
    best: list[tuple[float, float, tuple[Entry, ...]]] = [(0.0, 0.0, ())]
    for j in range(1, layers + 1):
        rows = [
            (best[e.first][0] + e.seconds, best[e.first][1] + e.error, (*best[e.first][2], e))
            for e, _ in by_end[j]
        ]
        best.append(min(rows, key=lambda r: r[:2], default=(math.inf, math.inf, ())))
    seconds, error, chosen = best[layers]
    return Solution(chosen, seconds, error)


def _walk(table: Sequence[dict[int, Any]], layers: int, ticks: int) -> Solution:
    error, seconds = table[layers][ticks][:2]
    chosen: list[Entry] = []
    here = layers
    while here:
        _, _, entry, ticks = table[here][ticks]
        chosen.append(entry)
        here = entry.first
    return Solution(tuple(reversed(chosen)), seconds, error)
