"""The narrow form: what is left of a layer computes what those channels computed."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lamina.errors import FileError
from lamina.forms import Edit, Plain, install, widths
from lamina.forms.narrow import build_narrow

LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (3, 6)),
    "stride": (nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 9, 8)),
    "dilation": (nn.Conv2d(6, 5, 3, dilation=2, padding=(0, 1)), (2, 6, 9, 8)),
    "same": (nn.Conv2d(6, 5, (3, 5), padding="same", bias=False), (2, 6, 9, 8)),
    "reflect": (nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), (2, 6, 9, 8)),
    "1d": (nn.Conv1d(6, 5, 3, stride=2), (2, 6, 9)),
    "3d": (nn.Conv3d(6, 5, 2, padding=1, bias=False), (2, 6, 4, 5, 3)),
}
NORMS = {
    "1d": (nn.BatchNorm1d(6, eps=0.1), (4, 6)),
    "2d": (nn.BatchNorm2d(6, momentum=None), (4, 6, 3, 3)),
    "3d": (nn.BatchNorm3d(6, affine=False), (4, 6, 2, 2, 2)),
    "no moments": (nn.BatchNorm2d(6, track_running_stats=False), (4, 6, 3, 3)),
}
INPUTS, OUTPUTS = torch.tensor([0, 2, 5]), torch.tensor([1, 3])


@pytest.mark.parametrize("name", LAYERS)
def test_a_narrow_layer_is_the_layer_on_some_channels(name: str) -> None:
    layer, shape = LAYERS[name]
    net = nn.Sequential(copy.deepcopy(layer))
    edits = [
        Edit("0", "narrow", {"inputs": 3, "outputs": 2}),
        Edit("0.weight", "values", values=Plain(layer.weight.detach()[OUTPUTS][:, INPUTS])),
    ]
    if layer.bias is not None:
        edits.append(Edit("0.bias", "values", values=Plain(layer.bias.detach()[OUTPUTS])))
    install(net, edits)
    assert type(net[0]) is type(layer) and (net[0].bias is None) == (layer.bias is None)
    x = torch.randn(shape)
    silent = torch.zeros_like(x)
    silent[:, INPUTS] = x[:, INPUTS]  # the other channels give nothing
    assert torch.allclose(net(x[:, INPUTS]), layer(silent)[:, OUTPUTS], atol=1e-5)
    assert not torch.allclose(net(x[:, INPUTS]), layer(x)[:, OUTPUTS], atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_a_narrow_norm_is_the_norm_on_some_channels(name: str, training: bool) -> None:
    norm, shape = copy.deepcopy(NORMS[name][0]), NORMS[name][1]
    with torch.no_grad():
        for tensor in (*norm.parameters(), *norm.buffers()):
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.dim() else torch.tensor(7))
    net = nn.Sequential(copy.deepcopy(norm)).train(training)
    edits = [Edit("0", "narrow", {"inputs": 3, "outputs": 3})]
    edits += [
        Edit(f"0.{leaf}", "values", values=Plain(tensor.detach()[INPUTS]))
        for leaf, tensor in norm.state_dict().items()
        if tensor.dim()
    ]
    install(net, edits)
    x = torch.randn(shape)
    norm.train(training)
    assert torch.allclose(net(x[:, INPUTS]), norm(x)[:, INPUTS], atol=1e-6)
    for leaf, tensor in norm.state_dict().items():
        now = net[0].state_dict()[leaf]
        assert torch.allclose(now, tensor[INPUTS] if tensor.dim() else tensor)
    assert (net[0].eps, net[0].momentum, net[0].training) == (norm.eps, norm.momentum, training)


def test_dtype_flags_and_hooks_stay() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1).double(), nn.BatchNorm2d(4).double())
    net[0].weight.requires_grad_(False)
    calls: list[int] = []
    net[0].register_forward_hook(lambda *_: calls.append(1))
    for path in ("0", "1"):
        install(net, [Edit(path, "narrow", {"inputs": 4 if path == "0" else 2, "outputs": 2})])
    assert {t.dtype for t in net.state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert not net[0].weight.requires_grad and net[0].bias.requires_grad
    net(torch.zeros(2, 4, 3, 3, dtype=torch.float64))
    assert calls == [1]
    mixed = nn.BatchNorm2d(4)
    mixed.weight.data = mixed.weight.data.half()
    made = build_narrow(mixed, {"inputs": 3, "outputs": 3})
    assert (made.weight.dtype, made.running_mean.dtype) == (torch.float16, torch.float32)


def test_on_the_meta_device_it_costs_nothing() -> None:
    with torch.device("meta"):
        layer = nn.Linear(10_000, 10_000)
    made = build_narrow(layer, {"inputs": 5_000, "outputs": 9_999})
    assert made.weight.is_meta and made.weight.shape == (9_999, 5_000)


@given(
    inputs=st.one_of(st.integers(-(2**70), 2**70), st.sampled_from([0, 1, 6, 7])),
    outputs=st.one_of(st.integers(-(2**70), 2**70), st.sampled_from([0, 1, 5, 6])),
)
def test_hostile_integers_are_refused(inputs: int, outputs: int) -> None:
    settings = {"inputs": inputs, "outputs": outputs}
    if 1 <= inputs <= 6 and 1 <= outputs <= 5:
        assert widths(build_narrow(nn.Linear(6, 5), settings)) == (inputs, outputs)
    else:
        with pytest.raises(FileError, match="does not fit"):
            build_narrow(nn.Linear(6, 5), settings)


@pytest.mark.parametrize("settings", [{}, {"inputs": 2}, {"inputs": True, "outputs": 2}])
def test_missing_numbers_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(FileError, match="does not fit"):
        build_narrow(nn.Linear(6, 5), settings)


def test_a_norm_has_one_width() -> None:
    with pytest.raises(FileError, match="one width"):
        build_narrow(nn.BatchNorm1d(6), {"inputs": 3, "outputs": 2})


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ConvTranspose2d(4, 4, 3),
        nn.LayerNorm(4),
        nn.Embedding(4, 4),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    ],
)
def test_other_layers_are_refused(layer: nn.Module) -> None:
    with pytest.raises(FileError, match="cannot be made narrower"):
        build_narrow(layer, {"inputs": 2, "outputs": 2})
