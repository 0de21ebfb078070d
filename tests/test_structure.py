"""A run's lossless structure: alone, under a budget, from its plan, from its folder, by command."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.own import run_lamina
from torch import nn

import lamina
from lamina import artifact
from lamina.data import TensorLoader, as_data
from lamina.errors import BudgetError, LaminaError, NetworkError, PlanError
from lamina.network.source import Network
from lamina.opening import open_model
from lamina.plan import Plan
from lamina.run import open_run

X = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
stable = importlib.import_module("lamina.plan.stable")


def build(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3)
    )


def planted() -> nn.Sequential:
    """15 units that are never on, in two layers."""
    module = build()
    with torch.no_grad():
        module[1].bias[3:12] = -1e3
        module[3].bias[:6] = -30.0
    return module


def network() -> Network:
    return Network(planted(), (X[:2],), name="net")


def apart(before: nn.Module, after: nn.Module, x: torch.Tensor = X) -> float:
    with torch.no_grad():
        return float((before(x) - after(x)).abs().max())


def test_alone_it_writes_a_smaller_lossless_file(tmp_path: Path) -> None:
    net = network()
    with open_run(tmp_path / "run") as run:
        result = lamina.compress(net, lossless_structure="0,1", run=run)
    plain = lamina.compress(net, lossless=True)
    assert len(result.file) < 0.85 * len(plain.file)
    assert result.plan.rewrite == ("stable 0.0,1.0",)
    assert result.plan.network == net.digest()
    result.save(tmp_path / "net.lamina")
    loaded = lamina.load(tmp_path / "net.lamina", build(9))
    assert apart(loaded, result.model) == 0
    assert 0 <= apart(net.module, loaded) < 1e-6
    assert apart(net.module, loaded, 1e3 * torch.randn(64, 1, 4, 4)) > 1e-3  # outside the box
    facts = result.report.dict()
    (note,) = [n for n in facts["notes"] if n.startswith("Lossless structure")]
    assert "15 of 70 units removed (15 inactive)" in note and "[0, 1]" in note
    assert not any("bit for bit" in n for n in facts["notes"])
    assert facts["network"]["params"] == sum(p.numel() for p in net.module.parameters())
    assert artifact.unpack(result.file).box == "0.0,1.0"
    log = json.loads((tmp_path / "run" / "structure.json").read_text(encoding="utf-8"))
    assert log["box"] == "0.0,1.0" and len(log["removed"]) == 15
    assert log["network"] == net.digest()


def test_the_box_is_that_of_the_data_where_none_is_given() -> None:
    loader = TensorLoader(X, torch.zeros(64, dtype=torch.int64), 16, shuffle=True)
    data = as_data({"train": loader, "calibration": [X[:16]]})
    result = lamina.compress(network(), data, lossless_structure=True)
    low, high = float(X.min().double()), float(X.max().double())
    assert artifact.unpack(result.file).box == f"{low!r},{high!r}"
    assert loader.epoch == 0  # training would go the same way
    notes = result.report.dict()["notes"]
    assert any("is the range of the data's inputs" in note for note in notes)
    with pytest.raises(BudgetError, match="--box 0,1"):
        lamina.compress(network(), lossless_structure=True)


def test_with_a_budget_planning_begins_with_the_smaller_network(tmp_path: Path) -> None:
    net, asked = network(), {"methods": ["rdoq"], "recover": None}

    def go() -> Any:
        with open_run(tmp_path / "run") as run:
            return lamina.compress(net, [X], "40%", lossless_structure="0,1", run=run, **asked)

    result = go()
    whole = 4 * sum(p.numel() for p in net.module.parameters())
    assert len(result.file) <= 0.4 * whole  # of the network as given
    assert result.plan.rewrite == ("stable 0.0,1.0",) and result.plan.original.bits == 8 * whole
    assert result.model[1].out_features == 31
    assert artifact.unpack(result.file).box == "0.0,1.0"
    result.plan.save(tmp_path / "plan.json")
    again = lamina.compress(net, [X], plan=Plan.load(tmp_path / "plan.json"), **asked)
    assert again.file == result.file
    resumed = go()
    assert resumed.file == result.file
    stages = {s["name"]: s["cached"] for s in resumed.report.dict()["stages"]}
    assert stages["structure"] is True


def test_a_run_folder_keeps_the_proofs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    with open_run(tmp_path / "run") as run:
        first = lamina.compress(net, lossless_structure="0,1", run=run)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("proven again")

    monkeypatch.setattr(stable, "decide", never)
    with open_run(tmp_path / "run") as run:
        second = lamina.compress(net, lossless_structure="0,1", run=run)
    assert second.file == first.file
    with pytest.raises(AssertionError), open_run(tmp_path / "run") as run:  # another box
        lamina.compress(net, lossless_structure="0,0.5", run=run)


def test_a_plan_whose_structure_is_not_there_is_refused() -> None:
    net = network()
    plan = lamina.compress(net, lossless_structure="0,1").plan
    for wrong in ("stable -1e6,1e6", "stable 0,0.5"):
        other = Plan.from_dict({**plan.dict(), "rewrite": [wrong]})
        with pytest.raises(PlanError):
            lamina.compress(net, plan=other, recover=None)
    with pytest.raises(PlanError, match="not valid"):
        Plan.from_dict({**plan.dict(), "rewrite": ["stable \x1b[2J"]})


def test_where_nothing_is_stable_the_file_is_the_lossless_one() -> None:
    module = build()
    with torch.no_grad():
        for layer in (module[1], module[3]):
            layer.bias.zero_()
            layer.weight.copy_(torch.randn_like(layer.weight))
    net = Network(module, (X[:2],), name="net")
    result = lamina.compress(net, lossless_structure="-1,1")
    assert result.file == lamina.compress(net, lossless=True).file
    assert result.plan.rewrite == () and artifact.unpack(result.file).box == ""
    assert any("none of 70 units" in note for note in result.report.dict()["notes"])


def test_a_file_that_is_compressed_again_keeps_its_box(tmp_path: Path) -> None:
    lamina.compress(network(), lossless_structure="0,1").save(tmp_path / "net.lamina")
    opened = open_model(tmp_path / "net.lamina", (X[:2],), None, build(9))
    assert opened.box == "0.0,1.0"
    again = lamina.compress(opened, [X], "60%", methods=["rdoq"], recover=None)
    assert artifact.unpack(again.file).box == "0.0,1.0"
    twice = lamina.compress(opened, lossless_structure="0.25,2")
    assert artifact.unpack(twice.file).box in ("0.0,1.0", "0.25,1.0")  # never more than both hold
    again.save(tmp_path / "again.lamina")
    assert apart(lamina.load(tmp_path / "again.lamina", build(9)), again.model) == 0


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"lossless": True}, "lossless does not go with lossless_structure"),
        ({"recipe": "deep-compression"}, "recipe does not go with lossless_structure"),
        ({"lossless_structure": "1,0"}, "cannot read the box"),
        ({"methods": ["rdoq"]}, "methods does not go"),
    ],
)
def test_what_does_not_go_together_is_refused(more: dict[str, Any], why: str) -> None:
    with pytest.raises(BudgetError, match=why):
        lamina.compress(network(), **{"lossless_structure": "0,1", **more})


def test_another_network_is_refused_with_its_reason() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    with pytest.raises(NetworkError, match="tanh at 1 is no ReLU"):
        lamina.compress(Network(module, (torch.zeros(1, 4),)), lossless_structure="0,1")
    with pytest.raises(LaminaError, match="no example inputs"):
        lamina.compress(Network(build()), lossless_structure="0,1")


NET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    layers = nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)
    with torch.no_grad():
        layers[0].bias[:6] = -100
    return nn.Sequential(*layers), (torch.zeros(1, 16),)
"""


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET, encoding="utf-8")
    asked = ["compress", "net.py:build", "--lossless-structure"]
    done = run_lamina(*asked, "--box=-1,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 of 24 units removed" in " ".join(done.stdout.split())
    folder = tmp_path / "runs" / "net-structure"
    assert json.loads((folder / "structure.json").read_text())["box"] == "-1.0,1.0"
    shown = run_lamina("inspect", str(folder / "net.lamina"), cwd=tmp_path)
    assert "for inputs in -1.0,1.0" in shown.stdout
    for words, said in (([], "--box"), (["--box", "7"], "cannot read the box")):
        done = run_lamina(*asked, *words, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    done = run_lamina("compress", "net.py:build", "--size", "50%", "--box", "0,1", cwd=tmp_path)
    assert done.returncode == 2 and "needs --lossless-structure" in done.stderr


def test_under_a_latency_it_comes_first_and_is_timed() -> None:
    from tests.test_rewriting import Slow

    from lamina.plan import Budget
    from lamina.rewriting import begin
    from lamina.stages import Way

    module = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)
    ).eval()
    with torch.no_grad():
        module[1].bias[:3] = -50.0
    pair = X.repeat(1, 2, 1, 1)
    net = Network(module, (pair[:2],), name="net")
    way = Way(net, None, Budget(latency="0.5x"), timer=Slow(norm=0.0, plain=3.0))
    begin(way, structure="0,1")
    assert way.rewriting == ("fold", "stable 0.0,1.0", "channels_last")
    assert way.base.module[0].out_channels == 5 and way.base.box == "0.0,1.0"
    assert way.share < 1 and any("stable units removed" in note for note in way.notes)
    assert apart(module, way.base.module, pair) < 1e-5
    slow = Way(net, None, Budget(latency="0.5x"), timer=Slow(norm=0.0, plain=0.1))
    begin(slow, structure="0,1")  # channels-last would be slower: the structure stays
    assert slow.rewriting == ("fold", "stable 0.0,1.0")
