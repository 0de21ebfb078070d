"""Gates: the penalty's shape, its proximal step, and what is left when gates close."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.methods.test_tucker import LAYERS, site_of, stats_for
from torch import nn

from lamina.train.funnel import CLOSED, Gated, close, cut, even, funnel, gated_macs, shrink

SIZES = st.floats(1e-3, 1e3)


def value(g: float, c: float) -> float:
    return float(funnel(torch.tensor([g], dtype=torch.float64), c))


# --- the penalty ---------------------------------------------------------------------------------


@given(SIZES, SIZES, SIZES)
def test_it_is_even_rising_concave_and_below_one(a: float, b: float, c: float) -> None:
    assert value(0.0, c) == 0.0
    assert value(a, c) == value(-a, c)
    assert 0 < value(a, c) < 1
    if a < b * (1 - 1e-6):
        assert value(a, c) < value(b, c)
    middle = value((a + b) / 2, c)
    assert middle >= (value(a, c) + value(b, c)) / 2 - 1e-12
    assert value(1e9 * c, c) == pytest.approx(1.0, abs=1e-8)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_it_lies_between_a_count_and_a_sum(gates: list[float]) -> None:
    g = torch.tensor(gates, dtype=torch.float64)
    g = torch.where(g.abs() < 1e-3, 0.0, g)
    assert float(funnel(g, 1e-12)) == pytest.approx(float((g != 0).sum()), abs=1e-6)
    assert 1e9 * float(funnel(g, 1e9)) == pytest.approx(float(g.abs().sum()), rel=1e-6, abs=1e-6)


@given(SIZES, SIZES)
def test_its_slope_is_what_the_step_takes_off(g: float, c: float) -> None:
    x = torch.tensor([g], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(funnel(x, c), x)
    step = 0.5 * g / float(slope)
    assert float(shrink(x.detach(), step, c)) == pytest.approx(g - step * float(slope), rel=1e-9)


def test_the_step_stops_at_zero_and_spares_what_is_open() -> None:
    gates = torch.tensor([0.0, 0.01, -0.01, 1.0, -3.0])
    after = shrink(gates, 0.05, 0.1)
    assert after[:3].tolist() == [0.0, 0.0, 0.0]
    assert (after[3:] * gates[3:] > 0).all()
    moved = (gates - after).abs()[3:]
    assert moved[0] < 0.005 and moved[1] < moved[0] / 5, "an L1 norm would take as much from both"
    assert torch.equal(shrink(gates, 0.0, 0.1), gates)


def test_it_solves_its_own_problem() -> None:
    """The step minimises `(x - g)^2 / 2 + step * slope * |x|`, by brute force on a grid."""
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for g in (-2.0, -0.1, 0.05, 0.4, 1.5):
        slope = 0.3 / (abs(g) + 0.3) ** 2
        best = grid[((grid - g) ** 2 / 2 + 0.2 * slope * grid.abs()).argmin()]
        step = shrink(torch.tensor([g], dtype=torch.float64), 0.2, 0.3)
        assert float(step) == pytest.approx(float(best), abs=1e-4)


# --- the gated layer -----------------------------------------------------------------------------


def gated(name: str, data: bool = False) -> tuple[nn.Module, Gated, torch.Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    return (
        layer,
        Gated(layer, stats_for(site_of(layer, shape)) if data else None),
        torch.randn(shape),
    )


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_full_ranks_with_open_gates_are_the_layer(name: str, data: bool) -> None:
    layer, net, x = gated(name, data)
    torch.testing.assert_close(net(x), layer(x), rtol=1e-4, atol=1e-5)
    assert [g.tolist() for g in net.gates] == [[1.0] * len(g) for g in net.gates]
    assert all(bool(mask.all()) for mask in net.open())
    with torch.no_grad():
        net.outputs[0] = 0.0
    assert not torch.allclose(net(x), layer(x), atol=1e-3)


def test_only_the_core_and_the_gates_are_trained() -> None:
    _, net, x = gated("same")
    net(x).square().sum().backward()
    with_gradient = {n for n, p in net.named_parameters() if p.grad is not None}
    assert with_gradient == {"core.weight", "last.bias", "outputs", "inputs"}
    # a gate's gradient is that of the channel it stands for: finite differences
    net.double()
    for gates, index in ((net.outputs, 2), (net.inputs, 1)):
        loss = net(x.double()).square().sum()
        (slope,) = torch.autograd.grad(loss, gates)
        with torch.no_grad():
            gates[index] += 1e-6
            after = net(x.double()).square().sum()
            gates[index] -= 1e-6
        assert float((after - loss.detach()) / 1e-6) == pytest.approx(float(slope[index]), rel=1e-3)


def test_settling_keeps_the_function_and_undoes_any_rescaling() -> None:
    _, net, x = gated("stride")
    net = net.double()
    x = x.double()
    before = net(x)
    with torch.no_grad():  # the penalty, defeated: small gates, a large core
        net.outputs.mul_(torch.linspace(0.01, 0.2, len(net.outputs)))
        scale = 1 / torch.linspace(0.01, 0.2, len(net.outputs)).double()
        net.core.weight.mul_(scale[:, None, None, None])
    torch.testing.assert_close(net(x), before)
    net.settle()
    torch.testing.assert_close(net(x), before)
    torch.testing.assert_close(net.outputs, torch.ones_like(net.outputs), rtol=1e-6, atol=1e-6)
    with torch.no_grad():  # the other way: all gates alike, which a norm behind would undo
        net.inputs.mul_(0.1)
    after = net(x)
    net.settle()
    torch.testing.assert_close(net(x), after)
    assert float(net.inputs.detach().max()) == pytest.approx(1.0)
    with torch.no_grad():
        net.inputs.zero_()
    net.settle()
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_an_even_core_holds_channels_of_one_size() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(7, 4).double(), torch.randn(5, 3).double().T
    C = torch.randn(4, 3, 9).double()
    C = C * torch.tensor([1.0, 1e-1, 1e-2, 1e-3]).double()[:, None, None]
    after = even(A, C, B[:, :5], 0.1)
    for axis in (0, 1):
        sizes = after[1].movedim(axis, 0).flatten(1).square().mean(1).sqrt()
        assert sizes.max() < 1.1 * sizes.min() and float(sizes.mean()) == pytest.approx(
            0.1, rel=0.1
        )
    product = [torch.einsum("fi,ijk,jc->fck", *t) for t in ((A, C, B), after)]
    torch.testing.assert_close(*product)
    zero = even(A, 0 * C, B, 0.1)
    assert all(torch.isfinite(t).all() for t in zero)


# --- closing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_removing_gates_that_are_zero_changes_nothing(name: str) -> None:
    layer, net, x = gated(name)
    with torch.no_grad():
        net.outputs[3:] = 0.0
        net.outputs[1] = -0.5
        net.inputs[2:5] = 0.0
    masks = net.open()
    assert [int(m.sum()) for m in masks] == [3, 3]
    site = site_of(layer, tuple(x.shape))
    made = cut(site, net, masks)
    assert made.ranks in ((3, 3), None)
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight.copy_(made.weight.reshape(dense.weight.shape))
    torch.testing.assert_close(dense(x), net(x), rtol=1e-4, atol=1e-5)


def test_the_last_gate_stays_open() -> None:
    _, net, _ = gated("same")
    with torch.no_grad():
        net.outputs.zero_()
        net.inputs.mul_(1e-9)
        net.inputs[2] = CLOSED / 10
    outputs, inputs = net.open()
    assert int(outputs.sum()) == 1
    assert inputs.nonzero().flatten().tolist() == [2]


def test_gates_close_until_the_limit_is_met_and_one_is_left() -> None:
    layer, shape = LAYERS["same"]()
    site = site_of(layer, shape)
    net = Gated(layer)
    with torch.no_grad():
        net.outputs.copy_(torch.linspace(1.0, 0.3, len(net.outputs)))
        net.inputs.copy_(torch.linspace(1.0, 0.2, len(net.inputs)))
    for share in (1.0, 0.6, 0.3, 0.1):
        masks, macs = close([site], {site.name: net}, share * site.macs)
        assert macs <= share * site.macs and macs == gated_macs(site, masks[site.name])
        for mask in masks[site.name]:  # the widest stay
            count = int(mask.sum())
            assert bool(mask[:count].all())
    masks, macs = close([site], {site.name: net}, 0.0)
    assert [int(m.sum()) for m in masks[site.name]] == [1, 1]
    assert macs > 0.0


def test_a_layer_of_nearly_all_gates_goes_back_to_dense() -> None:
    layer, net, x = gated("same")
    site = site_of(layer, tuple(x.shape))
    masks = net.open()
    assert gated_macs(site, masks) == site.macs
    made = cut(site, net, masks)
    assert made.ranks is None
    torch.testing.assert_close(
        made.weight.reshape(layer.weight.shape).float(), layer.weight.detach(), rtol=1e-4, atol=1e-5
    )


def test_ranks_have_a_tensor_to_fill() -> None:
    """Nine outputs of one input and three taps are of rank three at most."""
    layer = nn.Conv1d(16, 32, 3, padding=1)
    site = site_of(layer, (1, 16, 20))
    net = Gated(layer)
    masks = torch.zeros(32, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)
    masks[0][:9] = True
    masks[1][0] = True
    made = cut(site, net, masks)
    assert made.ranks == (3, 1)
    assert int(torch.linalg.matrix_rank(made.weight.flatten(1))) <= 3
