"""Costs against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.errors import DataError
from lamina.forms import GroupedLinear
from lamina.measure.cost import latency, measured_macs, measured_params, network_cost, site_cost
from lamina.measure.stats import Cost
from lamina.network.sites import Site, Sites
from lamina.network.source import Network


def test_site_cost_counts_weight_and_bias() -> None:
    site = Site("c", op="conv", shape=(8, 3, 5, 5), positions=16)
    assert site_cost(site, 8, 16) == Cost(608.0, 9728.0, 9600.0)


def test_shared_tensors_count_once() -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.BatchNorm1d(10))
    net[1].weight = net[0].weight
    cost = network_cost(Network(net), Sites((Site("1", shape=(10, 4), positions=3),)))
    assert cost.params == measured_params(net) == 40 + 20
    assert cost.bits == 32 * (40 + 40) + 64  # the batch norm's counter is an int64
    assert cost.macs == 120


@pytest.mark.parametrize(
    "module, shape, macs",
    [
        (nn.Linear(3, 4), (2, 5, 3), 60),
        (nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2), (2, 4, 8, 8), 6 * 16 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (2, 4, 5, 5), 25 * 4 * 3 * 9),
        (GroupedLinear(6, 4, 2), (2, 6), 12),
        (nn.GRUCell(3, 5), (2, 3), 15 * 3 + 15 * 5),
        (nn.LSTM(3, 5, bidirectional=True, batch_first=True), (2, 7, 3), 7 * 2 * (20 * 3 + 20 * 5)),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 2)), (2, 6), 16),
    ],
)
def test_macs_by_hand(module: nn.Module, shape: tuple[int, ...], macs: float) -> None:
    assert measured_macs(module, (torch.zeros(shape),)) == macs
    assert module.training
    assert not any(m._forward_hooks for m in module.modules())


def test_attention_macs() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert measured_macs(layer, (torch.zeros(2, 3, 8),)) == 3 * (4 * 64 + 2 * 128)


def test_latency_orders_models_and_restores_threads() -> None:
    before = torch.get_num_threads()
    models = {"small": nn.Linear(4, 4), "large": nn.Sequential(*[nn.Linear(512, 512)] * 20)}
    models["small"] = nn.Sequential(nn.Linear(512, 1))
    times = latency(models, (torch.zeros(64, 512),), rounds=3, min_time=0.0)
    assert set(times) == {"small", "large"} and all(t > 0 for t in times.values())
    assert torch.get_num_threads() == before
    assert models["large"].training
    with pytest.raises(DataError, match="does not take"):
        latency(models, (torch.zeros(64, 5),))
    assert torch.get_num_threads() == before
