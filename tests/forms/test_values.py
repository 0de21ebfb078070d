"""Forms of values: the dense tensor is the one the numbers say, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.forms import Affine, Codebook, Grid, Plain, Sparse
from lamina.forms.values import FORMS_OF_VALUES, exponent_scale


def test_plain_and_sparse_give_back_their_tensor() -> None:
    tensor = torch.tensor([[0.0, 1.5], [-2.0, 0.0]])
    assert Plain(tensor).dense() is tensor
    assert Sparse(tensor).dense() is tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("index_dtype", [torch.uint8, torch.int32])
def test_a_codebook_looks_up_its_centroids(dtype: torch.dtype, index_dtype: torch.dtype) -> None:
    centroids = torch.tensor([-1.0, 0.0, 0.3])
    index = torch.tensor([[[0, 2], [1, 1]]], dtype=index_dtype)
    dense = Codebook(index, centroids, dtype).dense()
    assert dense.dtype == dtype
    assert dense.shape == index.shape
    expected = torch.tensor([[[-1.0, 0.3], [0.0, 0.0]]]).to(dtype)
    assert torch.equal(dense, expected)


@given(st.integers(-200, 200), st.integers(1, 1 << 20), st.integers(-40, 40))
def test_a_grid_without_exponents_is_one_rounded_product(
    symbol: int, step: int, power: int
) -> None:
    size = float(torch.tensor(step * 2.0**power, dtype=torch.float32))
    got = Grid(torch.tensor([[symbol]], dtype=torch.int32), size).dense().item()
    # a product of two float32 is exact in float64, so one rounding to float32 is the IEEE product
    assert got == float(torch.tensor(symbol * size, dtype=torch.float64).to(torch.float32))


@given(st.lists(st.integers(-60, 60), min_size=1, max_size=9))
def test_exponent_scales_are_quarter_octaves(exponents: list[int]) -> None:
    scale = exponent_scale(torch.tensor(exponents, dtype=torch.int32))
    expected = torch.tensor([2.0 ** (e / 4) for e in exponents], dtype=torch.float64)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), expected, rtol=1e-7, atol=0)
    whole = [i for i, e in enumerate(exponents) if e % 4 == 0]
    assert all(float(scale[i]) == 2.0 ** (exponents[i] // 4) for i in whole)


@pytest.mark.parametrize("axis", [0, 1])
def test_grid_exponents_run_along_their_axis_of_the_2d_view(axis: int) -> None:
    symbols = torch.randint(-5, 6, (2, 3, 2), dtype=torch.int32)
    exponents = torch.tensor([4, -4] if axis == 0 else [4, 0, -4, 8, 0, 1], dtype=torch.int32)
    dense = Grid(symbols, 0.5, exponents, axis, torch.float64).dense()
    flat = symbols.reshape(2, 6).double() * 0.5
    scale = 2.0 ** (exponents.double() / 4)
    expected = flat * (scale[:, None] if axis == 0 else scale[None, :])
    torch.testing.assert_close(dense, expected.reshape(2, 3, 2), rtol=2e-7, atol=0)


def test_grid_exponents_along_both_axes_multiply() -> None:
    symbols = torch.randint(-5, 6, (2, 3, 2), dtype=torch.int32)
    rows, columns = torch.tensor([4, -3]), torch.tensor([4, 0, -4, 8, 0, 1])
    exponents = torch.cat([rows, columns]).int()
    dense = Grid(symbols, 0.5, exponents, 2, torch.float64).dense()
    scale = 2.0 ** (rows.double()[:, None] / 4 + columns.double() / 4)
    expected = symbols.reshape(2, 6).double() * 0.5 * scale
    torch.testing.assert_close(dense, expected.reshape(2, 3, 2), rtol=3e-7, atol=0)


def test_every_form_has_one_name() -> None:
    assert set(FORMS_OF_VALUES.values()) == {Plain, Sparse, Codebook, Grid, Affine}
