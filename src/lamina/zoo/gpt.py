"""A small GPT for text cut into 1,024 kinds of pieces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lamina.zoo.attention import Block, initialise


class GPT(nn.Module):
    """A causal language model in the form of GPT-2, its head tied to its embedding.

    Input: tokens [n, t], t <= `context`; output: logits of the next tokens [n, t, vocabulary].
    As it stands 2,658,880 parameters.

    Args:
        width: features of a token.
        depth: blocks.
        heads: attention heads of a block.
        vocabulary: kinds of tokens.
        context: tokens that are seen at a time.

    Reference: Radford et al. 2019, Language models are unsupervised multitask learners.

    Example:
        >>> GPT(depth=1).eval()(torch.zeros(2, 9, dtype=torch.long)).shape
        torch.Size([2, 9, 1024])
    """

    def __init__(
        self,
        width: int = 160,
        depth: int = 8,
        heads: int = 5,
        vocabulary: int = 1024,
        context: int = 128,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.dropout = nn.Dropout(0.1)
        blocks = (Block(width, heads, causal=True, dropout=0.1) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        initialise(self)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(self.dropout(x))))


ZOO: dict[str, Callable[[], nn.Module]] = {"gpt-tiny": GPT}
EXAMPLE, DATA, VOCABULARY = (128,), "Brown corpus", 1024
