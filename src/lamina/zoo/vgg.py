"""VGG for 32 x 32 images, with BatchNorm: one linear layer, or the classifier of three."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

# Channels of the 3 x 3 convolutions; 0 halves the image.
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
VGG11 = (32, 0, 64, 0, 128, 128, 0, 192, 192, 0, 192, 192, 0)


class VGG(nn.Module):
    """VGG for CIFAR: convolutions with BatchNorm, five poolings, a classifier.

    Input: images [n, 3, 32, 32]; output: logits [n, 10]. `vgg16` has 14,724,042 parameters;
    `vgg11-bn`, narrow but with the three linear layers of the original, holds most of its own in
    these.

    Args:
        layers: output channels of every convolution, 0 where the image is halved.
        hidden: features of the two hidden layers of the classifier; 0: it is one linear layer.

    Reference: Simonyan, Zisserman 2015, arXiv:1409.1556; BatchNorm and one linear layer as is
    usual on CIFAR.

    Example:
        >>> import torch
        >>> VGG((8, 0, 16, 0, 0, 0, 0)).eval()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, layers: tuple[int, ...] = VGG16, hidden: int = 0) -> None:
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
        classifier: list[nn.Module] = []
        for _ in range(2 if hidden else 0):
            classifier += [nn.Linear(channels, hidden), nn.ReLU(), nn.Dropout(0.5)]
            channels = hidden
        last = nn.Linear(channels, 10)
        self.fc = nn.Sequential(*classifier, last) if hidden else last

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).flatten(1))


ZOO: dict[str, Callable[[], nn.Module]] = {
    "vgg16": VGG,
    "vgg11-bn": partial(VGG, VGG11, hidden=2048),
}
EXAMPLE, DATA = (3, 32, 32), "CIFAR-10"
