"""The merged form: what it builds, what it refuses, and that integers alone say it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms import Edit, install
from lamina.forms.merged import ACTIVATIONS, build_merged, per_axis, spelled

SAME = {"inputs": 3, "outputs": 8, "kernel": 5, "padding": 2}


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3))


@pytest.mark.parametrize("made_of", [nn.Conv2d(3, 8, 3), block()])
def test_a_layer_or_a_block_becomes_one_convolution_of_zeros(made_of: nn.Module) -> None:
    conv = build_merged(made_of, SAME)
    assert isinstance(conv, nn.Conv2d)
    assert (conv.kernel_size, conv.padding, conv.stride) == ((5, 5), (2, 2), (1, 1))
    assert conv.bias is not None and not conv.weight.any()
    assert conv(torch.ones(1, 3, 6, 6)).shape == (1, 8, 6, 6)


@pytest.mark.parametrize("number", ACTIVATIONS)
def test_an_activation_follows(number: int) -> None:
    made = build_merged(block(), SAME | {"activation": number})
    assert isinstance(made, nn.Sequential) and type(made[1]) is ACTIVATIONS[number]


def test_numbers_of_every_axis() -> None:
    conv = build_merged(
        nn.Conv2d(4, 4, 1), {"inputs": 4, "outputs": 4, "kernel": 1, "kernel1": 7, "padding": 0,
                             "padding1": 3, "stride0": 2, "groups": 4, "bias": 0},
    )  # fmt: skip
    assert isinstance(conv, nn.Conv2d)
    assert (conv.kernel_size, conv.padding, conv.stride) == ((1, 7), (0, 3), (2, 1))
    assert conv.groups == 4 and conv.bias is None
    assert per_axis(spelled("kernel", (1, 7)), "kernel", 2, 0) == (1, 7)


def test_dtype_and_what_is_trained_stay() -> None:
    old = nn.Conv1d(3, 8, 3).double().requires_grad_(False)
    made = build_merged(old, SAME)
    assert isinstance(made, nn.Conv1d) and made.weight.dtype == torch.float64
    assert not made.weight.requires_grad


@pytest.mark.parametrize(
    "wrong",
    [
        *({"inputs": 0}, {"outputs": -1}, {"kernel": 0}, {"kernel": 128}, {"stride": 0}),
        *({"padding": -1}, {"groups": 2}, {"bias": 2}, {"activation": 99}, {"kernel2": 3}),
        *({"taps": 3}, {"kernel": True}, {"kernel": 3.0}, {"outputs": 1 << 19, "kernel": 99}),
        {"inputs": 1 << 21},
    ],
)
def test_integers_that_do_not_fit_are_refused(wrong: dict) -> None:
    with pytest.raises(FileError):
        build_merged(nn.Conv2d(3, 8, 3), SAME | wrong)


@pytest.mark.parametrize(
    "module",
    [nn.Linear(3, 8), nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv2d(3, 8, 3)), nn.ReLU()],
)
def test_what_holds_no_convolution_of_one_kind_is_refused(module: nn.Module) -> None:
    with pytest.raises(FileError, match="only convolutions"):
        build_merged(module, SAME)


def test_it_is_put_in_by_an_edit_and_exports() -> None:
    net = nn.Sequential(block(), nn.Flatten()).eval()
    install(net, [Edit("0", "merged", SAME | {"activation": 1})])
    x = torch.randn(2, 3, 6, 6)
    program = torch.export.export(net, (x,))
    assert torch.equal(program.module()(x), net(x))
