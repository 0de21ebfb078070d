"""VGG-16 in the form made for 32 x 32 images, with BatchNorm and one linear layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

# Channels of the 3 x 3 convolutions; 0 halves the image.
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class VGG(nn.Module):
    """VGG for CIFAR: convolutions with BatchNorm, five poolings, one linear layer.

    Input: images [n, 3, 32, 32]; output: logits [n, 10]. VGG-16 has 14,724,042 parameters.

    Args:
        layers: output channels of every convolution, 0 where the image is halved.

    Reference: Simonyan, Zisserman 2015, arXiv:1409.1556; BatchNorm and one linear layer as is
    usual on CIFAR.

    Example:
        >>> import torch
        >>> VGG((8, 0, 16, 0, 0, 0, 0)).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, layers: tuple[int, ...] = VGG16) -> None:
        super().__init__()
        features: list[nn.Module] = []
        channels = 3
        for width in layers:
            if width:
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                features += [conv, nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            else:
                features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))


ZOO: dict[str, Callable[[], nn.Module]] = {"vgg16": VGG}
EXAMPLE, DATA = (3, 32, 32), "CIFAR-10"
