"""ResNet-20 in the form made for 32 x 32 images, the reference of the low rank literature."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm and a shortcut that has no parameters.

    Where the block halves the image, the shortcut takes every second pixel and pads the new
    channels with zeros ("option A").

    Args:
        inputs: input channels.
        outputs: output channels.
        stride: of the first convolution, 1 or 2.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.added:
            half = self.added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return self.relu2(x + y)


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR: 3 stages of 3 blocks with 16, 32 and 64 channels, 269,722 parameters.

    Input: images [n, 3, 32, 32]; output: logits [n, 10].

    Reference: He et al. 2016, arXiv:1512.03385, section 4.2.

    Example:
        >>> import torch
        >>> ResNet20().eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(Block(a, b, b // a) for a, b in pairwise(widths)))
        self.fc = nn.Linear(64, 10)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))


ZOO: dict[str, Callable[[], nn.Module]] = {"resnet20": ResNet20}
EXAMPLE, DATA = (3, 32, 32), "CIFAR-10"
