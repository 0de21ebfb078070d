"""The two LeNets: parameter counts, layers, and a forward pass worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lamina.zoo.lenet import ZOO, LeNet5, LeNet300100


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts() -> None:
    assert count(LeNet300100()) == 266_610 == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    wanted = 25 * 20 + 20 + 25 * 20 * 50 + 50 + 800 * 500 + 500 + 500 * 10 + 10
    assert count(LeNet5()) == 431_080 == wanted


def test_layer_names() -> None:
    def layers(module: nn.Module) -> list[str]:
        return [name for name, m in module.named_modules() if list(m.parameters(recurse=False))]

    assert layers(LeNet300100()) == ["fc1", "fc2", "fc3"]
    assert layers(LeNet5()) == ["conv1", "conv2", "fc1", "fc2"]


def test_lenet_300_100_by_hand() -> None:
    network = LeNet300100().double()
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    h = x.reshape(3, 784).numpy()
    for layer, last in ((network.fc1, False), (network.fc2, False), (network.fc3, True)):
        h = h @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        h = h if last else np.maximum(h, 0)
    np.testing.assert_allclose(network(x).detach().numpy(), h, atol=1e-12)


def test_lenet_5_by_hand() -> None:
    network = LeNet5().double()
    x = torch.randn(2, 1, 28, 28, dtype=torch.float64)

    def conv_pool(h: np.ndarray, conv: nn.Conv2d) -> np.ndarray:
        assert conv.bias is not None
        weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
        windows = np.lib.stride_tricks.sliding_window_view(h, (5, 5), axis=(2, 3))
        y = np.einsum("ncijab,ocab->noij", windows, weight) + bias[None, :, None, None]
        n, c, height, width = y.shape
        return y.reshape(n, c, height // 2, 2, width // 2, 2).max(axis=(3, 5))

    h = conv_pool(conv_pool(x.numpy(), network.conv1), network.conv2).reshape(2, 800)
    h = np.maximum(h @ network.fc1.weight.detach().numpy().T + network.fc1.bias.detach().numpy(), 0)
    h = h @ network.fc2.weight.detach().numpy().T + network.fc2.bias.detach().numpy()
    np.testing.assert_allclose(network(x).detach().numpy(), h, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_network_exports(name: str) -> None:
    module = ZOO[name]().eval()
    x = torch.randn(2, 1, 28, 28)
    exported = torch.export.export(module, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), module(x))
