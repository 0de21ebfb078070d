"""The probe finds a scale that is known, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.errors import LaminaError
from lamina.measure.forward import Batch
from lamina.measure.loss import Loss
from lamina.measure.probe import Probe, first_of, measure_scale, probe_size
from lamina.measure.stats import LayerStats
from lamina.network.sites import Site

SITE = Site("0", module="0", weight="0.weight", shape=(3, 4))


def features() -> tuple[nn.Module, LayerStats, list[Probe]]:
    """A linear network whose exact statistics are known."""
    net = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(50, 4, dtype=torch.float64)
    H = (x.T @ x / 50)[None]
    stats = LayerStats(H, torch.eye(3, dtype=torch.float64)[None], samples=50)
    return net, stats, [Probe(Batch((x,), {}, None, 50), net(x).detach())]


@pytest.mark.parametrize("factor", [1.0, 10.0, 0.02])
def test_it_finds_a_known_scale(factor: float) -> None:
    net, stats, probes = features()
    wrong = LayerStats(stats.H, stats.G / factor)
    found = measure_scale(net, SITE, wrong, probes, Loss("features"))
    assert found.scale == pytest.approx(factor, rel=1e-6)
    assert found.unit == 1.0


def test_the_scale_is_clamped_and_zero_statistics_say_nothing() -> None:
    net, stats, probes = features()
    far = LayerStats(stats.H, stats.G * 1e6)
    assert measure_scale(net, SITE, far, probes, Loss("features")).scale == 1e-3
    zero = LayerStats(stats.H * 0, stats.G)
    assert measure_scale(net, SITE, zero, probes, Loss("features")).scale == 1.0
    assert measure_scale(net, SITE, stats, [], Loss("features")).scale == 1.0


def test_a_layer_that_changes_nothing_gets_a_tiny_scale() -> None:
    net, stats, probes = features()
    mute = nn.Sequential(net[0], nn.Threshold(1e9, 0.0))
    probes = [Probe(probes[0].batch, mute(probes[0].batch.args[0]).detach())]
    assert measure_scale(mute, SITE, stats, probes, Loss("features")).scale == 1e-3


def test_the_weight_is_restored_whatever_happens() -> None:
    net, stats, probes = features()
    before = net[0].weight.detach().clone()
    measure_scale(net, SITE, stats, probes, Loss("features"))
    assert torch.equal(net[0].weight, before)

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("broken")

    with pytest.raises(LaminaError, match="broken"):
        broken = nn.Sequential(net[0], Broken())
        measure_scale(broken, SITE, stats, probes, Loss("features"))
    assert torch.equal(net[0].weight, before)


def test_dear_networks_are_probed_on_fewer_samples() -> None:
    assert probe_size([SITE]) == 250
    dear = Site("big", shape=(10_000, 10_000), positions=1000)
    assert probe_size([dear] * 50) == 16
    assert probe_size([dear] * 50, {}, 4) == 4  # samples of four predictions each
    assert probe_size([dear] * 50, {}, 1000) == 1


def test_what_data_really_costs_decides_on_how_many_samples() -> None:
    one = torch.ones(1, 100, dtype=torch.float64)
    site = Site("a", shape=(100, 100), positions=1)
    long = {"a": LayerStats(one, one, None, positions=1e6)}
    assert probe_size([site]) == 250 > probe_size([site], long) > 16


def test_probes_are_cut_to_the_first_samples() -> None:
    whole = torch.arange(10.0)[:, None]
    probes = [Probe(Batch((part,), {}, None, len(part)), part) for part in whole.split(4)]
    kept = first_of(probes, 6)
    assert torch.equal(torch.cat([p.reference for p in kept]), whole[:6])
    assert [p.batch.size for p in kept] == [4, 2] and first_of(probes, 0) == []
