"""The choices of the way that no single stage makes: start plans, what is kept after training."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

import lamina
from lamina.measure.stats import Cost
from lamina.methods.base import Candidate, Step
from lamina.plan import Budget, Decision, Plan
from lamina.train import Recovered

stages = importlib.import_module("lamina.stages")


def candidate(site: str, bits: float, error: float, *methods: str) -> Candidate:
    steps = tuple(Step(m, site, {}) for m in methods)
    return Candidate(site, steps, Cost(10, bits, 10), error)


def test_only_single_grids_count_as_squeezable():
    assert stages.on_grid(candidate("a", 8, 0.1, "rdoq"))
    assert not stages.on_grid(candidate("a", 8, 0.1, "magnitude", "rdoq"))
    assert not stages.on_grid(candidate("a", 8, 0.1, "keep"))


def test_smallest_working_reads_the_curve():
    plan = Plan("x", {}, curve=((10.0, 1.0), (20.0, 4e-4), (30.0, 1e-5)))
    assert stages.smallest_working(plan) == 20.0
    assert stages.smallest_working(replace(plan, curve=((10.0, 1.0),))) == 0.0


def test_the_file_says_each_chain_once():
    steps = (Step("alds", "fc"), Step("rdoq", "fc.0"), Step("rdoq", "fc.1"))
    plan = Plan("x", {"fc": Decision(steps, Cost(), 0.0)})
    assert stages.chains_of(plan) == {"fc": "alds rdoq"}


@pytest.mark.parametrize("worse", [True, False])
def test_training_that_made_it_worse_is_thrown_away(worse):
    net = lamina.zoo("lenet-300-100")
    way = stages.Way(net, net.data, Budget(size="50%"), metric="accuracy")
    sites = lamina.discover(net)
    stats = lamina.measure(net, sites, net.data, samples=50, probe=False)
    offers = lamina.propose(net, sites, stats, ["kmeans"])
    plan = lamina.plan(net, sites, stats, offers, Budget(size="30%"))
    edited = lamina.apply(net, plan, sites, stats)
    broken = replace(edited, network=replace(net, module=_broken(net.module)))
    before, after = (edited, broken) if worse else (broken, edited)
    kept = stages.keeps_applied(way, plan, before, Recovered(after, (), 0), None)
    assert kept is worse
    assert bool(way.notes) is worse
    if worse:  # a limit that only the trained network keeps to
        assert not stages.keeps_applied(way, plan, before, Recovered(after, (), 0), 1000.0)


def test_max_drop_is_met_without_labels_or_refused():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    data = {"calibration": [torch.randn(200, 16)], "validation": [torch.randn(400, 16)]}
    loose = lamina.compress(net, data, Budget(max_drop=20), recover=None)
    tight = lamina.compress(net, data, Budget(max_drop=1), recover=None)
    assert len(loose.file) < len(tight.file)
    assert tight.report.dict()["quality"]["validation"]["drop"] <= 1
    with pytest.raises(lamina.errors.InfeasibleError) as refused:
        lamina.compress(net, data, Budget(max_drop=0.1, size=500), recover=None)
    assert refused.value.nearest["max_drop"] > 0.1


def _broken(module: torch.nn.Module) -> torch.nn.Module:
    import copy

    module = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module
