"""Alignment: orders against brute force, and functions that do not change."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from lamina.errors import MethodError
from lamina.forms import install
from lamina.methods.layer_fusion.align import Hidden, align, match, permute
from lamina.network.discover import discover
from lamina.network.source import Network


class Blocks(nn.Module):
    """Residual blocks, each with a hidden width of its own; linear or convolutional."""

    def __init__(self, count: int, conv: bool = False) -> None:
        super().__init__()
        torch.manual_seed(count + conv)
        make = (lambda a, b: nn.Conv2d(a, b, 3, padding=1)) if conv else nn.Linear
        norm = nn.BatchNorm2d if conv else nn.BatchNorm1d
        self.first = nn.ModuleList(make(4, 6) for _ in range(count))
        self.norms = nn.ModuleList(norm(6) for _ in range(count))
        self.second = nn.ModuleList(make(6, 4) for _ in range(count))
        for n in self.norms:
            nn.init.uniform_(n.weight, 0.5, 2)
            nn.init.normal_(n.bias)
            n.running_mean.normal_()
            n.running_var.uniform_(0.5, 2)
        self.double().eval()

    def forward(self, x):
        for first, norm, second in zip(self.first, self.norms, self.second, strict=True):
            x = x + second(torch.relu(norm(first(x))))
        return x


def hidden_of(net: nn.Module, x: torch.Tensor) -> dict[str, Hidden]:
    sites = discover(Network(net, (x,)))
    layers = {s.name: s for s in sites.layers}
    return {
        f"first.{i}": Hidden(layers[f"first.{i}"], layers[f"second.{i}"], (f"norms.{i}",))
        for i in range(len(net.first))
    }


def inputs(conv: bool) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(*((3, 4, 5, 5) if conv else (3, 4)), generator=g, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_the_best_of_all(seed) -> None:
    g = torch.Generator().manual_seed(seed)
    kept = [torch.randn(5, 3, generator=g), torch.randn(5, 2, 2, generator=g)]
    moved = [torch.randn(5, 3, generator=g), torch.randn(5, 2, 2, generator=g)]
    cosine = torch.nn.functional.cosine_similarity

    def worth(order) -> float:
        turned = [t[list(order)] for t in moved]
        both = zip(kept, turned, strict=True)
        return sum(float(cosine(a.flatten(1), b.flatten(1), dim=1).sum()) for a, b in both)

    best = max(worth(order) for order in itertools.permutations(range(5)))
    assert worth(match(kept, moved).tolist()) == pytest.approx(best, abs=1e-5)


def test_equal_neurons_stay_where_they_are() -> None:
    assert match([torch.ones(4, 3)], [torch.ones(4, 3)]).tolist() == [0, 1, 2, 3]
    assert match([torch.zeros(4, 3)], [torch.ones(4, 3)]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("conv", [False, True])
def test_a_permuted_copy_is_found_and_the_function_stays(conv) -> None:
    net, x = Blocks(2, conv), inputs(conv)
    hidden = hidden_of(net, x)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    with torch.no_grad():  # the second block is the first one with its neurons turned
        net.first[1].weight.copy_(net.first[0].weight[order])
        net.second[1].weight.copy_(net.second[0].weight[:, order])
    before = net(x)
    assert align(net, hidden, [["first.0", "first.1"], ["second.0", "second.1"]]) == ("first.1",)
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)
    assert torch.equal(net.first[1].weight, net.first[0].weight)
    assert torch.equal(net.second[1].weight, net.second[0].weight)


@pytest.mark.parametrize("leave_out", ["bias", "norms", "columns"])
def test_a_half_permutation_changes_the_function(leave_out) -> None:
    """Negative control: rows, biases, norms and columns all have to move."""
    net, x = Blocks(1), inputs(False)
    (hidden,) = hidden_of(net, x).values()
    edits = permute(net, [hidden], torch.tensor([1, 2, 3, 4, 5, 0]))
    gone = {"bias": "first.0.bias", "norms": "norms.0", "columns": "second.0.weight"}[leave_out]
    before, broken = net(x), copy.deepcopy(net)
    install(broken, [e for e in edits if not e.path.startswith(gone)])
    assert not torch.allclose(broken(x), before, rtol=1e-3, atol=1e-3)
    install(net, edits)
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def test_pixels_of_a_flattened_map_move_together() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).double()
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    sites = {s.name: s for s in discover(Network(net, (x,))).layers}
    before = net(x)
    install(net, permute(net, [Hidden(sites["0"], sites["3"], (), 4)], torch.tensor([2, 0, 1])))
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def test_tied_layers_move_together_or_not_at_all() -> None:
    net, x = Blocks(3), inputs(False)
    hidden = hidden_of(net, x)
    net.first[2].weight = net.first[1].weight
    net.second[2].weight = net.second[1].weight
    turn = torch.tensor([1, 0, 2, 3, 4, 5])
    with pytest.raises(MethodError, match=r"tied to first\.2\.weight"):
        permute(net, [hidden["first.1"]], turn)
    before = net(x)
    groups = [[f"first.{i}" for i in range(3)], [f"second.{i}" for i in range(3)]]
    assert align(net, hidden, groups) == ("first.1", "first.2")
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)
    assert net.first[2].weight is net.first[1].weight


def test_a_layer_whose_neurons_are_read_elsewhere_sets_the_order() -> None:
    net, x = Blocks(2), inputs(False)
    hidden = hidden_of(net, x)
    del hidden["first.1"]  # as if somebody else looked at its outputs
    kept, before = net.first[1].weight.clone(), net(x)
    assert align(net, hidden, [["first.0", "first.1"]]) == ("first.0",)
    assert torch.equal(net.first[1].weight, kept)
    torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def test_alignment_brings_layers_nearer() -> None:
    net, x = Blocks(4, conv=True), inputs(True)
    hidden = hidden_of(net, x)

    def apart() -> float:
        one = net.first[0].weight
        return sum(float((f.weight - one).detach().norm()) for f in net.first[1:])

    before = apart()
    align(net, hidden, [[f"first.{i}" for i in range(4)]])
    assert apart() < before


def test_what_is_no_order_is_refused() -> None:
    net, x = Blocks(1), inputs(False)
    (hidden,) = hidden_of(net, x).values()
    with pytest.raises(MethodError, match="no order"):
        permute(net, [hidden], torch.tensor([0, 0, 1, 2, 3, 4]))
    with pytest.raises(MethodError, match="no order of the neurons"):
        permute(net, [hidden], torch.arange(3))
    turned = replace(hidden, producer=replace(hidden.producer, transposed=True))
    with pytest.raises(MethodError, match="can be moved"):
        permute(net, [turned], torch.arange(6))
    with pytest.raises(MethodError, match="cannot be matched"):
        match([torch.zeros(3, 2)], [torch.zeros(2, 2)])
