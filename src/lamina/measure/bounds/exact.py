"""Linear and integer programs: the two last rungs, by HiGHS (scipy).

The linear program knows of each ReLU the triangle between its two pieces and the line above
(Ehlers 2017, arXiv:1705.01320); the integer program chooses the piece (Tjeng et al. 2019,
arXiv:1711.07356), and is exact but for pooling. What a linear program claims is checked: by weak
duality its multipliers give a bound that is recomputed here, and holds whatever the solver's
tolerances were (Neumaier and Shcherbina 2004). Integer programs are trusted up to a margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lamina.measure.bounds.steps import EPS, Bounds, Step, forward, linear, run

FLOOR = 1e-6  # of the margin that integer programs are trusted to
MOST_DENSE = 1 << 25  # numbers of one unrolled matrix


@dataclass(frozen=True)
class Program:
    """All that is known of a network's values at one step, as rows of a program over `v`.

    `v` is the input, then what each ReLU that may do either gives, then (integer program) which.

    Args:
        rows, shifts: the values at the step are `rows v + shifts`.
        left, right: `left v <= right`.
        low, high: ends of v.
        choices: indices of the whole numbers among v.
        steps, box: what it is of.
    """

    rows: Any
    shifts: np.ndarray
    left: Any
    right: np.ndarray
    low: np.ndarray
    high: np.ndarray
    choices: np.ndarray
    steps: tuple[Step, ...]
    box: Bounds


def program(steps: Sequence[Step], known: Sequence[Bounds], whole: bool) -> Program | None:
    """Return the program of the values after the last of the steps, or None where it is too large.

    Args:
        steps: from the input on.
        known: bounds before each.
        whole: an integer program.
    """
    from scipy import sparse

    made = _Maker(known[0], whole)
    for step, before in zip(steps, known, strict=True):
        if step.op == "relu":
            made.relu(before)
        elif step.op.endswith("max_pool"):
            made.most(step, before)
        elif not made.affine(step, before):
            return None
    columns = len(made.low)
    rows = made.values
    rows.resize(rows.shape[0], columns)
    for block in made.blocks:
        block.resize(block.shape[0], columns)
    left = sparse.vstack(made.blocks, "csr") if made.blocks else sparse.csr_array((0, columns))
    right = np.concatenate(made.right) if made.right else np.zeros(0)
    return Program(
        rows, made.shifts, left, right, np.array(made.low), np.array(made.high),
        np.array(made.choices, dtype=np.int64), tuple(steps), known[0],
    )  # fmt: skip


def most(made: Program, at: int, sign: int, seconds: float) -> float:
    """Return an upper bound on `sign` times one value, by linear programming, certified.

    Args:
        made: a program; what it says of whole numbers is relaxed.
        at: index of the value.
        sign: 1, or -1 for minus the lower bound.
        seconds: that it may take.

    Returns:
        the bound; infinite where the solver has no answer.

    Source:
        weak duality: for every y >= 0, `max c v <= y b + sum_j max over v_j of (c - A^T y)_j v_j`.
    """
    from scipy.optimize import linprog

    goal = sign * made.rows[[at]].toarray()[0]
    solve: Any = linprog
    found = solve(
        -goal, made.left if made.left.shape[0] else None, made.right if len(made.right) else None,
        bounds=np.stack([made.low, made.high], 1), method="highs",
        options={"time_limit": max(seconds, 1e-3)},
    )  # fmt: skip
    y = np.zeros(len(made.right))
    if len(y):
        marginals = getattr(getattr(found, "ineqlin", None), "marginals", None)
        if marginals is None or not np.all(np.isfinite(marginals)):
            return float("inf")
        y = np.maximum(-np.asarray(marginals), 0.0)
    return certified(made, goal, y) + sign * float(made.shifts[at])


def certified(made: Program, goal: np.ndarray, y: np.ndarray) -> float:
    """Return the upper bound on `goal v` that multipliers y >= 0 prove, rounded outwards."""
    rest = goal - made.left.T @ y
    ends = np.where(rest > 0, made.high, made.low)
    reach = np.maximum(np.abs(made.low), np.abs(made.high))
    size = (np.abs(goal) + abs(made.left).T @ y) @ reach + y @ np.abs(made.right)
    return float(rest @ ends + y @ made.right + 8 * EPS * (len(goal) + len(y)) * size)


def exactly(made: Program, at: int, sign: int, seconds: float) -> tuple[float, torch.Tensor | None]:
    """Return an upper bound on `sign` times one value by integer programming, and its best point.

    The bound is the value itself, but for the solver's tolerances, if there was time enough.
    """
    from scipy.optimize import milp

    goal = sign * made.rows[[at]].toarray()[0]
    found = milp(
        -goal, constraints=_constraints(made), bounds=_ends(made), integrality=_whole(made),
        options={"time_limit": max(seconds, 1e-3), "mip_rel_gap": 0.0},
    )  # fmt: skip
    bound = found.mip_dual_bound
    if bound is None or not np.isfinite(bound):
        return float("inf"), None
    return -float(bound) + sign * float(made.shifts[at]), _point(made, found.x)


def excluded(
    made: Program, at: int, sign: int, margin: float, seconds: float
) -> tuple[bool, torch.Tensor | None]:
    """Try to prove by integer programming that `sign` times a value stays below `-margin`.

    Args:
        made: an integer program.
        at, sign: which value, and of which sign.
        margin: at least a few times the solver's tolerance, 1e-7.
        seconds: that it may take.

    Returns:
        whether it is proven, and else a point that may be a witness against it, if one was found.
    """
    from scipy import sparse
    from scipy.optimize import LinearConstraint, milp

    row, shift = made.rows[[at]], float(made.shifts[at])
    asked = LinearConstraint(sparse.csr_array(sign * row), -margin - sign * shift, np.inf)
    found = milp(
        np.zeros(row.shape[1]), constraints=[*_constraints(made), asked], bounds=_ends(made),
        integrality=_whole(made), options={"time_limit": max(seconds, 1e-3)},
    )  # fmt: skip
    return found.status == 2, _point(made, found.x)


def margin_of(made: Program, at: int) -> float:
    """Return the margin within which an integer program's sign is not trusted."""
    row = made.rows[[at]].toarray()[0]
    reach = np.maximum(np.abs(made.low), np.abs(made.high))
    return FLOOR * max(1.0, float(np.abs(row).max(initial=0.0) * reach.max(initial=0.0)))


def value_at(made: Program, at: int, point: torch.Tensor) -> float:
    """Return the value that the network really has at a point, moved into the box."""
    inside = torch.minimum(torch.maximum(point, made.box.low), made.box.high)
    return float(run(made.steps, inside[None])[0].flatten()[at])


class _Maker:
    """Collects a program step by step: `values` and `shifts` are those of the step reached."""

    def __init__(self, box: Bounds, whole: bool) -> None:
        from scipy import sparse

        self.whole = whole
        self.low, self.high = box.low.flatten().tolist(), box.high.flatten().tolist()
        self.values: Any = sparse.csr_array(sparse.eye_array(len(self.low)))
        self.shifts = np.zeros(len(self.low))
        self.blocks: list[Any] = []
        self.right: list[np.ndarray] = []
        self.choices: list[int] = []

    def affine(self, step: Step, before: Bounds) -> bool:
        from scipy import sparse

        after = forward(step, before.low[None])[0]
        if step.op == "flatten":
            return True
        if after.numel() * before.low.numel() > MOST_DENSE:
            return False
        basis = torch.eye(before.low.numel(), dtype=torch.float64)
        columns = linear(step, basis.reshape(-1, *before.low.shape)).flatten(1)
        matrix = sparse.csr_array(columns.T.numpy())
        self.shifts = matrix @ self.shifts
        if step.bias is not None:
            zero = torch.zeros(1, *before.low.shape, dtype=torch.float64)
            self.shifts = self.shifts + forward(step, zero).flatten().numpy()
        self.values = sparse.csr_array(matrix @ self.values)
        return True

    def relu(self, before: Bounds) -> None:
        from scipy import sparse

        low, high = before.low.flatten().numpy(), before.high.flatten().numpy()
        kept, crossing = low >= 0, np.flatnonzero((low < 0) & (high > 0))
        old, shifts, first = self.values, self.shifts, len(self.low)
        count = len(crossing)
        self._add(np.zeros(count), high[crossing])
        above = sparse.csr_array(
            (np.ones(count), (np.arange(count), first + np.arange(count))),
            shape=(count, first + count),
        )
        inner = old[crossing]
        inner.resize(count, first + count)
        low, high, moved = low[crossing], high[crossing], shifts[crossing]
        self._say(inner - above, -moved)  # h >= g
        if self.whole:
            self._choose(inner, above, low, high, moved)
        else:
            slope = high / (high - low)
            tilted = sparse.diags_array(slope) @ inner
            self._say(above - tilted, slope * (moved - low))  # h <= s (g - l)
        active = sparse.diags_array(kept.astype(np.float64)) @ old
        active.resize(len(kept), len(self.low))
        place = sparse.csr_array(
            (np.ones(count), (crossing, first + np.arange(count))), shape=active.shape
        )
        self.values = sparse.csr_array(active + place)
        self.shifts = np.where(kept, shifts, 0.0)

    def _choose(
        self, inner: Any, above: Any, low: np.ndarray, high: np.ndarray, moved: np.ndarray
    ) -> None:
        """Let a whole number z say which piece it is: h <= u z and h <= g - l (1 - z)."""
        from scipy import sparse

        first, count = len(self.low), len(low)
        self._add(np.zeros(count), np.ones(count))
        self.choices += range(first, first + count)
        for block in (inner, above):
            block.resize(count, first + count)

        def z(factor: np.ndarray) -> Any:
            places = (np.arange(count), first + np.arange(count))
            return sparse.csr_array((factor, places), shape=(count, first + count))

        self._say(above - z(high), np.zeros(count))
        self._say(above - inner - z(low), moved - low)

    def most(self, step: Step, before: Bounds) -> None:
        """A maximum is no less than any value it is of, and no more than one of them.

        The linear program knows of the second half only the ends.
        """
        from scipy import sparse

        ends = before.low, before.high
        low, high = (forward(step, end[None])[0].flatten().numpy() for end in ends)
        basis = torch.eye(before.low.numel(), dtype=torch.float64)
        reads = forward(step, basis.reshape(-1, *before.low.shape)).flatten(1) > 0
        source, target = (part.numpy() for part in reads.nonzero(as_tuple=True))
        old, shifts, first = self.values, self.shifts, len(self.low)
        self._add(low, high)
        if self.whole:
            self._add(np.zeros(len(source)), np.ones(len(source)))
            self.choices += range(first + len(low), len(self.low))
        width, count = len(self.low), len(source)
        inner = old[source]
        inner.resize(count, width)

        def at(columns: np.ndarray, values: np.ndarray, rows: int = count) -> Any:
            places = (np.arange(len(columns)) if rows == count else target, columns)
            return sparse.csr_array((values, places), shape=(rows, width))

        above = at(first + target, np.ones(count))
        self._say(inner - above, -shifts[source])  # o >= x
        if self.whole:  # o <= x + (u - l) (1 - z), and of each o's z one is 1
            gap = high[target] - before.low.flatten().numpy()[source]
            z = first + len(low) + np.arange(count)
            self._say(above - inner + at(z, gap), shifts[source] + gap)
            self._say(at(z, -np.ones(count), len(low)), -np.ones(len(low)))
        self.values = sparse.csr_array(
            (np.ones(len(low)), (np.arange(len(low)), first + np.arange(len(low)))),
            shape=(len(low), width),
        )
        self.shifts = np.zeros(len(low))

    def _add(self, low: np.ndarray, high: np.ndarray) -> None:
        self.low += low.tolist()
        self.high += high.tolist()

    def _say(self, left: Any, right: np.ndarray) -> None:
        from scipy import sparse

        self.blocks.append(sparse.csr_array(left))
        self.right.append(right)


def _constraints(made: Program) -> list[Any]:
    from scipy.optimize import LinearConstraint

    return [LinearConstraint(made.left, -np.inf, made.right)] if len(made.right) else []


def _ends(made: Program) -> Any:
    from scipy.optimize import Bounds as Ends

    return Ends(made.low, made.high)


def _whole(made: Program) -> np.ndarray:
    found = np.zeros(len(made.low))
    found[made.choices] = 1
    return found


def _point(made: Program, x: Any) -> torch.Tensor | None:
    if x is None:
        return None
    count = made.box.low.numel()
    return torch.from_numpy(np.asarray(x[:count], dtype=np.float64)).reshape(made.box.low.shape)
