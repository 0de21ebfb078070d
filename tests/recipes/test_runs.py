"""Runs of convolutions: what is found, and what only looks like one."""

from __future__ import annotations

import importlib

import pytest
import torch
from tests.recipes.chained import Block, make
from torch import nn

from lamina.network.source import Network
from lamina.recipes.runs import Run, computed, find_runs
from lamina.zoo import untrained

discover = importlib.import_module("lamina.network.discover").discover


def runs_of(module: nn.Module | Network, shape: tuple[int, ...] = (2, 4, 8, 8)):
    given = module if isinstance(module, Network) else Network(module, (torch.randn(shape),))
    return find_runs(given, discover(given))


def by_name(runs: tuple[Run, ...]) -> dict[str, Run]:
    return {run.links[0].site.name: run for run in runs}


def test_blocks_and_rows_are_found() -> None:
    runs = by_name(runs_of(make())[0])
    assert list(runs) == ["stem.0", "a.c1", "b.conv.0", "row.0"]
    a, b, row = runs["a.c1"], runs["b.conv.0"], runs["row.0"]
    assert (a.skip, a.block, a.ends, a.after, a.idle) == (True, "a", 1, 1, True)
    assert [(k.act, k.through) for k in a.links] == [(1, ""), (0, "")]
    assert (b.skip, b.block, b.ends, b.idle) == (True, "b", 0, True)
    assert [k.reducible for k in b.links] == [False, True, False]
    assert not row.skip and [k.through for k in row.links] == ["row.2", "row.4", ""]
    assert [k.norm for k in row.links] == ["row.1", "", ""]


def test_a_run_computes_what_its_block_does() -> None:
    network = make()
    run = by_name(runs_of(network)[0])["a.c1"]
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert torch.allclose(network.module.a(x), computed(network.module, run, x), atol=1e-6)


def test_a_scaled_sum_is_no_skip() -> None:
    """The data flow shows an addition; only running it shows that it adds half of it."""
    run = by_name(runs_of(make(0.5))[0])["a.c1"]
    assert not run.skip and not run.block


def test_zoo_networks() -> None:
    runs, refused = runs_of(untrained("resnet20"))
    assert [r.block for r in runs if r.skip] == [f"blocks.{i}" for i in (0, 1, 2, 4, 5, 7, 8)]
    assert all(r.after == 1 for r in runs) and not refused
    runs, _ = runs_of(untrained("mobilenet-v2-tiny"))
    assert [r.block for r in runs if r.skip] == [f"features.{i}" for i in (1, 2, 4, 5, 7, 8)]
    assert all(link.act == 2 for r in runs for link in r.links[:-1])


@pytest.mark.parametrize(
    ("conv", "why"),
    [
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding"),
        (nn.Conv2d(4, 4, 3, padding="same"), "padding"),
    ],
)
def test_what_cannot_be_merged_has_a_reason(conv: nn.Module, why: str) -> None:
    runs, refused = runs_of(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), conv))
    assert [len(r.links) for r in runs] == [1]
    assert len(refused) == 1 and why in refused[0].why


def test_a_module_that_runs_twice_ends_a_run() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

        def forward(self, x):
            return self.b(self.act(self.b(self.act(self.a(x)))))

    runs, refused = runs_of(Twice())
    assert [r.name for r in runs] == ["a..a"] and refused[0].where == "b"


def test_an_activation_that_runs_elsewhere_too_cannot_be_taken_out() -> None:
    act = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(4, 4, 1), act, nn.Conv2d(4, 4, 1), act)
    (run,), _ = runs_of(net)
    assert [(k.act, k.through) for k in run.links] == [(1, ""), (1, "")]


def test_a_branch_ends_a_run() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y) * y

    assert [r.name for r in runs_of(Branch())[0]] == ["a..a", "b..b"]


def test_a_block_that_is_called_twice_is_none() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(4)

        def forward(self, x):
            return self.block(self.block(x))

    runs, refused = runs_of(Net().eval())
    assert not runs and {r.where for r in refused} == {"block.c1", "block.c2"}


def test_without_a_data_flow_there_are_no_runs() -> None:
    runs, refused = find_runs(Network(nn.Conv2d(4, 4, 1)), discover(Network(nn.Conv2d(4, 4, 1))))
    assert not runs and refused[0].where == "runs"
