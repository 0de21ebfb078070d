"""Verify and re-solve: where what is measured misses the budget, correct the model and plan again.

The planner adds costs up. A file's size and a network's time are not quite such sums: headers are
shared, layers overlap, caches remember. So both are measured, and planned again a few times: of
what a plan was predicted to take and what it took, a line through two points says what to aim at
next (false position; the first of them is the original, whose time is known). Every round is kept
in `way.rounds`, and so in the report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lamina.errors import BudgetError, InfeasibleError
from lamina.measure.bench import tokens_of
from lamina.measure.latency import measure_ratio, reshaped
from lamina.measure.stats import Stats
from lamina.methods.base import Candidate, spanning
from lamina.network.isolate import batch_size
from lamina.network.sites import Sites
from lamina.plan import Budget, Candidates, Edited, Plan
from lamina.plan.seconds import reshape_edits
from lamina.run import key_of
from lamina.search import searched
from lamina.stages import Way, applied, clock_key, noted, packed, size_limit, solved

SLACK_ERROR = 5e-4  # [nats per sample] predicted error from which rate pressure starts walking
ROUNDS = 4  # of verifying and planning again
REFITS = 6  # of planning again for the size: in a file of few bytes names weigh as much as values
TOLERANCE = 0.03  # of a latency: nearer is met, and further below is needless
AIM = 0.985  # of a latency: what is aimed at, so that another measurement still meets it
SECONDS = 8.0  # that measuring one plan may take, about

Make = Callable[[Budget], Plan]


@dataclass(frozen=True)
class Timed:
    """A plan with its predicted and its measured time [s], and its row of the report."""

    plan: Plan
    seconds: float
    row: dict[str, Any]

    @property
    def predicted(self) -> float:
        return self.plan.predicted.seconds


def planned(way: Way, sites: Sites, stats: Stats, candidates: Candidates) -> Plan:
    """Make the plan that keeps to the budget, as far as it can be verified before training.

    Raises:
        InfeasibleError: none does; `nearest` holds the nearest limits that can be met.
        DataError: `max_drop` without validation data.
    """
    budget = way.budget

    def start(asked: Budget) -> Plan:
        return started(way, sites, stats, candidates, asked)

    if budget.max_drop is not None:
        size = budget.size if budget.size is not None else "100%"
        others = replace(budget, max_drop=None, size=size)
        made = _small_enough(way, sites, stats, candidates, others)
    elif budget.latency is not None:
        made = fast_enough(way, sites, budget, start)
    else:
        made = start(budget)
    return replace(made, budget=budget.to_json())


def started(way: Way, sites: Sites, stats: Stats, candidates: Candidates, budget: Budget) -> Plan:
    """Make a plan; where training will squeeze the file, one that still works is its start.

    A second-order prediction says nothing about a network that has lost 99 % of its bytes, and from
    such a plan training has no way back. So where rate pressure will follow, the plan is the
    smallest one that is predicted to work (`SLACK_ERROR`), and the pressure walks to the limit.
    Where bytes are all that is limited such a start holds grids only: what pruning and low rank
    would save there the pressure finds by itself, and each of them adds to the file's header.
    """
    if budget.size is None or not squeezable(way, candidates):
        return solved(way, sites, stats, candidates, budget)
    roomy = solved(way, sites, stats, candidates, replace(budget, size="100%"))
    limit = size_limit(way, roomy) or 0.0
    if limit >= smallest_working(roomy):
        return solved(way, sites, stats, candidates, budget)
    if budget.macs is None and budget.params is None and budget.latency is None:
        candidates = {name: tuple(filter(on_grid, offers)) for name, offers in candidates.items()}
        roomy = solved(way, sites, stats, candidates, replace(budget, size="100%"))
    size = max(limit, 1.02 * smallest_working(roomy))
    try:
        return solved(way, sites, stats, candidates, replace(budget, size=size))
    except InfeasibleError:
        return solved(way, sites, stats, candidates, budget)


def smallest_working(roomy: Plan) -> float:
    """Return the smallest size on a plan's curve that is predicted to work [bytes]."""
    return min((size for size, error in roomy.curve if error <= SLACK_ERROR), default=0.0)


def on_grid(candidate: Candidate) -> bool:
    """Whether a candidate only puts a layer's values on a grid, which rate pressure can squeeze."""
    return len(candidate.steps) == 1 and candidate.steps[0].method == "rdoq"


def squeezable(way: Way, candidates: Candidates) -> bool:
    """Whether recovery with rate pressure will run, and every site can be held on a grid."""
    trains = way.recovery is not None and way.recovery.squeezes and way.data is not None
    if not trains or way.data is None or way.data.train is None:
        return False
    return all(any(map(on_grid, offers)) for offers in candidates.values() if not of_span(offers))


def of_span(offers: Sequence[Candidate]) -> bool:
    """Whether offers are for a span of layers, which may stay as they are."""
    return bool(offers) and offers[0].steps[0].method in spanning()


# --- latency -------------------------------------------------------------------------------------


def seconds_limit(way: Way) -> float | None:
    """Return the budget's limit on one forward pass [s], or None."""
    if way.budget.latency is None or way.table is None:
        return None
    only = Budget(latency=way.budget.latency)
    return only.resolve({"seconds": way.whole})["seconds"]


def fast_enough(way: Way, sites: Sites, budget: Budget, make: Make) -> Plan:
    """Plan, measure the whole network, and plan again until its time is met and not far below.

    Only structure is measured, with values of no use, so nothing is computed for a round. What
    the kept plan was allowed is left in `way.seconds`, for whoever plans again.

    Args:
        budget: all limits but `max_drop`.
        make: a budget to a plan.

    Raises:
        InfeasibleError: no plan is fast enough; `nearest` holds the fastest measured [s].
    """
    limit = seconds_limit(way)
    assert limit is not None
    wanted, allowed = AIM * limit, dict[int, float]()
    tried: list[Timed] = []
    for _ in range(ROUNDS):
        made, at_least = _within(budget, wanted, make)
        if any(_steps(made) == _steps(t.plan) for t in tried):
            break  # the candidates are no finer than that
        now = timed(way, sites, made, [(t.predicted, t.seconds) for t in tried])
        tried.append(now)
        allowed[id(made)] = max(wanted, made.predicted.seconds)
        if limit * (1 - TOLERANCE) <= now.seconds <= limit:
            break
        if now.seconds <= limit and (made.error <= 0 or now.predicted < 0.97 * wanted):
            break  # the other limits, or nothing at all, made it this fast
        if now.seconds > limit and at_least:
            break  # nothing is faster
        wanted = corrected([known(way), *((t.predicted, t.seconds) for t in tried)], AIM * limit)
    fits = [t for t in tried if t.seconds <= limit]
    if not fits:
        raise _too_slow(way, min(t.seconds for t in tried), way.whole)
    best = min(fits, key=lambda t: (t.plan.error, -t.seconds))
    best.row["kept"] = True
    way.seconds = allowed[id(best.plan)]
    return best.plan


def timed(way: Way, sites: Sites, made: Plan, before: Sequence[tuple[float, float]] = ()) -> Timed:
    """Measure what a plan's structure takes, in turn with the original, and note the round.

    Args:
        before: (predicted, measured) of earlier rounds, whose line corrects this prediction.
    """
    edits = reshape_edits(way.base, sites, {n: d.steps for n, d in made.sites.items()})
    shape = [[e.path, e.form, dict(e.settings)] for e in edits]

    def measure() -> bytes:
        if not edits and way.rewritten is None:
            return b"[1.0, 0.0]"
        module = reshaped(way.base, (*edits, *(way.rewritten.last if way.rewritten else ())))
        found = measure_ratio(
            way.network, module, threads=way.threads, seconds=SECONDS, timer=way.timer
        )
        return json.dumps(found[:2]).encode()

    key = key_of("timed", *clock_key(way), way.whole, shape)
    ratio, noise = json.loads(way.stored("timed", key, ".json", measure, {}))
    seconds = ratio * way.whole
    guess = predict([known(way), *before], made.predicted.seconds)
    row = noted(way, "latency", f"latency={way.budget.latency}", made, {"seconds": seconds})
    row["predicted"]["seconds"] = guess
    limit = seconds_limit(way) or 0.0
    verdict = "over the limit" if seconds > limit else "within the limit"
    if seconds < (1 - TOLERANCE) * limit:
        verdict = "needlessly below the limit"
    row["note"] = f"{ratio:.3f} of the original's time (+- {noise:.3f}), {verdict}"
    return Timed(made, seconds, row)


def known(way: Way) -> tuple[float, float]:
    """Return what planning starts from, as (predicted, measured): no plan changes a layer there."""
    assert way.table is not None
    return way.table.whole, way.table.whole


def corrected(points: Sequence[tuple[float, float]], goal: float) -> float:
    """Return what a plan should be predicted to take, so that it really takes `goal`.

    Args:
        points: (predicted, measured) [s]; the first is the unplanned network's time, twice.
        goal: the time that is wanted [s].

    Example:
        >>> corrected([(10.0, 10.0), (6.0, 5.0)], 7.5)  # savings are 5/4 of what was predicted
        8.0
    """
    above = min((p for p in points if p[1] >= goal), key=lambda p: (p[1], p[0]), default=None)
    below = max((p for p in points if p[1] < goal), key=lambda p: (p[1], p[0]), default=None)
    if above is None:  # nothing is as slow as that
        assert below is not None
        return max(1e-12, below[0] * goal / below[1])
    if below is None:  # no round was fast enough: along the line to the fastest
        below = min(points[1:] or points, key=lambda p: p[1])
        above = points[0]
    if not above[0] > below[0] or not above[1] > below[1]:  # no line falls through these
        return 0.9 * min(p for p, _ in points)
    slope = (above[0] - below[0]) / (above[1] - below[1])
    return max(1e-12, above[0] + slope * (goal - above[1]))


def predict(points: Sequence[tuple[float, float]], seconds: float) -> float:
    """Return what a predicted time is corrected to, by the line through the two nearest points."""
    near = sorted(points, key=lambda p: abs(p[0] - seconds))[:2]
    if len(near) < 2 or near[0][0] == near[1][0]:
        return seconds
    (a, b), (c, d) = near
    return b + (seconds - a) * (d - b) / (c - a)


def _within(budget: Budget, wanted: float, make: Make) -> tuple[Plan, bool]:
    """Return the plan for a predicted time, or the fastest one, and whether it is that."""
    try:
        return make(replace(budget, latency=wanted)), False
    except InfeasibleError as error:
        nearest = error.nearest.get("seconds", 0.0)
        if not nearest > wanted:
            raise
        try:
            return make(replace(budget, latency=nearest * (1 + 1e-6))), True
        except InfeasibleError:  # other limits are in the way too
            raise error from None


def _steps(made: Plan) -> list[Any]:
    return [decision.steps for decision in made.sites.values()]


def _too_slow(way: Way, fastest: float, whole: float) -> InfeasibleError:
    percent = min(100.0, 100 * fastest / whole + 1)
    return InfeasibleError(
        "no plan fits the budget", way.budget.describe(),
        f"the fastest plan was measured at {1000 * fastest:.4g} ms, "
        f"{100 * fastest / whole:.1f}% of the original's {1000 * whole:.4g} ms",
        f"the nearest feasible budget is latency={percent:.0f}%", {"seconds": fastest},
    )  # fmt: skip


# --- a drop, and a size --------------------------------------------------------------------------


def _small_enough(
    way: Way, sites: Sites, stats: Stats, candidates: Candidates, others: Budget
) -> Plan:
    """Search for `max_drop`, and where a latency is asked for too, verify what was found."""
    if others.latency is None:
        return searched(way, sites, stats, candidates, others)

    def make(asked: Budget) -> Plan:
        return solved(way, sites, stats, candidates, asked)

    limit, roomy = seconds_limit(way), fast_enough(way, sites, others, make)
    assert limit is not None
    for _ in range(2):
        found = searched(way, sites, stats, candidates, replace(others, latency=way.seconds))
        now = timed(way, sites, found)
        if now.seconds <= limit:
            now.row["kept"] = True
            return found
        way.seconds = corrected([known(way), (now.predicted, now.seconds)], AIM * limit)
    way.notes.append("No smaller plan kept to the latency as measured; the first that did is used.")
    return roomy


def refit(
    way: Way, sites: Sites, stats: Stats, candidates: Candidates,
    chosen: Plan, edited: Edited, file: bytes, limit: float,
) -> tuple[Plan, Edited, bytes]:  # fmt: skip
    """Plan again, a little smaller, while the measured file is over the limit (six rounds)."""
    wanted, asked = limit, f"size={way.budget.size}"
    row, fast = noted(way, "size", asked, chosen, {"bytes": len(file)}), True
    for _ in range(REFITS):
        if len(file) <= limit and fast:
            break
        if len(file) > limit:
            # From what the plan was to take, where that is less than was asked for: or the same
            # plan would come again.
            wanted = min(wanted, chosen.predicted.bits / 8) - (len(file) - limit + 8)
        budget = replace(way.budget, size=wanted, latency=way.seconds)
        try:
            tighter = solved(way, sites, stats, candidates, budget)
        except (InfeasibleError, BudgetError):
            break
        chosen = replace(tighter, budget=way.budget.to_json())
        edited = applied(way, chosen, sites, stats)
        file = packed(edited, chosen)
        row = noted(way, "size", asked, chosen, {"bytes": len(file)})
        if way.table is not None:  # other bytes may mean other ranks
            now, most = timed(way, sites, chosen), seconds_limit(way)
            fast = now.row["kept"] = most is None or now.seconds <= most
            if not fast:
                way.seconds = AIM * (way.seconds or now.predicted)
    row["kept"] = len(file) <= limit
    return chosen, edited, file


# --- the end -------------------------------------------------------------------------------------


def judged(way: Way, facts: dict[str, Any], final: nn.Module) -> dict[str, Any]:
    """Return a report's facts with the rounds, and the finished network's time where one counts.

    A latency is met where a fresh measurement, in turn with the original, is within `TOLERANCE`.
    """
    limit = seconds_limit(way)
    if limit is None or way.table is None:
        return {**facts, "rounds": way.rounds}
    whole = way.whole
    ratio, noise, _ = measure_ratio(
        way.network, final, threads=way.threads, seconds=SECONDS, timer=way.timer
    )
    met = ratio * whole <= limit * (1 + TOLERANCE)
    found = {
        "before_s": whole, "after_s": ratio * whole, "ratio": 1 / ratio,
        "batch": batch_size(way.network.example_inputs, way.network.example_kwargs),
        "tokens": tokens_of(way.network), "threads": way.threads,
    }  # fmt: skip
    if not met:
        way.notes.append(
            f"The finished network takes {ratio:.3f} (+- {noise:.3f}) of the original's time, "
            f"{100 * (ratio * whole / limit - 1):.1f}% over the latency that was asked for."
        )
    budget = facts["budget"]
    limits, kept = {**budget["limits"], "seconds": limit}, {**budget["met"], "seconds": met}
    budget = {**budget, "limits": limits, "met": kept}
    return {**facts, "latency": found, "budget": budget, "rounds": way.rounds}
