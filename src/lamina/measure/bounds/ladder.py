"""The ladder: decide which units of each ReLU are stable on a box, by the cheapest proof.

A unit is a value before a ReLU, or a channel of them. It is inactive where it is never positive,
and active where it is never negative. What a point of the box shows needs no proof; then come
intervals, linear relaxation, linear programs and integer programs, each for what is still open, as
long as there is time. Without time less is proven, and nothing else changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lamina.measure.bounds import exact
from lamina.measure.bounds.interval import interval
from lamina.measure.bounds.relaxed import relaxed
from lamina.measure.bounds.steps import Bounds, Step, run
from lamina.measure.bounds.witness import ascend, points_of, seen

MARGIN = 1e-6  # a bound nearer to zero than this decides nothing
RUNGS = ("interval", "relaxed", "lp", "milp")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Limits:
    """How much may be spent on proofs.

    Args:
        unit: seconds for one unit on one rung.
        seconds: in all; what is open then stays open.
        points: of the box at which the network is run first.
        rungs: to climb, of `RUNGS`.
        widest: values of one step above which only intervals and points are used behind it.
        seed: of the points.
    """

    unit: float = 5.0
    seconds: float = 300.0
    points: int = 4096
    rungs: tuple[str, ...] = RUNGS
    widest: int = 8192
    seed: int = 0


@dataclass
class Verdict:
    """What is known of the units before one ReLU.

    Args:
        step: index of the ReLU.
        low, high: bounds of each unit, over its positions: float64 [units].
        state: -1 inactive, 1 active, 0 seen to be both, 2 open: int64 [units].
        rung: what decided each: one of `RUNGS`, `"points"`, or `""` where it is open.
    """

    step: int
    low: Tensor
    high: Tensor
    state: Tensor
    rung: list[str] = field(default_factory=list)


def decide(
    steps: Sequence[Step],
    box: Bounds,
    limits: Limits | None = None,
    points: Tensor | None = None,
    only: Collection[int] | None = None,
    progress: Progress | None = None,
) -> list[Verdict]:
    """Return what is proven of the units before every ReLU, from the input on.

    Args:
        steps: the whole network.
        box: of its input, `[*shape]`.
        limits: how much may be spent.
        points: more points of the box to look at, `[n, *shape]`.
        only: the ReLUs (indices of steps) whose units are worth a program; None: all.
        progress: called with (units done, units in all, rung).

    Example:
        >>> weight = torch.tensor([[1.0], [-1.0], [1.0]]).double()
        >>> bias = torch.tensor([1.0, -1.0, -0.5]).double()
        >>> box = Bounds(torch.zeros(1).double(), torch.ones(1).double())
        >>> decide([Step("linear", weight, bias), Step("relu")], box)[0].state.tolist()
        [1, -1, 0]
    """
    climb = _Climb(list(steps), box, limits or Limits(), progress, only)
    with torch.no_grad():
        climb.look(points)
        for i, step in enumerate(steps):
            known = interval(step, climb.known[-1])
            climb.known.append(known)
            if i + 1 < len(steps) and steps[i + 1].op == "relu":
                climb.settle(i + 1)
    return climb.found


class _Climb:
    """One climb: what is known so far, and the time left."""

    def __init__(
        self, steps: list[Step], box: Bounds, limits: Limits, progress: Progress | None,
        only: Collection[int] | None,
    ) -> None:  # fmt: skip
        self.steps, self.box, self.limits, self.progress = steps, box, limits, progress
        self.only, self.known = only, [box]
        self.found: list[Verdict] = []
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.end = time.monotonic() + limits.seconds

    def look(self, given: Tensor | None) -> None:
        """Run the network on points of the box, and note which units were on, and which off."""
        relus = [i for i, step in enumerate(self.steps) if step.op == "relu"]
        width = max(self.box.low.numel(), 1)
        count = max(2, min(self.limits.points, (1 << 24) // width))
        points = points_of(self.box, count, self.limits.seed)
        if given is not None:
            given = torch.minimum(torch.maximum(given.double(), self.box.low), self.box.high)
            points = torch.cat([points, given])
        self.seen = seen(self.steps, points, relus, self.end - 3 / 4 * self.left())

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def settle(self, at: int) -> None:
        """Decide the units before the ReLU at a step, and tighten what is known there."""
        before = self.known[at]
        on, off = self.seen[at]
        spatial = before.low.dim() > 1
        verdict = Verdict(at, *_ends(before), torch.full((len(on),), 2), [""] * len(on))
        self._still(at, verdict)
        self._judge(verdict, on, off, "interval", spatial)
        small = all(b.low.numel() <= self.limits.widest for b in self.known)
        if small and "relaxed" in self.limits.rungs and self.left() > 0 and at > 1:
            before = self._relax(at, before)
            self.known[at] = before
            verdict.low, verdict.high = _ends(before)
            self._judge(verdict, on, off, "relaxed", spatial)
        if self.only is None or at in self.only:
            self._witness(at, verdict, on, off, spatial)
            for rung in ("lp", "milp"):
                if small and rung in self.limits.rungs:
                    self._programs(at, verdict, on, off, spatial, rung)
        self._tighten(at, verdict)
        self.found.append(verdict)

    def _still(self, at: int, verdict: Verdict) -> None:
        """A unit that reads nothing is its bias, without any rounding: no margin is needed."""
        step = self.steps[at - 1]
        if step.op != "linear" or step.weight is None:
            return
        for unit in (step.weight == 0).all(1).nonzero().flatten().tolist():
            value = 0.0 if step.bias is None else float(step.bias[unit])
            verdict.state[unit] = 1 if value > 0 else -1
            verdict.rung[unit] = "interval"
            verdict.low[unit] = verdict.high[unit] = value
            self.known[at].low[unit] = self.known[at].high[unit] = value

    def _judge(self, verdict: Verdict, on: Tensor, off: Tensor, rung: str, spatial: bool) -> None:
        inactive = verdict.high < -MARGIN
        active = (verdict.low > MARGIN) & (not spatial)
        both = (on & off) | (on & spatial)
        for state, where, name in ((-1, inactive, rung), (1, active, rung), (0, both, "points")):
            for unit in ((verdict.state == 2) & where).nonzero().flatten().tolist():
                verdict.state[unit], verdict.rung[unit] = state, name

    def _relax(self, at: int, before: Bounds) -> Bounds:
        rows = ((before.low < 0) & (before.high > 0)).flatten().nonzero().flatten()
        low, high = before.low.flatten().clone(), before.high.flatten().clone()
        for block in rows.split(512):
            if not len(block) or self.left() <= 0:
                break
            found = relaxed(self.steps[:at], self.known[:at], block)
            low[block] = torch.maximum(low[block], found.low)
            high[block] = torch.minimum(high[block], found.high)
        return Bounds(low.reshape(before.low.shape), high.reshape(before.low.shape))

    def _witness(self, at: int, verdict: Verdict, on: Tensor, off: Tensor, spatial: bool) -> None:
        """Look for points at which open units do what was not seen of them yet."""
        for side, shown in ((1, on), (-1, off)):
            open_ = ((verdict.state == 2) & ~shown).nonzero().flatten()
            if not len(open_) or (spatial and side == -1) or self.left() <= 0:
                continue
            points = ascend(
                self.steps[:at], self.box, open_, side, seed=self.limits.seed,
                until=self.end - 3 / 4 * self.left(),
            )  # fmt: skip
            more = seen(self.steps, points, [at])[at]
            on |= more[0]
            off |= more[1]
        self._judge(verdict, on, off, "", spatial)

    def _programs(
        self, at: int, verdict: Verdict, on: Tensor, off: Tensor, spatial: bool, rung: str
    ) -> None:
        units = (verdict.state == 2).nonzero().flatten().tolist()
        if not units or self.left() <= 0:
            return
        made = exact.program(self.steps[:at], self.known[:at], whole=rung == "milp")
        if made is None:
            return
        positions = self.known[at].low.numel() // len(on)
        for done, unit in enumerate(units):
            if self.progress:
                self.progress(done, len(units), f"{rung} of step {at}")
            for sign, against in ((1, on), (-1, off)):
                # On the side that was seen there is nothing to prove.
                if verdict.state[unit] != 2 or bool(against[unit]) or (spatial and sign == -1):
                    continue
                top, seconds = -float("inf"), min(self.limits.unit, self.left())
                for place in range(unit * positions, (unit + 1) * positions):
                    top = max(top, self._bound(made, place, sign, rung, seconds, at, on, off))
                    if top > -MARGIN or self.left() <= 0:
                        break
                else:
                    verdict.state[unit], verdict.rung[unit] = -sign, rung
                    if sign == 1:
                        verdict.high[unit] = min(float(verdict.high[unit]), top)
                    else:
                        verdict.low[unit] = max(float(verdict.low[unit]), -top)
            if bool(on[unit] & off[unit]) and verdict.state[unit] == 2:
                verdict.state[unit], verdict.rung[unit] = 0, rung

    def _bound(
        self, made: exact.Program, place: int, sign: int, rung: str, seconds: float, at: int,
        on: Tensor, off: Tensor,
    ) -> float:  # fmt: skip
        """Return an upper bound on `sign` times a value; at the last rung only its sign counts."""
        flat = self.known[at]
        end = float((flat.high if sign == 1 else -flat.low).flatten()[place])
        if end < -MARGIN:
            return end
        if rung == "lp":
            return exact.most(made, place, sign, seconds)
        margin = max(MARGIN, exact.margin_of(made, place))
        proven, point = exact.excluded(made, place, sign, margin, seconds)
        if proven:
            return -margin
        if point is not None:  # the solver's point need not be one, by rounding: look
            inside = torch.minimum(torch.maximum(point, self.box.low), self.box.high)
            more = seen(self.steps, inside[None], [at])[at]
            on |= more[0]
            off |= more[1]
        return float("inf")

    def _tighten(self, at: int, verdict: Verdict) -> None:
        """Let later bounds know what was proven of the units here."""
        known = self.known[at]
        shape = (-1, *[1] * (known.low.dim() - 1))
        high = torch.where(verdict.state == -1, verdict.high, torch.inf).reshape(shape)
        low = torch.where(verdict.state == 1, verdict.low, -torch.inf).reshape(shape)
        self.known[at] = known.meet(Bounds(low.expand_as(known.low), high.expand_as(known.high)))


def _ends(known: Bounds) -> tuple[Tensor, Tensor]:
    """Return the bounds of every unit over its positions, [units] each."""
    flat = (len(known.low), -1)
    return known.low.reshape(flat).min(1).values, known.high.reshape(flat).max(1).values


def outside(steps: Sequence[Step], known: Sequence[Bounds], points: Tensor) -> float:
    """Return by how much values at points are outside bounds, the most: 0 where they never are."""
    most = 0.0
    for i, bounds in enumerate(known):
        values = run(steps[:i], points)
        most = max(most, float((bounds.low - values).max()), float((values - bounds.high).max()))
    return most
