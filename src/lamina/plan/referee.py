"""Branch and bound over all options at once (HiGHS): the planner's referee."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lamina.plan.options import (
    Allocation,
    Array,
    Index,
    Objective,
    Table,
    allocation,
    infeasible,
    read,
)


def milp(
    errors: Sequence[ArrayLike],
    costs: Sequence[ArrayLike],
    limits: ArrayLike,
    objective: Objective = "sum",
    claims: NDArray[Any] | Sequence[Collection[int]] | None = None,
    *,
    gap: float = 1e-7,
    nodes: int | None = None,
) -> Allocation:
    """The optimum by branch and bound (HiGHS): the referee, and the solver where sites overlap.

    Args:
        errors: as for `allocate`, one entry per group of options.
        costs: as for `allocate`.
        limits: as for `allocate`.
        objective: `"sum"` or `"minimax"`, the maximum over the groups that are used.
        claims: per group the base sites it covers: sets of indices, or a 0/1 matrix
            [groups, base sites]. Each base site is then covered by exactly one group, and a group
            that is not used has choice -1. None: every group is its own site.
        gap: relative gap to the optimum at which the search may stop.
        nodes: nodes of a search at most: the best choice found so far is returned.

    Raises:
        ValueError: as `allocate`; a group that claims nothing, a base site that nobody claims.
        InfeasibleError: as `allocate`.

    Example:
        A chain that takes the place of two layers:

        >>> costs = [[1, 4], [1, 4], [3]]
        >>> milp([[5, 0], [5, 0], [1]], costs, [5], claims=[{0}, {1}, {0, 1}]).choice
        (-1, -1, 0)
    """
    if objective not in ("sum", "minimax"):
        raise ValueError(f"objective is 'sum' or 'minimax', not {objective!r}")
    table = read(errors, costs, limits)
    cover = None if claims is None else cover_of(claims, len(table.error))
    finite = np.isfinite(table.error) & table.live
    for live in (finite, table.live):  # last resorts only where nothing else fits
        spread = float(np.abs(np.where(finite, table.error, 0)).sum()) + 1.0
        filled = np.where(np.isfinite(table.error), table.error, 2 * spread)
        solved = solve(Table(filled, table.cost, table.limit, live), cover, objective, gap, nodes)
        if solved is None:
            continue
        choice, bound = solved
        while objective == "minimax" and len(choice):
            # A maximum far below the largest error drowns in the solver's tolerance: ask for a
            # strictly lower one until there is none.
            used = np.flatnonzero(choice >= 0)
            bound = float(filled[used, choice[used]].max())
            lower = Table(filled, table.cost, table.limit, live & (filled < bound))
            if (again := solve(lower, cover, objective, gap, nodes)) is None:
                break
            choice = again[0]
        while objective == "sum" and len(choice) and not (filled < 0).any():
            # Nor can an option be better that alone is worse than a choice in hand: without those
            # the range of the errors, and with it the solver's tolerance, shrinks.
            used = np.flatnonzero(choice >= 0)
            in_hand = float(filled[used, choice[used]].sum())
            fewer = live & (filled <= in_hand)
            again = solve(
                Table(filled, table.cost, table.limit, fewer), cover, objective, gap, nodes
            )
            if fewer.sum() == live.sum() or again is None or again[1] > in_hand:
                break
            live, (choice, bound) = fewer, again
        return allocation(table, choice, np.zeros(len(table.limit)), bound, objective)
    nearest = solve(Table(table.error, table.cost, table.limit, table.live), cover, "excess")
    if nearest is None:
        raise ValueError("no set of groups covers every base site exactly once")
    used = np.flatnonzero(nearest[0] >= 0)
    raise infeasible(table.cost[used, nearest[0][used]].sum(0), table.limit)


def solve(
    table: Table,
    cover: Array | None,
    goal: Literal["sum", "minimax", "excess", "any"],
    gap: float = 1e-7,
    nodes: int | None = None,
) -> tuple[Index, float] | None:
    """The best choice and a bound on it, or None if there is none (or none was found in `nodes`).

    Args:
        table: the options; errors of live ones are finite.
        cover: which base sites [base sites, groups] a group covers; None: each its own.
        goal: least sum or maximum of the errors; `"any"` choice that fits; or least `"excess"`:
            the worst relative overrun of a limit, so that there is always a choice.
        gap: relative gap to the optimum at which to stop.
        nodes: nodes of the search at most.
    """
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.optimize import milp as branch_and_bound
    from scipy.sparse import csr_array, hstack

    groups = len(table.error)
    site, option = np.nonzero(table.live)
    count, error = len(site), table.error[site, option]
    if not groups:
        fits = goal == "excess" or bool((table.limit >= 0).all())
        return (np.zeros(0, np.intp), 0.0) if fits else None
    if not count:
        return None
    member = csr_array((np.ones(count), (site, np.arange(count))), shape=(groups, count))
    covers = member if cover is None else csr_array(cover) @ member
    scarce, unit = table.scaled()
    # HiGHS lets a row be 1e-6 over; against 1000 that is a billionth of the limit.
    spent = csr_array((1e3 * table.cost[site, option][:, scarce] / unit).T)
    limit = 1e3 * table.limit[scarce] / unit
    largest = float(np.abs(error).max()) or 1.0
    scale = 1 / largest
    if goal == "sum" and (relaxed := relax(table, cover)) is not None:
        # The gap is also absolute: an optimum of about 100 keeps that from mattering.
        scale = 100 / max(abs(relaxed[2]), 1e-9 * largest)

    # One more variable, last: the maximum of the errors, the excess, or nothing.
    cost = np.append(error * scale if goal == "sum" else np.zeros(count), goal != "sum")
    cost[-1] *= goal != "any"
    lower = np.append(np.zeros(count), -np.inf if goal == "minimax" else 0.0)
    upper = np.append(np.ones(count), np.inf)

    def row(matrix: Any, last: float, least: float, most: float | Array) -> LinearConstraint:
        column = csr_array(np.full((matrix.shape[0], 1), last))
        return LinearConstraint(hstack([matrix, column]), least, most)

    rows = [row(covers, 0, 1, 1), row(member, 0, 0, 1)]
    if goal == "minimax":
        worst = csr_array((error * scale, (site, np.arange(count))), shape=(groups, count))
        rows.append(row(worst, -1, -np.inf, 0))
    options: Any = {"mip_rel_gap": gap} | ({"node_limit": nodes} if nodes else {})
    for attempt in range(12):
        kept = limit - (2e-6 if attempt > 8 else 0)
        spend = [row(spent, -1e3 * (goal == "excess"), -np.inf, kept)] if len(scarce) else []
        solved = branch_and_bound(
            cost,
            integrality=np.append(np.ones(count), 0),
            bounds=Bounds(lower, upper),
            constraints=rows + spend,
            options=options,
        )
        if solved.x is None:
            return None
        taken = solved.x[:count] > 0.5
        choice = np.full(groups, -1, np.intp)
        choice[site[taken]] = option[taken]
        total = table.cost[site[taken], option[taken]].sum(0)
        if goal == "excess" or (total <= table.most).all():
            bound = solved.mip_dual_bound
            return choice, -np.inf if bound is None else float(bound) / scale
        # Over by less than the tolerance of HiGHS: forbid this very choice, at last keep off.
        rows.append(row(csr_array(taken[None] * 1.0), 0, -np.inf, taken.sum() - 1))
    return None


def relax(table: Table, cover: Array | None = None) -> tuple[Array, Array, float] | None:
    """The linear relaxation, where sites may mix their options.

    Returns:
        share [sites, options], price [resources], and the sum of errors; None if even that does
        not fit.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    groups = len(table.error)
    site, option = np.nonzero(table.live)
    count, error = len(site), table.error[site, option]
    member = csr_array((np.ones(count), (site, np.arange(count))), shape=(groups, count))
    covers = member if cover is None else csr_array(cover) @ member
    scarce, unit = table.scaled()
    scale = float(np.abs(error).max(initial=0.0)) or 1.0
    highs: Any = linprog  # whose hints do not know that it takes sparse arrays
    solved = highs(
        error / scale,
        A_ub=csr_array((table.cost[site, option][:, scarce] / unit).T),
        b_ub=table.limit[scarce] / unit,
        A_eq=covers,
        b_eq=np.ones(covers.shape[0]),
        bounds=(0, 1),
        method="highs",
    )
    if solved.x is None:
        return None
    share, price = np.zeros(table.live.shape), np.zeros(len(table.limit))
    share[site, option] = solved.x
    price[scarce] = np.maximum(-solved.ineqlin.marginals, 0) * scale / unit
    return share, price, float(solved.fun) * scale


def cover_of(claims: NDArray[Any] | Sequence[Collection[int]], groups: int) -> Array:
    """Claims as a 0/1 matrix [base sites, groups]; raises ValueError as `milp`."""
    if len(claims) != groups:
        raise ValueError(f"{len(claims)} claims for {groups} groups")
    if isinstance(claims, np.ndarray):
        if claims.ndim != 2 or not np.isin(claims, (0, 1)).all():
            raise ValueError("claims as an array are 0 or 1, [groups, base sites]")
        cover = claims.T.astype(np.float64)
    else:
        if any(base < 0 for claim in claims for base in claim):
            raise ValueError("base sites are counted from 0")
        most = max((base for claim in claims for base in claim), default=-1)
        cover = np.zeros((most + 1, groups))
        for group, claim in enumerate(claims):
            cover[list(claim), group] = 1
    if not cover.any(0).all():
        raise ValueError(f"group {int((~cover.any(0)).argmax())} claims no base site")
    if not cover.any(1).all():
        raise ValueError(f"no group claims base site {int((~cover.any(1)).argmax())}")
    return cover
