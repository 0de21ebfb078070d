"""Choosing groups under a budget, against brute force, and making them share."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tests.recipes.kin import images, params, text

from lamina.errors import DataError, InfeasibleError, MethodError
from lamina.measure.calibrate import calibrate
from lamina.measure.stats import Stats
from lamina.methods.layer_fusion.distances import distances
from lamina.methods.layer_fusion.fuse import joined, members_of, merge_order
from lamina.network.discover import discover
from lamina.recipes.tying import (
    PATTERNS,
    choose_groups,
    find_bundles,
    fuse_groups,
    mix_groups,
    structure_of,
)


@pytest.fixture(scope="module")
def gpt():
    network, data = text()
    return network, discover(network), data


def alone(bundles):
    return [tuple(range(b.count)) for b in bundles]


def test_families_are_bundles_alone_or_by_block(gpt) -> None:
    _, sites, _ = gpt
    single, whole = find_bundles(sites), find_bundles(sites, unit="block")
    assert [b.name for b in single] == [f.name for f in sites.families] and len(single) == 6
    assert [len(b.families) for b in whole] == [6]
    assert whole[0].blocks == tuple(f"blocks.{i}" for i in range(4))
    assert whole[0].saved == sum(b.saved for b in single) == 4 * 144 + 2 * 12 * 48
    conv = find_bundles(discover(images()[0]), unit="block")
    assert len(conv) == 1 and conv[0].blocks == ()  # two layers of one block: no whole blocks


def test_layers_can_be_left_out(gpt) -> None:
    _, sites, _ = gpt
    left = find_bundles(sites, ("*.attention.*",))
    assert [b.name for b in left] == ["blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]
    with pytest.raises(MethodError, match="names no layer"):
        find_bundles(sites, ("blok*",))
    with pytest.raises(MethodError, match="finds no layers to fuse"):
        find_bundles(sites, ("*",))
    with pytest.raises(MethodError, match="unknown unit"):
        find_bundles(sites, unit="stage")


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_budgets_are_kept(gpt, pattern, share) -> None:
    network, sites, _ = gpt
    for unit in ("layer", "block"):
        bundles = find_bundles(sites, unit=unit)
        module = copy.deepcopy(network.module)
        limit = share * params(module)
        found = choose_groups(module, bundles, alone(bundles), limit, Stats(), pattern=pattern)
        fuse_groups(module, bundles, alone(bundles), found)
        assert params(module) <= limit


def test_the_choice_is_the_best_of_all(gpt) -> None:
    """Every combination of levels of three families, by brute force."""
    network, sites, _ = gpt
    bundles = find_bundles(sites, ("*.mlp.*", "*.attention.out"))
    whole, lines = params(network.module), []
    for bundle in bundles:
        weights = [network.module.get_submodule(s.module).weight for s in bundle.layers[0]]
        apart = distances(weights)
        total, line = 0.0, []
        for part, height in merge_order(apart / (apart.sum() / 12)):
            total += height
            line.append((part, total))
        lines.append(line)
    for share in (0.95, 0.9, 0.85):
        limit = share * whole
        fits = [
            combo
            for combo in itertools.product(*lines)
            if whole - sum(144 * (4 - len(set(p))) for p, _ in combo) <= limit
        ]
        best = min(sum(cost for _, cost in combo) for combo in fits)
        found = choose_groups(network.module, bundles, alone(bundles), limit, Stats())
        costs = [dict(line)[part] for line, part in zip(lines, found, strict=True)]
        assert sum(costs) == pytest.approx(best)


def test_groups_only_grow(gpt) -> None:
    network, sites, _ = gpt
    for unit, pattern in itertools.product(("layer", "block"), PATTERNS):
        bundles, module = find_bundles(sites, unit=unit), copy.deepcopy(network.module)
        now = alone(bundles)
        for share in (0.8, 0.6, 0.4):
            limit = share * params(network.module)
            new = choose_groups(module, bundles, now, limit, Stats(), pattern=pattern)
            assert all(joined(a, b) == b for a, b in zip(now, new, strict=True))
            fuse_groups(module, bundles, now, new)
            assert params(module) <= limit
            now = new


def test_what_cannot_be_met_says_what_can(gpt) -> None:
    network, sites, _ = gpt
    bundles = find_bundles(sites)
    with pytest.raises(InfeasibleError, match="nearest feasible budget is params=") as found:
        choose_groups(network.module, bundles, alone(bundles), 100, Stats())
    module = copy.deepcopy(network.module)
    fuse_groups(module, bundles, alone(bundles), [(0,) * 4] * 6)
    assert found.value.nearest == {"params": float(params(module))}
    with pytest.raises(DataError, match="calibration data"):
        choose_groups(network.module, bundles, alone(bundles), 1e9, Stats(), distance="loss")


def test_a_duplicate_is_chosen_first_under_every_measure(gpt) -> None:
    from lamina.recipes.tying import MEASURES

    network, sites, data = gpt
    bundles = find_bundles(sites, ("*.mlp.*", "*.attention.out", "*.key", "*.value"))
    module = copy.deepcopy(network.module)
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        for i, block in enumerate(module.blocks):  # different in scale, mean and form
            block.attention.query.weight.mul_(1 + i).add_(0.02 * i)
            block.attention.query.weight[:, i] *= 2
        noise = 1e-5 * torch.randn(12, 12, generator=g)
        module.blocks[3].attention.query.weight.copy_(
            module.blocks[1].attention.query.weight + noise
        )
    stats = calibrate(network, sites, data, samples=48)
    for name in MEASURES:
        found = choose_groups(
            module, bundles, alone(bundles), params(module) - 1, stats, distance=name
        )
        assert found == [(0, 1, 2, 1)], name


def test_sharing_keeps_biases_and_norms_and_ties_in_place(gpt) -> None:
    network, sites, _ = gpt
    bundles, module = find_bundles(sites, unit="block"), copy.deepcopy(network.module)
    groups = [(0, 0, 1, 1)]
    fuse_groups(module, bundles, alone(bundles), groups)
    for name, tensor in network.module.named_parameters():
        new = module.get_parameter(name)
        if tensor.dim() < 2 or not name.startswith("blocks"):
            assert torch.equal(new, tensor)
    one, two, old = module.blocks[0].mlp.fc1, module.blocks[1].mlp.fc1, network.module.blocks
    assert one.weight is two.weight is not module.blocks[2].mlp.fc1.weight
    torch.testing.assert_close(one.weight, (old[0].mlp.fc1.weight + old[1].mlp.fc1.weight) / 2)
    edits = structure_of(network.module, bundles, groups)
    assert len(edits) == 12 and {e.form for e in edits} == {"tie"}


def test_the_mean_of_a_group_counts_all_its_members(gpt) -> None:
    """In steps: a pair and then a third weigh two and one."""
    network, sites, _ = gpt
    bundles, module = find_bundles(sites, unit="block"), copy.deepcopy(network.module)
    start, middle, end = alone(bundles), [(0, 0, 1, 2)], [(0, 0, 0, 1)]
    fuse_groups(module, bundles, start, middle)
    fuse_groups(module, bundles, middle, end)
    weights = torch.stack([b.mlp.fc2.weight.detach() for b in network.module.blocks[:3]])
    torch.testing.assert_close(module.blocks[2].mlp.fc2.weight.detach(), weights.mean(0))
    assert module.blocks[2].mlp.fc2.weight is module.blocks[0].mlp.fc2.weight


def test_mixing_loses_nothing_and_ties_nothing(gpt) -> None:
    network, sites, _ = gpt
    bundles, module = find_bundles(sites, unit="block"), copy.deepcopy(network.module)
    mix_groups(module, bundles, [(0, 1, 0, 2)], seed=1)
    assert params(module) == params(network.module)

    def sorted_pair(m):
        pair = torch.stack([m.blocks[i].attention.key.weight.detach() for i in (0, 2)])
        return pair.sort(0).values

    assert torch.equal(sorted_pair(module), sorted_pair(network.module))
    assert not torch.equal(
        module.blocks[0].attention.key.weight, network.module.blocks[0].attention.key.weight
    )
    assert torch.equal(
        module.blocks[1].attention.key.weight, network.module.blocks[1].attention.key.weight
    )


def test_dropped_blocks_vanish_once(gpt) -> None:
    network, sites, _ = gpt
    bundles, module = find_bundles(sites, unit="block"), copy.deepcopy(network.module)
    start, middle, end = alone(bundles), [(0, 0, 1, 2)], [(0, 0, 0, 1)]
    fuse_groups(module, bundles, start, middle, drop=True)
    fuse_groups(module, bundles, middle, end, drop=True)
    kinds = [type(block).__name__ for block in module.blocks]
    assert kinds == ["Block", "Identity", "Identity", "Block"]
    edits = structure_of(network.module, bundles, end, start)
    assert [e.path for e in edits] == ["blocks.1", "blocks.2"]
    weights = torch.stack([b.mlp.fc2.weight.detach() for b in network.module.blocks[:3]])
    torch.testing.assert_close(module.blocks[0].mlp.fc2.weight.detach(), weights.mean(0))
    assert [len(g) for g in members_of(end[0])] == [3, 1]
