"""The recipe: budgets, ties through training, files, plans, dropping, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.recipes.kin import Thin, images, params, text, way

import lamina
from lamina.artifact import pack, restore, unpack
from lamina.errors import DataError, InfeasibleError, MethodError, SiteError
from lamina.measure.calibrate import calibrate
from lamina.measure.cost import measured_macs
from lamina.measure.stats import Stats
from lamina.network.discover import discover
from lamina.opening import open_model
from lamina.plan import apply
from lamina.recipes.fusion import LayerFusion
from lamina.stages import packed
from lamina.zoo.gpt import GPT


def follow(network, data, recipe, budget="100%", stats=None, seed=0):
    sites = discover(network)
    return recipe.follow(way(network, data, budget, seed), sites, stats or Stats())


def small_gpt():
    return GPT(width=12, depth=4, heads=2, vocabulary=11, context=8)


SETTINGS = [
    {}, {"unit": "block"}, {"unit": "block", "pattern": "cycle"}, {"distance": "w2"},
    {"unit": "block", "pattern": "neighbours", "combine": "mix"}, {"combine": "freeze"},
    {"combine": "max", "align": False}, {"distance": "loss", "combine": "solve"},
    {"optimizer": "sgd", "lr": 0.05, "combine": "first"},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_budget_is_met_and_the_file_is_the_network(settings) -> None:
    network, data = text()
    sites = discover(network)
    stats = Stats()
    if "loss" in settings.values():
        stats = calibrate(network, sites, data, samples=48)
    recipe = LayerFusion(keep=0.45, steps=2, epochs=2, **settings)
    before = {n: t.clone() for n, t in network.module.state_dict().items()}
    done = recipe.follow(way(network, data), sites, stats)
    state = network.module.state_dict()
    assert all(torch.equal(state[n], t) for n, t in before.items())  # the original stays
    model, x = done.final.model.eval(), data.test[0][0]
    assert params(model) <= 0.45 * params(network.module)
    package = unpack(pack(model, done.final.edits, "", {}))
    loaded = restore(package, small_gpt()).eval()
    assert torch.equal(loaded(x), model(x)) and params(loaded) == params(model)
    stored = sum(package.tensors[n].dense().numel() for n in package.tensors)
    assert stored == params(model)
    assert done.plan.predicted.params == params(model)
    again = apply(network, done.plan, sites, stats)  # the plan alone: the same ties, untrained
    assert params(again.model) == params(model)
    assert [m for m, s in done.plan.sites.items() if s.steps[0].method == "layer_fusion"]
    assert {row["phase"] for row in done.history} == {1.0, 2.0}
    assert done.settings["recipe"] == "layer-fusion" and "Unique parameters" in done.notes[0]


def test_layers_of_a_group_are_equal_after_training() -> None:
    network, data = text()
    done = follow(network, data, LayerFusion(keep=0.4, steps=2, unit="block", epochs=2))
    ((groups,),) = {
        tuple(tuple(s.steps[0].settings["groups"]) for s in done.plan.sites.values()
              if s.steps[0].method == "layer_fusion")[:1]
    }  # fmt: skip
    blocks = done.final.model.blocks
    trained = False
    for i, a in enumerate(groups):
        for j, b in enumerate(groups):
            same = blocks[i].mlp.fc1.weight is blocks[j].mlp.fc1.weight
            assert same == (a == b)
            if i != j and same:  # what stays their own differs
                trained |= not torch.equal(blocks[i].mlp.fc1.bias, blocks[j].mlp.fc1.bias)
    assert trained


def test_convolutions_of_a_stage_share_across_blocks_and_moments_are_new() -> None:
    network, data = images()
    done = follow(network, data, LayerFusion(keep=0.45, steps=2))
    assert done.history == ()  # no epochs: nothing is trained
    assert params(done.final.model) <= 0.45 * params(network.module)
    old, new = network.module.blocks, done.final.model.blocks
    assert not torch.equal(old[1].bn1.running_mean, new[1].bn1.running_mean)
    loaded = restore(unpack(pack(done.final.model, done.final.edits, "", {})), Thin()).eval()
    x = data.test[0][0]
    assert torch.equal(loaded(x), done.final.model.eval()(x))


def test_equal_blocks_are_fused_without_a_difference() -> None:
    network, _ = text()
    with torch.no_grad():
        for block in network.module.blocks[1:]:
            block.load_state_dict(network.module.blocks[0].state_dict())
    x = network.example_inputs[0]
    before = network.module(x)
    for how in ("auto", "mean", "freeze", "first", "mix", "max"):
        recipe = LayerFusion(keep=0.35, steps=2, unit="block", align=how == "mean", combine=how)
        done = follow(network, None, recipe)
        assert torch.equal(done.final.model(x), before)


def test_training_is_seeded() -> None:
    network, data = text()
    recipe = LayerFusion(keep=0.5, steps=2, epochs=2, unit="block", combine="mix", align=False)
    runs = [follow(network, data, recipe, seed=seed).final.model for seed in (1, 1, 2)]
    weights = [m.blocks[0].mlp.fc1.weight for m in runs]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_budget_on_parameters_goes_before_keep() -> None:
    network, _ = text()
    done = follow(network, None, LayerFusion(keep=0.9, steps=1), {"params": "40%"})
    assert params(done.final.model) <= 0.4 * params(network.module)
    assert done.settings["keep"] == pytest.approx(0.4)


def test_what_cannot_be_met_is_said_before_training() -> None:
    network, data = text()
    with pytest.raises(InfeasibleError, match="one weight for each family"):
        follow(network, data, LayerFusion(keep=0.05, epochs=100))
    with pytest.raises(DataError, match="needs training data"):
        follow(network, None, LayerFusion(keep=0.5, epochs=1))


# --- dropping ------------------------------------------------------------------------------------


def test_dropped_blocks_do_not_run() -> None:
    network, data = text()
    recipe = LayerFusion(
        keep=0.6, steps=2, unit="block", pattern="neighbours", mode="drop", epochs=1
    )
    done = follow(network, data, recipe)
    model = done.final.model.eval()
    assert params(model) <= 0.6 * params(network.module)
    assert done.plan.predicted.params == params(model)
    kinds = [type(b).__name__ for b in model.blocks]
    assert kinds.count("Identity") == 2 and kinds[0] == "Block"
    inputs = network.example_inputs
    assert measured_macs(model, inputs) < 0.7 * measured_macs(network.module, inputs)
    loaded = restore(unpack(pack(model, done.final.edits, "", {})), small_gpt()).eval()
    assert torch.equal(loaded(*inputs), model(*inputs))
    assert done.applied is not None and params(done.applied.model) == params(model)


def test_blocks_without_a_skip_are_not_dropped() -> None:
    network, _ = images()
    with pytest.raises(SiteError, match="not one to a block"):
        follow(network, None, LayerFusion(keep=0.5, unit="block", mode="drop"))


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0}, {"keep": 1.5}, {"steps": 0}, {"distance": "near"}, {"unit": "stage"},
        {"pattern": "spiral"}, {"combine": "sum"}, {"mode": "skip"}, {"mode": "drop"},
        {"mode": "drop", "unit": "block", "combine": "mix"}, {"epochs": -1}, {"last": 2},
        {"distill": -0.1}, {"lr": 0}, {"optimizer": "lion"}, {"decay": -1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_are_checked(settings) -> None:
    with pytest.raises(MethodError):
        LayerFusion(**settings)


def test_a_fused_file_is_compressed_further_and_keeps_its_ties(tmp_path: Path) -> None:
    network, data = text()
    done = follow(network, data, LayerFusion(keep=0.45, steps=1, unit="block"))
    file = tmp_path / "fused.lamina"
    file.write_bytes(packed(done.final, done.plan))
    fused = open_model(str(file), network.example_inputs, skeleton=small_gpt().eval())
    assert params(fused.module) == params(done.final.model)
    result = lamina.compress(fused, data, "60%", methods=("rdoq",), recover=None, samples=48)
    assert len(result.file) < file.stat().st_size
    result.save(tmp_path / "small.lamina")
    loaded = lamina.load(tmp_path / "small.lamina", skeleton=small_gpt())
    x = data.test[0][0]
    assert torch.equal(loaded(x), result.model(x)) and params(loaded) == params(fused.module)
    assert loaded.blocks[3].mlp.fc1.weight is loaded.blocks[0].mlp.fc1.weight
    assert result.plan.sites["blocks.0.mlp.fc1"].steps[0].method == "rdoq"
