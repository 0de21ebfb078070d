"""A small convolutional network for 28 x 28 images: the quick case of the benchmarks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Three 3 x 3 convolutions (32, 64, 128 channels) with BatchNorm, 94,186 parameters.

    Input: images [n, 1, 28, 28]; output: logits [n, 10].

    Example:
        >>> import torch
        >>> SmallCNN().eval()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = []
        for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
            conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            features += [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*features)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).amax((2, 3)))


ZOO: dict[str, Callable[[], nn.Module]] = {"small-cnn": SmallCNN}
EXAMPLE, DATA = (1, 28, 28), "Fashion-MNIST"
