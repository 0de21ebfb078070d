"""The low-rank recipe as a whole: with no data, with calibration, with training, in rounds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.own import write_net
from tests.recipes.small import make_data, make_wide
from tests.train.small import make_network
from torch import nn

import lamina
from lamina import cli
from lamina.compress import Result, compress
from lamina.data import Data
from lamina.errors import DataError, InfeasibleError, MethodError
from lamina.measure.cost import measured_params
from lamina.measure.stats import Stats
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.recipes import LowRank, recipe_named
from lamina.recipes.low_rank import select
from lamina.recipes.pairs import choose_pairs, pairs_plan
from lamina.recipes.selectors import NEED_STATS, SELECTORS

NO_DATA = [name for name in SELECTORS if name not in NEED_STATS]


def make_conv() -> Network:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3),
    )  # fmt: skip
    return make_network(module)


def measure(network: Network) -> tuple[lamina.network.sites.Sites, Stats]:
    sites = discover(network)
    return sites, lamina.measure(network, sites, make_data())


@cache
def measured() -> tuple[Network, lamina.network.sites.Sites, Stats]:
    network = make_conv()
    return (network, *measure(network))


@cache
def rounds() -> Result:
    return compress(make_conv(), make_data(), recipe=LowRank(keep=0.3, rounds=2, epochs=1))


def mean_output(module: nn.Module, name: str) -> torch.Tensor:
    """The mean of what a layer gives on the calibration data, per channel."""
    seen: list[torch.Tensor] = []
    handle = module.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        module.eval()(torch.cat([batch[0] for batch in make_data().calibration]))
    handle.remove()
    return seen[0].movedim(1, 0).flatten(1).mean(1)


def pairs(result: Result) -> dict[str, dict[str, object]]:
    return {
        name: dict(d.steps[0].settings)
        for name, d in result.plan.sites.items()
        if d.steps[0].method == "alds"
    }


@pytest.mark.parametrize("selector", ["alds", "svd-energy"])
def test_no_data_is_needed_where_the_selector_needs_none(selector: str) -> None:
    network = make_conv()
    before = network.digest()
    result = compress(network, recipe=LowRank(selector, keep=0.6))
    assert pairs(result) and network.digest() == before
    whole = measured_params(network.module)
    assert measured_params(result.model) == result.plan.predicted.params <= 0.6 * whole
    assert result.plan.objective == "minimax"
    assert result.report.dict()["recovery"]["settings"]["recipe"] == "low-rank"


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_keeps_to_its_share_and_counts_rightly(selector: str) -> None:
    network, sites, stats = measured()
    whole = measured_params(network.module)
    sizes = []
    for keep in (0.35, 0.7):
        plan = select(network, sites, stats, selector, keep)
        edited = lamina.apply(network, plan, sites, stats)
        assert measured_params(edited.model) == plan.predicted.params <= keep * whole
        sizes.append(plan.predicted.params)
        assert plan.budget == {"params": keep * whole} and plan.network == network.digest()
    assert sizes == sorted(sizes)
    assert choose_pairs(network, sites, stats, selector, 1.0) == {}


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_predicted_error_is_that_of_what_is_applied(selector: str) -> None:
    network, sites, stats = measured()
    plan = select(network, sites, stats, selector, 0.6)
    edited = lamina.apply(network, plan, sites, stats)
    x = torch.cat([b[0] for b in make_data().calibration])
    with torch.no_grad():
        before, after = (m.eval()(x).log_softmax(-1) for m in (network.module, edited.model))
        loss = float((before.exp() * (before - after)).sum(-1).mean())
    assert plan.objective == "sum"
    assert loss / 30 < plan.error < 30 * max(loss, 1e-6)


def test_calibration_does_not_change_what_a_data_free_selector_makes() -> None:
    network, sites, stats = measured()
    for selector in NO_DATA:
        chosen = choose_pairs(network, sites, stats, selector, 0.6)
        assert chosen == choose_pairs(network, sites, Stats(), selector, 0.6)
        assert {s["metric"] for s in chosen.values()} == {"weights"}
    plan = select(network, sites, stats, "alds", 0.6)
    models = [lamina.apply(network, plan, sites, s).model.state_dict() for s in (stats, Stats())]
    assert all(torch.equal(models[0][k], models[1][k]) for k in models[0])
    aware = choose_pairs(network, sites, stats, "data-aware", 0.6)
    assert all("metric" not in s for s in aware.values())


def test_data_aware_predicts_less_loss_than_any_other() -> None:
    network, sites, stats = measured()
    errors = {s: select(network, sites, stats, s, 0.5).error for s in SELECTORS}
    assert min(errors, key=lambda s: errors[s]) == "data-aware", errors


def test_exact_ranks_have_the_least_largest_error() -> None:
    network, sites, _ = measured()
    found = {s: select(network, sites, Stats(), s, 0.5).error for s in NO_DATA}
    assert found["alds-exact"] <= min(found.values()) * (1 + 1e-4)
    assert found["alds"] <= found["svd-error"] * (1 + 1e-4)


def test_pca_gives_layers_a_bias_and_keeps_their_mean() -> None:
    network, sites, stats = measured()
    plan = select(network, sites, stats, "pca", 0.6)
    taken = {n: d.steps[0].settings for n, d in plan.sites.items() if d.steps[0].method == "alds"}
    assert any("bias" in s for s in taken.values()) or "1" not in taken
    edited = lamina.apply(network, plan, sites, stats)
    means = [mean_output(model, next(iter(taken))) for model in (network.module, edited.model)]
    assert torch.allclose(*means, atol=1e-4)
    plain = {n: {**s, "metric": "weights", "bias": 0} for n, s in taken.items()}
    blind = pairs_plan(network, sites, stats, plain, 0.6)
    moved = mean_output(lamina.apply(network, blind, sites, stats).model, next(iter(taken)))
    assert not torch.allclose(means[0], moved, atol=1e-3)  # the negative control


def test_the_plan_is_carried_out_again_to_the_bit() -> None:
    network = make_conv()
    for selector in ("data-aware", "pca"):
        result = compress(network, make_data(), recipe=LowRank(selector, keep=0.6))
        again = lamina.Plan.from_dict(json.loads(json.dumps(result.plan.dict())))
        other = compress(network, make_data(), plan=again, recover=None)
        ours, theirs = result.model.state_dict(), other.model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_the_file_gives_back_the_model_to_the_bit(tmp_path: Path) -> None:
    result = rounds()
    result.save(tmp_path / "net.lamina")
    again = lamina.load(tmp_path / "net.lamina", make_conv().module)
    ours, theirs = result.model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_rounds_train_compose_and_compress_again() -> None:
    result = rounds()
    history = result.report.dict()["recovery"]["history"]
    assert {row["phase"] for row in history} == {1.0, 2.0}
    steps = [row["step"] for row in history]
    assert steps == sorted(steps)
    whole = measured_params(make_conv().module)
    assert measured_params(result.model) == result.plan.predicted.params <= 0.3 * whole
    nested = [n for n, m in result.model.named_modules() if n.count(".") > 1 or ".0.0" in n]
    assert not nested  # no pair in a pair
    assert result.plan.network == make_conv().digest()


def test_training_improves_on_the_validation_split() -> None:
    data = make_data()
    once = compress(make_wide(), data, recipe=LowRank("svd", keep=0.05, epochs=0))
    trained = compress(make_wide(), data, recipe=LowRank("svd", keep=0.05, epochs=4))
    x, y = data.validation[0]
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(r.model(x), y) for r in (once, trained)]
    assert losses[1] < losses[0]


def test_a_budget_on_parameters_goes_before_the_share() -> None:
    network = make_conv()
    result = compress(network, budget=lamina.Budget(params="60%"), recipe=LowRank(keep=0.9))
    whole = measured_params(network.module)
    assert 0.5 * whole < measured_params(result.model) <= 0.6 * whole
    assert result.report.dict()["budget"]["met"] == {"params": True}
    assert result.report.dict()["recovery"]["settings"]["keep"] == pytest.approx(0.6, abs=1e-4)


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_share_out_of_reach_says_which_is_not(selector: str) -> None:
    network, sites, stats = measured()
    with pytest.raises(InfeasibleError) as caught:
        select(network, sites, stats, selector, 0.01)
    nearest = caught.value.nearest
    assert f"params={nearest['params']:.0f}" in str(caught.value)
    plan = select(network, sites, stats, selector, nearest["keep"] * (1 + 1e-9))
    assert plan.predicted.params <= nearest["params"]
    with pytest.raises(InfeasibleError):
        select(network, sites, stats, selector, (nearest["params"] - 1) / plan.original.params)


def test_schemes_may_be_chosen_from() -> None:
    network, sites, _ = measured()
    wide = select(network, sites, Stats(), "alds-exact", 0.5, schemes=(0, 1, 2, 3))
    plain = select(network, sites, Stats(), "alds-exact", 0.5)
    assert wide.error <= plain.error * (1 + 1e-4)
    edited = lamina.apply(network, wide, sites, Stats())
    assert measured_params(edited.model) == wide.predicted.params


def test_layers_can_be_left_out() -> None:
    network, sites, _ = measured()
    plan = select(network, sites, Stats(), "svd", 0.8, exclude=("7", "1"))
    assert [d.steps[0].method for d in plan.sites.values()] == ["keep", "alds", "keep"]
    with pytest.raises(MethodError, match="exclude names no layer"):
        select(network, sites, Stats(), "svd", 0.8, exclude=("fc*",))
    with pytest.raises(MethodError, match="finds no layer"):
        select(network, sites, Stats(), "svd", 0.8, exclude=("*",))


def test_data_is_asked_for_where_it_is_needed() -> None:
    for selector in NEED_STATS:
        with pytest.raises(DataError, match=f"{selector} needs calibration data"):
            compress(make_conv(), recipe=LowRank(selector))
    with pytest.raises(DataError, match="low-rank needs training data"):
        compress(make_conv(), Data(calibration=make_data().calibration), recipe=LowRank(epochs=1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"selector": "best"}, {"keep": 0}, {"keep": 1.5}, {"keep": "half"}, {"score": "loss"},
        {"schemes": ()}, {"schemes": (4,)}, {"seeds": 0}, {"rounds": 0}, {"epochs": -1},
        {"lr": 0}, {"distill": 2}, {"rounds": 2}, {"rounds": 2, "epochs": 1, "selector": "pca"},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(MethodError):
        LowRank(**wrong)


def test_it_is_a_recipe_by_name_and_on_the_command_line(tmp_path: Path) -> None:
    assert recipe_named("low-rank") == LowRank()
    where = f"{write_net(tmp_path)}:build"
    run = tmp_path / "run"
    args = ["compress", where, "--recipe", "low-rank", "--set", "keep=0.9", "-o", str(run)]
    assert cli.main([*args, "--set", "selector=svd"]) == 0
    plan = lamina.Plan.load(run / "plan.json")
    assert any(d.steps[0].method == "alds" for d in plan.sites.values())
