from __future__ import annotations

import importlib
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from lamina.artifact.records import encode
from lamina.forms import Codebook, Edit, Grid, Plain, Values
from lamina.train.fit import SMALL, estimated_bytes, fit, held_bytes
from lamina.train.hold import HeldGrid, HeldNetwork


@pytest.fixture
def net() -> HeldNetwork:
    """A grid trained off its points, a codebook and plain values."""
    module = nn.Sequential(nn.Linear(90, 60), nn.Linear(60, 4))
    module.requires_grad_(True)
    symbols = (3 * torch.randn(60, 90)).round().int()
    index = torch.randint(0, 3, (4, 60)).int()
    held = HeldNetwork(
        module,
        [
            Edit("0.weight", "values", values=Grid(symbols, 0.0625)),
            Edit("0.bias", "values", values=Plain(torch.randn(60))),
            Edit("1.weight", "values", values=Codebook(index, torch.randn(3))),
        ],
    )
    with torch.no_grad():
        held.held[0].latent += 0.02 * torch.randn(60, 90)
    return held


def test_sizes_are_those_of_the_records(net: HeldNetwork) -> None:
    values = net.release()
    exact = sum(len(encode(v)) for v in values.values())
    assert held_bytes(values) == exact
    assert values["0.weight"].dense().numel() > SMALL
    assert estimated_bytes(values) == pytest.approx(exact, rel=0.03)


def test_nothing_changes_where_all_fits(net: HeldNetwork) -> None:
    trained = net.release()
    for room in (None, held_bytes(trained), 1e9):
        values = fit(net, room)
        assert list(values) == list(trained)
        for name, v in values.items():
            assert torch.equal(v.dense(), trained[name].dense())


def test_values_fit_their_room_and_use_it(net: HeldNetwork) -> None:
    whole, least = held_bytes(net.release()), held_bytes(fit(net, 0))
    assert least < whole
    before = whole
    for share in (0.95, 0.7, 0.4, 0.1):
        room = least + share * (whole - least)
        size = held_bytes(fit(net, room))
        assert room - 0.05 * (whole - least) - 8 <= size <= room
        assert size <= before
        before = size


def test_only_grids_move_and_only_towards_zero(net: HeldNetwork) -> None:
    trained = net.release()
    tight = fit(net, 0.9 * held_bytes(trained))
    for name in ("0.bias", "1.weight"):
        assert torch.equal(tight[name].dense(), trained[name].dense())
    a, b = tight["0.weight"], trained["0.weight"]
    assert isinstance(a, Grid) and isinstance(b, Grid)
    assert a.step == b.step
    assert bool((a.symbols.abs() <= b.symbols.abs()).all())
    assert bool((a.symbols * b.symbols >= 0).all())
    assert bool(((b.symbols - a.symbols).abs() <= 1).all())
    assert not torch.equal(a.symbols, b.symbols)


def test_only_the_smallest_levels_become_zero(net: HeldNetwork) -> None:
    """A threshold, not a lottery; and what is over it keeps its value."""
    trained = net.release()["0.weight"]
    tight = fit(net, 0.9 * held_bytes(net.release()))["0.weight"]
    held = net.held[0]
    assert isinstance(held, HeldGrid) and isinstance(trained, Grid) and isinstance(tight, Grid)
    size = held.levels().detach().abs()
    moved, stayed = trained.symbols != tight.symbols, tight.symbols != 0
    assert moved.any()
    assert not tight.symbols[moved].any()
    assert float(size[moved].max()) <= float(size[stayed].min()) + 1e-6


def test_large_networks_are_fitted_by_estimates(
    net: HeldNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("lamina.train.fit")
    whole, least = held_bytes(net.release()), held_bytes(fit(net, 0))
    counted: list[int] = []

    def count(values: Mapping[str, Values]) -> int:
        counted.append(1)
        return held_bytes(values)

    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "held_bytes", count)
    for share in (0.95, 0.7, 0.4):
        counted.clear()
        room = least + share * (whole - least)
        size = held_bytes(fit(net, room))
        assert room - 0.08 * (whole - least) - 8 <= size <= room
        assert 2 <= len(counted) <= 5  # instead of fourteen
    assert held_bytes(fit(net, 0)) == least  # what estimates cannot reach is looked for exactly
