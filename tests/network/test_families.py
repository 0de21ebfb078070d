"""Families: layers of one role and shape, by name, and everything that is in none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lamina.network.discover import discover
from lamina.network.families import find_families
from lamina.network.sites import Site
from lamina.network.source import Network


def sites_of(module: nn.Module, *inputs: torch.Tensor):
    return discover(Network(module.eval(), inputs))


def names(families) -> dict[str, tuple[str, ...]]:
    return {family.name: family.members for family in families}


def fc(name: str, **more) -> Site:
    return Site(name, module=name, weight=f"{name}.weight", shape=(4, 4), **more)


class Blocks(nn.Module):
    """Two roles of one shape in three blocks, and a stem of that shape too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"query": nn.Linear(4, 4), "out": nn.Linear(4, 4)}) for _ in range(3)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block["out"](block["query"](x).relu())
        return x


def test_linear_layers_of_one_role_are_a_family():
    found = sites_of(Blocks(), torch.zeros(2, 4)).families
    assert names(found) == {
        f"blocks.*.{role}": tuple(f"blocks.{i}.{role}" for i in range(3))
        for role in ("query", "out")
    }
    assert {f.kind for f in found} == {"family"} and found[0].shape == (4, 4)
    assert found[0].positions == 3  # of all members together


def test_convolutions_of_one_geometry_are_a_family_whatever_they_are_called():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)
            self.b = nn.Conv2d(3, 3, 3, padding=1)
            self.strided = nn.Conv2d(3, 3, 3, 2, padding=1)
            self.bare = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.grouped = nn.Conv2d(3, 3, 3, padding=1, groups=3)

        def forward(self, x):
            return self.grouped(self.bare(self.strided(self.b(self.a(x)))))

    found = sites_of(Net(), torch.zeros(1, 3, 8, 8)).families
    assert names(found) == {"*": ("a", "b")}


@pytest.mark.parametrize(
    "more",
    [
        {"aliases": ("head.weight",)},
        {"rigid": "read raw"},
        {"op": "embedding"},
        {"op": "recurrent"},
        {"bias": "1.bias"},
        {"groups": 2},
        {"transposed": True},
    ],
)
def test_what_is_unlike_is_in_no_family(more):
    assert find_families([fc("0"), replace(fc("1"), **more)]) == ()
    assert names(find_families([fc("0"), replace(fc("1"), **more), fc("2")])) == {"*": ("0", "2")}


def test_two_families_never_have_one_name():
    small = [fc(f"{i}.x") for i in range(2)]
    large = [replace(fc(f"{i}.x"), shape=(5, 5)) for i in range(2, 4)]
    assert names(find_families([*small, *large])) == {
        "*.x": ("0.x", "1.x"),
        "*.x (2)": ("2.x", "3.x"),
    }


def test_families_of_paths_unequally_long_name_the_ends():
    convs = [Site(n, op="conv", module=n, shape=(2, 2, 1, 1)) for n in ("a", "b.c", "d")]
    assert names(find_families(convs)) == {"a, d": ("a", "b.c", "d")}


def test_tied_layers_of_a_network_are_in_no_family():
    net = Blocks()
    net.blocks[1]["query"].weight = net.blocks[0]["query"].weight
    found = names(sites_of(net, torch.zeros(2, 4)).families)
    assert "blocks.*.query" not in found and len(found["blocks.*.out"]) == 3
