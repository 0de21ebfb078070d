"""The allocator against brute force, and against the branch and bound referee."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import InfeasibleError
from lamina.plan.allocate import Allocation, allocate, curve, hull, milp

ROUND = 1 + 1e-9


def brute(errors, costs, limits, objective="sum"):
    """The least error of all choices that fit, or None."""
    best = None
    for choice in itertools.product(*(range(len(error)) for error in errors)):
        total = sum((cost[j] for cost, j in zip(costs, choice, strict=True)), np.zeros(len(limits)))
        if (total <= np.asarray(limits) * (1 + 1e-12)).all():
            taken = [error[j] for error, j in zip(errors, choice, strict=True)]
            worth = sum(taken) if objective == "sum" else max(taken, default=0.0)
            best = worth if best is None else min(best, worth)
    return best


def check(found: Allocation, errors, costs, limits, objective="sum") -> None:
    """What an allocation says of itself is true."""
    taken = [error[j] for error, j in zip(errors, found.choice, strict=True)]
    total = sum(
        (cost[j] for cost, j in zip(costs, found.choice, strict=True)), np.zeros(len(limits))
    )
    worth = sum(taken) if objective == "sum" else max(taken, default=0.0)
    assert found.error == pytest.approx(worth)
    assert found.cost == pytest.approx(tuple(total))
    assert (np.array(found.cost) <= np.asarray(limits) * (1 + 1e-12)).all()
    assert found.bound <= found.error
    assert all(price >= 0 for price in found.price)


@st.composite
def problems(draw, resources=(1, 3)):
    """Tiny problems: ties, zero costs, single options, budgets from nothing to everything."""
    r = draw(st.integers(*resources))
    number = st.one_of(st.integers(0, 6).map(float), st.floats(0, 10, width=32))
    errors, costs = [], []
    for _ in range(draw(st.integers(0, 4))):
        n = draw(st.integers(1, 4))
        errors.append(np.array(draw(st.lists(number, min_size=n, max_size=n))))
        flat = draw(st.lists(number, min_size=n * r, max_size=n * r))
        costs.append(np.array(flat).reshape(n, r))
    least = sum((cost.min(0) for cost in costs), np.zeros(r))
    most = sum((cost.max(0) for cost in costs), np.zeros(r))
    share = np.array(draw(st.lists(st.floats(-0.1, 1.1), min_size=r, max_size=r)))
    return errors, costs, least + np.round(share * (most - least))


def layers(seed: int, sites=60, options=20, resources=1):
    """Rate-distortion curves like those of layers, of very different scale, with noise."""
    rng = np.random.default_rng(seed)
    errors, costs = [], []
    for _ in range(sites):
        bits = np.append(rng.uniform(0.5, 8, options - 1), 32.0)
        weights = 10 ** rng.uniform(3, 6)
        noise = np.exp(rng.normal(0, 0.3, options))
        error = 10 ** rng.normal(0, 1) * 2 ** (-2 * bits) * noise
        error[-1] = 0.0
        cost = np.ceil(weights * bits[:, None] * rng.uniform(0.7, 1, (options, resources)))
        errors.append(error)
        costs.append(cost)
    return errors, costs, sum(cost[-1] for cost in costs)


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(["sum", "minimax"]))
def test_tiny_problems_against_brute_force(problem, objective):
    errors, costs, limits = problem
    best = brute(errors, costs, limits, objective)
    for solve in (allocate, milp):
        if best is None:
            with pytest.raises(InfeasibleError) as caught:
                solve(errors, costs, limits, objective)
            nearest = [caught.value.nearest[str(k)] for k in range(len(limits))]
            assert any(near > limit for near, limit in zip(nearest, limits, strict=True))
            assert brute(errors, costs, nearest, objective) is not None
        else:
            found = solve(errors, costs, limits, objective)
            check(found, errors, costs, limits, objective)
            assert found.bound <= best * ROUND + 1e-9
            slack = 1.01 if solve is allocate and objective == "sum" else 1 + 1e-6
            assert best / ROUND - 1e-9 <= found.error <= best * slack + 1e-9


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("resources", [1, 2])
def test_within_one_percent_of_the_optimum(seed, resources):
    errors, costs, whole = layers(seed, resources=resources)
    for share in (0.05, 0.15):
        found = allocate(errors, costs, whole * share)
        best = milp(errors, costs, whole * share, gap=1e-4)
        check(found, errors, costs, whole * share)
        assert found.bound <= best.error * ROUND
        assert best.error / 1.0002 <= found.error <= 1.01 * best.error


def test_a_price_alone_would_not_do():
    """The negative control: at the price of one large step everything stays where it is."""
    errors = [np.array([100.0, 0.0]), *(np.array([1.0, 0.0]) for _ in range(30))]
    costs = [np.array([0.0, 100.0]), *(np.array([0.0, 2.0]) for _ in range(30))]
    found = allocate(errors, costs, [60.0])
    assert found.error == 100.0
    assert found.bound == pytest.approx(70.0)
    assert found.cost == (60.0,)


@pytest.mark.parametrize("resources", [1, 2])
def test_more_budget_does_not_raise_the_error(resources):
    errors, costs, whole = layers(7, sites=30, resources=resources)
    shares = np.linspace(0.03, 1, 15)
    total = [allocate(errors, costs, whole * share).error for share in shares]
    worst = [allocate(errors, costs, whole * share, "minimax").error for share in shares]
    assert all(after <= before * 1.005 for before, after in itertools.pairwise(total))
    assert all(after <= before for before, after in itertools.pairwise(worst))
    assert total[-1] == worst[-1] == 0.0 < total[0]


@pytest.mark.parametrize("resources", [1, 2])
def test_minimax_is_exact_and_spends_what_is_left(resources):
    errors, costs, whole = layers(3, sites=30, resources=resources)
    limits = whole * 0.1
    found = allocate(errors, costs, limits, "minimax")
    assert found.error == milp(errors, costs, limits, "minimax").error == found.bound
    for error, cost, j in zip(errors, costs, found.choice, strict=True):
        better = error < error[j]
        left = limits - np.array(found.cost)
        assert not (better & (cost - cost[j] <= left).all(1)).any()


def test_the_same_problem_gives_the_same_choice():
    errors, costs, whole = layers(5, resources=2)
    assert allocate(errors, costs, whole * 0.1) == allocate(errors, costs, whole * 0.1)


def test_units_do_not_matter():
    errors, costs, whole = layers(6, resources=2)
    plain = allocate(errors, costs, whole * 0.1)
    unit = np.array([1e6, 1e-9])
    scaled = allocate(
        [1e-7 * error for error in errors], [c * unit for c in costs], whole * unit * 0.1
    )
    assert scaled.error == pytest.approx(1e-7 * plain.error, rel=5e-3)
    assert scaled.bound == pytest.approx(1e-7 * plain.bound, rel=1e-4)


def test_a_limit_met_to_the_last_bit_by_another_order_of_addition():
    costs = [np.array([0.1]), np.array([0.2]), np.array([0.3])]
    errors = [np.array([0.0])] * 3
    assert 0.3 + 0.2 + 0.1 < 0.1 + 0.2 + 0.3
    assert allocate(errors, costs, [0.3 + 0.2 + 0.1]).choice == (0, 0, 0)


def test_no_limit_takes_the_least_error():
    errors, costs, _ = layers(1, sites=5, resources=2)
    found = allocate(errors, costs, [np.inf, np.inf])
    assert found.error == 0.0
    assert found.price == (0.0, 0.0)
    one = allocate(errors, costs, [np.inf, sum(cost[:, 1].min() for cost in costs)])
    check(one, errors, costs, [np.inf, sum(cost[:, 1].min() for cost in costs)])


@pytest.mark.parametrize("solve", [allocate, milp])
@pytest.mark.parametrize("objective", ["sum", "minimax"])
def test_infinite_errors_are_a_last_resort(solve, objective):
    errors, costs = [[np.inf, 3.0, 1.0], [5.0, np.inf]], [[1.0, 5.0, 9.0], [2.0, 0.0]]
    assert solve(errors, costs, [7.0], objective).choice == (1, 0)
    forced = solve(errors, costs, [5.0], objective)
    assert forced.error == np.inf
    assert forced.cost[0] <= 5.0
    only = solve([[np.inf], [2.0, 1.0]], [[1.0], [1.0, 2.0]], [3.0], objective)
    assert only.error == np.inf


def test_last_resorts_are_as_few_as_possible():
    errors, costs = [[np.inf, 3.0], [np.inf, 900.0], [np.inf, 1.0]], [[0.0, 2.0]] * 3
    found = allocate(errors, costs, [4.0])
    assert sum(found.choice) == 2


@pytest.mark.parametrize("solve", [allocate, milp])
def test_infeasible_names_the_nearest_that_can_be_met(solve):
    with pytest.raises(InfeasibleError, match=r"resource 0 takes 3 of 2\.5") as caught:
        solve([[1, 0], [1, 0]], [[1, 5], [2, 5]], [2.5])
    assert caught.value.nearest == {"0": 3.0}
    # Each limit could be met alone, but not both: what is near must be met together.
    with pytest.raises(InfeasibleError) as caught:
        solve([[0, 0]], [[[1, 10], [10, 1]]], [2, 2])
    assert sorted(caught.value.nearest.values()) == [2.0, 10.0]


@pytest.mark.parametrize("solve", [allocate, milp])
@pytest.mark.parametrize("objective", ["sum", "minimax"])
def test_no_sites(solve, objective):
    assert solve([], [], [3.0, 0.0], objective) == Allocation((), 0.0, (0.0, 0.0), (0.0, 0.0), 0.0)
    with pytest.raises(InfeasibleError):
        solve([], [], [-1.0], objective)


@pytest.mark.parametrize(
    ("errors", "costs", "limits"),
    [
        ([[np.nan]], [[1.0]], [1.0]),
        ([[-np.inf]], [[1.0]], [1.0]),
        ([[1.0]], [[np.inf]], [1.0]),
        ([[1.0]], [[np.nan]], [1.0]),
        ([[1.0]], [[1.0]], [np.nan]),
        ([[]], [[]], [1.0]),
        ([[1.0, 2.0]], [[1.0]], [1.0]),
        ([[1.0]], [[1.0]], [1.0, 2.0]),
        ([[1.0]], [], [1.0]),
    ],
)
def test_bad_input(errors, costs, limits):
    for solve in (allocate, milp):
        with pytest.raises(ValueError, match=r"site|limits"):
            solve(errors, costs, limits)


def test_unknown_objective():
    for solve in (allocate, milp):
        with pytest.raises(ValueError, match="mean"):
            solve([[1.0]], [[1.0]], [1.0], "mean")


@settings(max_examples=100, deadline=None)
@given(problems(resources=(1, 1)))
def test_hull_is_the_lower_convex_hull(problem):
    for error, cost in zip(problem[0], problem[1], strict=True):
        points = hull(error, cost[:, 0])
        x, y = cost[list(points), 0], error[list(points)]
        assert (np.diff(x) > 0).all() and (np.diff(y) < 0).all()
        assert x[0] == cost.min() and y[-1] == error.min()
        inside = cost[:, 0] <= x[-1]  # no option lies below it
        assert (error[inside] >= np.interp(cost[inside, 0], x, y) - 1e-6).all()


def test_curve_has_the_optimum_at_each_breakpoint():
    errors, costs, _ = layers(2, sites=8, options=6)
    totals, error = curve(errors, costs)
    assert (np.diff(totals) > 0).all() and (np.diff(error) < 0).all() and error[-1] == 0.0
    for at in range(0, len(totals), 5):
        found = allocate(errors, costs, [totals[at]])
        assert found.error == pytest.approx(error[at], rel=1e-9)
        assert milp(errors, costs, [totals[at]]).error == pytest.approx(error[at], rel=1e-6)
    assert [part.tolist() for part in curve([], [])] == [[0.0], [0.0]]


@settings(max_examples=60, deadline=None)
@given(problems(resources=(1, 2)), st.data(), st.sampled_from(["sum", "minimax"]))
def test_claims_against_brute_force(problem, data, objective):
    errors, costs, limits = problem
    bases = data.draw(st.integers(1, 3))
    subset = st.sets(st.integers(0, bases - 1), min_size=1)
    # Singles first, so that every base site is claimed and a cover exists.
    claims = [{base} for base in range(bases)] + [data.draw(subset) for _ in range(2)]
    errors = (errors * 5 or [np.array([1.0])] * 5)[: len(claims)]
    costs = (costs * 5 or [np.ones((1, len(limits)))] * 5)[: len(claims)]
    errors, costs = (part + part[:1] * (len(claims) - len(part)) for part in (errors, costs))
    best = None
    for used in itertools.product([False, True], repeat=len(claims)):
        covered = sorted(
            base for use, claim in zip(used, claims, strict=True) if use for base in claim
        )
        if covered == list(range(bases)):
            part = [[x for x, use in zip(xs, used, strict=True) if use] for xs in (errors, costs)]
            worth = brute(*part, limits, objective)
            if worth is not None:
                best = worth if best is None else min(best, worth)
    matrix = np.array([[base in claim for base in range(bases)] for claim in claims])
    for given_claims in (claims, matrix):
        if best is None:
            with pytest.raises(InfeasibleError):
                milp(errors, costs, limits, objective, given_claims)
        else:
            found = milp(errors, costs, limits, objective, given_claims)
            assert found.error == pytest.approx(best, rel=1e-6, abs=1e-6)
            once = sorted(
                b for j, claim in zip(found.choice, claims, strict=True) if j >= 0 for b in claim
            )
            assert once == list(range(bases))
            assert (np.array(found.cost) <= limits * (1 + 1e-12)).all()


def test_a_limit_that_is_tiny_beside_the_costs():
    tiny = 2.0**-52
    errors, costs = [[0.0, 1.0]] * 2, [[1.0, tiny], [1e9, 0.0]]
    for claims in (None, [{0}, {1}]):
        assert milp(errors, costs, [tiny], claims=claims).choice == (1, 1)
    assert allocate(errors, [np.array([c, c]).T for c in costs], [tiny, 1.0]).choice == (1, 1)


def test_bad_claims():
    errors, costs = [[1.0], [1.0]], [[1.0], [1.0]]
    for claims in ([{0}], [{0}, set()], [{0}, {2}], [{0}, {-1}], np.array([[2], [0]])):
        with pytest.raises(ValueError, match=r"claim|base"):
            milp(errors, costs, [5.0], claims=claims)
    with pytest.raises(ValueError, match="exactly once"):
        milp([[1.0]] * 3, [[1.0]] * 3, [5.0], claims=[{0, 1}, {1, 2}, {0, 2}])
