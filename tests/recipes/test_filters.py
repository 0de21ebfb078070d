"""Filter pruning: budgets, what the smaller network computes, the recipe and its file."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.recipes.small import make_data
from tests.recipes.thin import Chain, chain, params, settle
from torch import nn

import lamina
from lamina.errors import DataError, InfeasibleError, MethodError
from lamina.forms import install
from lamina.measure.calibrate import calibrate
from lamina.measure.stats import Stats
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.recipes import RECIPES, Filters
from lamina.recipes.filters import choose_channels, prune, thin
from lamina.recipes.saliency import count_params, filter_norms
from lamina.recipes.widths import find_widths, masked
from lamina.zoo import untrained

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("scope", ["uniform", "global", "currency"])
@pytest.mark.parametrize("keep", [1.0, 0.8, 0.5, 0.25])
def test_budgets_are_kept_to_the_last_parameter(keep: float, scope: str) -> None:
    network = chain()
    sites = discover(network)
    stats = calibrate(network, sites, [X], samples=64) if scope == "currency" else Stats()
    done = thin(network, sites, stats, keep, scope=scope)
    left = {name: len(channels) for name, channels in done.kept.items()}
    limit = keep * params(network.module)
    assert params(done.edited.model) == count_params(network, done.widths, left) <= limit
    if keep == 1.0:
        assert [left[w.name] for w in done.widths] == [w.channels for w in done.widths]
    else:  # one channel more somewhere would break the budget: nothing is given away
        more = [
            count_params(network, done.widths, left | {w.name: left[w.name] + 1})
            for w in done.widths
            if left[w.name] < w.channels
        ]
        assert max(more) > limit or scope != "uniform"
    assert done.edited.model(X).shape == (64, 4)


def test_resnet20_at_half_counts_what_its_modules_hold() -> None:
    network = untrained("resnet20")
    done = thin(network, discover(network), Stats(), 0.5)
    (kept,) = ([len(done.kept[w.name]) for w in done.widths],)
    model = done.edited.model
    outer = 27 * 16 + 32 + 650 + 2 * 16 * 3 + 2 * 32 * 3 + 2 * 64 * 3
    ends = [(16, 16)] * 3 + [(16, 32)] + [(32, 32)] * 2 + [(32, 64)] + [(64, 64)] * 2
    inner = sum(n * (9 * a + 9 * b + 2) for n, (a, b) in zip(kept, ends, strict=True))
    assert params(model) == outer + inner <= 269_722 / 2 < outer + inner + 2 * 18 * 64
    for block, width in zip(model.blocks, done.widths, strict=True):
        n = len(done.kept[width.name])
        assert (block.conv1.out_channels, block.bn1.num_features, block.conv2.in_channels) == (
            n,
        ) * 3
        assert abs(n - width.channels / 2) <= 1  # uniform, within a channel
    assert isinstance(model.blocks[0].bn1, nn.BatchNorm2d)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_smallest_filters_go_and_the_rest_is_the_masked_network(norm: str) -> None:
    network = chain(bias=True)
    done = thin(network, discover(network), Stats(), 0.5, norm, compensate="none")
    for width in done.widths:
        norms = filter_norms(network, width, norm)
        kept = done.kept[width.name]
        gone = torch.ones(width.channels, dtype=torch.bool)
        gone[kept] = False
        assert 0 < len(kept) < width.channels and norms[gone].max() <= norms[kept].min()
    with torch.no_grad():
        wanted = masked(network.module, done.widths, done.kept)(X)
        assert torch.allclose(done.edited.model(X), wanted, atol=1e-5)
        assert not torch.allclose(network.module(X), wanted, atol=1e-2)


def test_filters_that_are_zero_go_first_and_leave_no_trace() -> None:
    """BatchNorm without a shift, ReLU and GELU: silent channels give zero."""
    network = chain(bias=True)
    with torch.no_grad():
        for layer, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("fc1", None)):
            part = network.module.get_submodule(layer)
            part.weight[1::2] = 0
            part.bias[1::2] = 0
            if norm:
                for tensor in (network.module.get_submodule(norm).bias,
                               network.module.get_submodule(norm).running_mean):  # fmt: skip
                    tensor[1::2] = 0
    sites = discover(network)
    for scope in ("uniform", "global"):
        for how in ("none", "constant"):
            small = prune(network, sites, Stats(), 0.34, scope=scope, compensate=how).model
            assert (small.conv1.out_channels, small.conv2.out_channels) == (4, 6)
            with torch.no_grad():
                assert torch.allclose(small(X), network.module(X), atol=1e-5)


def test_the_original_is_not_touched() -> None:
    network = chain()
    before = copy.deepcopy(network.module.state_dict())
    edited = prune(network, discover(network), Stats(), 0.5)
    after = network.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = copy.deepcopy(network.module)
    install(again, edited.edits)  # parameters; moments are stored as the network has them
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.parameters(), edited.model.parameters(), strict=True)
    )
    assert edited.network.example_inputs is network.example_inputs


def test_every_width_keeps_its_least() -> None:
    network = chain()
    widths, _ = find_widths(network, discover(network))
    kept = choose_channels(network, widths, Stats(), 0.32, "l2", "global", least=0.5)
    assert all(len(kept[w.name]) >= w.channels / 2 for w in widths)
    with pytest.raises(InfeasibleError, match="nearest feasible budget is params=") as caught:
        choose_channels(network, widths, Stats(), 0.05, "l2", "global", least=0.5)
    nearest = caught.value.nearest["params"] / params(network.module)
    choose_channels(network, widths, Stats(), nearest, "l2", "global", least=0.5)


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0},
        {"keep": 1.5},
        {"keep": True},
        {"norm": "l3"},
        {"scope": "layer"},
        {"compensate": "luck"},
        {"least": -0.1},
        {"epochs": -1},
        {"lr": 0},
        {"distill": 2},
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, object]) -> None:
    with pytest.raises(MethodError, match=next(iter(settings))):
        Filters(**settings)  # type: ignore[arg-type]


def test_a_network_without_inner_widths() -> None:
    network = Network(nn.Linear(3, 2), (torch.zeros(2, 3),))
    with pytest.raises(MethodError, match="finds no channel to prune"):
        prune(network, discover(network), Stats())


def test_the_recipe_without_any_data_and_its_file(tmp_path: Path) -> None:
    assert RECIPES["filters"] is Filters
    network = chain()
    result = lamina.compress(network, recipe=Filters(keep=0.5))
    assert params(result.model) <= 0.5 * params(network.module)
    assert result.plan.predicted.params == params(result.model)
    result.save(tmp_path / "small.lamina")
    back = lamina.load(tmp_path / "small.lamina", skeleton=settle(Chain(), 5))
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(back(X), result.model(X))
    notes = " ".join(result.report.dict()["notes"])
    assert "conv1 8 to" in notes and "The plan keeps every value" in notes


def test_macs_of_the_plan_are_those_of_the_smaller_network() -> None:
    network = chain()
    result = lamina.compress(network, recipe=Filters(keep=0.5))
    smaller = Network(result.model, network.example_inputs)
    assert result.plan.predicted.macs == sum(s.macs for s in discover(smaller).layers)
    assert abs(result.plan.predicted.bits / 8 - len(result.file)) < 0.1 * len(result.file)


def test_a_budget_on_parameters_goes_before_keep() -> None:
    network = chain()
    budget = lamina.Budget(params="40%")
    result = lamina.compress(network, budget=budget, recipe=Filters(keep=0.9))
    assert params(result.model) <= 0.4 * params(network.module)
    assert result.report.dict()["budget"]["met"] == {"params": True}


def test_the_recipe_with_training() -> None:
    from tests.recipes.small import make_wide

    network, data = make_wide(), make_data()
    recipe = Filters(keep=0.1, scope="currency", epochs=2, lr=2e-3)
    result = lamina.compress(network, data, recipe=recipe)
    assert params(result.model) <= 0.1 * params(network.module)
    document = result.report.dict()
    assert document["recovery"]["settings"]["recipe"] == "filters"
    assert document["recovery"]["steps"] == 24
    rows = document["recovery"]["history"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert 0 < document["error"]["measured_applied"] != document["error"]["measured"] > 0
    assert any("layers share the channels" in note for note in document["notes"])
    with pytest.raises(DataError, match="needs training data"):
        lamina.compress(network, data.calibration, recipe=recipe)


def test_the_same_every_time() -> None:
    network = chain()
    data = [X]
    files = [lamina.compress(network, data, recipe=Filters(keep=0.5)).file for _ in range(2)]
    assert files[0] == files[1]


def test_torch_pruning_agrees_on_shapes_and_parameters() -> None:
    """A second opinion: its dependency graph, the same ratio, one group for each inner width."""
    tp = pytest.importorskip("torch_pruning")
    network = untrained("resnet20")
    module = copy.deepcopy(network.module)
    widths, _ = find_widths(network, discover(network))
    graph = tp.DependencyGraph().build_dependency(module, network.example_inputs)
    for width in widths:
        layer = module.get_submodule(width.producer.module)
        norms = layer.weight.detach().flatten(1).norm(dim=1)
        gone = norms.argsort()[: width.channels // 2].tolist()
        graph.get_pruning_group(layer, tp.prune_conv_out_channels, idxs=gone).prune()
    keep = params(module) / params(network.module)
    ours = prune(network, discover(network), Stats(), keep, compensate="none").model
    assert params(ours) == params(module)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(ours(x), module.eval()(x), atol=1e-5)
