"""Blends: exact at both ends, pulled by a closed form, and free of what is not theirs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lamina.errors import MethodError
from lamina.train.slope import Blend, Line, Pull, bends, penalty, pull, put_blends, snap

ACTIVATIONS = {
    "relu": nn.ReLU, "gelu": nn.GELU, "tanh gelu": lambda: nn.GELU("tanh"), "silu": nn.SiLU,
    "tanh": nn.Tanh, "leaky": lambda: nn.LeakyReLU(0.1), "hardswish": nn.Hardswish,
}  # fmt: skip
VALUES = torch.cat([torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 4,
                    torch.tensor([0.0, 1e-30, -1e-30, 1e4, -1e4])])  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_it_is_the_activation_at_0_and_the_identity_at_1_to_the_bit(
    name: str, dtype: torch.dtype
) -> None:
    x = VALUES.to(dtype)
    act = ACTIVATIONS[name]()
    start, end, between = Blend(act), Blend(act, 1.0), Blend(act, 0.5)
    assert torch.equal(start(x), act(x)) and start(x).dtype == dtype
    assert torch.equal(end(x), x)
    assert not torch.equal(between(x), act(x)) and not torch.equal(between(x), x)


@given(st.floats(-0.5, 1.5))
def test_of_a_relu_it_is_the_prelu_with_the_same_gradient(slope: float) -> None:
    x = VALUES[:2000].double().requires_grad_()
    blend, a = Blend(nn.ReLU(), slope), torch.tensor([slope], dtype=torch.float64)
    a.requires_grad_()
    ours, theirs = blend(x), F.prelu(x, a)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    weight = torch.linspace(-1, 1, 2000, dtype=torch.float64)
    mine = torch.autograd.grad((ours * weight).sum(), [x, blend.linearity])
    other = torch.autograd.grad((theirs * weight).sum(), [x, a])
    torch.testing.assert_close(mine[0], other[0], rtol=1e-6, atol=1e-6)
    assert float(mine[1]) == pytest.approx(float(other[1]), rel=1e-4)


@given(st.floats(0, 1), st.sampled_from(["gelu", "silu", "tanh"]))
def test_others_are_blends_by_the_formula(t: float, name: str) -> None:
    act, x = ACTIVATIONS[name](), VALUES[:200].double()
    expected = (1 - t) * act(x) + t * x
    torch.testing.assert_close(Blend(act, t)(x), expected, rtol=1e-6, atol=1e-6)


def test_putting_blends_in_changes_no_output() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Sequential(nn.Linear(9, 4), nn.GELU()))
    x = torch.randn(20, 5)
    before = net.eval()(x)
    found = put_blends(net, ["1", "2.1"])
    assert torch.equal(net(x), before)
    assert [type(b.activation) for b in found.values()] == [nn.ReLU, nn.GELU]
    assert not found["1"].training, "it takes over the mode"
    again = put_blends(net, ["1"])
    assert again["1"] is found["1"], "what is a blend stays"
    with torch.no_grad():
        found["1"].linearity.fill_(0.5)
    assert not torch.equal(net(x), before)
    with pytest.raises(AttributeError):
        put_blends(net, ["nowhere"])


@pytest.mark.parametrize("axis", [-1, 1])
def test_it_can_go_to_a_line_for_each_unit(axis: int) -> None:
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))
    units = x.shape[axis]
    line = Line(torch.linspace(0.1, 0.9, units), torch.linspace(-1, 1, units), axis)
    shape = (1, 4, 1) if axis == 1 else (1, 1, 5)
    expected = x * line.scale.view(shape) + line.shift.view(shape)
    act = nn.GELU()
    assert torch.equal(Blend(act, 0.0, line)(x), act(x))
    assert torch.equal(Blend(act, 1.0, line)(x), expected)
    torch.testing.assert_close(Blend(act, 0.25, line)(x), 0.75 * act(x) + 0.25 * expected)
    net = nn.Sequential(nn.Linear(5, 5), nn.GELU())
    blend = put_blends(net, ["1"], {"1": line})["1"]
    assert blend.scale is not None and torch.equal(blend.scale, line.scale)
    assert {name for name, _ in blend.named_parameters()} == {"linearity"}


# --- the pull ------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 0.04), min_size=1, max_size=30), st.floats(0, 10), st.floats(-1, 1))
def test_the_pull_alone_follows_its_closed_form(
    rates: list[float], gain: float, start: float
) -> None:
    blend = Blend(nn.ReLU(), start).double()
    for lr in rates:
        pull([blend], lr, gain)
    left = (1 - start) * math.prod(1 - 2 * lr * gain for lr in rates)
    assert 1 - float(blend.linearity.detach()) == pytest.approx(left, abs=1e-6)


def test_a_pull_that_is_too_strong_stops_at_the_identity() -> None:
    blend = Blend(nn.ReLU())
    pull([blend], 1.0, 7.0)
    assert blend.bend == 0.0


@given(st.floats(0.1, 6), st.integers(200, 800))
def test_the_gain_folds_as_often_as_was_asked(strength: float, steps: int) -> None:
    rates = [1e-3 * math.sin(math.pi * (i + 0.5) / steps) for i in range(steps)]
    gain, blend = Pull(strength=strength).gain(rates), Blend(nn.GELU()).double()
    for lr in rates:
        pull([blend], lr, gain)
    assert blend.bend == pytest.approx(math.exp(-strength), rel=0.15)


@given(st.lists(st.floats(-1, 2), min_size=1, max_size=5))
def test_the_penalty_and_its_gradient(slopes: list[float]) -> None:
    blends = [Blend(nn.ReLU(), s).double() for s in slopes]
    loss = penalty(blends)
    assert float(loss.detach()) == pytest.approx(sum((1 - s) ** 2 for s in slopes), abs=1e-6)
    loss.backward()
    for blend, slope in zip(blends, slopes, strict=True):
        assert blend.linearity.grad is not None
        assert float(blend.linearity.grad) == pytest.approx(-2 * (1 - slope), abs=1e-5)
    weighed = Pull("penalty", 3.0).penalty(blends)
    assert float(weighed.detach()) == pytest.approx(3 * float(loss.detach()))
    assert float(Pull().penalty(blends).detach()) == 0.0


def test_snapping_is_for_good_and_for_near_ones_only() -> None:
    blends = {"a": Blend(nn.ReLU(), 0.96), "b": Blend(nn.ReLU(), 0.94), "c": Blend(nn.ReLU(), 1.03)}
    assert bends(blends) == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.03}, abs=1e-6)
    assert snap(blends.values(), 0.05) == 2
    assert bends(blends)["a"] == bends(blends)["c"] == 0.0
    assert blends["b"].linearity.requires_grad and not blends["a"].linearity.requires_grad
    assert snap(blends.values(), 0.05) == 0
    pull(blends.values(), 0.1, 1.0)
    assert blends["a"].bend == 0.0 and blends["b"].bend < 0.06
    assert copy.deepcopy(blends["a"]).bend == 0.0


def test_settings_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(MethodError, match="unknown pull"):
        Pull("gently")
    with pytest.raises(MethodError, match="strength is 0 or more"):
        Pull(strength=-1)
    with pytest.raises(MethodError, match="tau is 0 or more"):
        Pull(tau=math.nan)
