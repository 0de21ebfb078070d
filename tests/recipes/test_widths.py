"""Inner widths: which are found, which are refused and why, and what narrowing them computes."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.recipes.thin import Chain, chain, settle
from torch import Tensor, nn

from lamina.errors import MethodError
from lamina.forms import install
from lamina.measure.stats import Stats
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.recipes.filters import prune
from lamina.recipes.widths import find_widths, masked, narrow_edits
from lamina.zoo import untrained


def found_in(module: nn.Module, x: Tensor) -> tuple[list[str], list[str]]:
    network = Network(settle(module), (x,))
    widths, refusals = find_widths(network, discover(network))
    return [w.name for w in widths], [r.why for r in refusals]


def test_widths_of_a_chain() -> None:
    network = chain()
    widths, refusals = find_widths(network, discover(network))
    assert [(w.name, w.channels, w.repeat, w.norms, w.after) for w in widths] == [
        ("conv1 -> conv2", 8, 1, ("bn1",), "bn2"),
        ("conv2 -> fc1", 12, 4, ("bn2",), ""),
        ("fc1 -> fc2", 10, 1, (), ""),
    ]
    assert refusals == ()
    assert widths[1].inputs(torch.tensor([0, 2])).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_resnet20_has_nine_inner_widths() -> None:
    network = untrained("resnet20")
    widths, _ = find_widths(network, discover(network))
    assert [w.name for w in widths] == [f"blocks.{i}.conv1 -> blocks.{i}.conv2" for i in range(9)]
    assert [w.channels for w in widths] == [16] * 3 + [32] * 3 + [64] * 3
    assert [w.norms for w in widths] == [(f"blocks.{i}.bn1",) for i in range(9)]


def test_a_narrow_chain_is_the_chain_with_channels_masked() -> None:
    network = chain()
    widths, _ = find_widths(network, discover(network))
    kept = {
        "conv1 -> conv2": torch.tensor([0, 3, 4, 7]),
        "conv2 -> fc1": torch.tensor([1, 5]),
        "fc1 -> fc2": torch.tensor([0, 1, 2, 9]),
    }
    edits, buffers = narrow_edits(network.module, widths, kept)
    small = copy.deepcopy(network.module)
    install(small, (*edits, *buffers))
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        wanted = masked(network.module, widths, kept)(x)
        assert torch.allclose(small(x), wanted, atol=1e-5)
        assert not torch.allclose(wanted, network.module(x), atol=1e-2)
    assert (small.conv2.in_channels, small.conv2.out_channels, small.fc1.in_features) == (4, 2, 8)


def test_other_orders_and_kinds() -> None:
    norm_last = nn.Sequential(
        nn.Conv1d(3, 6, 3), nn.SiLU(), nn.BatchNorm1d(6), nn.Dropout(), nn.Conv1d(6, 4, 3)
    )
    assert found_in(norm_last, torch.randn(2, 3, 12)) == (["0 -> 4"], [])
    tokens = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 5))
    assert found_in(tokens, torch.randn(2, 7, 5)) == (["0 -> 2"], [])
    solid = nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1))
    assert found_in(solid, torch.randn(2, 2, 5, 5, 5)) == (["0 -> 3"], [])


class Middle(nn.Module):
    """Two convolutions, and something between."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Conv2d(3, 4, 1), between, nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (nn.GroupNorm(2, 4), "group_norm"),
        (nn.PReLU(4), "prelu"),
        (Scaled(), "mul"),
    ],
)
def test_what_does_not_act_on_channels_alone_is_refused(between: nn.Module, why: str) -> None:
    names, whys = found_in(Middle(between), torch.randn(2, 3, 6, 6))
    assert names == [] and why in whys[0]


def test_groups_and_shared_norms_are_refused() -> None:
    grouped = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4))
    names, whys = found_in(grouped, torch.randn(2, 3, 6, 6))
    assert names == [] and "in groups" in whys[0]

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.norm(self.b(self.norm(self.a(x)))))

    names, whys = found_in(Shared(), torch.randn(2, 4, 5, 5))
    assert names == [] and all("more than once" in why for why in whys)


def test_a_view_with_literal_sizes_is_found_out_by_trying() -> None:
    class Literal(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.bn1(self.conv1(x)))
            x = self.pool(self.relu(self.bn2(self.conv2(x))))
            return self.fc2(self.gelu(self.fc1(x.view(-1, 48))))

    names, whys = found_in(Literal(), torch.randn(2, 3, 8, 8))
    assert names == ["conv1 -> conv2", "fc1 -> fc2"]
    assert len(whys) == 1 and "does not run with a channel less" in whys[0]


def test_a_hook_that_looks_at_other_channels_ends_a_width() -> None:
    module = Middle(nn.ReLU())
    module.between.register_forward_hook(lambda m, args, y: y * y.sum(1, keepdim=True))
    assert found_in(module, torch.randn(2, 3, 6, 6))[0] == []


def test_a_residual_connection_keeps_its_channels() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x + self.c(torch.relu(self.b(x)))

    assert found_in(Residual(), torch.randn(3, 6)) == (["b -> c"], [])


def test_without_a_trace_there_is_a_reason() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:
                return x
            return self.b(torch.relu(self.a(x)))

    network = Network(Branching(), (torch.randn(2, 4),))
    sites = discover(network)
    assert find_widths(network, sites) == ((), ())
    with pytest.raises(MethodError, match="export failed"):
        prune(network, sites, Stats())
