"""funnel: gates, ranks, training on, and the same plan, file and report as any way."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from tests.recipes.small import make_data as make_rows
from tests.train.small import make_network
from tests.train.test_gating import Net, make_data, trained
from torch import nn

from lamina.artifact import restore, unpack
from lamina.compress import Result, compress
from lamina.errors import DataError, MethodError
from lamina.measure.cost import measured_macs, measured_params
from lamina.plan import Budget, Plan
from lamina.recipes import RECIPES, recipe_named
from lamina.recipes.funnel import Funnel

QUICK = Funnel(macs=0.6, epochs=4, last=2, lr=3e-3)


@cache
def done() -> Result:
    return compress(trained(), make_data(), recipe=QUICK)


def test_it_can_be_asked_for_by_name() -> None:
    assert RECIPES["funnel"] is Funnel
    assert recipe_named("funnel") == Funnel()


def test_the_operations_come_down_to_the_share_and_the_network_works() -> None:
    result, original = done(), trained()
    inputs = original.example_inputs
    macs = measured_macs(result.model, inputs)
    assert macs <= 0.6 * measured_macs(original.module, inputs)
    assert macs == pytest.approx(result.plan.predicted.macs)
    assert measured_params(result.model) == pytest.approx(result.plan.predicted.params)
    quality = result.report.dict()["quality"]["test"]
    assert quality["after"] > 60 and quality["before"] > quality["after"] - 10
    forms = [m for m in result.model.modules() if isinstance(m, nn.Sequential)]
    assert forms and all(len(m) == 3 for m in forms)


def test_the_file_gives_the_same_network() -> None:
    result = done()
    torch.manual_seed(99)
    loaded = restore(unpack(result.file), Net().eval())
    (x, _), = make_data().test  # fmt: skip
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))
        assert not torch.equal(loaded(x), trained().module(x))


def test_the_plan_says_the_ranks_and_can_be_carried_out_without_training() -> None:
    plan = Plan.from_dict(done().plan.dict())
    chosen = {n: d.steps for n, d in plan.sites.items() if d.steps[0].method == "tucker"}
    assert chosen
    for name, steps in chosen.items():
        assert [s.method for s in steps] == ["tucker", "keep", "keep", "keep"]
        assert [s.at for s in steps[1:]] == [f"{name}.{i}" for i in range(3)]
    again = compress(trained(), make_data(), plan=plan, recover=None)
    for name, steps in chosen.items():
        r1, r2 = (steps[0].settings[k] for k in ("outputs", "inputs"))
        assert again.model.get_submodule(name)[1].weight.shape[:2] == (r1, r2)
        assert done().model.get_submodule(name)[1].weight.shape[:2] == (r1, r2)


def test_the_report_tells_of_the_training_and_the_ranks() -> None:
    facts = done().report.dict()
    assert facts["recovery"]["settings"]["recipe"] == "funnel"
    rows = facts["recovery"]["history"]
    assert {row["phase"] for row in rows} == {1.0, 2.0}
    assert [r["step"] for r in rows] == sorted(r["step"] for r in rows)
    assert any("Ranks that training chose" in note for note in facts["notes"])
    assert {s["name"] for s in facts["stages"]} >= {"measure", "gate", "recover", "pack"}
    done().report.table()


def test_a_budget_on_operations_goes_before_the_share() -> None:
    recipe = Funnel(macs=0.9, epochs=2, last=0, lr=3e-3)
    result = compress(trained(), make_data(), Budget(macs="50%"), recipe=recipe)
    assert result.plan.predicted.macs <= 0.5 * result.plan.original.macs
    assert result.report.dict()["budget"]["met"]["macs"] is True
    assert {row["phase"] for row in result.report.dict()["recovery"]["history"]} == {1.0}


def test_an_impossible_share_is_met_as_nearly_as_can_be_and_said() -> None:
    recipe = Funnel(macs=1e-6, epochs=1, last=0, lr=3e-3)
    result = compress(trained(), make_data(), recipe=recipe)
    notes = " ".join(result.report.dict()["notes"])
    assert "over the limit" in notes and "one 1x1, two 1x1" in notes


def test_what_it_cannot_work_on_is_refused() -> None:
    with pytest.raises(DataError, match="funnel"):
        compress(trained(), recipe=QUICK)
    with pytest.raises(MethodError, match="convolutions"):
        compress(make_network(), make_rows(), recipe=QUICK)
    broken = copy.deepcopy(trained().module)
    for p in broken.parameters():
        p.requires_grad_(False)
    with pytest.raises(MethodError, match="trainable"):
        compress(broken, make_data(), recipe=QUICK)


@pytest.mark.parametrize(
    "setting",
    [{"macs": 0}, {"macs": 1.5}, {"macs": "half"}, {"lr": 0}, {"epochs": -1}, {"last": -1},
     {"decay": -1}, {"distill": 2}],
)  # fmt: skip
def test_settings_it_cannot_use(setting: dict) -> None:
    with pytest.raises(MethodError, match="epochs" if "last" in setting else next(iter(setting))):
        Funnel(**setting)
