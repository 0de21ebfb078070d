from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lamina.codecs import context
from lamina.codecs.above import CONTEXTS, LEVELS, contexts_above
from lamina.codecs.context import ABOVE, Layout

EDGES = [-(2**31), -32768, -129, -128, -2, -1, 0, 0, 0, 1, 2, 3, 127, 32767, 2**31 - 1]
GRIDS = hnp.arrays(
    np.int32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8),
    elements=st.sampled_from(EDGES),
)


def context_slowly(grid: list[list[int]], row: int, col: int) -> int:
    """Referee: the module's docstring, one symbol at a time."""
    size = 0
    for shift, weight in ((-1, 1), (0, 2), (1, 1)):
        if row > 0 and 0 <= col + shift < len(grid[0]):
            size += weight * abs(grid[row - 1][col + shift])
    for level, most in enumerate((0, 1, 2, 4)):
        if size <= most:
            return level
    return 4


@given(GRIDS)
def test_contexts_are_those_of_a_loop(grid: np.ndarray) -> None:
    rows, cols = grid.shape
    slow = [[context_slowly(grid.tolist(), r, c) for c in range(cols)] for r in range(rows)]
    assert contexts_above(grid).tolist() == slow


def test_every_context_occurs() -> None:
    assert sorted(set(LEVELS.tolist())) == list(range(CONTEXTS))
    grid = np.random.default_rng(0).integers(-2, 3, (50, 50))
    assert set(contexts_above(grid).reshape(-1).tolist()) == set(range(CONTEXTS))


@pytest.mark.parametrize("backend", ["auto", "numpy"])
@pytest.mark.parametrize("low", [-128, -32768, -(2**31)])
def test_the_magnitude_of_the_least_number_of_a_type(low: int, backend: str) -> None:
    """-128 is an int8 whose magnitude is none: it once sent the decoder out of its tables."""
    grid = np.random.default_rng(0).choice([low, low + 1, low + 100], (30, 20)).astype(np.int32)
    layout = Layout(ABOVE, False, np.zeros(30, np.int64), low, 101)
    data = context._encode_rows(grid, layout, backend)
    back = context.decode(data, grid.shape, backend=backend)
    np.testing.assert_array_equal(back, grid)
    assert back.dtype.itemsize == {-128: 1, -32768: 2, -(2**31): 4}[low]
