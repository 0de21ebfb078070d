"""What the small transformers are made of: attention with one layer a projection, and its block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Two linear layers with GELU between them: `fc2(gelu(fc1(x)))`.

    Args:
        width: features in and out.
        hidden: features between.

    Reference: Hendrycks, Gimpel 2016, arXiv:1606.08415 (GELU).

    Example:
        >>> import torch
        >>> MLP(4, 16)(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    """Multi-head attention; query, key, value and output are layers of their own.

    Args:
        width: features in and out.
        heads: attention heads; they divide `width`.
        causal: whether a token sees only those before it, and itself.

    Reference: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2.

    Example:
        >>> import torch
        >>> Attention(8, 2)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block with its norms in front: attention and MLP, each beside a skip.

    Args:
        width: features of a token; the MLP has four times as many.
        heads: attention heads.
        causal: as for `Attention`.
        dropout: share of the values of each branch that training drops.

    Example:
        >>> import torch
        >>> Block(8, 2)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 8])
    """

    def __init__(self, width: int, heads: int, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


def initialise(module: nn.Module) -> None:
    """Draw weights of linear layers, embeddings and positions as GPT-2 does (deviation 0.02).

    Example:
        >>> layer = nn.Linear(64, 64)
        >>> initialise(layer)
        >>> 0.01 < float(layer.weight.detach().std()) < 0.03
        True
    """
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
