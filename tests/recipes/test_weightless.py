"""The weightless recipe as a whole, on small networks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.recipes.small import LIGHT, make_data, make_wide

import lamina
from lamina import codecs
from lamina.artifact import pack, unpack
from lamina.compress import Result, compress
from lamina.data import Data
from lamina.errors import MethodError
from lamina.forms import Codebook, Edit, find_tensor
from lamina.recipes import Weightless
from lamina.recipes.retraining import Session
from lamina.recipes.sharing import share
from lamina.recipes.weightless import filtered, lossless


@cache
def done() -> Result:
    return compress(make_wide(), make_data(), recipe=LIGHT)


def books(result: Result) -> dict[str, Codebook]:
    tensors = unpack(result.file).tensors
    return {n: v for n, v in tensors.items() if isinstance(v, Codebook)}


def test_a_filter_gives_back_every_survivor_and_some_zeros_wrong() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    weight[torch.rand(200, 300, generator=torch.Generator().manual_seed(1)) > 0.05] = 0
    values = share(weight, 6)
    at = values.index != 0
    zeros = int((~at).sum())
    for cells in (1, 3, 5):
        form = filtered(values, cells, 0)
        assert torch.equal(form.index[at], values.index[at])
        wrong = int((form.index[~at] != 0).sum())
        rate = 6 / 2 ** (3 + cells)  # k / 2^t
        assert abs(wrong - zeros * rate) < 4 * (zeros * rate * (1 - rate)) ** 0.5
        assert int(form.index.max()) <= 6
        assert form.code is not None and form.code[0] == "bloomier"
    exact = filtered(values, 24, 0)
    assert torch.equal(exact.index, values.index)


def test_zeros_cost_a_filter_nothing() -> None:
    values = share(torch.randn(40, 50, generator=torch.Generator().manual_seed(0)), 4)
    wide = torch.zeros(40, 500, dtype=torch.int32)
    wide[:, :50] = values.index
    small, large = filtered(values, 4, 0), filtered(replace(values, index=wide), 4, 0)
    assert small.code is not None and large.code is not None
    assert abs(len(small.code[1]) - len(large.code[1])) < 64
    assert len(lossless(values)[1]) < len(lossless(replace(values, index=wide))[1])


def test_the_file_gives_back_the_model_to_the_bit(tmp_path: Path) -> None:
    result = done()
    result.save(tmp_path / "net.lamina")
    again = lamina.load(tmp_path / "net.lamina", make_wide().module)
    ours, theirs = result.model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    package = unpack(result.file)
    edits = tuple(Edit(n, "values", values=v) for n, v in package.tensors.items())
    assert pack(result.model, edits, package.skeleton, package.plan) == result.file


def test_a_layer_where_the_filter_wins_is_coded_so_with_its_errors() -> None:
    found = books(done())
    large = found["2.weight"]  # 32,768 weights
    assert large.code is not None and large.code[0] == "bloomier"
    shape = (large.index.shape[0], large.index[0].numel())
    symbols = codecs.get("bloomier").decode(large.code[1], shape)
    assert torch.equal(large.index.reshape(shape), torch.from_numpy(symbols).int())
    notes = " ".join(done().report.dict()["notes"])
    assert "zeros come back as values" in notes
    assert done().plan.sites["2"].describe().endswith("kmeans(k=4, weighted=False)")


def test_a_filter_is_never_taken_where_it_is_larger_or_does_harm() -> None:
    for recipe in (replace(LIGHT, cells=(24,)), replace(LIGHT, drop=0.0, cells=(0,), epochs=0)):
        result = compress(make_wide(), make_data(), recipe=recipe)
        kinds = {v.code[0] if v.code else "own" for v in books(result).values()}
        if recipe.cells == (24,):
            assert kinds <= {"huffman", "own"}
        else:  # every second zero wrong, and nothing retrained: not without a loss
            assert books(result)["2.weight"].code is None or "huffman" in kinds


def test_layers_that_are_done_are_not_touched_by_later_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[tuple[str, ...], bool]] = []
    original = Session.train

    def watched(self: Session, epochs: float, lr: float, sites: Any = (), frozen: Any = ()) -> None:
        was = {n: find_tensor(self.module, n).detach().clone() for n in frozen}
        original(self, epochs, lr, sites, frozen)
        same = all(torch.equal(find_tensor(self.module, n), t) for n, t in was.items())
        seen.append((tuple(frozen), same))

    monkeypatch.setattr(Session, "train", watched)
    compress(make_wide(), make_data(), recipe=LIGHT)
    assert all(same for _, same in seen)
    assert ("0.weight", "0.bias", "2.weight") in [frozen for frozen, _ in seen]


def test_without_validation_data_a_safe_number_of_bits_is_taken() -> None:
    data = make_data()
    blind = Data(train=data.train, calibration=data.calibration)
    result = compress(make_wide(), blind, recipe=LIGHT)
    for values in books(result).values():
        if values.code and values.code[0] == "bloomier":
            facts = codecs.get("bloomier").describe(values.code[1], values.index.shape)
            assert facts["bits"] == 2 + 5


def test_the_same_seed_gives_the_same_file() -> None:
    assert compress(make_wide(), make_data(), recipe=LIGHT).file == done().file


@pytest.mark.parametrize(
    "wrong",
    [
        {"clusters": 0}, {"clusters": 300}, {"cells": ()}, {"cells": (-1,)}, {"cells": (40,)},
        {"drop": -1}, {"drop": float("nan")}, {"epochs": -1}, {"lr": 0},
    ],
)  # fmt: skip
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        Weightless(**wrong)
