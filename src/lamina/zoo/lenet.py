"""The two LeNets every compression paper starts from: LeNet-300-100 and LeNet-5 in Caffe's form."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class LeNet300100(nn.Module):
    """The fully connected LeNet: 784 - 300 - 100 - 10, ReLU between, 266,610 parameters.

    Input: images [n, 1, 28, 28] (or [n, 784]); output: logits [n, 10].

    Reference: LeCun et al. 1998, Gradient-based learning applied to document recognition.

    Example:
        >>> import torch
        >>> LeNet300100()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(300, 100)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.fc1(x.flatten(1)))
        x = self.relu2(self.fc2(x))
        return self.fc3(x)


class LeNet5(nn.Module):
    """LeNet-5 as the Caffe framework ships it, 431,080 parameters.

    Two 5 x 5 convolutions (20, 50 channels) each followed by 2 x 2 max pooling and nothing else,
    then 800 - 500 - 10 with one ReLU. Input: images [n, 1, 28, 28]; output: logits [n, 10].

    Reference: Jia et al. 2014, Caffe, arXiv:1408.5093 (examples/mnist/lenet).

    Example:
        >>> import torch
        >>> LeNet5()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(800, 500)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(self.conv1(x))
        x = self.pool2(self.conv2(x))
        return self.fc2(self.relu(self.fc1(x.flatten(1))))


# What this file adds to the zoo; `lamina.zoo` collects the `ZOO` of every file beside it.
ZOO: dict[str, Callable[[], nn.Module]] = {"lenet-300-100": LeNet300100, "lenet-5": LeNet5}
EXAMPLE, DATA = (1, 28, 28), "mnist-10k"
