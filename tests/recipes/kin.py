"""Small networks whose layers are alike, and data for them."""

from __future__ import annotations

import torch
from torch import nn

from lamina.data import Data, TensorLoader
from lamina.network.source import Network
from lamina.plan import Budget
from lamina.stages import Way
from lamina.zoo.gpt import GPT
from lamina.zoo.resnet import Block


class Thin(nn.Module):
    """Three residual blocks of a ResNet with eight channels, for images of 6 x 6."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8, 8, 1) for _ in range(3)))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.blocks(torch.relu(self.conv(x))).mean((2, 3)))


def images() -> tuple[Network, Data]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(128, 3, 6, 6, generator=g)
    y = (x.mean((2, 3)) @ torch.randn(3, 4, generator=g)).argmax(1)
    return Network(Thin().eval(), (x[:2],), source="", loss="logits"), _data(x, y, 32)


def text(depth: int = 4) -> tuple[Network, Data]:
    torch.manual_seed(0)
    net = GPT(width=12, depth=depth, heads=2, vocabulary=11, context=8).eval()
    x = torch.randint(0, 11, (96, 8), generator=torch.Generator().manual_seed(2))
    return Network(net, (x[:2],), source="", loss="logits"), _data(x, x.roll(-1, 1), 24)


def _data(x: torch.Tensor, y: torch.Tensor, size: int) -> Data:
    return Data(
        train=TensorLoader(x, y, size, shuffle=True), calibration=[(x[:64], y[:64])],
        validation=[(x[:64], y[:64])], test=[(x[64:], y[64:])],
    )  # fmt: skip


def way(network: Network, data: Data | None, budget: object = "100%", seed: int = 0) -> Way:
    return Way(network, data, Budget.parse(budget), seed=seed)


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
