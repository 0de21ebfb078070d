"""The choices of the way that no single stage makes: what a file says, what training is worth."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

import lamina
from lamina.measure.stats import Cost
from lamina.methods.base import Step
from lamina.plan import Budget, Decision, Plan
from lamina.train import Recovered

stages = importlib.import_module("lamina.stages")


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


def _broken(module: torch.nn.Module) -> torch.nn.Module:
    import copy

    module = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module
