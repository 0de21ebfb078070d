"""Tiny networks, one for each way in which a network can be unusual."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Residual(nn.Module):
    """A residual CNN with batch norm, a strided shortcut and a flattening by `view`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.tail, self.fc = nn.Conv2d(4, 2, 1), nn.Linear(2 * 16, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = self.tail(F.relu(x + y))
        return self.fc(F.max_pool2d(x, 2).view(x.size(0), -1))


class Gpt(nn.Module):
    """Tied embedding and head, learned positions, attention by hand, a dict as output."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.wte, self.pos = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 4, 8))
        self.ln, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids) + self.pos[:, : ids.shape[1]]
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.ln(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x)))
        return {"hidden": x, "logits": self.head(x)}


class Twice(nn.Module):
    """One module called twice, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared = nn.Linear(4, 4), nn.Linear(4, 4)
        self.same = self.shared
        self.never = nn.Linear(4, 4)

    def forward(self, x):
        return self.same(self.shared(F.relu(self.a(self.a(x)))))


class Branching(nn.Module):
    """Control flow that depends on the data: export fails."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.a(x)
        if x.sum() > 1e6:
            x = -x
        return self.b(x)


class Counting(nn.Module):
    """Writes to a buffer and to its input, draws random numbers, and minds the training flag."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(2, 2), persistent=False)

    def forward(self, x):
        self.calls.add_(1)
        x.mul_(2)
        return self.fc(x + torch.rand(3))


class Uncopyable(Counting):
    """Cannot be copied: the fallback has to put everything back."""

    def __deepcopy__(self, memo):
        raise RuntimeError("no copies")
