"""Deciding: candidates and a budget to a plan."""

from __future__ import annotations

import numpy as np

from lamina.errors import BudgetError, InfeasibleError
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Candidate
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.plan.allocate import allocate, curve
from lamina.plan.budget import Budget
from lamina.plan.chains import Candidates, total
from lamina.plan.costs import fixed_cost, original_cost
from lamina.plan.plan import Decision, Plan

FIELDS = {"bytes": "bits", "macs": "macs", "params": "params", "seconds": "seconds"}


def plan(
    network: Network,
    sites: Sites,
    stats: Stats,
    candidates: Candidates,
    budget: Budget,
    *,
    original: Cost | None = None,
    fixed: Cost | None = None,
    objective: str = "auto",
) -> Plan:
    """Choose one candidate per site so that the predicted error is least within the budget.

    Args:
        network, sites, stats, candidates: from the earlier stages.
        budget: size, MACs and parameter limits (latency and `max_drop` are loops above this).
        original: what the whole network costs as it is.
        fixed: what everything outside the candidates costs (other tensors, the file's structure).
        objective: `"sum"`, `"minimax"`, or `"auto"`: the sum where there are statistics.

    Raises:
        InfeasibleError: nothing fits; `nearest` holds the nearest limits that can be met.
        BudgetError: a limit this stage cannot plan for.
    """
    original = original or original_cost(network, sites)
    fixed = fixed or fixed_cost(network, sites)
    if objective == "auto":
        objective = "sum" if stats.samples else "minimax"
    resources, limits = limits_of(budget, original, fixed)
    names = [site.name for site in sites.layers]
    errors = [np.array([c.error for c in candidates[n]], dtype=np.float64) for n in names]
    costs = [
        np.array([[getattr(c.cost, FIELDS[r]) for r in resources] for c in candidates[n]])
        for n in names
    ]
    try:
        chosen = allocate(errors, costs, limits, objective)  # type: ignore[arg-type]
    except InfeasibleError as error:
        raise infeasible(error, budget, resources, original, fixed) from None
    taken = {n: candidates[n][i] for n, i in zip(names, chosen.choice, strict=True)}
    return make_plan(network, taken, budget, objective, original, fixed, candidates)


def make_plan(
    network: Network,
    taken: dict[str, Candidate],
    budget: Budget,
    objective: str,
    original: Cost,
    fixed: Cost,
    candidates: Candidates,
) -> Plan:
    """Write a choice down as a plan, with the whole network's rate-distortion curve."""
    errors = [c.error for c in taken.values()]
    names = list(taken)
    bits, error_curve = curve(
        [np.array([c.error for c in candidates[n]]) for n in names],
        [np.array([c.cost.bits for c in candidates[n]]) for n in names],
    )
    points = tuple(
        ((float(b) + fixed.bits) / 8, float(e)) for b, e in zip(bits, error_curve, strict=True)
    )
    return Plan(
        network=network.digest(),
        sites={n: Decision(c.steps, c.cost, c.error) for n, c in taken.items()},
        budget=budget.to_json(),
        objective=objective,
        original=original,
        predicted=total(c.cost for c in taken.values()) + fixed,
        fixed_bits=fixed.bits,
        error=(sum(errors) if objective == "sum" else max(errors, default=0.0)),
        curve=points,
        name=network.name,
    )


def check_limits(budget: Budget) -> None:
    """Refuse limits that cannot be planned for, before any work is done.

    Raises:
        BudgetError: a latency limit; this version has no latency tables.
    """
    if budget.latency is not None:
        raise BudgetError(
            "latency budgets cannot be planned yet",
            f"latency={budget.latency!r}",
            "no latency tables are measured",
            "give macs= or params= instead",
        )


def limits_of(budget: Budget, original: Cost, fixed: Cost) -> tuple[list[str], np.ndarray]:
    """Return the limited resources and what the sites may spend of each.

    Raises:
        BudgetError: a latency limit (this version has no latency tables), or no limit at all.
    """
    whole = {"bytes": original.bits / 8, "macs": original.macs, "params": original.params}
    check_limits(budget)
    limits = budget.resolve(whole)
    resources: list[str] = [r for r in ("bytes", "macs", "params") if r in limits]
    if not resources:  # max_drop alone: the search above gives a size
        return ["bytes"], np.array([np.inf])
    spent = {"bytes": fixed.bits, "macs": fixed.macs, "params": fixed.params}
    scale = {"bytes": 8.0, "macs": 1.0, "params": 1.0}
    return resources, np.array([limits[r] * scale[r] - spent[r] for r in resources])


def infeasible(
    error: InfeasibleError, budget: Budget, resources: list[str], original: Cost, fixed: Cost
) -> InfeasibleError:
    """Restate the allocator's answer in whole-network units, with the nearest budget that works."""
    spent = {"bytes": fixed.bits / 8, "macs": fixed.macs, "params": fixed.params}
    scale = {"bytes": 8.0, "macs": 1.0, "params": 1.0}
    nearest = {}
    for i, r in enumerate(resources):
        value = error.nearest.get(str(i), float("nan"))
        nearest[r] = float(np.ceil(value / scale[r] + spent[r]))
    words = {"bytes": "size", "macs": "macs", "params": "params"}
    offer = ", ".join(f"{words[r]}={v:.0f}" for r, v in nearest.items())
    return InfeasibleError(
        "no plan fits the budget",
        budget.describe(),
        "every candidate of every site is larger than that",
        f"the nearest feasible budget is {offer}",
        nearest=nearest,
    )
