"""A tiny transformer and the work it learns in a second."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.data import Data, TensorLoader
from lamina.network.source import Network


class Layer(nn.Module):
    """One block; query, key and value are given the same tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        mixed = F.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y))
        x = x + self.drop(self.out(mixed))
        return x + self.drop(self.fc2(F.relu(self.fc1(self.norm2(x)))))


class Tiny(nn.Module):
    """Tokens, two blocks, the mean, three classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(24, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def make_network(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Tiny()
    return Network(module, (torch.zeros(2, 8, dtype=torch.int64),), name="tiny", loss="logits")


def make_data(labels: bool = True) -> Data:
    """Which third of the table most tokens of a sentence come from."""
    g = torch.Generator().manual_seed(5)
    y = torch.randint(3, (640,), generator=g)
    own = torch.rand(640, 8, generator=g) < 0.7
    ids = torch.where(
        own, 8 * y[:, None] + torch.randint(8, (640, 8), generator=g),
        torch.randint(24, (640, 8), generator=g),
    )  # fmt: skip
    return Data(
        train=TensorLoader(ids[:384], y[:384] if labels else None, 32, shuffle=True),
        calibration=[(ids[:64],)],
        validation=[(ids[384:512], y[384:512])],
        test=[(ids[512:], y[512:])],
    )
