"""A small zoo of tiny random networks: one for each kind of layer and of tie a method will meet.

The weights are random, but not at their initialisation: heads are scaled so that logits differ, and
BatchNorm has statistics of its own, or every loss would be flat and every comparison noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lamina.network.source import Network

SAMPLES = 192  # of calibration


class Mlp(nn.Module):
    """Functional activations: nothing between the layers is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(24, 32), nn.Linear(32, 24), nn.Linear(24, 10)

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Residual(nn.Module):
    """A residual CNN: BatchNorm, a strided shortcut, layers without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, 2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.short, self.fc = nn.Conv2d(8, 12, 1, 2), nn.Linear(12, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(F.relu(self.short(x) + y).mean((2, 3)))


class Grouped(nn.Module):
    """Grouped and depthwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 24, 3, stride=2, padding=1, groups=4)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.pointwise, self.fc = nn.Conv2d(24, 16, 1), nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.stem(x))))
        return self.fc(F.relu(self.pointwise(F.relu(self.depthwise(x)))).mean((2, 3)))


class Vit(nn.Module):
    """Patches, a free parameter, `nn.TransformerEncoderLayer` and `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 24, 4, 4)
        self.pos = nn.Parameter(torch.randn(1, 4, 24) / 4)
        self.layer = nn.TransformerEncoderLayer(24, 2, 32, 0.0, batch_first=True)
        self.norm = nn.LayerNorm(24)
        self.pool = nn.MultiheadAttention(24, 2, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.layer(self.patch(x).flatten(2).transpose(1, 2) + self.pos)
        y, _ = self.pool(x.mean(1, keepdim=True), x, x, need_weights=False)
        return self.head(self.norm(y[:, 0]))


class Gpt(nn.Module):
    """Causal attention by hand; the embedding is tied with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(40, 24), nn.Embedding(6, 24)
        self.ln1, self.qkv, self.proj = nn.LayerNorm(24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.ln2, self.up, self.down = nn.LayerNorm(24), nn.Linear(24, 48), nn.Linear(48, 24)
        self.ln, self.head = nn.LayerNorm(24), nn.Linear(24, 40, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        length = ids.shape[1]
        x = self.wte(ids) + self.wpe(torch.arange(length, device=ids.device))
        q, k, v = (t.unflatten(-1, (2, 12)).transpose(1, 2) for t in self.split(self.ln1(x)))
        hidden = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        attention = (q @ k.transpose(2, 3) / 12**0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + self.proj((attention @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.ln2(x))))
        return self.head(self.ln(x))

    def split(self, x):
        return self.qkv(x).chunk(3, -1)


class Lstm(nn.Module):
    """A recurrent classifier over the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(10, 16, batch_first=True), nn.Linear(16, 6)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


class Decoder(nn.Module):
    """Transposed convolutions; the output is an image, not logits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 48)
        self.up1 = nn.ConvTranspose2d(12, 12, 4, 2, 1)
        self.up2 = nn.ConvTranspose2d(12, 4, 4, 2, 1, groups=2)

    def forward(self, z):
        x = F.relu(self.fc(z)).unflatten(1, (12, 2, 2))
        return torch.tanh(self.up2(F.relu(self.up1(x))))


class Wave(nn.Module):
    """One-dimensional convolutions, one of them dilated, and a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 16, 5, stride=2)
        self.conv2 = nn.Conv1d(16, 16, 3, padding=2, dilation=2)
        self.fc = nn.Linear(16, 8)
        self.register_buffer("order", torch.arange(8))

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.mean(2))[:, self.order]


@dataclass(frozen=True)
class Entry:
    """One network of the zoo: how to build it, what it takes, and what its outputs are."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: str = "logits"
    dtype: torch.dtype = torch.float32
    tokens: int = 0

    def network(self) -> Network:
        """Return a fresh network: every call gives the same weights, bit for bit."""
        with torch.random.fork_rng():
            torch.manual_seed(sum(map(ord, self.name)))
            module = self.build()
            _enliven(module)
        module = module.to(self.dtype).eval()
        return Network(module, (self.inputs(2, seed=1),), name=self.name, loss=self.loss)

    def inputs(self, samples: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.tokens:
            return torch.randint(self.tokens, (samples, *self.shape), generator=generator)
        # Inputs of one layer are correlated in life; white ones would make H the identity.
        x = torch.randn(samples, *self.shape, generator=generator)
        x = x + 0.7 * x.roll(1, -1)
        return x.to(self.dtype)


def _enliven(module: nn.Module) -> None:
    """Take a network away from its initialisation."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)
            nn.init.uniform_(m.running_var, 0.3, 1.5)
            nn.init.uniform_(m.weight, 0.6, 1.4)
            nn.init.uniform_(m.bias, -0.3, 0.3)
        elif isinstance(m, nn.Embedding):
            nn.init.normal_(m.weight, 0, 0.4)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1:  # heavier tails than a Gaussian, a spectrum that falls, more gain
                p.mul_(1.6 * torch.randn_like(p).abs().clamp(0.2, 3))
                flat = p.view(p.shape[0], -1)
                flat += (flat.std() * torch.randn(len(flat), 2)) @ torch.randn(2, flat.shape[1]) / 2


ZOO = {
    entry.name: entry
    for entry in (
        Entry("mlp", Mlp, (24,)),
        Entry("residual", Residual, (3, 8, 8)),
        Entry("grouped", Grouped, (3, 8, 8)),
        Entry("vit", Vit, (3, 8, 8)),
        Entry("gpt", Gpt, (6,), tokens=40),
        Entry("lstm", Lstm, (6, 10)),
        Entry("decoder", Decoder, (12,), loss="features"),
        Entry("mlp-bf16", Mlp, (24,), dtype=torch.bfloat16),
        Entry("wave", Wave, (4, 24)),
    )
}
