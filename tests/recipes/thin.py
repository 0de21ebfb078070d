"""Networks with inner channels, and their BatchNorms with moments that are not the initial ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamina.network.source import Network


def settle(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give weights, moments and scales values that tell channels apart."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            spread = 1.0 / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.3
            tensor.copy_(spread * torch.randn(tensor.shape, generator=g))
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                for tensor in (m.weight, m.running_var):
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=g))
                m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) / 3)
    return module.eval()


class Chain(nn.Module):
    """conv-bn-relu-conv-bn-relu-pool-flatten-linear-gelu-linear."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, stride=2, bias=bias)
        self.bn2 = nn.BatchNorm2d(12)
        self.relu, self.pool, self.gelu = nn.ReLU(), nn.MaxPool2d(2), nn.GELU()
        self.fc1 = nn.Linear(12 * 4, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.pool(self.relu(self.bn2(self.conv2(x))))
        return self.fc2(self.gelu(self.fc1(x.flatten(1))))


def chain(bias: bool = False) -> Network:
    torch.manual_seed(1)
    return Network(settle(Chain(bias)), (torch.randn(2, 3, 8, 8),), loss="logits")


def params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
