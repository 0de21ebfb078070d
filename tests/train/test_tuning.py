"""Tuning what is small: integers stay, the file does not grow, outputs come nearer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.train.small import (
    edit_all,
    make_batches,
    make_data,
    make_network,
    plain,
    to_codebook,
    to_sparse,
)
from tests.train.small import to_grid as grid_of
from torch import nn

import lamina
from lamina.artifact import pack, unpack
from lamina.data import Data
from lamina.forms import Codebook, Edit, Grid, Plain, Sparse
from lamina.measure.quality import evaluate
from lamina.network.source import Network
from lamina.plan.apply import Edited
from lamina.train import Recovery, recover
from lamina.train.tuning import HeldStep, hold_scales, is_small, shortened

SCALES = Recovery(epochs=10, lr=5e-3, step_lr=1e-2, distill=1.0, parts="scales")


def parts() -> tuple[Network, Edited]:
    """A network in which every form is held."""
    network = replace(make_network(), loss="logits")
    p = dict(network.module.named_parameters())
    columns = torch.arange(8, dtype=torch.int32) % 3 - 1
    first = Grid((p["0.weight"] / 0.3).round().int().detach(), 0.3, columns, 1)
    values = {
        "0.weight": first, "0.bias": grid_of(p["0.bias"], 0.05), "1.weight": plain(p["1.weight"]),
        "4.weight": to_codebook(p["4.weight"]), "4.bias": plain(p["4.bias"]),
    }  # fmt: skip
    return network, edit_all(network, values)


def away(network: Network, edited: Edited) -> float:
    return evaluate(edited.model, make_batches(), "kl", original=network)


def values_of(edited: Edited) -> dict[str, Any]:
    return {e.path: e.values for e in edited.edits if e.form == "values"}


def test_the_integers_stay_and_the_outputs_come_nearer() -> None:
    network, edited = parts()
    unlabelled = Data(train=[x for x, _ in make_batches()])
    made = recover(network, edited, unlabelled, SCALES).edited
    old, new = values_of(edited), values_of(made)
    assert away(network, made) < 0.8 * away(network, edited)
    a, b = old["0.weight"], new["0.weight"]
    assert isinstance(b, Grid) and torch.equal(a.symbols, b.symbols)
    assert torch.equal(a.exponents, b.exponents) and a.step != b.step
    assert torch.equal(old["4.weight"].index, new["4.weight"].index)
    assert isinstance(new["4.weight"], Codebook)
    assert not torch.equal(old["4.weight"].centroids, new["4.weight"].centroids)
    assert not torch.equal(old["4.bias"].tensor, new["4.bias"].tensor)
    for name, tensor in made.model.named_parameters():
        assert torch.equal(tensor, new[name].dense()), name


@pytest.mark.parametrize("bits", [23, 7])
def test_the_file_does_not_grow_and_its_streams_stay(bits: int) -> None:
    """Also where vectors took few bytes, because they were short numbers."""
    network, edited = parts()
    values = shortened(values_of(edited), bits)
    edited = edit_all(network, values)
    before = pack(edited.model, edited.edits, "module", {})
    made = recover(network, edited, make_data(), SCALES).edited
    after = pack(made.model, made.edits, "module", {})
    assert len(after) <= len(before)
    assert away(network, made) < away(network, edited)
    a, b = (unpack(f).ledger for f in (before, after))
    assert a["0.weight"] == b["0.weight"]


def test_matrices_without_a_step_are_left_alone() -> None:
    network, _ = parts()
    p = dict(network.module.named_parameters())
    edited = edit_all(
        network, {"0.weight": to_sparse(p["0.weight"]), "4.weight": plain(p["4.weight"])}
    )
    made = recover(network, edited, make_data(), SCALES).edited
    old, new = dict(edited.model.named_parameters()), dict(made.model.named_parameters())
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"0.bias", "1.weight", "1.bias", "4.bias"}
    held = values_of(made)
    assert isinstance(held.get("0.weight"), Sparse) and isinstance(held["1.weight"], Plain)


def test_it_begins_with_the_very_same_tensors() -> None:
    _, edited = parts()
    net = hold_scales(edited.model, edited.edits)
    named = dict(edited.model.named_parameters())
    assert [type(h) for h in net.held][:1] == [HeldStep]
    for name, held in zip(net.names, net.held, strict=True):
        assert torch.equal(held()[0].detach(), named[name]), name
    for name, values in net.release().items():
        assert torch.equal(values.dense(), named[name]), name


def test_both_axes_of_a_grid_may_have_exponents() -> None:
    module = nn.Linear(3, 2, bias=False)
    symbols = torch.tensor([[1, -2, 3], [0, 4, 5]], dtype=torch.int32)
    for axis, count in ((0, 2), (1, 3)):
        grid = Grid(symbols, 0.25, torch.arange(count, dtype=torch.int32), axis)
        net = hold_scales(module, [Edit("weight", "values", values=grid)])
        dense, levels = net.held[0]()
        assert levels is None and torch.equal(dense.detach(), grid.dense())
        dense.sum().backward()
        assert net.held[0].log_step.grad is not None


def test_what_is_small() -> None:
    vector, matrix = torch.zeros(3), torch.zeros(2, 3)
    assert is_small(Plain(vector)) and not is_small(Plain(matrix))
    assert is_small(Grid(vector.int(), 1.0)) and not is_small(Grid(matrix.int(), 1.0))
    assert is_small(Codebook(vector.int(), vector)) and not is_small(Sparse(matrix))


def test_shortened_vectors_are_the_nearest_with_so_many_bits() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=g) * 10 ** torch.empty(1000).uniform_(-6, 6, generator=g)
    made = shortened({"v": Plain(x), "m": Plain(x.reshape(10, 100)), "h": Plain(x.half())}, 7)
    short = made["v"].tensor  # type: ignore[union-attr]
    assert torch.equal(short, x.bfloat16().float())
    assert torch.equal(made["m"].tensor, x.reshape(10, 100))  # type: ignore[union-attr]
    assert torch.equal(made["h"].tensor, x.half())  # type: ignore[union-attr]
    assert torch.equal(shortened({"v": Plain(x)}, 23)["v"].tensor, x)  # type: ignore[union-attr]


def test_where_vectors_would_grow_the_steps_are_tuned_alone() -> None:
    """Zeros take no bytes, and whatever they become takes some."""
    network, edited = parts()
    zero = Plain(torch.zeros(32))
    edited = edit_all(network, {**values_of(edited), "0.bias": zero, "1.bias": zero})
    size = len(pack(edited.model, edited.edits, "module", {}))
    made = recover(network, edited, make_data(), SCALES).edited
    assert len(pack(made.model, made.edits, "module", {})) <= size
    old, new = values_of(edited), values_of(made)
    assert torch.equal(new["0.bias"].tensor, zero.tensor)
    assert old["0.weight"].step != new["0.weight"].step
    roomy = recover(network, edited, make_data(), SCALES, limit=size + 500).edited
    assert size < len(pack(roomy.model, roomy.edits, "module", {})) <= size + 500
    assert away(network, roomy) < away(network, edited)
    tight = recover(network, edited, make_data(), SCALES, limit=size // 2).edited
    for a, b in zip(tight.model.parameters(), edited.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_plan_to_be_tuned_is_made_for_its_size() -> None:
    """Nothing walks from a roomy start to the limit, as where the size is trained down."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(256, 32)
    data = Data(train=list(x.split(64)), calibration=[x])
    options = {"methods": ("rdoq",), "seed": 0}
    settings = Recovery(epochs=10, lr=2e-3, parts="scales", distill=1.0)
    tuned = lamina.compress(module, data, "15%", recover=settings, **options)
    bare = lamina.compress(module, data, "15%", recover=None, **options)
    limit = 0.15 * 4 * sum(p.numel() for p in module.parameters())
    assert len(tuned.file) <= limit and len(bare.file) <= limit
    a, b = (unpack(r.file).ledger for r in (tuned, bare))
    for name in ("0.weight", "2.weight"):  # the same integers
        assert a[name] == b[name], name
    with torch.no_grad():
        away = [float((r.model(x) - module(x)).square().mean()) for r in (tuned, bare)]
    assert away[0] < away[1]


def test_tuning_that_goes_astray_is_thrown_away_without_validation_data() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.randn(256, 32)
    data = Data(train=list(x.split(64)), calibration=[x])
    options = {"methods": ("rdoq",), "seed": 0}
    far = Recovery(epochs=2, lr=10.0, step_lr=10.0, parts="scales", distill=1.0)
    tuned = lamina.compress(module, data, "15%", recover=far, **options)
    bare = lamina.compress(module, data, "15%", recover=None, **options)
    assert tuned.file == bare.file
    assert any("on calibration data" in note for note in tuned.report.dict()["notes"])
