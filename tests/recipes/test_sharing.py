"""Weight sharing: k-means over survivors, beside a zero."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import MethodError
from lamina.recipes.sharing import linear_start, lloyd, share


def pruned(rows: int = 40, columns: int = 30, density: float = 0.3, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g)
    return weight * (torch.rand(rows, columns, generator=g) < density)


@given(
    st.lists(st.floats(-10, 10, allow_nan=False), min_size=2, max_size=60),
    st.integers(1, 12),
)
def test_the_objective_never_rises(values: list[float], count: int) -> None:
    array = np.array(values)
    centroids, history = lloyd(array, linear_start(array, count))
    assert all(b <= a + 1e-9 * max(1.0, a) for a, b in itertools.pairwise(history))
    assert np.isfinite(centroids).all() and (np.diff(centroids) >= 0).all()
    last = np.abs(array[:, None] - centroids[None]).min(1) ** 2
    assert last.sum() <= history[0] + 1e-9


def test_as_many_values_as_there_are_distinct_ones_is_exact() -> None:
    values = np.repeat([-2.0, -0.5, 0.25, 3.0], 9)
    found, history = lloyd(values, np.array([-2.1, -0.4, 0.2, 3.2]))
    assert np.allclose(found, [-2.0, -0.5, 0.25, 3.0]) and history[-1] < 1e-20
    weight = torch.tensor(values, dtype=torch.float32).reshape(6, 6)
    assert torch.equal(share(weight, 200, "exact").dense(), weight)


@pytest.mark.parametrize("start", ["linear", "exact"])
@pytest.mark.parametrize("most", [1, 3, 31, 255])
def test_zero_stays_zero_and_nothing_else_becomes_zero(start: str, most: int) -> None:
    weight = pruned()
    form = share(weight, most, start)
    assert form.centroids[0] == 0.0 and (form.centroids[1:] != 0).all()
    assert torch.equal(form.index == 0, weight == 0)
    assert torch.equal(form.dense() == 0, weight == 0)
    assert len(form.centroids) - 1 <= most
    assert len(form.index.unique()) == len(form.centroids)  # no place in the table is unused
    assert (form.centroids[1:].abs().diff() >= 0).all()


def test_every_survivor_gets_its_nearest_value() -> None:
    weight = pruned()
    form = share(weight, 15)
    at = weight != 0
    far = (weight[at][:, None] - form.centroids[1:][None]).abs().min(1).values
    assert torch.allclose((form.dense() - weight)[at].abs(), far, atol=1e-6)


def test_the_exact_start_is_no_worse_than_the_linear_one() -> None:
    for seed in range(4):
        weight = pruned(seed=seed) ** 3
        linear, exact = (
            float((share(weight, 7, start).dense() - weight).pow(2).sum())
            for start in ("linear", "exact")
        )
        assert exact <= linear * 1.001
    assert exact < linear  # and on heavy tails better: the start matters


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 4), torch.zeros(0, 4), torch.full((2, 2), 3.5), torch.tensor([[0.0, -1e-30]])],
)
def test_degenerate_layers(weight: torch.Tensor) -> None:
    form = share(weight, 31)
    assert form.dense().shape == weight.shape
    assert torch.equal(form.dense(), weight)


def test_values_that_cancel_do_not_add_a_second_zero() -> None:
    weight = torch.tensor([[-1.0, 1.0, 0.0, -1.0, 1.0]])
    form = share(weight, 1)  # their mean is zero
    assert (form.centroids == 0).sum() == 1 and int(form.index.max()) < len(form.centroids)


@pytest.mark.parametrize(("most", "start"), [(0, "linear"), (256, "linear"), (3, "random")])
def test_wrong_arguments(most: int, start: str) -> None:
    with pytest.raises(MethodError):
        share(pruned(), most, start)
    with pytest.raises(MethodError, match="finite"):
        share(torch.tensor([float("nan")]), 3)
