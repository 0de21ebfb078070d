"""A small trained network with data of every split, and recipes that take a second."""

from __future__ import annotations

import torch
from tests.train.small import make_network
from torch import nn

from lamina.data import Data, TensorLoader
from lamina.network.source import Network
from lamina.recipes import DeepCompression, Pruning, Weightless

PRUNING = Pruning(density=0.3, rounds=2, epochs=1, last=2, lr=5e-3)
QUICK = DeepCompression(PRUNING, bits={"linear": 3, "conv": 3}, epochs=1, lr=1e-3)
LIGHT = Weightless(PRUNING, clusters=3, cells=(0, 1, 4), drop=30.0, centroid_epochs=1, epochs=1)


def make_data() -> Data:
    """The problem that the network was trained on: three separable classes in eight dimensions."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(12 * 32, 8, generator=g)
    y = (x @ torch.randn(8, 3, generator=g)).argmax(1)
    return Data(
        train=TensorLoader(x, y, 32, shuffle=True),
        calibration=[(x[:128], y[:128])],
        validation=[(x[128:256], y[128:256])],
        test=[(x[256:], y[256:])],
    )


def make_wide() -> Network:
    """Layers large enough that a filter of few bits is smaller than any lossless code."""
    torch.manual_seed(3)
    layers = nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 3)
    return make_network(nn.Sequential(*layers))


def make_convolutions() -> nn.Module:
    """One-dimensional convolutions, a layer norm, an embedding and a tied weight."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.table = nn.Embedding(20, 8)
            self.conv = nn.Conv1d(8, 16, 3, padding=1)
            self.norm = nn.LayerNorm(16)
            self.one = nn.Linear(16, 16)
            self.two = nn.Linear(16, 16)
            self.two.weight = self.one.weight
            self.head = nn.Linear(16, 2)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.conv(self.table(tokens).transpose(1, 2)).transpose(1, 2)
            x = self.two(torch.relu(self.one(self.norm(x))))
            return self.head(x.mean(1))

    return Net()
