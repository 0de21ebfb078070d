from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lamina.codecs import adaptive, rans
from lamina.codecs.mixing_tables import REACH, make_tables
from lamina.errors import FileError

EDGES = [-(2**31), -(2**31) + 1, -300, -13, -12, 0, 0, 0, 1, 12, 13, 14, 2**31 - 1]
ARRAYS = st.one_of(
    hnp.arrays(
        np.int32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6), elements=e
    )
    for e in (st.integers(-2, 2), st.sampled_from(EDGES), st.integers(-40, 40))
)


def make_grid(rows: int, cols: int, live: tuple[int, int], count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grid = np.zeros((rows, cols), dtype=np.int32)
    r, c = rng.choice(rows, live[0], False), rng.choice(cols, live[1], False)
    where = rng.choice(live[0] * live[1], count, False)
    size = np.minimum(rng.geometric(0.7, count), 3) * rng.choice([-1, 1], count)
    grid[r[where // live[1]], c[where % live[1]]] = size
    return grid


def entropy_bytes(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / symbols.size)).sum() / 8)


def oracle_bytes(grid: np.ndarray) -> float:
    """Entropy of the live block, the live rows and the live columns, all given for free."""
    rows, cols = (grid != 0).any(1), (grid != 0).any(0)
    flags = entropy_bytes(rows.astype(int)) + entropy_bytes(cols.astype(int))
    return entropy_bytes(grid[rows][:, cols]) + flags


@settings(deadline=None, max_examples=50)
@given(ARRAYS)
def test_round_trip_on_both_backends(symbols: np.ndarray) -> None:
    data = adaptive.encode(symbols)
    assert adaptive.encode(symbols, backend="numpy") == data
    for backend in ("auto", "numpy"):
        back = adaptive.decode(data, symbols.shape, backend=backend)
        assert back.dtype in (np.int8, np.int16, np.int32)
        np.testing.assert_array_equal(back, symbols)


@pytest.mark.parametrize("shape", [(40, 90), (6, 5, 5, 5), (1, 900), (900, 1), (900,)])
def test_backends_agree_on_longer_tensors(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    symbols = np.round(rng.laplace(0, 1, shape) * (rng.random(shape) < 0.3)).astype(np.int32)
    data = adaptive.encode(symbols)
    assert adaptive.encode(symbols, backend="numpy") == data
    np.testing.assert_array_equal(adaptive.decode(data, shape), symbols)
    np.testing.assert_array_equal(adaptive.decode(data, shape, backend="numpy"), symbols)


@pytest.mark.parametrize(
    ("rows", "cols", "live", "count"),
    [(500, 800, (80, 250), 1200), (50, 500, (30, 150), 750), (300, 100, (40, 60), 300)],
)
def test_dead_rows_and_columns_are_found(
    rows: int, cols: int, live: tuple[int, int], count: int
) -> None:
    for seed in (0, 1):
        grid = make_grid(rows, cols, live, count, seed)
        data = adaptive.encode(grid)
        np.testing.assert_array_equal(adaptive.decode(data, grid.shape), grid)
        assert len(data) < 1.05 * oracle_bytes(grid) + 4
        assert len(data) < 0.82 * len(rans.encode(grid))


def test_without_structure_it_is_near_entropy() -> None:
    rng = np.random.default_rng(0)
    symbols = rng.permutation(make_grid(100, 300, (60, 200), 2000, 0).reshape(-1)).reshape(100, 300)
    size = len(adaptive.encode(symbols))
    assert entropy_bytes(symbols) * 0.99 < size < entropy_bytes(symbols) * 1.02 + 8


def test_zeros_are_free_and_turning_costs_nothing() -> None:
    assert adaptive.encode(np.zeros((300, 200), np.int32)) == b""
    assert not adaptive.decode(b"", (300, 200)).any()
    grid = make_grid(50, 400, (30, 100), 500, 2)
    assert abs(len(adaptive.encode(grid)) - len(adaptive.encode(grid.T))) <= 3


def test_tables_against_floating_point() -> None:
    squash, stretch, small, lengths = make_tables()
    odds = np.arange(-REACH, REACH + 1) / 256
    exact = 65536 / (1 + np.exp(-odds))
    assert np.abs(squash - exact).max() <= 1.5
    p = np.arange(200, 65336)
    assert np.abs(stretch[p] - 256 * np.log(p / (65536 - p))).max() <= 2
    assert (np.diff(stretch[1:]) >= 0).all()
    q = np.arange(16, 65536)
    exact = np.maximum(256 * np.log(q / (2**22 - q)), -REACH)
    assert np.abs(small[q] - exact).max() <= 2
    assert lengths[:6].tolist() == [0, 1, 2, 2, 3, 3]


def test_too_many_symbols() -> None:
    with pytest.raises(ValueError, match="use rans"):
        adaptive.encode(np.zeros(adaptive.LARGEST + 1, np.int8))
    with pytest.raises(FileError):
        adaptive.decode(b"", (adaptive.LARGEST + 1,))


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=80), st.sampled_from([(0,), (1,), (7,), (3, 5), (4, 3, 2, 2), (300,)]))
def test_any_bytes_decode_or_are_refused(data: bytes, shape: tuple[int, ...]) -> None:
    try:
        assert adaptive.decode(data, shape).shape == shape
    except FileError:
        pass


def test_damage_on_both_backends_ends_the_same() -> None:
    grid = make_grid(20, 40, (10, 20), 80, 0)
    data = adaptive.encode(grid)
    for bit in range(0, 8 * len(data), 37):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        outcomes = []
        for backend in ("auto", "numpy"):
            try:
                outcomes.append(
                    adaptive.decode(bytes(broken), grid.shape, backend=backend).tobytes()
                )
            except FileError:
                outcomes.append(b"refused")
        assert outcomes[0] == outcomes[1] != grid.tobytes()
    assert adaptive.decode(data[:5], grid.shape).shape == grid.shape
