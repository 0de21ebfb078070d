"""Cross moments against brute force: every position by hand, in float64, from hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.measure import cross as module
from lamina.measure.calibrate import calibrate
from lamina.measure.cross import find_links, measure_cross
from lamina.measure.store import load_stats, save_stats
from lamina.network.discover import discover
from lamina.network.source import Network


def network_of(*layers: nn.Module, shape: tuple[int, ...]) -> tuple[Network, list[torch.Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(*layers).eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return Network(net, (torch.randn(2, *shape),)), [torch.randn(n, *shape) for n in (5, 3)]


def seen(network: Network, batches: list[torch.Tensor], path: str) -> torch.Tensor:
    """All inputs of a layer, in float64, by a hook."""
    found: list[torch.Tensor] = []
    layer = network.module.get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0].double()))
    with torch.no_grad():
        for x in batches:
            network.module(x)
    handle.remove()
    return torch.cat(found)


def columns(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The input columns of a layer `[samples, positions, columns]`, window by window."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])
    assert isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros"
    p, (s, _), (d, _), (k, _) = layer.padding[0], layer.stride, layer.dilation, layer.kernel_size
    x = nn.functional.pad(x, (p, p, p, p))
    reach = d * (k - 1) + 1
    rows = range(0, x.shape[2] - reach + 1, s)
    cols = range(0, x.shape[3] - reach + 1, s)
    windows = [x[:, :, i : i + reach : d, j : j + reach : d].flatten(1) for i in rows for j in cols]
    return torch.stack(windows, 1)


def channels(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The input channels of a layer at every position `[samples, positions, channels]`."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])
    return x.flatten(2).transpose(1, 2)


CASES = {
    "linear": ((nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)), (5,)),
    "tokens": ((nn.Linear(5, 7), nn.ReLU(), nn.Dropout(0.5), nn.Linear(7, 3)), (4, 5)),
    "pointwise": ((nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)), (3, 5, 4)),
    "padded": (
        (nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 2, 3, padding=1)),
        (3, 5, 4),
    ),
    "strided": (
        (nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU6(), nn.Conv2d(6, 2, 3, 2, 1)),
        (3, 7, 8),
    ),
    "dilated": ((nn.Conv2d(3, 4, 3, dilation=2), nn.Tanh(), nn.Conv2d(4, 2, 1)), (3, 8, 8)),
    "into depthwise": (
        (nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1, groups=6)),
        (3, 5, 5),
    ),
    "out of depthwise": (
        (nn.Conv2d(4, 4, 3, 1, 1, groups=4), nn.ReLU(), nn.Conv2d(4, 3, 1)),
        (4, 5, 5),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sums_are_those_of_brute_force(name):
    layers, shape = CASES[name]
    network, batches = network_of(*layers, shape=shape)
    first, last = layers[0], layers[-1]
    key = f"0->{len(layers) - 1}"
    found = measure_cross(network, discover(network), batches, 8)[key]
    x = columns(first, seen(network, batches, "0"))
    if getattr(first, "groups", 1) > 1:  # as the layer has them: group by group, channels in order
        assert x.shape[-1] == 4 * 9
    z = channels(last, seen(network, batches, str(len(layers) - 1)))
    assert x.shape[1] == z.shape[1], "the test itself: positions agree"
    x, z = x.flatten(0, 1), z.flatten(0, 1)
    for got, wanted in (
        (found.moment, z.T @ x),
        (found.second, z.T @ z),
        (found.mean, z.sum(0)),
        (found.x_second, x.T @ x),
        (found.x_mean, x.sum(0)),
    ):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, wanted / 8, rtol=1e-6, atol=1e-6)
    assert found.positions == len(x) / 8


def test_least_squares_from_the_sums_is_that_of_the_data():
    """What it is for: the affine map from x to z, without ever holding the data."""
    network, batches = network_of(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), shape=(5,))
    batches = [torch.randn(200, 5)]
    found = measure_cross(network, discover(network), batches, 200)["0->2"]
    n = found.positions
    covariance = found.x_second - torch.outer(found.x_mean, found.x_mean) / n
    both = found.moment - torch.outer(found.mean, found.x_mean) / n
    slope = torch.linalg.solve(covariance, both.T).T
    shift = (found.mean - slope @ found.x_mean) / n
    x, z = seen(network, batches, "0"), seen(network, batches, "2")
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    fitted = torch.linalg.lstsq(ones, z).solution.T
    torch.testing.assert_close(torch.cat([slope, shift[:, None]], 1), fitted, atol=1e-9, rtol=1e-7)


def test_left_out_positions_are_the_same_on_both_sides(monkeypatch):
    """With z = 2 x + 1 exactly, any choice of positions gives z's sums from x's."""
    monkeypatch.setattr(module, "FEWEST", 40)
    monkeypatch.setattr(module, "COLUMNS_PER_WIDTH", 1)
    layers = (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1))
    network, _ = network_of(*layers, shape=(4, 6, 6))
    with torch.no_grad():
        network.module[0].weight.copy_(2 * torch.eye(4)[:, :, None, None])
        network.module[0].bias.fill_(1)
        norm = network.module[1]
        norm.running_mean.zero_(), norm.running_var.fill_(1 - norm.eps)
    batches = [torch.randn(4, 4, 6, 6) for _ in range(3)]
    found = measure_cross(network, discover(network), batches, 12)["0->2"]
    assert found.positions == pytest.approx(36) and found.x_second.shape == (4, 4)
    n, ones = found.positions, torch.ones(4, dtype=torch.float64)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.mean, 2 * found.x_mean + n * ones, **close)
    wanted = 2 * found.x_second + torch.outer(ones, found.x_mean)
    torch.testing.assert_close(found.moment, wanted, **close)
    full = torch.cat(batches).double().square().sum((0, 2, 3)) / 12
    assert not torch.allclose(found.x_second.diagonal(), full), "nothing was left out"


def test_the_same_seed_gives_the_same_sums(monkeypatch):
    monkeypatch.setattr(module, "FEWEST", 30)
    monkeypatch.setattr(module, "COLUMNS_PER_WIDTH", 1)
    network, _ = network_of(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), shape=(9, 5))
    batches = [torch.randn(4, 9, 5)] * 2
    sites = discover(network)
    runs = [measure_cross(network, sites, batches, 8, seed)["0->2"].moment for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_only_neighbours_whose_positions_agree_are_linked():
    def links(*layers: nn.Module, shape: tuple[int, ...]) -> list[str]:
        network, _ = network_of(*layers, shape=shape)
        return [f"{a.name}->{b.name}" for a, b in find_links(discover(network))]

    conv = nn.Conv2d(2, 2, 3, padding=1)
    again = nn.Conv2d(2, 2, 3, padding=1)
    assert links(conv, nn.ReLU(), again, shape=(2, 4, 4)) == ["0->2"]
    assert links(conv, nn.MaxPool2d(2), again, shape=(2, 4, 4)) == []
    assert links(conv, nn.Flatten(), nn.Linear(32, 3), shape=(2, 4, 4)) == []
    three = (nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    assert links(*three, shape=(3,)) == ["0->2", "2->4"]
    wide = (nn.Linear(module.WIDEST + 1, 4), nn.ReLU(), nn.Linear(4, 2))
    assert links(*wide, shape=(module.WIDEST + 1,)) == []


def test_a_chain_of_three_has_its_middle_on_both_sides():
    three = (nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    network, batches = network_of(*three, shape=(3,))
    found = measure_cross(network, discover(network), batches, 8)
    torch.testing.assert_close(found["0->2"].second, found["2->4"].x_second)
    torch.testing.assert_close(found["0->2"].mean, found["2->4"].x_mean)


def test_measuring_leaves_the_network_and_its_hooks_alone():
    network, batches = network_of(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), shape=(5,))
    network.module.train()
    before, state = network.digest(), torch.get_rng_state()
    measure_cross(network, discover(network), batches, 8)
    assert network.digest() == before and torch.equal(state, torch.get_rng_state())
    assert all(not m._forward_pre_hooks and m.training for m in network.module.modules())


def test_calibration_holds_them_and_they_survive_the_store(tmp_path):
    network, batches = network_of(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), shape=(5,))
    sites = discover(network)
    stats = calibrate(network, sites, batches, samples=8)
    cross = stats.cross["0->2"]
    H = stats.layers["0"].H[0]
    torch.testing.assert_close(cross.x_second, H.double(), rtol=1e-6, atol=1e-8)
    with (tmp_path / "stats").open("wb") as file:
        save_stats(stats, file)
    again = load_stats(tmp_path / "stats").cross["0->2"]
    for name in vars(cross):
        a, b = getattr(cross, name), getattr(again, name)
        assert a == b if isinstance(a, float) else torch.equal(a, b)
    once = calibrate(network, sites, iter(batches), samples=8).cross["0->2"]
    assert torch.equal(once.moment, cross.moment)  # batches that come once only are kept


def test_fewer_samples_than_there_are_count_alone():
    network, _ = network_of(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), shape=(5,))
    x = torch.randn(12, 5)
    found = measure_cross(network, discover(network), [x[:5], x[5:]], 8)["0->2"]
    wanted = x[:8].double()
    torch.testing.assert_close(found.x_second, wanted.T @ wanted / 8, rtol=1e-6, atol=1e-8)
