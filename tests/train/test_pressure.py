from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.train.pressure import APPROACH, FLOOR, SHARPNESS, Price, rate_penalty


def brute(z: torch.Tensor) -> float:
    """The same sum, an element at a time, in Python's own floats."""
    rows = z.reshape(z.shape[0], -1).double().abs().tolist() if z.dim() > 1 else None
    if rows is None:
        values = z.double().abs().reshape(-1).tolist()
        mean = sum(values) / len(values)
        return sum(math.log2(1 + v / (SHARPNESS * mean + FLOOR)) for v in values)
    height, width = len(rows), len(rows[0])
    mean = sum(map(sum, rows)) / (height * width)
    total = 0.0
    for row in rows:
        for j, v in enumerate(row):
            column = sum(r[j] for r in rows) / height
            expected = (sum(row) / width) * column / (mean + 1e-9)
            total += math.log2(1 + v / (SHARPNESS * expected + FLOOR))
    return total


@pytest.mark.parametrize("shape", [(4, 7), (3, 2, 3, 3), (9,), (1, 1), ()])
def test_penalty_is_the_sum_over_elements(shape: tuple[int, ...]) -> None:
    z = 3 * torch.randn(shape)
    other = torch.randn(2, 2)
    got = float(rate_penalty({"z": z, "other": other}))
    assert got == pytest.approx(brute(z) + brute(other), rel=1e-4)
    assert got > 0


def test_nothing_costs_nothing() -> None:
    assert float(rate_penalty({})) == 0.0
    for shape in [(3, 4), (5,), (), (0, 4), (0,)]:
        assert float(rate_penalty({"z": torch.zeros(shape)})) == 0.0


def test_descent_shrinks_every_level_and_leaves_zeros() -> None:
    z = torch.randn(5, 6)
    z[0, 0] = 0
    z.requires_grad_()
    rate_penalty({"z": z}).backward()
    assert torch.equal(z.grad.sign(), z.detach().sign())


def test_a_nonzero_is_dearer_where_its_row_or_column_is_nearly_dead() -> None:
    z = torch.ones(40, 50)
    z[0], z[:, 0] = 0, 0
    z[0, 1] = z[1, 0] = 1
    z.requires_grad_()
    rate_penalty({"z": z}).backward()
    cost = [math.log2(1 + 1 / (SHARPNESS * m + FLOOR)) for m in (1 / 50, 1.0)]
    assert cost[0] > 2 * cost[1]
    assert z.grad[0, 1] > 1.2 * z.grad[2, 2]
    assert z.grad[1, 0] > 1.2 * z.grad[2, 2]
    shuffled = z.detach().reshape(-1)[torch.randperm(2000)].reshape(40, 50)
    assert float(rate_penalty({"z": z.detach()})) != float(rate_penalty({"z": shuffled}))


@given(st.floats(1, 1e7), st.floats(1, 1e7))
def test_the_path_is_monotone_and_ends_at_the_limit(start: float, limit: float) -> None:
    price = Price(1e-6, start, limit)
    path = [price.wanted(i / 100) for i in range(101)]
    assert path[0] == pytest.approx(start)
    assert path[-1] == pytest.approx(limit)
    assert path[85] == pytest.approx(limit)
    falls = start >= limit
    for a, b in itertools.pairwise(path):
        assert a >= b * (1 - 1e-9) if falls else a <= b * (1 + 1e-9)
    if start > APPROACH * limit:
        assert path[50] == pytest.approx(APPROACH * limit)


@given(st.floats(0, 1), st.floats(1.001, 100))
def test_the_price_rises_above_the_path_and_falls_below(progress: float, off: float) -> None:
    price = Price(1e-6, 1e5, 1e4)
    wanted = price.wanted(progress)
    above, below = price.steer(wanted * off, progress), price.steer(wanted / off, progress)
    assert price.value < above.value < 10 * price.value  # one odd look cannot ruin the training
    assert price.value / 100 < below.value < price.value
    assert (above.start, above.limit) == (price.start, price.limit)
    assert price.steer(wanted, progress).value == pytest.approx(price.value)


def test_the_price_keeps_its_floor_and_comes_back() -> None:
    price = Price(1e-6, 1e5, 1e4, 1e-7)
    for _ in range(60):
        price = price.steer(1.0, 0.5)
    assert price.value == 1e-7
    assert price.steer(1e6, 0.5).value > 1e-7
