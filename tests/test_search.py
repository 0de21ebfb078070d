"""The search for max_drop: few trials, and the smallest plan whose drop is allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import lamina
from lamina.errors import InfeasibleError
from lamina.measure.stats import Cost
from lamina.plan import Budget, Plan
from lamina.search import TRIALS, Trial, at_error, narrowed, smallest


def plan_of(size: float) -> Plan:
    """Smaller files err more: e = exp(-size / 100), down to 100 bytes and up to 2,000."""
    if size < 100:
        raise InfeasibleError("no plan fits the budget", nearest={"bytes": 100.0})
    size = min(math.floor(size), 2000)
    curve = tuple((float(s), math.exp(-s / 100)) for s in range(100, 2001, 50))
    cost = Cost(bits=8.0 * size)
    return Plan("x", {}, predicted=cost, error=math.exp(-size / 100), curve=curve)


@dataclass
class Judge:
    """A metric that drops by `scale e^power` points."""

    scale: float
    power: float
    asked: int = 0

    def __call__(self, made: Plan) -> Trial:
        self.asked += 1
        return Trial(made, self.scale * made.error**self.power)


@pytest.mark.parametrize("scale", [3.0, 50.0, 2000.0])
@pytest.mark.parametrize("power", [0.4, 1.0, 1.6])
@pytest.mark.parametrize("allowed", [0.1, 1.0, 5.0])
def test_it_finds_the_smallest_allowed_in_a_few_trials(scale, power, allowed):
    judge = Judge(scale, power)
    first = judge(plan_of(2000))
    if first.drop > allowed:
        return
    best = narrowed(first, smallest(plan_of, first.plan), allowed, plan_of, judge)
    exact = max(100.0, -100 / power * math.log(allowed / scale))
    assert best.drop <= allowed and judge.asked <= TRIALS
    assert best.size <= max(1.03 * exact, exact + 40)


def test_nothing_allowed_still_gives_a_plan_that_fits():
    judge = Judge(1.0, 1.0)
    exact = Trial(plan_of(2000), 0.0)
    best = narrowed(exact, plan_of(100), 0.0, plan_of, judge)
    assert best.drop <= 0 and judge.asked < TRIALS


def test_a_metric_that_never_drops_gives_the_smallest_plan():
    best = narrowed(Trial(plan_of(2000), -1.0), plan_of(100), 1.0, plan_of, lambda p: Trial(p, -1))
    assert best.size == 100


def test_plans_are_found_by_their_predicted_error():
    for error in (0.3, 0.01, 1e-5):
        made = at_error(error, plan_of(100), plan_of(2000), plan_of(100), plan_of)
        assert 0.85 * error <= made.error <= error
    assert at_error(1.0, plan_of(100), plan_of(2000), plan_of(100), plan_of) == plan_of(100)


def test_max_drop_is_met_without_labels_or_refused():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    data = {"calibration": [torch.randn(200, 16)], "validation": [torch.randn(400, 16)]}
    loose = lamina.compress(net, data, Budget(max_drop=20), recover=None, methods=["rdoq"])
    tight = lamina.compress(net, data, Budget(max_drop=1), recover=None, methods=["rdoq"])
    assert len(loose.file) < len(tight.file)
    for result, allowed in ((loose, 20), (tight, 1)):
        assert result.report.dict()["quality"]["validation"]["drop"] <= allowed
        rounds = result.report.dict()["rounds"]
        assert 2 <= len(rounds) <= TRIALS and {row["why"] for row in rounds} == {"max_drop"}
        (kept,) = (row for row in rounds if row["kept"])
        assert kept["measured"]["drop"] <= allowed
        assert kept["predicted"]["error"] == result.plan.error
        assert all(
            row["measured"]["drop"] > allowed
            for row in rounds
            if row["predicted"]["bytes"] < kept["predicted"]["bytes"]
        )
    with pytest.raises(lamina.errors.InfeasibleError) as refused:
        lamina.compress(net, data, Budget(max_drop=0.1, size=500), recover=None, methods=["rdoq"])
    assert refused.value.nearest["max_drop"] > 0.1
