"""Which option each site takes, so that the error is least and the costs keep to the limits.

This is the multiple-choice knapsack problem. For a price per unit of cost each site picks
`argmin error + price . cost`, and the right price meets the limits up to the one site (per limit)
that would have to take a mixture. With one limit that price is exact: the segments of all sites'
convex hulls, sorted by slope, are its only candidates. With several limits it is the dual of the
linear relaxation. What the price leaves unspent is spent by exchanges of one or two sites, and a
branch and bound over the few options that could still matter closes a gap that stays open.

Reference: Everett 1963 (prices); Sinha & Zoltners 1979 (the relaxation and its hulls);
Pisinger 1995 (only options near the price, the core, can be in an optimum); the bound is the
Lagrangian dual. `objective="minimax"` is ALDS's: Liebenwein et al. 2021, arXiv:2107.11442.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lamina.plan.options import (
    Allocation,
    Array,
    Index,
    Mask,
    Objective,
    Table,
    allocation,
    cheapest,
    curve,
    finite,
    hull,
    hulls,
    infeasible,
    read,
)
from lamina.plan.referee import milp, relax, solve

__all__ = ["Allocation", "allocate", "curve", "hull", "milp"]

_GOOD = 4e-3  # the gap to the bound at which the search of the core stops
_CORE = (1000, 2000)  # options in the core; HiGHS slows down faster than linearly
_NODES = 100  # of each search: a count and not a time, so that a plan does not depend on the clock
_MOVES = 384  # single exchanges that are tried in pairs
_STEPS = 256  # exchanges at most


def allocate(
    errors: Sequence[ArrayLike],
    costs: Sequence[ArrayLike],
    limits: ArrayLike,
    objective: Objective = "sum",
) -> Allocation:
    """Choose one option per site with the least error within all limits.

    Args:
        errors: per site the error of its options, [n_i]; inf marks a last resort.
        costs: per site what its options cost, [n_i, r], or [n_i] for one resource; finite.
        limits: what may be spent of each resource, [r]; inf for no limit.
        objective: `"sum"` of the errors (near-exact: see `Allocation.bound`), or `"minimax"`
            (the least maximum, exact; what is left then lowers the largest errors it can).

    Raises:
        ValueError: shapes that do not match, NaN, infinite costs, a site without options.
        InfeasibleError: no choice fits; `nearest` holds limits that can be met together, keyed by
            the resource's index as text, as near to the given ones as their worst excess allows.

    Example:
        >>> allocate([[9, 1, 0], [4, 0]], [[1, 2, 4], [1, 3]], [5]).choice
        (1, 1)
    """
    table = read(errors, costs, limits)
    if objective == "minimax":
        return _minimax(table)
    if objective != "sum":
        raise ValueError(f"objective is 'sum' or 'minimax', not {objective!r}")
    usual = finite(table)
    start = _thrift(usual, usual.live)
    if usual.fits(start):
        return _sum(usual, table, start)
    # Only with last resorts, or not at all: each costs more than all finite errors together.
    start = _thrift(table, table.live)
    if not table.fits(start):
        raise infeasible(table.at(start)[1], table.limit)
    spread = float(np.where(usual.live, np.abs(usual.error), 0).sum()) + 1.0
    last = table.live & ~usual.live
    forced = Table(np.where(last, 2 * spread, usual.error), table.cost, table.limit, table.live)
    return _sum(forced, table, start)


# --- the sum --------------------------------------------------------------------------------------


def _sum(table: Table, true: Table, start: Index) -> Allocation:
    """Price, exchange, core; `start` is a choice that fits, `true` holds the errors as given."""
    scarce, _ = table.scaled()
    if not len(scarce) or not len(start):
        choice = cheapest(table.error, table.cost.sum(2), table.live)
        price = np.zeros(len(table.limit))
    elif len(scarce) == 1:
        choice, price = _greedy(table, int(scarce[0]))
    else:
        choice, price = _relaxed(table, start)
    bound = _dual(table, price)
    choice = _exchange(table, choice, price)
    error = float(table.at(choice)[0].sum())
    for size in _CORE:
        if error - bound <= _GOOD * abs(error):
            break
        core = _core(table, choice, price, error - bound, size)
        solved = solve(core, None, "sum", gap=_GOOD, nodes=_NODES)
        if solved is not None and table.at(solved[0])[0].sum() < error:
            choice = _exchange(table, solved[0], price)
            error = float(table.at(choice)[0].sum())
    return allocation(true, choice, price, bound, "sum")


def _greedy(table: Table, resource: int) -> tuple[Index, Array]:
    """The exact price of one limit, and the choice at it that still fits."""
    first, steps = hulls(table, table.cost[:, :, resource])
    steps = steps.sorted()
    slack = table.limit[resource] - table.at(first)[1][resource]
    taken = int(np.searchsorted(np.cumsum(steps.cost), slack, side="right"))
    price = np.zeros(len(table.limit))
    if taken < len(steps.slope) and np.isfinite(steps.slope[taken]):
        price[resource] = steps.slope[taken]
    choice = first.copy()
    choice[steps.site[:taken]] = steps.option[:taken]  # the last write of a site wins
    return (choice if table.fits(choice) else first), price


def _relaxed(table: Table, start: Index) -> tuple[Index, Array]:
    """Prices of several limits from the linear relaxation, and its solution rounded."""
    solved = relax(table)
    if solved is None:  # within the solver's tolerance only `start` fits
        return start, np.zeros(len(table.limit))
    share, price, _ = solved
    best, choice = start, share.argmax(1)
    mixed = np.flatnonzero(share.max(1) < 1 - 1e-9)  # no more sites than limits, as a rule
    supports = [np.flatnonzero(share[i] > 1e-9).tolist() for i in mixed]
    for corner in itertools.islice(itertools.product(*supports), 256):
        choice[mixed] = corner
        if table.fits(choice) and table.at(choice)[0].sum() < table.at(best)[0].sum():
            best = choice.copy()
    return best, price


def _thrift(table: Table, live: Mask, decide: bool = False) -> Index:
    """A choice of live options that fits, else the one nearest to fitting (any, to `decide`)."""
    scarce, unit = table.scaled()
    scaled = table.cost[:, :, scarce] / unit
    for weight in (np.ones(len(scarce)), *np.eye(len(scarce))):
        choice = cheapest(scaled @ weight, table.error, live)
        if len(scarce) < 2 or table.fits(choice):
            return choice
    least = np.where(live[:, :, None], table.cost, np.inf).min(1).sum(0)
    if decide and (least > table.most).any():
        return choice
    part = Table(np.zeros_like(table.error), table.cost, table.limit, live)
    solved = solve(part, None, "any")
    if solved is None and not decide:
        solved = solve(part, None, "excess", gap=1e-4, nodes=_NODES)
    return choice if solved is None else solved[0]


def _dual(table: Table, price: Array) -> float:
    """The Lagrangian bound: what the sites would cost at this price, less what the limits pay."""
    paid = np.where(table.live, table.error + table.cost @ price, np.inf).min(1).sum()
    free = np.where(table.live, table.error, np.inf).min(1).sum()
    return max(float(paid - price[price > 0] @ table.limit[price > 0]), float(free))


def _exchange(table: Table, choice: Index, price: Array) -> Index:
    """Change one or two sites at a time, always by the best such move, while that helps."""
    choice = choice.copy()
    if not len(choice):
        return choice
    limit, rows = table.most, np.arange(len(choice))
    for _ in range(_STEPS):
        error, total = table.at(choice)
        change = table.error - error[:, None]
        extra = table.cost - table.cost[rows, choice][:, None, :]
        rank = np.where(table.live, change + extra @ price, np.inf)
        rank[rows, choice] = np.inf
        few = np.argsort(rank, axis=None, kind="stable")[:_MOVES]
        few = few[np.isfinite(rank.flat[few])]
        site, option = np.unravel_index(few, rank.shape)
        # One more move that changes nothing, so that single moves are pairs too.
        less = np.append(change[site, option], 0.0)
        cost = np.vstack([extra[site, option], np.zeros(len(limit))])
        both = less[:, None] + less
        both[np.append(site, -1)[:, None] == np.append(site, -1)] = np.inf
        for k in range(len(limit)):
            both[total[k] + (cost[:, None, k] + cost[:, k]) > limit[k]] = np.inf
        i, j = divmod(int(both.argmin()), len(less))
        if not both[i, j] < -1e-14 * np.abs(error).sum():
            break
        moved = choice.copy()
        for move in (i, j):
            if move < len(few):
                moved[site[move]] = option[move]
        if not table.fits(moved):
            break  # only by rounding of the sum
        choice = moved
    return choice


def _core(table: Table, choice: Index, price: Array, gap: float, size: int) -> Table:
    """The options that may improve: those whose loss at this price is at most the gap.

    Of these the `size` nearest to the price, and always the present choice. A choice's error
    exceeds the bound by the losses of its options (and what it leaves unspent), so a better one
    has no option of a larger loss.
    """
    paid = np.where(table.live, table.error + table.cost @ price, np.inf)
    loss = paid - paid.min(1, keepdims=True)
    live = table.live & (loss <= gap * (1 + 1e-9))
    if live.sum() > size:
        live &= loss <= np.partition(loss[live], size)[size]
    live[np.arange(len(choice)), choice] = True
    return Table(table.error, table.cost, table.limit, live)


# --- the maximum ----------------------------------------------------------------------------------


def _minimax(table: Table) -> Allocation:
    """Bisect over the sorted error values; each site takes an option of at most that error."""
    choice = _thrift(table, table.live)
    if not table.fits(choice):
        raise infeasible(table.at(choice)[1], table.limit)
    values = np.unique(table.error[table.live])
    floor = np.where(table.live, table.error, np.inf).min(1).max(initial=-np.inf)
    low, high = int(np.searchsorted(values, floor)), len(values) - 1  # values[high] can be met
    while low < high:
        middle = (low + high) // 2
        tried = _thrift(table, table.live & (table.error <= values[middle]), decide=True)
        if table.fits(tried):
            choice, high = tried, middle
        else:
            low = middle + 1
    price, bound = np.zeros(len(table.limit)), float(values[high]) if len(values) else 0.0
    return allocation(table, _lower(table, choice), price, bound, "minimax")


def _lower(table: Table, choice: Index) -> Index:
    """Spend what is left on the largest errors: each site in turn takes its next better option."""
    choice = choice.copy()
    limit, (error, total), (scarce, unit) = table.most, table.at(choice), table.scaled()
    dear = (table.cost[:, :, scarce] / unit).sum(2)
    heap = [(-error[site], site) for site in range(len(choice))]
    heapq.heapify(heap)
    stuck: list[tuple[float, int]] = []
    while heap:
        top = heapq.heappop(heap)
        site, here = top[1], table.cost[top[1], choice[top[1]]]
        better = table.live[site] & (table.error[site] < table.error[site, choice[site]])
        better &= (total - here + table.cost[site] <= limit).all(1)
        if not better.any():
            stuck.append(top)
            continue
        # The cheapest step that fits; a leap could eat what the next site needs.
        choice[site] = cheapest(dear[site][None], table.error[site][None], better[None])[0]
        total = table.at(choice)[1]
        heapq.heappush(heap, (-table.error[site, choice[site]], site))
        if (table.cost[site, choice[site]] < here).any():  # what it frees may help the others
            for other in stuck:
                heapq.heappush(heap, other)
            stuck.clear()
    return choice
