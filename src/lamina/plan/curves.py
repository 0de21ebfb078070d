"""Curves: what each chain of methods offers for one layer, and the prices a plan was made at."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lamina.errors import BudgetError, InfeasibleError
from lamina.measure.stats import Cost, LayerStats
from lamina.methods.base import Candidate, Method, Stage, Step, Weights, find_method
from lamina.network.sites import Site
from lamina.plan.allocate import allocate
from lamina.plan.budget import Budget
from lamina.plan.chains import Candidates, ended_by, pareto, serves
from lamina.plan.plan import Decision, Plan

POINTS = 40  # of a layer that a report keeps
RESOURCES = {"size": "bytes", "macs": "macs", "params": "params", "latency": "seconds"}


@dataclass(frozen=True)
class Point:
    """One point of one chain's curve.

    Args:
        chain: the methods' names: `"alds > rdoq"`.
        steps: the chain with its settings, as text.
        cost: what the layer costs there; `seconds` is 0 where it was not measured.
        error: predicted [nats per sample]; data-free the relative spectral error.
        taken: whether the plan took it.
        offered: whether the planner could choose it; a point that another beats in everything is
            not offered.
    """

    chain: str
    steps: str
    cost: Cost
    error: float
    taken: bool = False
    offered: bool = True

    @property
    def bytes(self) -> float:
        return self.cost.bits / 8

    def dict(self) -> dict[str, Any]:
        """Return the point as JSON values."""
        return {
            "chain": self.chain, "steps": self.steps, **vars(self.cost), "error": self.error,
            "taken": self.taken, "offered": self.offered,
        }  # fmt: skip


def chain_of(steps: Iterable[Step]) -> str:
    """Return the names of a chain's methods: those that shape layers, then those of their values.

    Example:
        >>> chain_of([Step("alds", "fc"), Step("rdoq", "fc.0"), Step("keep", "fc.1")])
        'alds > keep | rdoq'
    """
    names = list(dict.fromkeys(step.method for step in steps))
    final = sorted(name for name in names if find_method(name).final)
    return " > ".join([*(n for n in names if n not in final), " | ".join(final)])


def curves(offers: Iterable[Candidate], decision: Decision | None = None) -> list[Point]:
    """Return a layer's offers as points: chain by chain, each from its dearest point down.

    Args:
        offers: of the layer.
        decision: what the plan takes; it becomes a point of its own where no offer has its steps.
    """
    points = [point_of(c, decision) for c in offers]
    if decision is not None and not any(p.taken for p in points):
        points.append(taken_point(decision))
    return sorted(points, key=lambda p: (p.chain, -p.cost.bits, p.error))


def point_of(offer: Candidate, decision: Decision | None = None, offered: bool = True) -> Point:
    """Return an offer as a point."""
    taken = decision is not None and key_of(offer.steps) == key_of(decision.steps)
    words = Decision(offer.steps, offer.cost, offer.error).describe()
    return Point(chain_of(offer.steps), words, offer.cost, offer.error, taken, offered)


def key_of(steps: Iterable[Step]) -> str:
    """Return a text that equal steps share, also where one has been through a JSON document."""
    return json.dumps([[s.method, s.at, dict(s.settings)] for s in steps], sort_keys=True)


def taken_point(decision: Decision) -> Point:
    """Return what a plan decided as a point."""
    chain = chain_of(decision.steps)
    return Point(chain, decision.describe(), decision.cost, decision.error, taken=True)


def report_curves(candidates: Candidates, plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Return the curves of all layers as JSON values for a report, at most `POINTS` points each.

    Args:
        candidates: from `propose`; a layer without any is left out.
        plan: the decision.
    """
    found = {}
    for name, decision in plan.sites.items():
        if offers := candidates.get(name):
            points = [p.dict() for p in sparse(curves(offers, decision), POINTS)]
            found[name] = [{k: v for k, v in p.items() if k != "offered"} for p in points]
    return found


def sparse(points: Sequence[Point], most: int) -> list[Point]:
    """Return at most so many points: of every chain a fair share, its ends and the taken point.

    Example:
        >>> line = [Point("rdoq", "", Cost(bits=2.0**i), 0.0, taken=i == 4) for i in range(10)]
        >>> [p.cost.bits for p in sparse(line, 4)]
        [1.0, 16.0, 32.0, 512.0]
    """
    chains: dict[str, list[Point]] = {}
    for p in points:
        chains.setdefault(p.chain, []).append(p)
    # The smallest chains first: what they leave of their share goes to the larger ones.
    kept: list[Point] = []
    for done, line in enumerate(sorted(chains.values(), key=len)):
        share = max(1, (most - len(kept)) // (len(chains) - done))
        kept += _spread(line, share)
    return sorted(kept, key=lambda p: (p.chain, p.cost.bits, p.error))


def _spread(line: Sequence[Point], count: int) -> list[Point]:
    """Return points evenly over the log of the bytes; the taken one is always among them."""
    if len(line) <= count:
        return list(line)
    taken, others = [p for p in line if p.taken], [p for p in line if not p.taken]
    if count < 3:
        return (taken or others)[:1]
    logs = [math.log(max(p.cost.bits, 1.0)) for p in others]
    wanted = np.linspace(min(logs), max(logs), count - len(taken))
    picks = {min(range(len(logs)), key=lambda j: (abs(logs[j] - w), j)) for w in wanted}
    return taken + [others[i] for i in sorted(picks)]


def method_offers(
    site: Site, weights: Weights, stats: LayerStats | None, methods: Sequence[Method]
) -> list[Candidate]:
    """Ask every method for its offers on a layer, and keep also those that another method beats.

    Every final method alone, and every other method ended by each final one; longer chains only
    come from `propose`.

    Args:
        site, weights, stats: of the layer.
        methods: to ask.
    """
    serving = [m for m in methods if serves(m, site)]
    final = [m for m in serving if m.final]
    found = [c for m in final for c in m.propose(site, weights, stats)]
    for method in serving:
        if not method.final:
            # Every chain of `ended_by` may end in `keep` as well.
            for last in [m for m in final if m.name != "keep"] or final:
                found += ended_by(method, last, site, weights, stats)
    chains: dict[str, dict[str, Candidate]] = {}
    for c in found:
        chains.setdefault(chain_of(c.steps), {})[key_of(c.steps)] = c
    return [c for line in chains.values() for c in pareto(line.values())]


def timed_alike(offers: Iterable[Candidate], timed: Iterable[Candidate]) -> list[Candidate]:
    """Return offers with the latency of those that were timed: it depends on the structure only."""
    seconds = {shape_of(c): c.cost.seconds for c in timed if c.cost.seconds}
    return [
        replace(c, cost=replace(c.cost, seconds=c.cost.seconds or seconds.get(shape_of(c), 0)))
        for c in offers
    ]


def shape_of(offer: Candidate) -> str:
    """Return the steps that say what will run; the others only change values."""
    shaping = [s for s in offer.steps if find_method(s.method).stage < Stage.VALUES]
    return "; ".join(f"{s} at {s.at}" for s in shaping if not find_method(s.method).final)


def prices(candidates: Candidates, plan: Plan) -> dict[str, float]:
    """Return what one more unit of each limited resource would save [error per unit].

    Args:
        candidates: of every site of the plan.
        plan: the decision; its prices are those of its budget, or where it stayed below or went
            beyond that, as the search for `max_drop` does, of what it spends.

    Returns:
        By resource (`"bytes"`, `"macs"`, `"params"`, `"seconds"`); 0 where it is not scarce. With
        `objective="minimax"` there are no prices.
    """
    names = [name for name in plan.sites if candidates.get(name)]
    limits = limits_of(plan, names)
    errors = [np.array([c.error for c in candidates[n]]) for n in names]
    costs = [np.array([[amount(c.cost, r) for r in limits] for c in candidates[n]]) for n in names]
    if plan.objective != "sum" or not names:
        return dict.fromkeys(limits, 0.0)
    try:
        found = allocate(errors, costs, np.array(list(limits.values())))
    except InfeasibleError:  # candidates of other settings, or a plan that was edited
        return dict.fromkeys(limits, 0.0)
    return dict(zip(limits, found.price, strict=True))


def limits_of(plan: Plan, names: Sequence[str]) -> dict[str, float]:
    """Return what the named sites may spend of each limited resource, at least what they spend."""
    spent = {r: sum(amount(plan.sites[n].cost, r) for n in names) for r in RESOURCES.values()}
    whole = {r: amount(plan.original, r) for r in RESOURCES.values()}
    limits: dict[str, float] = {}
    for field, resource in RESOURCES.items():
        if (value := plan.budget.get(field)) is None:
            continue
        limit = 0.0
        if "max_drop" not in plan.budget:
            try:
                resolved = Budget.from_json({field: value}).resolve(whole)[resource]
                limit = resolved - (amount(plan.predicted, resource) - spent[resource])
            except BudgetError:  # a share of what was not measured
                limit = 0.0
        limits[resource] = max(limit, spent[resource])
    if not limits or "max_drop" in plan.budget:  # whose search goes over the size
        limits["bytes"] = spent["bytes"]
    return limits


def amount(cost: Cost, resource: str) -> float:
    """Return what a cost says of a resource, sizes in bytes."""
    return cost.bits / 8 if resource == "bytes" else float(getattr(cost, resource))


def priced(cost: Cost, price: Mapping[str, float]) -> float:
    """Return what a cost comes to at these prices [error]; without any price its bytes."""
    if not any(price.values()):
        return cost.bits / 8
    return sum(p * amount(cost, r) for r, p in price.items())
