"""layer-collapse: blocks are found and counted, collapsed exactly or absorbed, and reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.recipes.small import make_convolutions, make_data, make_wide
from torch import nn

from lamina.artifact import pack, restore, unpack
from lamina.data import Data
from lamina.errors import DataError, InfeasibleError, MethodError
from lamina.measure.calibrate import calibrate
from lamina.measure.cost import measured_params
from lamina.measure.stats import Stats
from lamina.methods.layer_collapse import fits_of
from lamina.methods.layer_collapse.merging import merge
from lamina.methods.layer_collapse.places import activations_of
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.plan import Budget, Edited, apply
from lamina.plan.apply import copy_module
from lamina.plan.spans import parts_of
from lamina.recipes.blocks import (
    collapse_runs,
    find_blocks,
    join_blocks,
    lines_of,
    order_blocks,
    saved,
)
from lamina.recipes.collapse import LayerCollapse
from lamina.recipes.followed import Followed
from lamina.stages import Way
from lamina.train.slope import Blend, put_blends

FAST = LayerCollapse(blocks=1.0, epochs=1.0, lr=5e-3)


class Deep(nn.Module):
    """Three MLP blocks with a skip, as transformers have them."""

    def __init__(self, act: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), act(), nn.Linear(32, 8))
            for _ in range(3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def deep(act: type[nn.Module] = nn.GELU) -> Network:
    return Network(Deep(act).eval(), (torch.zeros(2, 8),), loss="logits", name="deep")


def follow(
    network: Network, recipe: LayerCollapse, data: Data | None = None, budget: Budget | None = None
) -> tuple[Followed, Way]:
    way = Way(network, data or make_data(), budget or Budget(size="100%"), seed=0)
    sites = discover(network)
    assert way.data is not None
    stats = calibrate(network, sites, way.data, samples=128, probe=False)
    return recipe.follow(way, sites, stats), way


# --- blocks --------------------------------------------------------------------------------------


def test_blocks_are_pairs_that_get_smaller_in_their_order() -> None:
    network = deep()
    sites = discover(network)
    blocks = find_blocks(network, sites)
    assert [b.name for b in blocks] == [f"blocks.{i}.1..blocks.{i}.3" for i in range(3)]
    runs = join_blocks(sites, blocks)
    assert [r.name for r in runs] == [b.name for b in blocks], "a skip parts them"
    assert saved(sites, runs) == 3 * (2 * 8 * 32 + 32 - 64)


def test_neighbours_that_share_a_layer_are_one_part() -> None:
    network = make_wide()
    sites = discover(network)
    blocks = find_blocks(network, sites)
    assert [b.name for b in blocks] == ["0..2", "2..4"]
    assert [r.name for r in join_blocks(sites, blocks)] == ["0..4"]
    assert [r.name for r in join_blocks(sites, blocks[1:])] == ["2..4"]
    whole = measured_params(network.module)
    assert saved(sites, join_blocks(sites, blocks)) == whole - (8 * 3 + 3)


def test_a_bottleneck_is_no_block() -> None:
    module = nn.Sequential(nn.Linear(40, 4), nn.ReLU(), nn.Linear(4, 40)).eval()
    network = Network(module, (torch.zeros(2, 40),))
    with pytest.raises(MethodError, match=r"finds no block.*would be larger than 0\.\.2"):
        find_blocks(network, discover(network))


def test_where_there_is_no_chain_it_says_why() -> None:
    module = nn.Sequential(nn.Linear(4, 4)).eval()
    network = Network(module, (torch.zeros(2, 4),))
    with pytest.raises(MethodError, match="a gated MLP is the product of two branches"):
        find_blocks(network, discover(network))
    network = Network(make_convolutions().eval(), (torch.zeros(2, 6, dtype=torch.long),))
    with pytest.raises(MethodError, match="layer-collapse finds no block"):
        find_blocks(network, discover(network))


# --- the collapse --------------------------------------------------------------------------------


def test_snapped_blends_collapse_exactly_without_data() -> None:
    network = deep()
    sites = discover(network)
    blocks = find_blocks(network, sites)
    module = copy_module(network.module)
    for blend in put_blends(module, [p for b in blocks for p in activations_of(b)]).values():
        blend.snap()
    small = collapse_runs(network, module, sites, join_blocks(sites, blocks), None)
    x = torch.randn(50, 8)
    torch.testing.assert_close(small.model(x), module.eval()(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(m, Blend) for m in small.model.modules())
    assert measured_params(small.model) == measured_params(network.module) - saved(
        sites, join_blocks(sites, blocks)
    )
    assert measured_params(network.module) == measured_params(Deep()), "the original is unchanged"


def test_what_bends_is_absorbed_by_least_squares() -> None:
    """A network that bends a little: exact products are worse than the fit, which needs data."""
    network, data = deep(nn.ReLU), make_data()
    sites = discover(network)
    blocks = find_blocks(network, sites)
    module = copy_module(network.module)
    for blend in put_blends(module, [p for b in blocks for p in activations_of(b)]).values():
        with torch.no_grad():
            blend.linearity.fill_(0.5)
    x = make_data().test[0][0]  # type: ignore[index]
    errors = {}
    for fit in ("slope", "units", "full"):
        small = collapse_runs(
            network, module, sites, join_blocks(sites, blocks), data, fit, samples=128
        )
        with torch.no_grad():
            errors[fit] = float((small.model(x) - module.eval()(x)).norm())
    assert errors["full"] < 0.6 * errors["slope"] and errors["units"] < 0.6 * errors["slope"]
    without = collapse_runs(network, module, sites, join_blocks(sites, blocks), None)
    with torch.no_grad():  # no moments, and a blend is none of the activations a model knows
        assert float((without.model(x) - module(x)).norm()) == errors["slope"]


@pytest.mark.parametrize("kind", ["plain", "before", "after", "both", "conv"])
def test_lines_are_what_each_unit_does_on_average(kind: str) -> None:
    """By brute force on what really goes in and out; then a snapped blend is that line."""
    torch.manual_seed(0)
    conv = kind == "conv"
    layers: list[nn.Module] = [nn.Conv2d(5, 12, 1) if conv else nn.Linear(5, 12)]
    norms = [nn.BatchNorm2d(12) if conv else nn.BatchNorm1d(12) for _ in range(2)]
    for norm in norms:
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            assert tensor is not None
            tensor.data.uniform_(0.5, 1.5)
    layers += norms[:1] if kind in ("before", "both", "conv") else []
    layers.append(nn.GELU())
    layers += norms[1:] if kind in ("after", "both") else []
    layers += [nn.Dropout(0.3), nn.Conv2d(12, 3, 1) if conv else nn.Linear(12, 3)]
    module = nn.Sequential(*layers).double().eval()
    x = torch.randn((60, 5, 3, 2) if conv else (400, 5), dtype=torch.float64)
    network = Network(module, (x[:2],), loss="features")
    sites = discover(network)
    blocks = find_blocks(network, sites)
    stats = calibrate(network, sites, [x], samples=len(x), probe=False)
    ((path, line),) = lines_of(network, sites, stats, blocks).items()
    given = module[: int(path)](x)
    out = module[int(path)](given)
    if conv:
        given, out = (t.movedim(1, -1).flatten(0, -2) for t in (given, out))
    with torch.no_grad():
        for i in range(12):
            points = torch.stack([given[:, i], torch.ones(len(given)).double()], 1)
            slope, offset = torch.linalg.lstsq(points, out[:, i : i + 1]).solution.flatten()
            assert float(line.scale[i]) == pytest.approx(float(slope), rel=1e-5, abs=1e-7)
            assert float(line.shift[i]) == pytest.approx(float(offset), rel=1e-5, abs=1e-7)
    blended = copy_module(module)
    blend = put_blends(blended, [path], {path: line})[path]
    assert torch.equal(blended(x), module(x)), "it still starts as the function it was"
    blend.snap()
    small = collapse_runs(network, blended, sites, join_blocks(sites, blocks), None)
    torch.testing.assert_close(small.model(x), blended(x), rtol=1e-5, atol=1e-5)
    plain = copy_module(module)
    put_blends(plain, [path])[path].snap()
    with torch.no_grad():
        errors = [(m(x) - module(x)).norm() for m in (blended, plain)]
    assert errors[0] < 0.7 * errors[1], "the identity is further away"


# --- the recipe ----------------------------------------------------------------------------------


def check_file(done: Followed, network: Network) -> None:
    """The edits make the trained network from the original's skeleton, and the file holds it."""
    file = pack(done.final.model, tuple(done.final.edits), "module", {})
    skeleton = Deep() if isinstance(network.module, Deep) else make_wide().module
    loaded = restore(unpack(file), skeleton)
    x = torch.randn(20, 8)
    module = loaded if isinstance(loaded, nn.Module) else loaded.module
    assert torch.equal(module.eval()(x), done.final.model.eval()(x))


def test_it_trains_collapses_and_reports_quality_at_every_point() -> None:
    network = make_wide()
    done, way = follow(network, replace(FAST, epochs=4.0, last=1.0))
    model = done.final.model
    assert measured_params(model) == 8 * 3 + 3
    assert not any(isinstance(m, (Blend, nn.ReLU)) for m in model.modules())
    quality = done.settings["quality"]
    assert list(quality) == ["before", "swapped", "trained", "collapsed", "final"]
    assert quality["swapped"] == quality["before"], "it starts as the function it was"
    assert quality["collapsed"] == pytest.approx(quality["trained"], abs=1.0)
    assert quality["final"] > 80, "the task is linear"
    assert any("Blocks that became one layer: 2 of 2" in note for note in done.notes)
    assert any("1 - t" in note for note in done.notes)
    phases = [row["phase"] for row in done.history]
    assert phases == sorted(phases, key=lambda p: (p == 0, p)) and set(phases) == {0, 1, 2}
    steps = [row["step"] for row in done.history]
    assert steps == sorted(steps)
    check_file(done, network)
    assert [s["name"] for s in way.stages] == ["straighten", "collapse", "recover"]


def test_the_plan_is_what_collapsing_without_training_does() -> None:
    network = deep()
    done, way = follow(network, LayerCollapse(blocks=2, epochs=0))
    assert done.plan.sites.keys() == {
        "blocks.1.1..blocks.1.3", "blocks.2.1..blocks.2.3", "blocks.0.1", "blocks.0.3", "head",
    }  # fmt: skip
    sites = discover(network)
    assert way.data is not None
    stats = calibrate(network, sites, way.data, samples=128, probe=False)
    edited = apply(network, done.plan, sites, stats)
    assert isinstance(edited, Edited)
    assert measured_params(edited.model) == done.plan.predicted.params
    assert measured_params(edited.model) == measured_params(done.final.model)
    x = torch.randn(30, 8)
    torch.testing.assert_close(edited.model(x), done.final.model(x), rtol=0.2, atol=0.2)
    assert "straighten" not in {s["name"] for s in way.stages}
    assert list(done.settings["quality"]) == ["before", "collapsed"]
    check_file(done, network)


@pytest.mark.parametrize(
    ("blocks", "count"), [(1, 1), (2, 2), (9, 3), (1 / 3, 1), (0.5, 2), (1.0, 3)]
)
def test_blocks_are_counted_as_blocks_from_the_last(blocks: float, count: int) -> None:
    done, _ = follow(deep(), LayerCollapse(blocks=blocks, epochs=0))
    spans = [name for name in done.plan.sites if ".." in name]
    assert spans == [f"blocks.{i}.1..blocks.{i}.3" for i in range(3 - count, 3)]
    assert done.settings["blocks"] == count


def test_blocks_can_go_in_the_order_of_what_they_are_predicted_to_cost() -> None:
    network, data = deep(), make_data()
    with torch.no_grad():  # of the middle one next to nothing depends on its activation
        network.module.blocks[1][3].weight.mul_(1e-3)  # type: ignore[union-attr, index]
    sites = discover(network)
    stats = calibrate(network, sites, data, samples=128, probe=False)
    blocks = find_blocks(network, sites)
    order = order_blocks(network, sites, stats, blocks, "loss")
    assert order[0] is blocks[1] and sorted(b.name for b in order) == [b.name for b in blocks]
    parts = [parts_of(network, sites, stats, b) for b in order]
    errors = [merge(p, fits_of(p)[-1]).error for p in parts]
    assert errors == sorted(errors)
    assert order_blocks(network, sites, stats, blocks, "last") == blocks[::-1]
    done, _ = follow(network, LayerCollapse(blocks=1, epochs=0, order="loss"))
    assert [name for name in done.plan.sites if ".." in name] == [blocks[1].name]


def test_a_budget_on_parameters_goes_before_the_blocks() -> None:
    network = deep()
    whole = measured_params(network.module)
    done, _ = follow(network, LayerCollapse(blocks=1, epochs=0), budget=Budget(params=whole - 500))
    assert done.settings["blocks"] == 2
    with pytest.raises(InfeasibleError) as caught:
        follow(network, LayerCollapse(epochs=0), budget=Budget(params=10))
    assert caught.value.nearest["params"] == whole - 3 * 480


def test_steps_pull_more_blocks_one_after_the_other() -> None:
    data = make_data()
    one, _ = follow(deep(), replace(FAST, steps=1, epochs=0.5), data)
    three, _ = follow(deep(), replace(FAST, epochs=0.5), data)
    assert {row["phase"] for row in one.history} == {1}
    assert {row["phase"] for row in three.history} == {1, 2, 3}


def test_without_snapping_the_end_is_fitted() -> None:
    recipe = LayerCollapse(blocks=1.0, epochs=2.0, pull=0.7, reached=1.0, steps=1)
    done, _ = follow(deep(), recipe)
    note = next(n for n in done.notes if "1 - t" in n)
    assert all(float(part.split()[-1].rstrip(".")) > 0.3 for part in note.split(": ")[1].split(","))
    quality = done.settings["quality"]
    assert quality["collapsed"] > 0 and not any(
        isinstance(m, (Blend, nn.GELU)) for m in done.final.model.modules()
    )


def test_it_needs_training_data_only_where_it_trains() -> None:
    network, data = deep(), make_data()
    bare = replace(data, train=None)
    with pytest.raises(DataError, match="layer-collapse needs training data"):
        follow(network, FAST, bare)
    done, _ = follow(network, LayerCollapse(epochs=0), bare)
    assert done.history == ()
    way = Way(network, None, Budget(size="100%"))
    alone = LayerCollapse(epochs=0).follow(way, discover(network), Stats())
    assert alone.settings["quality"] == {} and measured_params(alone.final.model) < 2000


@pytest.mark.parametrize(
    "settings",
    [
        {"blocks": 0}, {"blocks": 1.5}, {"blocks": True}, {"epochs": -1}, {"lr": 0}, {"decay": -1},
        {"fit": "best"}, {"order": "first"}, {"how": "gently"}, {"tau": -1.0}, {"steps": 0.5},
        {"reached": 2}, {"distill": -0.1},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(MethodError):
        LayerCollapse(**settings)  # type: ignore[arg-type]
