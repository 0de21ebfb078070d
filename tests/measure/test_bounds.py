"""Bounds: sound at samples, each rung inside the one before, the last equal to brute force."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.measure.relu_nets import brute_force, conv_net, cube, net

from lamina.measure.bounds import Bounds, Limits, Step, decide, exact, run, shapes_of
from lamina.measure.bounds.interval import interval, intervals
from lamina.measure.bounds.ladder import MARGIN, outside
from lamina.measure.bounds.relaxed import relaxed, upper
from lamina.measure.bounds.steps import forward, transposed
from lamina.measure.bounds.witness import ascend, points_of, seen

TIGHT = 1e-6  # what the solver's tolerances may be off by


def rungs(steps: list[Step], box: Bounds) -> dict[str, np.ndarray]:
    """Return the bounds of each rung on the output, [rung -> [out, 2]]; each met with the last."""
    known = intervals(steps, box)
    for i, step in enumerate(steps):  # the relaxation knows the relaxed bounds of earlier ReLUs
        if i and step.op == "relu":
            rows = torch.arange(known[i].low.numel())
            better = relaxed(steps[:i], known[:i], rows)
            shape = known[i].low.shape
            known[i] = known[i].meet(Bounds(better.low.view(shape), better.high.view(shape)))
            for j in range(i, len(steps)):
                known[j + 1] = known[j + 1].meet(interval(steps[j], known[j]))
    rows = torch.arange(known[-1].low.numel())
    met = known[-1].meet(relaxed(steps, known[:-1], rows))
    found = {"interval": np.stack([known[-1].low, known[-1].high], 1)}
    found["relaxed"] = np.stack([met.low, met.high], 1)
    for name, whole in (("lp", False), ("milp", True)):
        made = exact.program(steps, known[:-1], whole)
        assert made is not None
        solve = (lambda m, i, s: exact.exactly(m, i, s, 20.0)[0]) if whole else (
            lambda m, i, s: exact.most(m, i, s, 20.0)
        )  # fmt: skip
        ends = [(-solve(made, i, -1), solve(made, i, 1)) for i in range(len(rows))]
        found[name] = np.array(ends)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_last_rung_is_the_range_that_brute_force_finds(seed: int) -> None:
    steps, box = net((3, 4, 4, 2), seed), cube((3,))
    found, true = rungs(steps, box), brute_force(steps, box)
    assert np.abs(found["milp"] - true).max() < TIGHT
    for name in ("interval", "relaxed", "lp"):
        assert (found[name][:, 0] <= true[:, 0] + 1e-9).all(), name
        assert (found[name][:, 1] >= true[:, 1] - 1e-9).all(), name
    # A negative control: bounds of half the box do not hold on the whole one.
    half = rungs(steps, cube((3,), -0.5, 0.5))["milp"]
    assert (half[:, 1] < true[:, 1] - TIGHT).any()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["net", "max_pool", "avg_pool"])
def test_each_rung_lies_in_the_one_before_and_holds_the_samples(kind: str, seed: int) -> None:
    if kind == "net":
        steps, box = net((6, 8, 8, 3), seed), cube((6,), -0.5, 1.0)
    else:
        steps, box = conv_net(seed, kind), cube((1, 4, 4), -0.5, 1.0)
        steps = [replace(s, settings={**s.settings}) for s in steps]
        assert shapes_of(steps, (1, 4, 4))[-1] == (2,)
    found = rungs(steps, box)
    values = run(steps, points_of(box, 10_000, seed)).numpy()
    order = ["interval", "relaxed", "lp", "milp"]
    for wide, tight in pairwise(order):
        assert (found[wide][:, 0] <= found[tight][:, 0] + TIGHT).all(), (wide, tight)
        assert (found[wide][:, 1] >= found[tight][:, 1] - TIGHT).all(), (wide, tight)
    for name in order:
        slack = TIGHT if name == "milp" else 0.0
        assert (found[name][:, 0] <= values.min(0) + slack).all(), name
        assert (found[name][:, 1] >= values.max(0) - slack).all(), name
    gaps = [float((found[n][:, 1] - found[n][:, 0]).sum()) for n in order]
    if kind == "net":  # the ladder is worth climbing
        assert gaps[0] > gaps[2] > gaps[3]


@given(seed=st.integers(0, 10_000), low=st.floats(-3, 3), width=st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_samples_never_leave_interval_and_relaxed_bounds(
    seed: int, low: float, width: float
) -> None:
    steps, box = net((5, 7, 6, 4), seed, bias=1.0), cube((5,), low, low + width)
    known = intervals(steps, box)
    points = points_of(box, 64, seed)
    assert outside(steps, known, points) <= 0
    found = relaxed(steps, known[:-1], torch.arange(4))
    values = run(steps, points)
    assert bool((found.low <= values).all()) and bool((found.high >= values).all())


def test_a_box_of_one_point_leaves_nothing_open() -> None:
    steps = net((5, 7, 6, 4), 1)
    point = torch.rand(5, dtype=torch.float64)
    known = intervals(steps, Bounds(point, point))
    assert float((known[-1].high - known[-1].low).max()) < 1e-12
    assert outside(steps, known, point[None]) == 0
    assert outside(steps, known, point[None] + 0.1) > 0  # the negative control


def test_a_certificate_needs_no_solver() -> None:
    """Any multipliers give a bound; the solver's own give the linear program's optimum."""
    steps, box = net((4, 6, 3), 2), cube((4,))
    made = exact.program(steps, intervals(steps, box)[:-1], whole=False)
    assert made is not None
    top = float(run(steps, points_of(box, 5000))[:, 0].max())
    goal = made.rows[[0]].toarray()[0]
    best = exact.most(made, 0, 1, 10.0)
    for seed in range(20):
        y = np.random.default_rng(seed).exponential(size=len(made.right))
        bound = exact.certified(made, goal, y) + made.shifts[0]
        assert bound >= best - 1e-9 and best >= top
    assert exact.certified(made, goal, 0 * y) + made.shifts[0] >= best - 1e-9


def test_integer_programs_prove_a_sign_or_show_a_point() -> None:
    steps, box = net((3, 4, 4, 2), 0), cube((3,))
    true = brute_force(steps, box)
    made = exact.program(steps, intervals(steps, box)[:-1], whole=True)
    assert made is not None
    most = true[0, 1]
    for away, proven in ((1e-3, True), (-1e-3, False)):
        # "most stays below its true value + away", asked as a margin
        found, point = exact.excluded(made, 0, 1, -(most + away), 20.0)
        assert found is proven
        if not proven:
            assert point is not None and exact.value_at(made, 0, point) > most - 2e-3
    assert exact.excluded(made, 0, 1, 1.0, 0.0)[0] in (False, True)  # no time: no crash


def test_back_substitution_is_the_adjoint_of_every_linear_step() -> None:
    random = torch.Generator().manual_seed(0)
    for step, shape in (
        (conv_net(0)[0], (1, 4, 4)), (net((6, 4), 0)[0], (6,)), (Step("flatten"), (2, 3)),
        (Step("avg_pool", settings={"kernel_size": 2, "stride": 2}), (2, 4, 4)),
        (Step("adaptive_avg_pool", settings={"output_size": 1}), (2, 4, 4)),
        (Step("scale", torch.randn(2).double(), torch.zeros(2).double()), (2, 3)),
    ):  # fmt: skip
        x = torch.randn(1, *shape, generator=random, dtype=torch.float64)
        zero = forward(step, torch.zeros_like(x))
        y = torch.randn(zero.shape, generator=random, dtype=torch.float64)
        left = float(((forward(step, x) - zero) * y).sum())
        assert left == pytest.approx(float((x * transposed(step, y, shape)).sum()), abs=1e-12)


def test_upper_bounds_any_function_of_the_output() -> None:
    steps, box = net((4, 6, 5), 3), cube((4,))
    rows = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    top = upper(steps, intervals(steps, box)[:-1], rows)
    values = run(steps, points_of(box, 4000)) @ rows.T
    assert bool((values <= top).all())
    assert bool((values.max(0).values > top - 5).all())


# --- the ladder ----------------------------------------------------------------------------------


def planted() -> tuple[list[Step], Bounds]:
    """Units that each need another rung, before the second ReLU."""
    one = torch.eye(1, dtype=torch.float64)
    first = Step("linear", torch.cat([one, -one]), torch.zeros(2).double())  # |x| = h0 + h1
    rows = torch.tensor([
        [-1.0, -1.0],  # -|x| - 1: interval
        [1.0, 1.0],  # |x| + 1: interval, active
        [1.0, -1.0],  # x - 1.25: the relaxation adds no more than 1/2
        [1.0, 1.0],  # |x| - 1.05: at most -.05, and the triangle says +.. : milp
        [1.0, 1.0],  # |x| - .5: both
    ]).double()  # fmt: skip
    shifts = torch.tensor([-1.0, 1.0, -1.25, -1.05, -0.5]).double()
    return [first, Step("relu"), Step("linear", rows, shifts), Step("relu")], cube((1,))


def test_the_ladder_climbs_only_as_far_as_it_must() -> None:
    steps, box = planted()
    verdict = decide(steps, box)[1]
    assert verdict.state.tolist() == [-1, 1, -1, -1, 0]
    assert verdict.rung[:2] == ["interval", "interval"] and verdict.rung[4] == "points"
    assert bool((verdict.high[verdict.state == -1] < 0).all())
    low = decide(steps, box, Limits(rungs=("interval",)))[1]
    assert low.state.tolist()[:2] == [-1, 1] and 2 in low.state.tolist()
    assert "" in low.rung


def test_without_time_less_is_proven_and_nothing_wrong() -> None:
    steps, box = net((8, 12, 12, 4), 5, bias=1.0), cube((8,), 0.0, 1.0)
    full = decide(steps, box)
    none = decide(steps, box, Limits(seconds=0.0))
    for a, b in zip(full, none, strict=True):
        proven = (b.state == 1) | (b.state == -1)
        assert bool((a.state[proven] == b.state[proven]).all())
        assert int(proven.sum()) <= int(((a.state == 1) | (a.state == -1)).sum())


@pytest.mark.parametrize("seed", range(4))
def test_verdicts_agree_with_brute_force(seed: int) -> None:
    steps, box = net((3, 4, 4, 1), seed, bias=0.8), cube((3,), -0.6, 0.9)
    for verdict in decide([*steps, Step("relu")], box):
        true = brute_force(steps[: verdict.step], box)
        for unit, state in enumerate(verdict.state.tolist()):
            least, most = true[unit]
            if state == -1:
                assert most < 0
            elif state == 1:
                assert least > 0
            elif state == 0:
                assert least < 0 < most
            else:  # open: only where the sign is within the margin
                assert min(abs(least), abs(most)) < 10 * MARGIN
            assert verdict.low[unit] <= least + 1e-6 and verdict.high[unit] >= most - 1e-6


def test_channels_are_stable_only_at_every_position() -> None:
    steps = conv_net(3)
    conv = steps[0]
    assert conv.weight is not None and conv.bias is not None
    weight, bias = conv.weight.clone(), conv.bias.clone()
    weight[0], bias[0] = -weight[0].abs(), -0.01  # off where all inputs are positive
    steps[0] = replace(conv, weight=weight, bias=bias)
    verdict = decide(steps, cube((1, 4, 4), 0.0, 1.0))[0]
    assert int(verdict.state[0]) == -1
    assert int(decide(steps, cube((1, 4, 4), -1.0, 1.0))[0].state[0]) == 0
    bias[0] = 50.0  # always on, which removes no channel
    weight[0] = 0.1
    assert int(decide(steps, cube((1, 4, 4), 0.0, 1.0))[0].state[0]) == 0


def test_the_ascent_finds_what_random_points_do_not() -> None:
    # On only near one corner of 40 dimensions.
    weight = torch.tensor([1.0, -1.0] * 20).double()[None]
    steps, box = [Step("linear", weight, torch.tensor([-19.5]).double())], cube((40,), 0.0, 1.0)
    random = points_of(box, 1000)
    assert bool(seen([*steps, Step("relu")], random, [1])[1][0].any()) is False
    best = ascend(steps, box, torch.tensor([0]), 1)
    assert float(run(steps, best)) == pytest.approx(0.5)
    assert bool(((best >= box.low) & (best <= box.high)).all())
