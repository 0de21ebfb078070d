"""A small MobileNetV2 for 28 x 28 images."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

# channels, blocks, stride of the first block
STAGES = ((16, 2, 1), (24, 3, 2), (40, 3, 1))


def conv_norm(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Return a convolution without bias that keeps the size (but for its stride), and BatchNorm.

    Example:
        >>> [type(layer).__name__ for layer in conv_norm(3, 8, 3)]
        ['Conv2d', 'BatchNorm2d']
    """
    pad = kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, pad, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """A 1 x 1 expansion, a 3 x 3 depthwise convolution, a linear 1 x 1 projection.

    A skip goes round them where input and output are alike.

    Args:
        inputs, outputs: channels.
        stride: of the depthwise convolution.
        expansion: channels between, as a multiple of `inputs`.

    Example:
        >>> import torch
        >>> InvertedResidual(4, 6, 2).eval()(torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 6, 4, 4])
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = expansion * inputs
        self.conv = nn.Sequential(
            *conv_norm(inputs, hidden, 1), nn.ReLU6(),
            *conv_norm(hidden, hidden, 3, stride, hidden), nn.ReLU6(),
            *conv_norm(hidden, outputs, 1),
        )  # fmt: skip
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 of eight blocks at 14 x 14 and 7 x 7.

    Input: images [n, 1, 28, 28]; output: logits [n, 10].

    Reference: Sandler et al. 2018, arXiv:1801.04381; stages as fit the image.

    Example:
        >>> import torch
        >>> MobileNetV2().eval()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [nn.Sequential(*conv_norm(1, 16, 3, 2), nn.ReLU6())]
        channels = 16
        for width, blocks, stride in STAGES:
            for i in range(blocks):
                features.append(InvertedResidual(channels, width, stride if i == 0 else 1))
                channels = width
        features.append(nn.Sequential(*conv_norm(channels, 160, 1), nn.ReLU6()))
        self.features = nn.Sequential(*features)
        self.fc = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


ZOO: dict[str, Callable[[], nn.Module]] = {"mobilenet-v2-tiny": MobileNetV2}
EXAMPLE, DATA = (1, 28, 28), "Fashion-MNIST"
