"""Deciding: candidates and a budget to a plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from lamina.errors import BudgetError, InfeasibleError
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Candidate
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.plan.allocate import Allocation, allocate, curve, milp
from lamina.plan.budget import Budget
from lamina.plan.chains import Candidates, total
from lamina.plan.costs import fixed_cost, original_cost
from lamina.plan.options import Array
from lamina.plan.plan import Decision, Plan
from lamina.plan.spans import claims_of

FIELDS = {"bytes": "bits", "macs": "macs", "params": "params", "seconds": "seconds"}
SCALE = {"bytes": 8.0}  # bits, in which candidates are counted, per byte
GAP, NODES = 1e-3, 2000  # of branch and bound where sites overlap
WORDS = {"bytes": "size", "seconds": "latency"}  # names of limits where the resource's differs


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
        budget: size, MACs, parameter and latency limits (`max_drop` is a loop above this).
        original: what the whole network costs as it is; with `seconds` where latency is limited.
        fixed: what everything outside the candidates costs (other tensors, the file's structure,
            the time outside the sites).
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
    names, claims = claims_of(sites, candidates)
    errors = [np.array([c.error for c in candidates[n]], dtype=np.float64) for n in names]
    costs = [
        np.array([[getattr(c.cost, FIELDS[r]) for r in resources] for c in candidates[n]])
        for n in names
    ]
    try:
        chosen = choose(errors, costs, limits, objective, claims, len(sites.layers))
    except InfeasibleError as error:
        raise infeasible(error, budget, resources, original, fixed) from None
    taken = {n: candidates[n][i] for n, i in zip(names, chosen.choice, strict=True) if i >= 0}
    return make_plan(network, taken, budget, objective, original, fixed, candidates)


def choose(
    errors: Sequence[Array], costs: Sequence[Array], limits: Array, objective: str,
    claims: Sequence[Collection[int]], layers: int,
) -> Allocation:  # fmt: skip
    """Choose one option per layer, or a span for several: by prices alone, or by branch and bound.

    Args:
        errors, costs, limits, objective: as for `allocate`.
        claims: which layers each site claims; the first `layers` claim themselves.
        layers: how many there are.

    Raises:
        InfeasibleError: nothing fits.
    """
    alone: Allocation | None = None
    try:
        alone = allocate(errors[:layers], costs[:layers], limits, objective)  # type: ignore[arg-type]
    except InfeasibleError:
        if layers == len(claims):
            raise
    if layers == len(claims):
        assert alone is not None
        return alone
    rest = (-1,) * (len(claims) - layers)
    joint = milp(errors, costs, limits, objective, claims, gap=GAP, nodes=NODES)  # type: ignore[arg-type]
    if alone is None or joint.error < alone.error:
        return joint
    return replace(alone, choice=(*alone.choice, *rest))


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


def write_plan(
    network: Network,
    sites: Sites,
    stats: Stats,
    taken: dict[str, Candidate],
    budget: Budget,
    fixed: Cost | None = None,
) -> Plan:
    """Write decisions down as a plan that were made without candidates to choose from.

    Args:
        network, sites, stats: as for `plan`.
        taken: by site.
        budget: what will be checked.
        fixed: what is outside of the sites; default: `fixed_cost`.
    """
    return make_plan(
        network, taken, budget, "sum" if stats.samples else "minimax",
        original_cost(network, sites), fixed or fixed_cost(network, sites),
        {name: (candidate,) for name, candidate in taken.items()},
    )  # fmt: skip


def limits_of(budget: Budget, original: Cost, fixed: Cost) -> tuple[list[str], np.ndarray]:
    """Return the limited resources and what the sites may spend of each.

    Raises:
        BudgetError: a latency limit where nothing was timed.
    """
    if budget.latency is not None and not original.seconds:
        raise BudgetError(
            "latency budgets need measured candidates",
            f"latency={budget.latency!r}",
            "the network and its candidates were not timed",
            "use lamina.compress, or plan.seconds.with_seconds and costs with seconds",
        )
    whole = {"bytes": original.bits / 8} | {
        r: getattr(original, r) for r in ("macs", "params", "seconds")
    }
    limits = budget.resolve(whole)
    resources: list[str] = [r for r in FIELDS if r in limits]
    if not resources:  # max_drop alone: the search above gives a size
        return ["bytes"], np.array([np.inf])
    return resources, np.array(
        [limits[r] * SCALE.get(r, 1.0) - getattr(fixed, FIELDS[r]) for r in resources]
    )


def infeasible(
    error: InfeasibleError, budget: Budget, resources: list[str], original: Cost, fixed: Cost
) -> InfeasibleError:
    """Restate the allocator's answer in whole-network units, with the nearest budget that works."""
    nearest = {}
    for i, r in enumerate(resources):
        value = error.nearest.get(str(i), float("nan"))
        value = (value + getattr(fixed, FIELDS[r])) / SCALE.get(r, 1.0)
        # Counts are whole; a time is rounded up, so that it can be met as it is written.
        nearest[r] = float(np.ceil(value)) if r != "seconds" else value * (1 + 1e-9)
    offer = ", ".join(f"{WORDS.get(r, r)}={_written(r, v)}" for r, v in nearest.items())
    return InfeasibleError(
        "no plan fits the budget",
        budget.describe(),
        "every candidate of every site is larger than that",
        f"the nearest feasible budget is {offer}",
        nearest=nearest,
    )


def _written(resource: str, value: float) -> str:
    return f"{np.ceil(value * 1e7) / 1e4:.4f}ms" if resource == "seconds" else f"{value:.0f}"
