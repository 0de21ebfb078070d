"""The Tucker-2 form: the same function as the layer at full ranks, in every geometry."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms import BUILDERS, Edit, Plain, build_tucker, install
from lamina.measure.tucker import compose

CONVS = {
    "plain": (nn.Conv2d(4, 5, 3), (2, 4, 9, 8)),
    "stride": (nn.Conv2d(4, 5, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "dilation": (nn.Conv2d(4, 5, 3, dilation=2, padding=1), (2, 4, 9, 8)),
    "same": (nn.Conv2d(4, 5, (3, 5), padding="same", bias=False), (2, 4, 9, 8)),
    "reflect": (nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 8)),
    "circular": (nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular"), (2, 4, 9, 8)),
    "oblong": (nn.Conv2d(4, 3, (1, 5), stride=(1, 3), padding=(0, 2)), (2, 4, 9, 8)),
    "1d": (nn.Conv1d(4, 5, 3, stride=2), (2, 4, 9)),
    "3d": (nn.Conv3d(4, 5, 2, padding=1, bias=False), (2, 4, 4, 5, 3)),
}


def fill(layers: nn.Module, A: torch.Tensor, C: torch.Tensor, B: torch.Tensor) -> None:
    with torch.no_grad():
        for layer, values in zip(layers, (B, C, A), strict=True):
            layer.weight.copy_(values.reshape(layer.weight.shape))


@pytest.mark.parametrize("name", CONVS)
def test_it_is_the_convolution_whose_weight_the_factors_make(name: str) -> None:
    """Full ranks reach any weight; here every rank, with the dense weight composed by einsum."""
    layer, shape = CONVS[name]
    layer = copy.deepcopy(layer).double()
    f, c = layer.weight.shape[:2]
    x = torch.randn(shape, dtype=torch.float64)
    for r1, r2 in ((f, c), (2, 3), (1, 1)):
        A, B = (torch.randn(n, r, dtype=torch.float64) for n, r in ((f, r1), (c, r2)))
        C = torch.randn(r1, r2, layer.weight[0, 0].numel(), dtype=torch.float64)
        layers = build_tucker(layer, {"outputs": r1, "inputs": r2})
        fill(layers, A, C, B.T)
        with torch.no_grad():
            layer.weight.copy_(compose(A, C, B.T).reshape(layer.weight.shape))
        torch.testing.assert_close(layers(x), layer(x), rtol=1e-10, atol=1e-9)
        wrong = layers[0].weight.flip(0)
        if r2 > 1:  # the order of channels matters
            layers[0].weight.data = wrong.clone()
            assert not torch.allclose(layers(x), layer(x))


def test_it_keeps_dtype_flags_and_bias_and_spends_no_random_numbers() -> None:
    layer = nn.Conv2d(6, 4, 3, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False)
    before = torch.get_rng_state()
    layers = build_tucker(layer, {"outputs": 2, "inputs": 3})
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in layers.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in layers.parameters()] == [False, False, False, True]
    assert torch.equal(layers[2].bias, layer.bias)
    assert layers[0].bias is None and layers[1].bias is None
    assert not any(p.is_meta for p in layers.parameters())
    assert sum(float(layer.weight.abs().sum()) for layer in layers) == 0.0


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (nn.Conv2d(6, 4, 3), {}),
        (nn.Conv2d(6, 4, 3), {"outputs": 2}),
        (nn.Conv2d(6, 4, 3), {"outputs": 0, "inputs": 2}),
        (nn.Conv2d(6, 4, 3), {"outputs": 2, "inputs": -1}),
        (nn.Conv2d(6, 4, 3), {"outputs": 5, "inputs": 2}),
        (nn.Conv2d(6, 4, 3), {"outputs": 2, "inputs": 7}),
        (nn.Conv2d(6, 4, 3), {"outputs": 1 << 40, "inputs": 1 << 40}),
        (nn.Conv2d(6, 40, 3), {"outputs": 40, "inputs": 4}),
        (nn.Conv2d(40, 6, 3), {"outputs": 4, "inputs": 40}),
        (nn.Conv2d(4, 4, 3, groups=2), {"outputs": 1, "inputs": 1}),
        (nn.ConvTranspose2d(4, 4, 3), {"outputs": 1, "inputs": 1}),
        (nn.Linear(4, 4), {"outputs": 1, "inputs": 1}),
        (nn.ReLU(), {"outputs": 1, "inputs": 1}),
    ],
)
def test_what_does_not_fit_is_refused(layer: nn.Module, settings: dict[str, int]) -> None:
    with pytest.raises(FileError, match="tucker"):
        build_tucker(layer, settings)


@pytest.mark.parametrize(("f", "c", "k"), [(5000, 1, 2), (1, 5000, 2), (64, 64, 3), (3, 2, 1)])
def test_no_integers_make_it_larger_than_three_layers(f: int, c: int, k: int) -> None:
    """The bound of memory: whatever a file says, three times what it replaces, or nothing."""
    layer = nn.Conv1d(c, f, k, bias=False)
    sides = sorted({1, 2, k, k * c, k * f, c, f})
    built = 0
    for r1 in sides:
        for r2 in sides:
            try:
                layers = build_tucker(layer, {"outputs": r1, "inputs": r2})
            except FileError:
                continue
            built += 1
            assert sum(p.numel() for p in layers.parameters()) <= 3 * layer.weight.numel()
            assert all(p.numel() <= layer.weight.numel() for p in layers.parameters())
    assert built


def test_installed_it_trains_copies_and_pickles() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    edits = [
        Edit("0", "tucker", {"outputs": 2, "inputs": 2}),
        Edit("0.0.weight", "values", values=Plain(torch.randn(2, 3, 1, 1))),
        Edit("0.1.weight", "values", values=Plain(torch.randn(2, 2, 3, 3))),
        Edit("0.2.weight", "values", values=Plain(torch.randn(5, 2, 1, 1))),
    ]
    assert "tucker" in BUILDERS
    install(net, edits)
    x = torch.randn(3, 3, 6, 6)
    net(x).square().sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in net[0])
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        assert torch.equal(twin(x), net(x))


def test_an_edit_within_an_edit_is_no_larger() -> None:
    """The outer layers are 1x1: such a form of them is bounded like any other."""
    net = nn.Sequential(nn.Conv2d(8, 8, 3))
    install(net, [Edit("0", "tucker", {"outputs": 8, "inputs": 8})])
    install(net, [Edit("0.0", "tucker", {"outputs": 8, "inputs": 8})])
    with pytest.raises(FileError, match=r"0\.2"):
        install(net, [Edit("0.2", "tucker", {"outputs": 9, "inputs": 8})])
