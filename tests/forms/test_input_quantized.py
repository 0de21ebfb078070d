"""Layers that round their input: the integers, the zero, the step, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lamina.artifact import pack, restore, unpack
from lamina.errors import FileError
from lamina.forms import Edit, Grid, Plain, install
from lamina.forms.input_quantized import bounds_of, build_input_quantized, round_input

FOUR = {"bits": 4, "zero": -5}


@given(st.integers(-15, 0), st.floats(1e-6, 1e4), st.integers(0, 99))
def test_zero_is_zero_and_values_are_few_integers(zero: int, step: float, seed: int) -> None:
    at = torch.tensor(step, dtype=torch.float32)
    x = 20 * at * torch.randn(300, generator=torch.Generator().manual_seed(seed))
    x[:2] = 0
    y = round_input(x, at, zero, zero + 15)
    assert bool((y[:2] == 0).all())
    assert len(torch.unique(y + 0.0)) <= 16
    assert torch.equal(round_input(y, at, zero, zero + 15), y)
    q = y / at
    assert torch.allclose(q, q.round(), atol=1e-4)
    assert float(q.round().min()) >= zero
    assert float(q.round().max()) <= zero + 15
    inside = (x >= zero * at) & (x <= (zero + 15) * at)
    assert bool(((y - x)[inside].abs() <= at / 2 * (1 + 1e-5)).all())


def test_rounding_in_half_precision_is_that_of_float32() -> None:
    x = torch.randn(100).to(torch.bfloat16)
    step = torch.tensor(0.1)
    y = round_input(x, step, -8, 7)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, round_input(x.float(), step, -8, 7).to(torch.bfloat16))


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 3, 3), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_layer_on_a_rounded_input(kind: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    layer.weight.requires_grad_(False)
    root = nn.Sequential(copy.deepcopy(layer))
    before = root[0]
    called: list[str] = []
    before.register_forward_hook(lambda *_: called.append("after"))
    step = torch.tensor(0.3)
    edits = [Edit("0", "input_quantized", FOUR), Edit("0.input_step", "values", values=Plain(step))]
    install(root, edits)
    x = torch.randn(shape)
    assert torch.equal(root(x), layer(round_input(x, step, -5, 10)))
    assert isinstance(root[0], type(layer))
    assert root[0].weight is before.weight
    assert not root[0].weight.requires_grad
    assert called == ["after"]
    assert type(before) is type(layer)
    assert "input_step" not in before._buffers
    assert "input=-5..10" in repr(root[0])
    file = pack(root, tuple(edits), "module", {})
    loaded = restore(unpack(file), nn.Sequential(make()))
    assert torch.equal(loaded(x), root(x))
    again = copy.deepcopy(loaded)
    assert torch.equal(again(x), root(x))


def test_a_layer_without_a_step_shows() -> None:
    layer = build_input_quantized(nn.Linear(2, 2), FOUR)
    assert bool(layer(torch.ones(1, 2)).isnan().all())


def test_conv1d_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(5, 6)
    root = nn.Sequential(layer)
    step = torch.tensor(0.25)
    install(root, [Edit("0", "input_quantized", {"bits": 4, "zero": -7, "levels": 15}),
                   Edit("0.input_step", "values", values=Plain(step))])  # fmt: skip
    x = torch.randn(3, 6)
    assert torch.equal(root(x), layer(round_input(x, step, -7, 7)))


def test_integer_arithmetic_gives_the_same() -> None:
    """Integer matrix product, then scales: what an integer kernel would compute."""
    torch.manual_seed(0)
    weight = Grid(torch.randint(-7, 8, (5, 64), dtype=torch.int32), 0.037)
    layer = nn.Linear(64, 5)
    layer.weight.data.copy_(weight.dense())
    root = nn.Sequential(layer)
    step, zero = torch.tensor(0.21), -6
    install(root, [Edit("0", "input_quantized", {"bits": 4, "zero": zero}),
                   Edit("0.input_step", "values", values=Plain(step))])  # fmt: skip
    x = torch.randn(40, 64)
    codes = (torch.round(x / step).clamp(zero, zero + 15) - zero).to(torch.int64)  # 0 to 15
    w = weight.symbols.to(torch.int64)
    total = codes @ w.T + zero * w.sum(1)
    want = total.double() * float(step) * weight.step + layer.bias.double()
    assert torch.allclose(root(x).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"bits": 1, "zero": 0}, {"bits": 9, "zero": 0}, {"bits": 4, "zero": 1},
     {"bits": 4, "zero": -16}, {"bits": 4, "zero": 0, "levels": 17},
     {"bits": 4, "zero": 0, "levels": 1}, {"bits": 4, "zero": 0, "more": 1}],
)  # fmt: skip
def test_integers_that_do_not_fit_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(FileError, match="input_quantized"):
        build_input_quantized(nn.Linear(2, 2), settings)


def test_other_modules_are_refused() -> None:
    for module in (nn.ReLU(), nn.Embedding(3, 2), nn.LayerNorm(2)):
        with pytest.raises(FileError, match=type(module).__name__):
            build_input_quantized(module, FOUR)
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(FileError, match="forward of its own"):
        build_input_quantized(layer, FOUR)
    assert bounds_of({"bits": 8, "zero": -127, "levels": 255}) == (-127, 127)
