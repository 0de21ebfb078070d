"""Small networks of convolutions in rows and residual blocks, and a clock that counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from lamina.data import Data, TensorLoader
from lamina.measure.cost import measured_macs
from lamina.network.source import Network


class Block(nn.Module):
    """Activations are calls: nothing inside can be taken out alone."""

    def __init__(self, channels: int, weight: float = 1.0) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.b1 = nn.BatchNorm2d(channels)
        self.c2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.b2 = nn.BatchNorm2d(channels)
        self.weight = weight

    def forward(self, x):
        y = self.b2(self.c2(torch.relu(self.b1(self.c1(x)))))
        return torch.relu(x + y if self.weight == 1.0 else torch.add(x, y, alpha=self.weight))


class Inverted(nn.Module):
    """A linear bottleneck: nothing bends the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.conv = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide),
            nn.ReLU6(), nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        return x + self.conv(x)


class Net(nn.Module):
    """Two kinds of blocks, and a row with a stride, as a classifier of three."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 1, 1), nn.ReLU())
        self.a, self.b = Block(8, weight), Inverted(8)
        self.row = nn.Sequential(
            nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU6(), nn.Conv2d(16, 6, 1),
        )  # fmt: skip
        self.fc = nn.Linear(216, 3)

    def forward(self, x):
        return self.fc(F.relu(self.row(self.b(self.a(self.stem(x))))).flatten(1))


def make(weight: float = 1.0, seed: int = 0) -> Network:
    """A network whose norms have moments of data."""
    torch.manual_seed(seed)
    net = Net(weight)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    net.fc.weight.data *= 40  # or all images would look alike
    x = torch.randn(160, 1, 12, 12)
    for _ in range(50):
        net.train()(x)
    return Network(net.eval(), (x[:4],), name="chained", loss="logits")


def images(network: Network) -> Data:
    g = torch.Generator().manual_seed(7)
    x = torch.randn(160, 1, 12, 12, generator=g)
    y = network.forward(x).argmax(1)
    train = TensorLoader(x, y, 32, shuffle=True)
    return Data(train=train, calibration=[(x[:96], y[:96])], validation=[(x, y)])


def counting(jobs, threads, seconds):
    """Time jobs by what they multiply, and a little for being called."""
    row = []
    for job in jobs:
        took = 0.0
        for c in job.calls:
            args = tuple(a.make() if hasattr(a, "make") else a for a in c.args)
            size = args[0].numel()
            convs = sum(isinstance(m, nn.Conv2d) for m in job.module.modules())
            took += c.count * ((measured_macs(job.module, args) if convs else 0) + 0.01 * size)
        row.append(1e-9 * took)
    return [row] * 5
