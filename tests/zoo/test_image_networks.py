"""ResNet-20, VGG-16 and the small CNN: parameters counted by hand, shapes, a forward pass."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from lamina.network.discover import discover
from lamina.zoo import build, untrained
from lamina.zoo.resnet import Block
from lamina.zoo.vgg import VGG

NAMES = ["resnet20", "small-cnn", "vgg16"]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def conv(inputs: int, outputs: int) -> int:
    """A 3 x 3 convolution without bias, and its BatchNorm."""
    return 9 * inputs * outputs + 2 * outputs


def test_parameter_counts() -> None:
    stages = 6 * conv(16, 16) + conv(16, 32) + 5 * conv(32, 32) + conv(32, 64) + 5 * conv(64, 64)
    assert count(build("resnet20")) == 269_722 == conv(3, 16) + stages + 64 * 10 + 10
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    convs = sum(conv(a, b) for a, b in pairwise(widths))
    assert count(build("vgg16")) == 14_724_042 == convs + 512 * 10 + 10
    assert (
        count(build("small-cnn"))
        == 94_186
        == (conv(1, 32) + conv(32, 64) + conv(64, 128) + 128 * 10 + 10)
    )


def test_multiply_accumulates_of_resnet20() -> None:
    """The 41 million that the literature states, without the sums of shortcuts and norms."""
    macs = sum(site.macs for site in discover(untrained("resnet20")).layers)
    stages = [(3, 16, 32), *[(16, 16, 32)] * 6, (16, 32, 16), *[(32, 32, 16)] * 5]
    stages += [(32, 64, 8), *[(64, 64, 8)] * 5]
    assert macs == sum(9 * a * b * side * side for a, b, side in stages) + 640
    assert 40e6 < macs < 41e6


@pytest.mark.parametrize("name", NAMES)
def test_shapes_at_several_batches(name: str) -> None:
    network = untrained(name)
    (x,) = network.example_inputs
    for n in (1, 3):
        assert network.forward(x[:1].expand(n, -1, -1, -1)).shape == (n, 10)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_exports(name: str) -> None:
    network = untrained(name)
    sites = discover(network)
    assert sites.traced and len(sites.chains) >= 1
    assert len(sites.layers) == {"resnet20": 20, "small-cnn": 4, "vgg16": 14}[name]


def test_a_block_by_hand() -> None:
    block = Block(4, 8, 2).double().eval()
    with torch.no_grad():
        for norm in (block.bn1, block.bn2):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.copy_(torch.rand(8) + 0.5)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)

    def normed(h: np.ndarray, norm: nn.BatchNorm2d) -> np.ndarray:
        state = {k: v.numpy()[:, None, None] for k, v in norm.state_dict().items() if v.dim()}
        scale = state["weight"] / np.sqrt(state["running_var"] + norm.eps)
        return (h - state["running_mean"]) * scale + state["bias"]

    def conved(h: np.ndarray, layer: nn.Conv2d, stride: int) -> np.ndarray:
        padded = np.pad(h, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
        windows = windows[:, :, ::stride, ::stride]
        return np.einsum("ncijab,ocab->noij", windows, layer.weight.detach().numpy())

    h = np.maximum(normed(conved(x.numpy(), block.conv1, 2), block.bn1), 0)
    h = normed(conved(h, block.conv2, 1), block.bn2)
    shortcut = np.zeros_like(h)
    shortcut[:, 2:6] = x.numpy()[:, :, ::2, ::2]
    np.testing.assert_allclose(block(x).detach().numpy(), np.maximum(h + shortcut, 0), atol=1e-12)


def test_a_vgg_of_other_layers() -> None:
    network = VGG((4, 0, 8, 0, 0, 0, 0)).eval()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert count(network) == conv(3, 4) + conv(4, 8) + 8 * 10 + 10
