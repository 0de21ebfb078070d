"""What stands in for channels: exact for silent filters inside, the mean, and the regression."""

from __future__ import annotations

import pytest
import torch
from tests.recipes.thin import chain, settle
from torch import Tensor, nn

from lamina.errors import DataError
from lamina.measure.calibrate import calibrate
from lamina.measure.stats import Stats
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.recipes.compensation import constants, regress
from lamina.recipes.filters import prune, thin
from lamina.recipes.widths import find_widths

HALF = {"keep": 0.5, "norm": "l2", "scope": "uniform"}


def silent_pair(padding: int, bias: bool, norm: bool = True) -> Network:
    """conv-bn-relu-conv(-bn), half of whose inner filters are zero."""
    layers = [nn.Conv2d(3, 8, 3, bias=True), nn.BatchNorm2d(8), nn.ReLU()]
    layers += [nn.Conv2d(8, 5, 3, padding=padding, bias=bias)]
    layers += [nn.BatchNorm2d(5)] if norm else []
    net = settle(nn.Sequential(*layers))
    with torch.no_grad():
        net[0].weight[::2] = 0
        net[1].bias[::2] = torch.tensor([0.5, 1.5, 0.25, -1.0])
    return Network(net, (torch.randn(2, 3, 9, 9),), loss="features")


def difference(network: Network, how: str, keep: float = 0.55) -> Tensor:
    small = prune(network, discover(network), Stats(), keep, "l2", compensate=how).model
    assert small[0].out_channels == 4
    x = torch.randn(3, 3, 9, 9)
    with torch.no_grad():
        return (small(x) - network.module(x)).abs()


@pytest.mark.parametrize("bias", [True, False])
def test_silent_filters_leave_without_a_trace(bias: bool) -> None:
    network = silent_pair(0, bias)
    assert float(difference(network, "constant").max()) < 1e-5
    assert float(difference(network, "none").max()) > 1e-2


def test_with_zero_padding_that_holds_inside_only() -> None:
    error = difference(silent_pair(1, True), "constant")
    assert float(error[..., 1:-1, 1:-1].max()) < 1e-5
    assert float(error[..., 0, :].max()) > 1e-2


def test_an_offset_that_has_no_place_is_told() -> None:
    network = silent_pair(0, bias=False, norm=False)
    sites = discover(network)
    assert thin(network, sites, Stats(), 0.55, compensate="constant").alone == ("0 -> 3",)
    assert thin(network, sites, Stats(), 0.55, compensate="none").alone == ()


def test_the_constant_is_what_the_channel_gives() -> None:
    network = silent_pair(0, True)
    (width,), _ = find_widths(network, discover(network))
    found = constants(network, width)
    assert found is not None
    with torch.no_grad():
        inner = network.module[:3](torch.randn(64, 3, 9, 9))
    assert torch.allclose(found[::2], inner[0, ::2, 0, 0].double(), atol=1e-5)


def test_the_mean_that_a_norm_implies() -> None:
    """Of filters that are not silent: the mean of what a normal distribution gives."""
    network = silent_pair(0, True)
    (width,), _ = find_widths(network, discover(network))
    found = constants(network, width)
    assert found is not None
    g = torch.Generator().manual_seed(0)
    draws = torch.randn(400_000, 8, generator=g, dtype=torch.float64)
    norm = network.module[1]
    wanted = (draws * norm.weight.double() + norm.bias.double()).relu().mean(0)
    assert torch.allclose(found[1::2], wanted[1::2], atol=0.02)


def test_a_function_whose_settings_are_not_known_gives_no_constant() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(nn.functional.leaky_relu(self.a(x), 0.3))

    network = Network(settle(Net()), (torch.randn(2, 4),))
    (width,), _ = find_widths(network, discover(network))
    assert constants(network, width) is None


def make_data(shape: tuple[int, ...] = (3, 8, 8)) -> list[Tensor]:
    g = torch.Generator().manual_seed(4)
    mix = torch.randn(3, 3, generator=g)
    x = torch.randn(256, *shape, generator=g)
    x = torch.einsum("nchw,cd->ndhw", x, mix) + 0.5
    return list(x.split(64))


@pytest.mark.parametrize("bias", [True, False])
def test_more_help_is_closer_to_the_original(bias: bool) -> None:
    network, data = chain(bias), make_data()
    sites = discover(network)
    stats = calibrate(network, sites, data, samples=256)
    errors = {}
    with torch.no_grad():
        for how in ("none", "mean", "regress"):
            small = prune(network, sites, stats, **HALF, compensate=how).model
            errors[how] = sum(float((small(x) - network.module(x)).square().sum()) for x in data)
        small = prune(network, sites, stats, **HALF).model
        auto = sum(float((small(x) - network.module(x)).square().sum()) for x in data)
    assert errors["none"] > errors["mean"] > errors["regress"] == auto


def test_regression_against_least_squares_with_an_intercept() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(500, 7, generator=g, dtype=torch.float64) @ torch.randn(
        7, 7, generator=g, dtype=torch.float64
    )
    x += 2
    weight = torch.randn(4, 7, generator=g, dtype=torch.float64)
    gone = torch.tensor([1, 4])
    stays = torch.tensor([0, 2, 3, 5, 6])
    mean = x.mean(0)
    fill = regress(weight, (x - mean).T @ (x - mean) / len(x), mean, gone)
    assert fill.weight is not None
    design = torch.cat([x[:, stays], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    wanted = torch.linalg.lstsq(design, x @ weight.T).solution
    assert torch.allclose(fill.weight[:, stays], wanted[:-1].T, atol=2e-2)
    assert torch.allclose(fill.offset, wanted[-1], atol=5e-2)


@pytest.mark.parametrize("how", ["mean", "regress"])
def test_means_need_data(how: str) -> None:
    network = chain()
    with pytest.raises(DataError, match="needs calibration data"):
        prune(network, discover(network), Stats(), compensate=how)
