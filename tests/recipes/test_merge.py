"""The recipe layer-merge: rows against merged networks, fits against lstsq, tables and budgets."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.recipes.chained import Net, counting, images, make
from torch import nn

import lamina
from lamina import artifact
from lamina.errors import DataError, InfeasibleError, MethodError
from lamina.forms import install
from lamina.measure.stats import Stats
from lamina.methods.layer_merge.merging import padded_first
from lamina.network.source import Network
from lamina.plan import Budget
from lamina.plan.apply import copy_module
from lamina.recipes.fitting import fit, fit_all, fits, patches
from lamina.recipes.merge import LayerMerge
from lamina.recipes.merge_tables import distance, judged, options_of, timed, worth
from lamina.recipes.runs import find_runs
from lamina.recipes.unmerged import Change, Row, link_conv, merge_network, unmerge
from lamina.stages import Way

discover = importlib.import_module("lamina.network.discover").discover
QUICK = LayerMerge(speedup=1.3, epochs=0, samples=96)


@pytest.fixture(scope="module")
def network() -> Network:
    return make()


@pytest.fixture(scope="module")
def sites(network: Network):
    return discover(network)


@pytest.fixture(scope="module")
def runs(network: Network, sites):
    return find_runs(network, sites)[0]


@pytest.fixture(scope="module")
def followed(network: Network, sites):
    return QUICK.follow(way_of(network), sites, Stats())


def options(network: Network, ends: str = "none"):
    return options_of(network, find_runs(network, discover(network))[0], ends)


def way_of(network: Network, budget: str | dict = "100%", **others) -> Way:
    return Way(network, images(network), Budget.parse(budget), timer=counting, **others)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def all_changes(network: Network, ends: str = "none") -> list[Change]:
    return [o.change for o in options(network, ends) if o.change is not None]


# --- merging in a module tree --------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["none", "same", "learned"])
def test_every_change_merged_is_what_it_was_unmerged(network: Network, ends: str) -> None:
    """BatchNorms, skips, strides, dropped layers, depthwise ones, activations at the end."""
    changes = all_changes(network, ends)
    x = torch.randn(3, 1, 12, 12)
    seen = set()
    for change in changes:
        row = unmerge(network, [change])
        merged, edits = merge_network(network, row, [change])
        assert apart(merged.forward(x), row.forward(x)) < 1e-5, change
        again = copy_module(network.module)
        install(again, edits)
        assert torch.equal(replace(network, module=again).forward(x), merged.forward(x))
        if change.act == 10:  # its slopes are values of the file
            file = artifact.pack(merged.module, edits, network.source, {})
            loaded = artifact.restore(artifact.unpack(file), Net()).eval()
            assert torch.equal(replace(network, module=loaded).forward(x), merged.forward(x))
        seen.add((change.skip, change.whole, bool(change.kept), change.act))
    kinds = {(True, True, False, 0), (True, True, True, 1), (False, False, True, 0)}
    assert kinds <= seen
    # The linear bottleneck ends with its ReLU6, or a slope.
    assert ((True, True, True, 2) in seen) == (ends == "same")
    assert ((True, True, True, 10) in seen) == (ends == "learned")


def test_several_changes_at_once(network: Network, runs) -> None:
    first = [next(o.change for o in options(network) if o.run == i and o.change and o.change.kept
                  and o.first == 0 and o.last == len(run.links))
             for i, run in enumerate(runs) if len(run.links) > 1]  # fmt: skip
    row = unmerge(network, first)
    merged, _ = merge_network(network, row, first)
    x = torch.randn(3, 1, 12, 12)
    assert apart(merged.forward(x), row.forward(x)) < 1e-5
    convs = [m for m in merged.module.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == len(runs)  # one a run
    assert not any(isinstance(m, Row) for m in merged.module.modules())


def test_without_activations_a_row_is_the_original_inside_the_border(runs) -> None:
    """Where nothing bends, merging loses nothing but the border; with a ReLU it does."""
    torch.manual_seed(0)
    straight = nn.Sequential(
        nn.Conv2d(2, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.Identity(), nn.Conv2d(4, 3, 3, 1, 1)
    ).eval()
    bent = nn.Sequential(*straight[:2], nn.ReLU(), straight[3]).eval()
    x = torch.randn(2, 2, 9, 9)
    for module, close in ((straight, True), (bent, False)):
        given = Network(module, (x,))
        run = find_runs(given, discover(given))[0][0]
        if not run.links[1:]:  # an identity leaves nothing in the data flow to take out
            pytest.fail("the two convolutions are not linked")
        change = Change(run, 0, 2, (0, 1))
        with torch.no_grad():
            made, before = unmerge(given, [change]).module(x), module(x)
        assert (apart(made[..., 1:-1, 1:-1], before[..., 1:-1, 1:-1]) < 1e-5) == close
        assert apart(made, before) > 1e-3  # the border: padding is at the first


def test_a_wrong_edit_would_be_seen(network: Network) -> None:
    """Negative control of the check that ends every merging."""
    change = next(c for c in all_changes(network) if c.skip and c.kept)
    row = unmerge(network, [change])
    broken = copy_module(row.module)
    block = broken.get_submodule(change.path)
    assert isinstance(block, Row)
    block.merged = lambda: replace(Row.merged(block), bias=torch.full((8,), 9.0))  # type: ignore
    with pytest.raises(MethodError, match="merging changed"):
        merge_network(network, replace(row, module=broken), [change])


def test_the_middle_of_a_kernel_can_be_fitted_and_merged(network: Network, runs) -> None:
    small = [
        o.change for o in options_of(network, runs, "none", True) if o.change and o.change.middle
    ]
    assert {c.kernel for c in small if c.path == "a"} == {(1, 1)}
    x, data = torch.randn(3, 1, 12, 12), images(network)
    for change in small[:3]:
        found = fit(network, network, change, data.calibration, 96)
        assert found[0].weight.shape == change.outline.weight.shape
        row = unmerge(network, [change], {0: found})
        merged, _ = merge_network(network, row, [change])
        assert apart(merged.forward(x), row.forward(x)) < 1e-5
        assert row.forward(x).shape == network.forward(x).shape


def test_the_padding_of_a_row_is_at_its_first_layer(network: Network) -> None:
    change = next(c for c in all_changes(network) if len(c.kept) == 2 and not c.skip)
    row = unmerge(network, [change]).module.get_submodule(change.path)
    convs = [m for m in row.modules() if isinstance(m, nn.Conv2d)]
    given = [link_conv(network.module, change.run.links[i]) for i in change.kept]
    assert [tuple(c.padding) for c in convs] == [c.padding for c in padded_first(given)]
    assert not any(p for c in convs[1:] for p in c.padding)


# --- fits ----------------------------------------------------------------------------------------


def test_patches_are_what_a_convolution_sees() -> None:
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    conv = nn.Conv2d(3, 5, (3, 2), (2, 1), (1, 0), bias=False).double()
    seen = patches(x, (3, 2), (2, 1), (1, 0))
    made = conv(x).movedim(1, -1).reshape(-1, 5)
    assert torch.allclose(seen @ conv.weight.reshape(5, -1).T, made)


def test_a_fit_is_the_least_squares_solution(network: Network) -> None:
    change = next(c for c in all_changes(network) if c.path == "a" and c.kept)
    data = images(network)
    conv, mean, var = fit(network, network, change, data.calibration, 96)
    together = fit_all(network, {7: change}, data.calibration, 96)[7][0]
    assert torch.allclose(conv.weight, together.weight, atol=1e-4)
    x = network.module.stem(data.calibration[0][0]).detach()
    with torch.no_grad():
        block = network.module.a
        y = block.b2(block.c2(torch.relu(block.b1(block.c1(x)))))
    seen = patches(x, conv.kernel, conv.stride, conv.padding)
    whole = torch.cat((seen, torch.ones(len(seen), 1)), 1).double()
    best = torch.linalg.lstsq(whole, y.movedim(1, -1).reshape(-1, 8).double()).solution
    ours = torch.cat((conv.weight.flatten(1), conv.bias[:, None]), 1).T
    wanted = y.movedim(1, -1).reshape(-1, 8).double()
    lost, least = ((whole @ w - wanted).square().sum() for w in (ours, best))
    assert least <= lost <= 1.001 * least
    flat = whole[:, :-1] @ conv.weight.flatten(1).T
    assert torch.allclose(mean, flat.mean(0), atol=1e-4)
    assert torch.allclose(var, flat.var(0, correction=0), rtol=1e-3)


def test_a_row_that_begins_fitted_computes_the_fit(network: Network) -> None:
    """Its BatchNorm is set so that it changes nothing, and training begins from there."""
    change = next(c for c in all_changes(network) if c.path == "a" and c.kept)
    data = images(network)
    found = fit(network, network, change, data.calibration, 96)
    row = unmerge(network, [change], {0: found}).module.get_submodule("a")
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert torch.allclose(row(x), torch.relu(found[0](x.double()) + x).float(), atol=1e-5)
    assert isinstance(row, Row) and isinstance(row.layers[1], nn.BatchNorm2d)


def test_a_later_fit_makes_up_for_earlier_changes(network: Network) -> None:
    data = images(network)
    a, b = (
        next(c for c in all_changes(network) if c.path == path and c.kept) for path in ("a", "b")
    )
    first = {0: fit(network, network, a, data.calibration, 96)}
    behind = unmerge(network, [a], first)
    score = distance(network, data.calibration, 96)
    alone = fit(network, network, b, data.calibration, 96)
    after = fit(network, behind, b, data.calibration, 96)
    assert score(unmerge(network, [a, b], first | {1: after})) < score(
        unmerge(network, [a, b], first | {1: alone})
    )


# --- tables --------------------------------------------------------------------------------------


def test_what_is_offered(network: Network, runs) -> None:
    found = options(network)
    spans = {(o.run, o.first, o.last) for o in found if o.change}
    whole = {runs[i].name: [s[1:] for s in sorted(spans) if s[0] == i] for i in range(len(runs))}
    assert whole["stem.0..stem.0"] == []
    # Activations are calls: inside a block nothing can be taken out, but layers can be dropped.
    assert whole["a.c1..a.c2"] == [(0, 1), (0, 2), (1, 2)]
    assert (0, 3) in whole["row.0..row.5"] and (1, 3) in whole["row.0..row.5"]
    assert all(o.change.whole for o in found if o.run == 1 and o.change and o.last - o.first == 2)
    kernels = {o.change.kernel[0] for o in found if o.run == 1 and o.change and o.change.kept}
    assert kernels == {3, 5}
    bottleneck = [o.change for o in found if o.run == 2 and o.change and o.change.whole]
    assert sorted(c.kernel[0] for c in bottleneck if c.kept) == [1, 3]
    assert sum(not c.kept for c in bottleneck) == 1  # the block may go, its skip stays


def test_only_what_is_faster_is_looked_at(network: Network, runs) -> None:
    timed_, whole = timed(network, runs, options(network), timer=counting)
    good = worth(runs, timed_)
    keep = {(o.run, o.first): o.seconds for o in timed_ if o.change is None}
    assert whole > 0 and all(s > 0 for s in keep.values())
    assert {(o.run, o.first) for o in good if o.change is None} == set(keep)
    for o in timed_:
        stays = math.fsum(keep[o.run, i] for i in range(o.first, o.last))
        assert (o in good) == (o.change is None or o.seconds < stays)
    slow = [o for o in timed_ if o not in good]
    assert any(o.change and o.change.kernel == (5, 5) for o in slow)  # 25 taps for 18


def test_a_fit_costs_less_than_the_product(network: Network) -> None:
    data = images(network)
    changed = [o for o in options(network) if o.change and fits(o.change)]
    score = distance(network, data.calibration, 96)
    fitted, plain = (
        judged(network, changed, score, data.calibration, 96, fitted=f) for f in (True, False)
    )
    assert sum(o.error for o in fitted) < 0.5 * sum(o.error for o in plain)
    assert score(network) == pytest.approx(0.0, abs=1e-6)


# --- the recipe ----------------------------------------------------------------------------------


def test_it_is_as_fast_as_asked_and_saves_and_loads_bit_for_bit(
    network: Network, sites, followed
) -> None:
    final = followed.final
    took = counting_time(final.model), counting_time(base_of(network))
    assert took[1] / took[0] >= 1.3 / 1.03
    file = artifact.pack(final.model, final.edits, network.source, {})
    loaded = artifact.restore(artifact.unpack(file), Net()).eval()
    x = torch.randn(3, 1, 12, 12)
    assert torch.equal(loaded(x), final.network.forward(x))
    program = torch.export.export(final.model.eval(), (x,))
    assert torch.equal(program.module()(x), final.network.forward(x))
    again = QUICK.follow(way_of(network), sites, Stats())
    assert torch.equal(again.final.network.forward(x), final.network.forward(x))
    before = make().module.state_dict()
    assert all(torch.equal(t, before[n]) for n, t in network.module.state_dict().items())


def counting_time(module: nn.Module) -> float:
    from lamina.measure.clock import Job, whole_call

    given = Network(module, (torch.randn(4, 1, 12, 12),))
    return counting([Job(module, (whole_call(given),))], 1, 0.0)[0][0]


def base_of(network: Network) -> nn.Module:
    from lamina.recipes.merge import rewritten

    return rewritten(network).network.module


def test_the_more_speed_the_more_is_lost(network: Network, sites) -> None:
    found = []
    for speedup in (1.0, 1.2, 1.9):
        recipe = replace(QUICK, speedup=speedup)
        followed = recipe.follow(way_of(network), sites, Stats())
        found.append((counting_time(followed.final.model), followed.plan.error))
    assert all(b[0] <= a[0] and b[1] >= a[1] - 1e-9 for a, b in pairwise(found))
    assert found[0][1] == 0.0 and found[-1][0] < found[0][0]


@pytest.mark.parametrize("start", ["fit", "product"])
def test_training_with_the_layers_apart_brings_it_nearer(network: Network, sites, start) -> None:
    data = images(network)
    recipe = LayerMerge(
        speedup=2.0, epochs=8, samples=96, lr=1e-3, distill=1.0, start=start, ends="same"
    )
    followed = recipe.follow(way_of(network), sites, Stats())
    assert followed.applied is not None and followed.history
    score = distance(network, data.calibration, 96)
    assert score(followed.final.network) < score(followed.applied.network)
    shapes = [tuple(p.shape) for p in followed.final.model.parameters()]
    assert shapes == [tuple(p.shape) for p in followed.applied.model.parameters()]


def test_importance_by_training(network: Network) -> None:
    recipe = LayerMerge(
        speedup=1.3, epochs=0, samples=96, importance="trained", trial=0.2, start="product"
    )
    followed = recipe.follow(way_of(network), discover(network), Stats())
    assert recipe.trains and followed.plan.error >= 0.0
    assert followed.settings["importance"] == "trained"


def test_a_budget_on_latency_goes_before_the_speedup(network: Network) -> None:
    recipe = replace(QUICK, speedup=1.0)
    way = way_of(network, {"latency": "60%"})
    final = recipe.follow(way, discover(network), Stats()).final
    assert counting_time(final.model) <= 0.6 * 1.03 * counting_time(network.module)


def test_the_plan_counts_what_is_left(followed) -> None:
    left = sum(p.numel() for p in followed.final.model.parameters())
    assert followed.plan.predicted.params == left
    assert followed.plan.predicted.macs < followed.plan.original.macs
    assert any("Merged" in note for note in followed.notes)


def test_too_fast_is_a_clear_error(network: Network) -> None:
    recipe = replace(QUICK, speedup=1000.0)
    with pytest.raises(InfeasibleError, match="ask for a speed-up of") as failed:
        recipe.follow(way_of(network), discover(network), Stats())
    assert failed.value.nearest["seconds"] > 0


def test_what_it_needs(network: Network) -> None:
    sites = discover(network)
    with pytest.raises(DataError, match="calibration"):
        QUICK.follow(replace(way_of(network), data=None), sites, Stats())
    with pytest.raises(DataError, match="training data"):
        LayerMerge().follow(replace(way_of(network), data=None), sites, Stats())
    flat = Network(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)), network.example_inputs)
    with pytest.raises(MethodError, match="nothing to merge"):
        QUICK.follow(replace(way_of(network), network=flat), discover(flat), Stats())


@pytest.mark.parametrize(
    "wrong",
    [
        *({"speedup": 0.5}, {"importance": "guess"}, {"start": "zero"}, {"epochs": -1}),
        *({"optimizer": "lion"}, {"distill": 2.0}, {"precision": 0.0}, {"lr": 0.0}),
        {"importance": "trained", "trial": 0.0},
        {"ends": "never"},
    ],
)
def test_settings_that_cannot_be_used(wrong: dict) -> None:
    with pytest.raises(MethodError):
        LayerMerge(**wrong)


def test_the_whole_way_and_what_comes_after_it(network: Network, tmp_path, monkeypatch) -> None:
    """A file of the recipe is a network like any other: its output is compressed further."""
    for place in ("lamina.recipes.merge_tables", "lamina.measure.latency"):
        monkeypatch.setattr(importlib.import_module(place), "clock", counting)
    data, recipe = images(network), LayerMerge(speedup=1.8, epochs=1, samples=96)
    result = lamina.compress(network, data, recipe=recipe)
    result.save(tmp_path / "net.lamina")
    loaded = lamina.load(tmp_path / "net.lamina", skeleton=Net())
    x = torch.randn(3, 1, 12, 12)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), result.model.eval()(x))
    assert any("Merged" in note for note in result.report.dict()["notes"])
    program = torch.export.export(result.model.eval(), (x,))
    assert torch.equal(program.module()(x), result.model(x))
    second = Network(loaded.eval(), (x,), loss="logits")
    small = lamina.compress(second, data, "30%", methods=["rdoq"], recover=None)
    assert len(small.file) < 0.5 * len(result.file)
