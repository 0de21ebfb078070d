"""A tiny vision transformer for 28 x 28 images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lamina.zoo.attention import Block, initialise


class ViT(nn.Module):
    """Vision transformer: patches as tokens, blocks, the mean of the tokens, one linear layer.

    Input: images [n, 1, 28, 28]; output: logits [n, 10]. As it stands 678,538 parameters.

    Args:
        width: features of a token.
        depth: blocks.
        heads: attention heads of a block.
        patch: side of a patch [pixels].

    Reference: Dosovitskiy et al. 2021, arXiv:2010.11929, with mean pooling for the class token.

    Example:
        >>> ViT(depth=1).eval()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: int = 96, depth: int = 6, heads: int = 3, patch: int = 7) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((28 // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads, dropout=0.1) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 10)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        return self.fc(self.norm(self.blocks(tokens)).mean(1))


ZOO: dict[str, Callable[[], nn.Module]] = {"vit-tiny": ViT}
EXAMPLE, DATA = (1, 28, 28), "Fashion-MNIST"
