"""The options of all sites as arrays, and their lower convex hulls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lamina.errors import InfeasibleError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]
Objective = Literal["sum", "minimax"]

_SLACK = 1e-12  # of a limit: rounding of a sum, so that "100%" fits in whatever order it is added


@dataclass(frozen=True)
class Allocation:
    """One option for every site.

    Args:
        choice: per site the index of its option; -1 for a group that `claims` left out.
        error: what the choice costs in error: the sum over sites, or with minimax the maximum.
        cost: per resource the total.
        price: per resource the error that one more unit of it would save; 0 where it is not scarce.
        bound: no choice within the limits has less error than this.
    """

    choice: tuple[int, ...]
    error: float
    cost: tuple[float, ...]
    price: tuple[float, ...]
    bound: float


@dataclass(frozen=True)
class Table:
    """All options as arrays over [site, option], padded with options that are not `live`."""

    error: Array  # [sites, options]
    cost: Array  # [sites, options, resources]
    limit: Array  # [resources], inf = no limit
    live: Mask  # [sites, options]

    def at(self, choice: Index) -> tuple[Array, Array]:
        """Error [sites] and total cost [resources] of a choice [sites]."""
        rows = np.arange(len(choice))
        return self.error[rows, choice], self.cost[rows, choice].sum(0)

    @property
    def most(self) -> Array:
        """The limits with room for rounding, [resources]."""
        return self.limit + _SLACK * np.abs(np.where(np.isfinite(self.limit), self.limit, 0.0))

    def fits(self, choice: Index) -> bool:
        return bool((self.at(choice)[1] <= self.most).all())

    def scaled(self) -> tuple[Index, Array]:
        """The resources [s] that have a limit, and the unit [s] in which each is about 1."""
        scarce = np.flatnonzero(np.isfinite(self.limit))
        largest = np.abs(self.cost[:, :, scarce]).max((0, 1), initial=0.0)
        # Not the limit alone: a tiny one would give coefficients beyond what a solver takes.
        unit = np.maximum(np.abs(self.limit[scarce]), 1e-6 * largest)
        return scarce, np.where(unit > 0, unit, 1.0)


def read(errors: Sequence[ArrayLike], costs: Sequence[ArrayLike], limits: ArrayLike) -> Table:
    """Check what the caller gave, and pad it to a table; `allocate` says what is refused."""
    limit = np.atleast_1d(np.asarray(limits, np.float64))
    if limit.ndim != 1 or np.isnan(limit).any():
        raise ValueError(f"limits are one number per resource, not NaN; got {limits!r}")
    if len(errors) != len(costs):
        raise ValueError(f"{len(errors)} sites have errors, {len(costs)} have costs")
    width = max([1, *(np.size(error) for error in errors)])
    table = Table(
        np.zeros((len(errors), width)),
        np.zeros((len(errors), width, len(limit))),
        limit,
        np.zeros((len(errors), width), bool),
    )
    for site, (error, cost) in enumerate(zip(errors, costs, strict=True)):
        error, cost = np.asarray(error, np.float64), np.asarray(cost, np.float64)
        cost = cost[:, None] if cost.ndim == 1 and len(limit) == 1 else cost
        if error.ndim != 1 or not len(error) or cost.shape != (len(error), len(limit)):
            shapes = f"errors {error.shape} and costs {cost.shape}"
            raise ValueError(f"site {site}: {shapes} are not [n >= 1] and [n, {len(limit)}]")
        if np.isnan(error).any() or np.isneginf(error).any() or not np.isfinite(cost).all():
            raise ValueError(f"site {site}: NaN, an error of -inf, or a cost that is not finite")
        table.error[site, : len(error)] = error
        table.cost[site, : len(error)] = cost
        table.live[site, : len(error)] = True
    return table


def finite(table: Table) -> Table:
    """The same without options of infinite error; where a site has no other, they count as 0."""
    live = table.live & np.isfinite(table.error)
    forced = ~live.any(1, keepdims=True)
    error = np.where(live, table.error, 0.0)
    return Table(error, table.cost, table.limit, np.where(forced, table.live, live))


def cheapest(cost: Array, tie: Array, live: Mask) -> Index:
    """Per site [sites] the live option of least cost; among equals least `tie`, then the first."""
    least = np.where(live, cost, np.inf).min(1, keepdims=True, initial=np.inf)
    equal = live & (cost == least)
    best = np.where(equal, tie, np.inf).min(1, keepdims=True, initial=np.inf)
    return (equal & (tie == best)).argmax(1)


def allocation(
    table: Table, choice: Index, price: Array, bound: float, objective: Objective
) -> Allocation:
    """The result as plain numbers; a group with choice -1 is not used."""
    used = np.flatnonzero(choice >= 0)
    error, total = table.error[used, choice[used]], table.cost[used, choice[used]].sum(0)
    worth = error.sum() if objective == "sum" else error.max(initial=-np.inf) if len(used) else 0.0
    return Allocation(
        tuple(choice.tolist()),
        float(worth),
        tuple(total.tolist()),
        tuple(price.tolist()),
        float(worth) if np.isinf(worth) else min(float(bound), float(worth)),
    )


def infeasible(total: Array, limit: Array) -> InfeasibleError:
    """No choice fits `limit` [resources]; one with the costs `total` [resources] comes nearest."""
    nearest = {str(k): float(max(total[k], limit[k])) for k in range(len(limit))}
    nearest = {k: value for k, value in nearest.items() if np.isfinite(value)}
    over = [k for k in range(len(limit)) if total[k] > limit[k]]
    return InfeasibleError(
        "no choice of options fits the budget",
        why=", ".join(f"resource {k} takes {total[k]:.6g} of {limit[k]:.6g}" for k in over),
        fix="allow more, or offer the sites cheaper options",
        nearest=nearest,
    )


@dataclass(frozen=True)
class Steps:
    """Segments of hulls: `site` moves on to `option` for `cost` more and `gain` less error."""

    site: Index
    option: Index
    cost: Array
    gain: Array
    slope: Array

    def sorted(self) -> Steps:
        """By falling slope; equal slopes stay in place, so each site's own order is kept."""
        order = np.argsort(-self.slope, kind="stable")
        return Steps(*(column[order] for column in vars(self).values()))


def hulls(table: Table, cost: Array) -> tuple[Index, Steps]:
    """The cheapest option of every site, and its hull's segments (gift wrapping, all at once)."""
    error, live = table.error, table.live
    rows = np.arange(len(error))
    at = first = cheapest(cost, error, live)
    steepest = np.full(len(error), np.inf)
    found: list[tuple[Any, ...]] = []
    while len(rows):
        more = cost[rows] - cost[rows, at][:, None]
        gain = error[rows, at][:, None] - error[rows]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            slope = np.where(live[rows] & (more > 0) & (gain > 0), gain / more, -1.0)
        best = slope.max(1, initial=-1.0)
        far = np.where(slope == best[:, None], more, -np.inf).argmax(1)
        going = best > 0
        rows, far, best = rows[going], far[going], best[going]
        more, gain = more[going, far], gain[going, far]
        # Rounding must not let a later segment overtake an earlier one of its site.
        steepest[rows] = np.minimum(steepest[rows], best)
        found.append((rows, far, more, gain, steepest[rows]))
        at = far
    empty = (np.zeros(0, np.intp),) * 2 + (np.zeros(0),) * 3
    return first, Steps(*(np.concatenate(column) for column in zip(empty, *found, strict=True)))


def hull(errors: ArrayLike, costs: ArrayLike) -> tuple[int, ...]:
    """The options on the lower convex hull, from the cheapest to the one of least error.

    Args:
        errors: error of the options, [n]; inf is never on the hull unless all are inf.
        costs: their cost in one resource, [n].

    Raises:
        ValueError: shapes that do not match, NaN, or no option.

    Example:
        >>> hull([9, 6, 1, 0, 5], [1, 2, 3, 9, 4])
        (0, 2, 3)
    """
    table = finite(read([errors], [np.asarray(costs, float).reshape(-1)], [np.inf]))
    first, steps = hulls(table, table.cost[:, :, 0])
    return (int(first[0]), *(int(option) for option in steps.option))


def curve(errors: Sequence[ArrayLike], costs: Sequence[ArrayLike]) -> tuple[Array, Array]:
    """The rate-distortion curve of the whole network: the best sums of errors at every price.

    Args:
        errors: per site the error of its options, [n_i].
        costs: per site their cost, [n_i] or [n_i, r], of which resource 0 is taken.

    Returns:
        totals [m], rising, and errors [m], falling: every breakpoint of the convex hull.

    Raises:
        ValueError: as `allocate`.

    Example:
        >>> totals, error = curve([[9, 1, 0], [4, 0]], [[1, 2, 4], [1, 3]])
        >>> totals.tolist(), error.tolist()
        ([2.0, 3.0, 5.0, 7.0], [13.0, 5.0, 1.0, 0.0])
    """
    columns = [np.asarray(cost, float) for cost in costs]
    flat = [column[:, 0] if column.ndim == 2 else column for column in columns]
    whole = read(errors, flat, [np.inf])
    table = finite(whole)
    first, steps = hulls(table, table.cost[:, :, 0])
    rows = np.arange(len(first))
    steps = steps.sorted()
    totals = table.cost[rows, first, 0].sum() + np.concatenate([[0.0], np.cumsum(steps.cost)])
    # Summed from the end, so that small errors are not lost beside the large one at the start.
    last = first.copy()
    last[steps.site] = steps.option
    rest = np.concatenate([[0.0], np.cumsum(steps.gain[::-1])])[::-1]
    return totals, whole.error[rows, last].sum() + rest
