from __future__ import annotations

import pytest
import torch
from tests.train.small import to_codebook, to_grid, to_sparse
from torch import nn

from lamina.forms import Codebook, Edit, Grid, Plain, Sparse, Values
from lamina.forms.values import exponent_scale
from lamina.train.hold import HeldCodebook, HeldGrid, HeldNetwork, HeldSparse, hold

WEIGHT = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
ROWS = torch.tensor([-5, -1, 0, 2, 3, 7], dtype=torch.int32)


def grid(axis: int | None = None, step: float = 0.0371, shape: tuple[int, ...] = (6, 5)) -> Grid:
    g = torch.Generator().manual_seed(2)
    symbols = torch.randint(-9, 10, shape, generator=g, dtype=torch.int32)
    columns = symbols[0].numel()
    exponents = None if axis is None else ROWS if axis == 0 else torch.arange(columns).int() - 2
    return Grid(symbols, float(torch.tensor(step)), exponents, axis or 0)


FORMS: dict[str, Values] = {
    "plain": Plain(WEIGHT),
    "sparse": to_sparse(WEIGHT, 0.5),
    "codebook": to_codebook(WEIGHT),
    "grid": grid(),
    "rows": grid(0),
    "columns": grid(1),
    "kernel rows": grid(0, shape=(6, 2, 3, 3)),
    "kernel columns": grid(1, shape=(6, 2, 3, 3)),
    "vector": grid(None, shape=(6,)),
    "half": Grid(grid().symbols, 0.037, ROWS, 0, torch.bfloat16),
    "double": Plain(WEIGHT.double() / 3),
    "bfloat16": Plain(WEIGHT.bfloat16()),
}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, signs of zeros included."""
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def train_a_little(held: nn.Module) -> None:
    """Move every part to somewhere else."""
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in held.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("name", FORMS)
def test_it_starts_where_the_values_are_and_gives_back_what_it_computed(name: str) -> None:
    values = FORMS[name]
    held = hold(values, values.dense())
    assert torch.equal(held()[0], values.dense())
    assert torch.equal(held.release().dense(), values.dense())
    before = held()[0].detach().clone()
    train_a_little(held)
    after = held()[0].detach()
    assert not torch.equal(before, after)
    released = held.release()
    assert type(released) is type(values)
    assert same(released.dense() + 0.0, after + 0.0)  # a released grid has no negative zero


def test_what_is_released_does_not_change_when_training_goes_on() -> None:
    for values in FORMS.values():
        held = hold(values, values.dense())
        released = held.release()
        before = released.dense().clone()
        train_a_little(held)
        assert torch.equal(released.dense(), before)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_gradients_of_a_grid_are_straight_through(axis: int | None) -> None:
    values = grid(axis)
    start = values.dense() + 0.011 * torch.randn(6, 5)
    held = HeldGrid(values, start)
    slope = torch.randn(6, 5)
    (held()[0] * slope).sum().backward()
    # w = s c (z + const), z = l / (s c): dw/dl = 1; dw/dlog s = s c (round(z) - z).
    scale = torch.ones(6, 5)
    if values.exponents is not None:
        scale = exponent_scale(values.exponents).reshape((6, 1) if axis == 0 else (1, 5)) * scale
    z = start.double() / (values.step * scale.double())
    assert torch.allclose(held.latent.grad, slope, atol=1e-5)
    wanted = (slope * values.step * scale * (z.round() - z)).sum().float()
    assert torch.allclose(held.log_step.grad, wanted, rtol=1e-4, atol=1e-5)

    # The same by differences of the surrogate, where the rounding's offset stands still.
    offset = (z.round() - z).detach()

    def surrogate(log_step: float) -> float:
        step = values.step * torch.tensor(log_step, dtype=torch.float64).exp() * scale.double()
        return float((slope.double() * (start.double() / step + offset) * step).sum())

    h = 1e-5
    slope_of_step = (surrogate(h) - surrogate(-h)) / (2 * h)
    assert float(held.log_step.grad) == pytest.approx(slope_of_step, rel=1e-3, abs=1e-4)


def test_levels_carry_gradients_to_latent_and_step() -> None:
    held = HeldGrid(grid(), grid().dense())
    held()[1].abs().sum().backward()
    z = held.levels().detach()
    assert torch.allclose(held.latent.grad, z.sign() / held.step().detach())
    assert torch.allclose(held.log_step.grad, -z.abs().sum())  # a wider step makes them smaller


def test_gradients_of_a_centroid_sum_over_its_members() -> None:
    values = to_codebook(WEIGHT)
    assert isinstance(values, Codebook)
    held = HeldCodebook(values)
    slope = torch.randn(6, 5)
    (held()[0] * slope).sum().backward()
    for k in range(len(values.centroids)):
        wanted = slope[values.index == k].sum() if values.centroids[k] else torch.zeros(())
        assert torch.allclose(held.centroids.grad[k], wanted, atol=1e-6), k
    train_a_little(held)
    zeros = values.dense() == 0
    assert zeros.any()
    assert not held.release().dense()[zeros].any()


def test_zeros_of_a_sparse_tensor_stay_zero() -> None:
    values = to_sparse(WEIGHT, 0.5)
    zeros = values.tensor == 0
    assert zeros.any() and not zeros.all()
    held = HeldSparse(values)
    optimizer = torch.optim.Adam(held.parameters(), lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        (held()[0] - 1).square().sum().backward()
        optimizer.step()
    released = held.release()
    assert isinstance(released, Sparse)
    assert not released.tensor[zeros].any()
    assert released.tensor[~zeros].ne(values.tensor[~zeros]).all()


def test_doubles_keep_their_digits() -> None:
    values = Plain(WEIGHT.double() / 3)
    assert torch.equal(hold(values, values.dense()).release().dense(), values.tensor)


def test_a_network_computes_with_held_values_and_stays_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
    net[2].weight = nn.Parameter(net[2].weight.detach())
    values = grid()
    x = torch.randn(3, 5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    held = HeldNetwork(net, [Edit("0.weight", "values", values=values)])
    out, levels = held(x)
    wanted = net[2](torch.tanh(x @ values.dense().T + net[0].bias))
    assert torch.allclose(out, wanted, atol=1e-6)
    assert list(levels) == ["0.weight"] == list(held.release())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_what_cannot_be_trained_is_not_held() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    net.register_parameter("count", nn.Parameter(torch.ones(2, dtype=torch.int64), False))
    net[0].bias.requires_grad_(False)
    zero = Grid(torch.zeros(6, dtype=torch.int32), 0.0)
    edits = [
        Edit("0.weight", "values", values=Plain(WEIGHT)),
        Edit("0.bias", "values", values=Plain(torch.ones(6))),  # frozen
        Edit("1.running_mean", "values", values=Plain(torch.ones(6))),  # a buffer
        Edit("1.weight", "values", values=zero),  # a grid with no step has no logarithm
        Edit("count", "values", values=Plain(torch.ones(2, dtype=torch.int64))),
    ]
    assert HeldNetwork(net, edits).names == ["0.weight"]


def test_recurrent_layers_see_held_weights() -> None:
    net = nn.LSTM(5, 4)
    values = Plain(torch.randn(16, 5))
    held = HeldNetwork(net, [Edit("weight_ih_l0", "values", values=values)])
    x = torch.randn(3, 2, 5)
    held(x)[0][0].sum().backward()
    (latent,) = held.parameters()
    assert latent.grad.abs().sum() > 0
    with torch.no_grad():
        net.weight_ih_l0.copy_(values.tensor)
        assert torch.allclose(net(x)[0], held(x)[0][0])


def test_a_grid_made_of_its_own_dense_values_is_found_again() -> None:
    values = to_grid(1000 * WEIGHT, 0.003)  # large integers
    assert torch.equal(hold(values, values.dense()).release().symbols, values.symbols)
