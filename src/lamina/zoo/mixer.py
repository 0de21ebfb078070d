"""A tiny MLP-Mixer for 28 x 28 images."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lamina.zoo.attention import MLP, initialise


class MixerBlock(nn.Module):
    """An MLP across the tokens and an MLP across the features, each with its norm and skip.

    Args:
        tokens: tokens of an image; their MLP has four times as many.
        width: features of a token; their MLP has four times as many.

    Example:
        >>> import torch
        >>> MixerBlock(4, 8)(torch.zeros(2, 4, 8)).shape
        torch.Size([2, 4, 8])
    """

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.across = MLP(tokens, 4 * tokens)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Mixer(nn.Module):
    """MLP-Mixer: patches as tokens, mixer blocks, the mean of the tokens, one linear layer.

    Input: images [n, 1, 28, 28]; output: logits [n, 10]. As it stands 466,282 parameters.

    Args:
        width: features of a token.
        depth: blocks.
        patch: side of a patch [pixels].

    Reference: Tolstikhin et al. 2021, arXiv:2105.01601.

    Example:
        >>> import torch
        >>> Mixer(depth=1).eval()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: int = 96, depth: int = 6, patch: int = 7) -> None:
        super().__init__()
        tokens = (28 // patch) ** 2
        self.embed = nn.Conv2d(1, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(MixerBlock(tokens, width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 10)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.fc(self.norm(self.blocks(tokens)).mean(1))


ZOO: dict[str, Callable[[], nn.Module]] = {"mlp-mixer-tiny": Mixer}
EXAMPLE, DATA = (1, 28, 28), "Fashion-MNIST"
