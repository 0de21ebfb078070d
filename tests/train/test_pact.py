"""Activation quantizers: gradients against the surrogate, zero, and the form they become."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lamina.errors import MethodError
from lamina.forms.input_quantized import build_input_quantized
from lamina.train.pact import KINDS, InputQuantizer, RoundWeight, grid_of


def drawn(count: int = 400, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def make(kind: str, bits: int = 4, plus: bool = True) -> InputQuantizer:
    return InputQuantizer(kind, bits, 1.7, -0.9, plus)


def surrogate(kind: str, bits: int, x: Tensor, high: Tensor, low: Tensor, plus: bool) -> Tensor:
    """What the backward pass is the derivative of, in float64, with everything rounded held fixed.

    Beyond the range the value is its end; inside it is `x + step r` with the residual r of the real
    quantizer at the point of expansion (0 without `plus`).
    """
    count = 2**bits - (2 if kind == "symmetric" else 1)
    low = {"symmetric": -high, "one-sided": torch.zeros_like(high)}.get(kind, low)
    step = (high - low) / count
    at, zero, levels = grid_of(kind, bits, high.float(), low.float())
    q = torch.round(x.float() / at).clamp(zero, zero + levels - 1)
    residual = (q.double() - (x.float() / at).double()) * plus
    inside = x + step * residual.detach()
    above, below = x >= high.detach(), x <= low.detach()
    return torch.where(above, high.expand_as(x), torch.where(below, low.expand_as(x), inside))


@pytest.mark.parametrize("plus", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_the_surrogate(kind: str, bits: int, plus: bool) -> None:
    quantizer = make(kind, bits, plus)
    x = drawn().requires_grad_()
    g = drawn(seed=1)
    quantizer(x).backward(g)
    high = quantizer.high.detach().double().requires_grad_()
    low = quantizer.low.detach().double().requires_grad_()
    z = x.detach().double().requires_grad_()
    value = (surrogate(kind, bits, z, high, low, plus) * g.double()).sum()
    want = torch.autograd.grad(value, [z, high, low], allow_unused=True)
    assert torch.allclose(x.grad.double(), want[0], atol=1e-6)
    assert float(quantizer.high.grad) == pytest.approx(float(want[1]), rel=1e-3, abs=1e-3)
    if kind == "asymmetric":
        assert float(quantizer.low.grad) == pytest.approx(float(want[2]), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences_of_the_surrogate(kind: str) -> None:
    """The derivative of the surrogate itself, without autograd: residuals of one point are held."""
    quantizer = make(kind)
    x, g = drawn(), drawn(seed=1).double()
    quantizer(x).backward(g.float())
    high, low = quantizer.high.detach().double(), quantizer.low.detach().double()
    ends = {"symmetric": -high, "one-sided": torch.zeros_like(high)}
    count = 14 if kind == "symmetric" else 15
    at, zero, levels = grid_of(kind, 4, high.float(), low.float())
    r = (torch.round(x / at).clamp(zero, zero + levels - 1) - x / at).double()
    above, below = x >= high, x <= ends.get(kind, low)

    def value(up: Tensor, down: Tensor) -> float:
        down = {"symmetric": -up, "one-sided": torch.zeros_like(up)}.get(kind, down)
        y = x.double() + (up - down) / count * r
        return float((torch.where(above, up, torch.where(below, down, y)) * g).sum())

    e = 1e-4
    found = (value(high + e, low) - value(high - e, low)) / (2 * e)
    assert float(quantizer.high.grad) == pytest.approx(found, rel=1e-3, abs=1e-3)
    if kind == "asymmetric":
        found = (value(high, low + e) - value(high, low - e)) / (2 * e)
        assert float(quantizer.low.grad) == pytest.approx(found, rel=1e-3, abs=1e-3)


def test_pact_counts_only_what_is_beyond() -> None:
    quantizer = make("one-sided", plus=False)
    x = torch.tensor([-1.0, 0.3, 1.0, 1.8, 5.0], requires_grad=True)
    quantizer(x).backward(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    assert float(quantizer.high.grad) == 24.0
    assert x.grad.tolist() == [0.0, 2.0, 4.0, 0.0, 0.0]


@given(st.sampled_from(KINDS), st.integers(2, 8), st.floats(1e-4, 1e4), st.floats(-1e4, -1e-4))
def test_zero_is_preserved_by_any_range(kind: str, bits: int, high: float, low: float) -> None:
    quantizer = InputQuantizer(kind, bits, high, low)
    x = torch.cat([torch.zeros(2), torch.linspace(2 * low, 2 * high, 97)])
    y = quantizer(x).detach()
    assert bool((y[:2] == 0).all())
    assert len(torch.unique(y + 0.0)) <= 2**bits - (kind == "symmetric")
    assert torch.equal(quantizer(y).detach(), y)
    if kind == "symmetric":
        assert torch.equal(quantizer(-x).detach(), -y)


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_does_the_very_same(kind: str) -> None:
    quantizer, layer, x = make(kind), nn.Linear(8, 3), drawn(80).reshape(10, 8)
    form = build_input_quantized(layer, quantizer.settings())
    form.input_step.copy_(quantizer.grid()[0])
    assert torch.equal(form(x), layer(quantizer(x)))


def test_many_bits_lose_little_and_few_much() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(50, 64)
    errors = {}
    for bits in (2, 4, 8):
        quantizer = InputQuantizer("asymmetric", bits, float(x.max()), float(x.min()))
        got, want = layer(quantizer(x)).detach(), layer(x).detach()
        errors[bits] = float((got - want).norm() / want.norm())
    assert errors[8] < 1e-2 < errors[4] < errors[2]


def test_ranges_cannot_turn_over() -> None:
    quantizer = make("asymmetric")
    with torch.no_grad():
        quantizer.high.fill_(-3.0)
        quantizer.low.fill_(2.0)
    quantizer.clamp()
    assert float(quantizer.high.detach()) > 0 > float(quantizer.low.detach())
    assert bool(quantizer(drawn()).isfinite().all())


def test_half_precision_is_quantized_in_float32() -> None:
    quantizer, x = make("asymmetric"), drawn().to(torch.bfloat16).requires_grad_()
    y = quantizer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert quantizer.high.grad.dtype == torch.float32


def test_weights_pass_gradients_straight_through() -> None:
    w, g = drawn().requires_grad_(), drawn(seed=3)
    RoundWeight.apply(w, torch.tensor(0.1), 7, True).backward(g)
    assert torch.equal(w.grad, g)  # SAWB+: also beyond the range
    w.grad = None
    y = RoundWeight.apply(w, torch.tensor(0.1), 7, False)
    y.backward(g)
    assert torch.equal(w.grad, g * (w.detach().abs() <= 7 * torch.tensor(0.1)))
    assert len(torch.unique(y.detach() + 0.0)) <= 15


def test_unknown_quantizers_are_named() -> None:
    for kind, bits in (("both", 4), ("symmetric", 1), ("symmetric", 9)):
        with pytest.raises(MethodError, match="kinds are"):
            InputQuantizer(kind, bits, 1.0)
