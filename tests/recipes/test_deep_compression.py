"""The deep-compression recipe as a whole, on small networks."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.own import write_net
from tests.recipes.small import PRUNING, QUICK, make_convolutions, make_data
from tests.train.small import make_network

import lamina
from lamina import cli, codecs
from lamina.artifact import pack, unpack
from lamina.compress import Result, compress
from lamina.data import Data, TensorLoader
from lamina.errors import DataError, InfeasibleError, MethodError
from lamina.forms import Codebook, Edit
from lamina.recipes import DeepCompression, recipe_named
from lamina.run import open_run


@cache
def done() -> Result:
    return compress(make_network(), make_data(), recipe=QUICK)


def books(result: Result) -> dict[str, Codebook]:
    tensors = unpack(result.file).tensors
    return {n: v for n, v in tensors.items() if isinstance(v, Codebook)}


def test_the_file_gives_back_the_model_to_the_bit(tmp_path: Path) -> None:
    result = done()
    result.save(tmp_path / "net.lamina")
    again = lamina.load(tmp_path / "net.lamina", make_network().module)
    ours, theirs = result.model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert sum(unpack(result.file).ledger.values()) == len(result.file)


def test_the_huffman_code_is_stored_as_it_is_and_saved_again_as_it_is() -> None:
    result = done()
    package = unpack(result.file)
    for name, values in books(result).items():
        assert values.code is not None and values.code[0] == "huffman"
        symbols = values.index.reshape(values.index.shape[0], -1).numpy()
        assert values.code[1] == codecs.get("huffman").encode(symbols)
        assert values.code[1] in result.file
        assert package.codecs[name] == "huffman"
        assert values.centroids[0] == 0 and (values.centroids[1:] != 0).all()
    edits = tuple(Edit(n, "values", values=v) for n, v in package.tensors.items())
    assert pack(result.model, edits, package.skeleton, package.plan) == result.file


def test_every_layer_is_pruned_and_shared() -> None:
    found = books(done())
    assert set(found) == {"0.weight", "4.weight"}
    sizes = {n: v.index.numel() for n, v in found.items()}
    kept = sum(int((v.index != 0).sum()) for v in found.values())
    assert kept <= 0.3 * sum(sizes.values())
    assert all(len(v.centroids) <= 8 for v in found.values())


def test_the_plan_can_be_read_and_carried_out_untrained() -> None:
    result, network = done(), make_network()
    chains = {n: d.describe() for n, d in result.plan.sites.items()}
    assert all(" -> kmeans(k=" in c and c.startswith("magnitude(keep=") for c in chains.values())
    again = lamina.Plan.from_dict(json.loads(json.dumps(result.plan.dict())))
    untrained = compress(network, plan=again, recover=None)
    zeros = {n: int((v.index == 0).sum()) for n, v in books(untrained).items()}
    assert zeros == {n: int((v.index == 0).sum()) for n, v in books(result).items()}


def test_the_report_tells_of_the_training() -> None:
    facts = done().report.dict()
    assert facts["recovery"]["settings"]["recipe"] == "deep-compression"
    assert facts["recovery"]["steps"] == (1 + 2 + 1) * 12  # rounds, then shared values
    assert [int(row["phase"]) for row in facts["recovery"]["history"]][-1] == 3
    assert {s["name"] for s in facts["stages"]} >= {"measure", "prune", "share", "encode", "pack"}
    assert facts["size"]["file"] == len(done().file)
    for site in facts["sites"]:
        assert abs(site["bytes_planned"] - site["bytes_file"]) < 60
    done().report.table()


def test_the_same_seed_gives_the_same_file_and_another_does_not() -> None:
    files = [compress(make_network(), make_data(), recipe=QUICK, seed=s).file for s in (0, 1)]
    assert files[0] == done().file != files[1]


def test_our_own_codes_hold_the_same_values() -> None:
    own = compress(make_network(), make_data(), recipe=replace(QUICK, code="best"))
    assert all(v.code is None for v in books(own).values())
    ours, theirs = own.model.state_dict(), done().model.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_what_is_not_covered_is_stored_losslessly_and_listed() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 20, (96, 5), generator=g)
    y = (x.sum(1) > 47).long()
    data = Data(train=TensorLoader(x, y, 32), calibration=[(x, y)], validation=[(x, y)])
    net = make_convolutions()
    result = compress(net, data, recipe=QUICK, example_inputs=(x[:2],))
    assert set(books(result)) == {"conv.weight", "one.weight", "head.weight"}
    assert torch.equal(result.model.one.weight, result.model.two.weight)
    notes = " ".join(result.report.dict()["notes"])
    assert "table" in notes and "lossless" in notes


def test_a_network_without_labels_learns_from_the_original() -> None:
    x = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    data = Data(train=[x[:64], x[64:]], validation=[x])
    result = compress(make_network(), data, recipe=QUICK)
    assert result.report.dict()["quality"]["metric"] == "agreement"


def test_a_budget_is_checked_at_the_end(tmp_path: Path) -> None:
    size = len(done().file)
    assert compress(make_network(), make_data(), size, recipe=QUICK).file == done().file
    with (
        open_run(tmp_path / "run") as run,
        pytest.raises(InfeasibleError, match="bytes") as refused,
    ):
        compress(make_network(), make_data(), size - 1, recipe=QUICK, run=run)
    assert refused.value.nearest == {"bytes": size}
    assert not (tmp_path / "run" / "net.lamina").exists()
    assert (tmp_path / "run" / "report.json").exists()


def test_an_interruption_passes_through_and_leaves_no_network(tmp_path: Path) -> None:
    def stop(stage: str, *_: object) -> None:
        if stage == "share":
            raise KeyboardInterrupt

    network = make_network()
    was = {k: v.clone() for k, v in network.module.state_dict().items()}
    with open_run(tmp_path / "run") as run, pytest.raises(KeyboardInterrupt):
        compress(network, make_data(), recipe=QUICK, run=run, watch=stop)
    assert not (tmp_path / "run" / "net.lamina").exists()
    assert all(torch.equal(v, was[k]) for k, v in network.module.state_dict().items())


def test_the_command_line_follows_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(lamina.recipes.RECIPES, "deep-compression", lambda: QUICK)
    write_net(tmp_path)
    words = ["compress", "net.py:build", "--data", "net.py:loaders", "--recipe", "deep-compression"]
    assert cli.main(words) == 0
    assert (tmp_path / "runs" / "net-recipe-deep-compression" / "net.lamina").exists()
    assert "huffman" in capsys.readouterr().out
    assert cli.main([*words, "--size", "100"]) == 3
    assert cli.main([*words[:-1], "shallow"]) == 2
    assert "choose from deep-compression" in capsys.readouterr().err


@pytest.mark.parametrize("beside", [{"recover": 3}, {"methods": ["rdoq"]}, {"recover": None}])
def test_what_does_not_go_with_a_recipe(beside: dict[str, object]) -> None:
    if beside == {"recover": None}:  # said in so many words: a recipe trains
        beside = {"recover": "none"}
    with pytest.raises(MethodError, match="does not go with a recipe"):
        compress(make_network(), make_data(), recipe=QUICK, **beside)  # type: ignore[arg-type]


def test_wrong_arguments() -> None:
    with pytest.raises(MethodError, match="choose from"):
        recipe_named("deep-kompression")
    with pytest.raises(MethodError):
        recipe_named(3)
    with pytest.raises(DataError, match="train"):
        compress(make_network(), [torch.randn(8, 8)], recipe="deep-compression")
    with pytest.raises(MethodError, match="convx"):
        compress(make_network(), make_data(), recipe=replace(QUICK, bits={"convx": 3}))
    assert recipe_named(None) is None and recipe_named(QUICK) is QUICK


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": {"conv": 0}}, {"bits": {"conv": 9}}, {"bits": {"conv": 2.5}}, {"start": "forgy"},
        {"code": "zip"}, {"epochs": -1}, {"lr": 0.0},
    ],
)  # fmt: skip
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(MethodError):
        DeepCompression(PRUNING, **wrong)  # type: ignore[arg-type]
