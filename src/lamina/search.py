"""The search for `max_drop`: the smallest file whose metric, really measured, falls little enough.

A price on bytes picks one point of the planner's curve, and with it a predicted error; the search
is over that price. What a plan loses is only known by trying it, so few are tried: the predicted
error of each is known before, the drop grows with its logarithm near enough, and false position
(Illinois) on it needs about five trials. It is made on the plan as applied, before training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from lamina.errors import DataError, InfeasibleError
from lamina.measure.quality import evaluate, metric_named
from lamina.measure.stats import Stats
from lamina.network.sites import Sites
from lamina.plan import Budget, Candidates, Plan
from lamina.stages import Way, applied, metric_of, noted, solved

TRIALS = 8  # real evaluations at most, the first plan's included
CLOSE = 0.1  # of the allowed drop: what may be left unspent
SAME = 1.01  # sizes nearer than this are not worth another trial
FIRST = 0.02  # [nats per sample] predicted error to try first, per allowed point
FLAT = 0.02  # drops below this share of the allowed one count as this: they are noise
SPAN = 6.0  # of the error's logarithm down to a trial without a drop: it may be any distance off
LEAST = 1e-9  # errors below this count as this


@dataclass(frozen=True)
class Trial:
    """A plan that was tried, and the drop it really has."""

    plan: Plan
    drop: float

    @property
    def size(self) -> float:
        return self.plan.predicted.bits / 8

    @property
    def error(self) -> float:
        return max(self.plan.error, LEAST)


def searched(way: Way, sites: Sites, stats: Stats, candidates: Candidates, others: Budget) -> Plan:
    """Find the smallest size whose validation metric drops by at most `max_drop` points.

    Args:
        way, sites, stats, candidates: of the run.
        others: the other limits, a size among them.

    Raises:
        DataError: there is no validation data.
        InfeasibleError: the best plan within the other limits drops by more already.
    """
    if way.data is None or way.data.validation is None:
        raise DataError("max_drop needs validation data", "data.validation", "", "give some")
    metric, validation = metric_named(metric_of(way)), way.data.validation
    before = evaluate(way.network.module, validation, metric, original=way.network)
    allowed = float(way.budget.max_drop or 0)

    def make(size: float) -> Plan:
        return solved(way, sites, stats, candidates, replace(others, size=size))

    def attempt(made: Plan) -> Trial:
        model = applied(way, made, sites, stats).model
        drop = metric.drop(before, evaluate(model, validation, metric, original=way.network))
        row = noted(way, "max_drop", f"max_drop={allowed:g}", made, {"drop": drop})
        row["note"] = f"{metric.name} {'within' if drop <= allowed else 'beyond'} the limit"
        rows[id(made)] = row
        return Trial(made, drop)

    rows: dict[int, dict[str, object]] = {}
    best = attempt(solved(way, sites, stats, candidates, others))
    if best.drop > allowed:
        raise InfeasibleError(
            "no plan fits the budget", way.budget.describe(),
            f"the best within its other limits loses {best.drop:.2f} of {metric.name} "
            "before training", f"the nearest feasible budget is max_drop={best.drop:.2f}",
            {"max_drop": best.drop},
        )  # fmt: skip
    best = narrowed(best, smallest(make, best.plan), allowed, make, attempt)
    rows[id(best.plan)]["kept"] = True
    if way.recovery is not None:
        way.notes.append("max_drop was searched on the plans as applied, before any training.")
    return best.plan


def narrowed(
    best: Trial, least: Plan, allowed: float,
    make: Callable[[float], Plan], attempt: Callable[[Plan], Trial],
) -> Trial:  # fmt: skip
    """Return the smallest of a few trials whose drop is allowed, by false position.

    Args:
        best: a trial whose drop is allowed.
        least: the smallest plan there is.
        allowed: the drop [points].
        make: a size [bytes] to a plan.
        attempt: a plan to a trial.
    """
    good, bad = best, None
    weights = [1.0, 1.0]  # Illinois: halved for an end that stays twice
    for i in range(1, TRIALS):
        if good.drop >= allowed * (1 - CLOSE) and i > 1 and allowed > 0:
            break
        largest = math.log(max(bad.error if bad else least.error, LEAST))
        smallest_error = math.log(good.error)
        if good.drop <= FLAT * allowed:
            smallest_error = max(smallest_error, largest - SPAN)
        if bad is None:
            rate = allowed / good.drop if good.drop > 0 else 8.0
            jump = good.error * min(max(rate, 2.0), 16.0)
            wanted = max(jump, FIRST * allowed) if i == 1 else jump
            wanted = min(math.log(max(wanted, LEAST)), largest)
        else:
            under = -weights[0] * distance(good.drop, allowed)
            over = weights[1] * distance(bad.drop, allowed)
            share = min(max(under / max(under + over, 1e-12), 0.1), 0.9)
            wanted = smallest_error + share * (largest - smallest_error)
        made = at_error(math.exp(wanted), least, good.plan, bad.plan if bad else least, make)
        size = made.predicted.bits / 8
        if size * SAME >= good.size or (bad is not None and size <= bad.size):
            break
        trial = attempt(made)
        if trial.drop <= allowed:
            good, weights = trial, [1.0, weights[1] / 2]
            if size <= least.predicted.bits / 8 * (1 + 1e-9):
                break
        else:
            bad, weights = trial, [weights[0] / 2, 1.0]
    return good


def distance(drop: float, allowed: float) -> float:
    """Return how far a drop is beyond what is allowed: the logarithm of their ratio.

    Drops grow like a power of the predicted error, so this is a line in the error's logarithm.
    """
    if allowed <= 0:  # nothing to take the ratio to: bisection
        return 1.0 if drop > allowed else -1.0
    return math.log(max(drop / allowed, FLAT))


def smallest(make: Callable[[float], Plan], roomy: Plan) -> Plan:
    """Return the smallest plan there is within the other limits."""
    size = min((s for s, _ in roomy.curve), default=roomy.predicted.bits / 8)
    for _ in range(3):
        try:
            return make(size * 1.0001)
        except InfeasibleError as error:
            nearest = error.nearest.get("bytes", math.nan)
            size = nearest if nearest > size else 1.1 * size
    return roomy


def at_error(
    error: float, least: Plan, roomy: Plan, tight: Plan, make: Callable[[float], Plan]
) -> Plan:
    """Return a plan between two others whose predicted error is near `error`, and no larger.

    Args:
        error: the predicted error that is wanted.
        least: what to return where nothing larger errs.
        roomy, tight: plans of less and of more error.
        make: a size [bytes] to a plan.
    """
    if least.error <= error:
        return least
    low, high = tight.predicted.bits / 8, roomy.predicted.bits / 8
    guess = min((s for s, e in roomy.curve if e <= error), default=high)  # exact for size alone
    best = roomy
    for i in range(8):
        size = guess if i == 0 and low < guess < high else math.sqrt(low * high)
        try:
            made = make(size * 1.0001)
        except InfeasibleError:
            low = size
            continue
        if made.error <= error:
            best, high = made, min(size, made.predicted.bits / 8)
            if made.error >= 0.9 * error:
                break
        else:
            low = size
        if high <= low * 1.002:
            break
    return best
