"""Training with gates: down to a limit, on what the data needs, the same every time."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamina.data import Data, TensorLoader
from lamina.errors import DataError
from lamina.measure.calibrate import calibrate
from lamina.measure.stats import Stats
from lamina.network.discover import discover
from lamina.network.sites import Site
from lamina.network.source import Network
from lamina.train.gating import Gating, Learned, train_gates


def make_data(samples: int = 384) -> Data:
    """Which third of the line carries most power: wants few channels of a wide network."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 4, 24, generator=g)
    y = x.square().sum(1).unflatten(1, (3, 8)).sum(2).argmax(1)
    return Data(train=TensorLoader(x, y, 32, shuffle=True), calibration=[(x[:128], y[:128])],
                validation=[(x[:128], y[:128])], test=[(x[128:], y[128:])])  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv1d(4, 24, 3, padding=1, bias=False), nn.BatchNorm1d(24)
        self.two = nn.Conv1d(24, 24, 3, stride=2, padding=1)
        self.fc = nn.Linear(3 * 24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.one(x)).square()
        x = F.relu(self.two(x)).unflatten(2, (3, 4)).mean(3)
        return self.fc(x.flatten(1))


@cache
def trained() -> Network:
    torch.manual_seed(0)
    net, data = Net(), make_data()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(8):
        for x, y in data.train:
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return Network(net.eval(), (data.test[0][0][:4],))


def parts() -> tuple[Network, list[Site], Stats]:
    network = trained()
    sites = discover(network)
    stats = calibrate(network, sites, make_data().calibration, samples=128)
    return network, [sites["one"], sites["two"]], stats


@cache
def learned(share: float) -> Learned:
    network, layers, stats = parts()
    gating = Gating(share * sum(s.macs for s in layers), epochs=5, lr=3e-3)
    return train_gates(network, layers, stats, make_data(), gating)


def loss_with(found: Learned) -> float:
    """Cross-entropy of the network with the dense weights that the gates make up."""
    net = copy.deepcopy(trained().module)
    state = dict(found.tensors)
    for name, made in found.cuts.items():
        like = net.get_submodule(name).weight
        state[f"{name}.weight"] = made.weight.reshape(like.shape).to(like)
    net.load_state_dict(state)
    (x, y), = make_data().test  # fmt: skip
    with torch.no_grad():
        return float(F.cross_entropy(net.eval()(x), y))


def test_the_limit_is_met_and_the_network_still_works() -> None:
    network, layers, _ = parts()
    before = network.digest()
    found = learned(0.6)
    whole = sum(site.macs for site in layers)
    assert found.macs <= 0.6 * whole
    assert any(c.ranks is not None for c in found.cuts.values())
    (x, y), = make_data().test  # fmt: skip
    blind = float(F.cross_entropy(torch.zeros(len(x), 3), y))
    assert loss_with(found) < 0.6 * blind
    assert network.digest() == before, "the original is not changed"
    assert "one.bias" not in found.tensors and "two.bias" in found.tensors
    assert not any(name.startswith(("one.core", "two.outputs")) for name in found.tensors)


def test_the_history_tells_of_the_way_down() -> None:
    rows = learned(0.6).history
    assert len(rows) == 60
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0]["macs"] > 1.5 * rows[-1]["macs"]
    assert rows[0]["c"] > rows[30]["c"] > rows[-1]["c"] == pytest.approx(0.01)
    assert all(row["price"] >= 1 for row in rows)


def test_the_same_training_gives_the_same_bits_and_another_does_not() -> None:
    first = learned(0.6)
    learned.cache_clear()
    again, other = learned(0.6), learned(0.59)
    same = [torch.equal(first.cuts[n].weight, again.cuts[n].weight) for n in first.cuts]
    assert all(same) and first.history == again.history
    assert not torch.equal(first.cuts["two"].weight, other.cuts["two"].weight)


def test_no_limit_closes_nothing() -> None:
    found = learned(10.0)
    assert all(c.ranks is None for c in found.cuts.values()), "all gates open: dense again"
    assert loss_with(found) < 0.6


def test_without_statistics_and_without_labels() -> None:
    network, layers, _ = parts()
    loader = [x for x, _ in make_data().train]
    gating = Gating(0.5 * sum(s.macs for s in layers), epochs=2, lr=3e-3)
    said: list[str] = []
    found = train_gates(
        network, layers, Stats(), Data(train=loader), gating, lambda *a: said.append(a[2])
    )
    assert found.macs <= gating.limit
    assert said and all("operations" in line for line in said)


def test_what_cannot_be_trained_on_is_refused() -> None:
    network, layers, stats = parts()
    for data in (Data(), Data(train=[])):
        with pytest.raises(DataError, match="training data"):
            train_gates(network, layers, stats, data, Gating(1.0))
    x, y = next(iter(make_data().train))
    broken = Data(train=[(x * torch.inf, y)])
    with pytest.raises(DataError, match="finite"):
        train_gates(network, layers, stats, broken, Gating(1.0, epochs=2))
