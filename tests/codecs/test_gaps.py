from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.codecs.gaps import (
    LONGEST,
    expand,
    fill_weights,
    fillers_of,
    gap_stream,
    gap_weights,
)
from lamina.errors import FileError

BACKENDS = ("auto", "numpy")
LINES = st.tuples(st.integers(1, 1 << 30), st.floats(0, 1))


def draw_matrix(rows: int, cols: int, density: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.choice([-3, -1, 1, 2, 9], (rows, cols))
    grid = np.where(rng.random((rows, cols)) < density, values, 0).astype(np.int32)
    return grid, rng.integers(0, rng.integers(1, 4), rows)


@given(LINES)
def test_weights_follow_the_geometric_law(line: tuple[int, float]) -> None:
    size, nonzeros = line[0], int(line[0] * line[1])
    weights = gap_weights(np.array([size]), np.array([nonzeros]))[0]
    filler = int((weights > 0).sum()) - 1
    assert (weights[: filler + 1] > 0).all()  # no holes
    zero = (size - nonzeros) / size
    q = math.floor(zero * 2**20) / 2**20
    law = q ** np.arange(filler) * (1 - q)
    rounding = 2 * (LONGEST + 1) * 2.0**-30
    np.testing.assert_allclose(weights[:filler] / 2**30, law, rtol=0, atol=rounding + 2**-19)
    assert weights[filler] / 2**30 == pytest.approx(q**filler, abs=rounding + 2**-19)
    assert 1 <= filler <= LONGEST
    if filler < LONGEST:
        assert q**filler <= 1 / 64 + 1e-6
    if filler > 1:
        assert q ** (filler - 1) >= 1 / 64 - 1e-6


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.5, 0.9])
def test_cut_gaps_cost_what_whole_ones_do(density: float) -> None:
    size = 1 << 20
    nonzeros = int(size * density)
    weights = gap_weights(np.array([size]), np.array([nonzeros]))[0]
    filler = int((weights > 0).sum()) - 1
    cost = -np.log2(weights[: filler + 1] / weights.sum())
    q = 1 - nonzeros / size
    chance = q ** np.arange(filler) * (1 - q)
    cut = (chance @ cost[:filler] + q**filler * cost[filler]) / (1 - q**filler)
    whole = -(q * math.log2(q) + (1 - q) * math.log2(1 - q)) / (1 - q)
    assert cut == pytest.approx(whole, rel=0.01)
    wrong = -np.log2(np.full(filler + 1, 1 / (filler + 1)))  # control: a flat table costs more
    flat = (chance @ wrong[:filler] + q**filler * wrong[filler]) / (1 - q**filler)
    assert flat > 1.05 * whole


@given(st.lists(LINES, min_size=1, max_size=4))
def test_weights_are_the_same_on_both_backends(lines: list[tuple[int, float]]) -> None:
    sizes = np.array([size for size, _ in lines])
    nonzeros = np.array([int(size * part) for size, part in lines])
    slow = [[0] * (LONGEST + 1) for _ in lines]

    class Grid:
        def __setitem__(self, place: tuple[int, int], value: int) -> None:
            slow[place[0]][place[1]] = value

    fill_weights(sizes.tolist(), nonzeros.tolist(), Grid())  # whole numbers of any size
    for backend in BACKENDS:
        assert gap_weights(sizes, nonzeros, backend).tolist() == slow


def test_a_class_without_rows_has_a_table() -> None:
    weights = gap_weights(np.array([0, 10]), np.array([0, 10]))
    assert fillers_of(weights).tolist() == [1, 1]
    assert (weights.sum(1) > 0).all()


@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.sampled_from([0, 0.01, 0.1, 0.5, 1]),
    st.integers(0, 99),
)
def test_stream_by_hand_and_back(rows: int, cols: int, density: float, seed: int) -> None:
    grid, classes = draw_matrix(rows, cols, density, seed)
    stream = gap_stream(grid, classes)
    lengths, values, counts = [], [], []
    for k in range(classes.max() + 1):
        line = [v for row in grid[classes == k].tolist() for v in row]
        filler = int(fillers_of(gap_weights(np.array([len(line)]), np.count_nonzero([line], 1)))[0])
        here, zeros, found = [], 0, 0
        for symbol in line:
            if symbol == 0:
                zeros += 1
                continue
            here += [filler] * (zeros // filler) + [zeros % filler]
            values.append(symbol)
            zeros, found = 0, found + 1
        lengths += here
        counts.append([len(here), found])
        assert stream.sizes[k] == len(line)
    assert stream.gaps.tolist() == lengths
    assert stream.values.tolist() == values
    assert stream.counts.tolist() == counts
    fillers = fillers_of(gap_weights(stream.sizes, stream.counts[:, 1]))
    flat = stream.index(-3)
    at = 0
    for entries, nonzeros in counts:  # values were counted from -3
        flat[at + entries : at + entries + nonzeros] -= 3
        at += entries + nonzeros
    for backend in BACKENDS:
        back = expand(flat, stream.counts, fillers, classes, cols, np.int8, backend)
        np.testing.assert_array_equal(back, grid)
        assert back.dtype == np.int8


def test_values_by_class() -> None:
    grid = np.array([[0, 2, 0, -1], [2, 2, 0, 0], [0, 0, 0, 0]], dtype=np.int32)
    stream = gap_stream(grid, np.array([1, 0, 0]))
    assert stream.values_by_class(-1, 4).tolist() == [[0, 0, 0, 2], [1, 0, 0, 1]]
    assert gap_stream(0 * grid, np.zeros(3, np.int64)).bits() < 64


@pytest.mark.parametrize(("size", "nonzeros"), [(1000, 1), (1000, 100), (5000, 4000), (64, 64)])
def test_gap_bits_are_those_of_choosing_places(size: int, nonzeros: int) -> None:
    line = np.zeros((1, size), dtype=np.int32)
    line[0, np.random.default_rng(0).permutation(size)[:nonzeros]] = 1
    exact = math.log2(math.comb(size, nonzeros))
    assert exact <= gap_stream(line, np.zeros(1, np.int64)).gap_bits() + 1e-6 <= exact + 12


@given(st.lists(st.integers(0, 3), max_size=14), st.integers(0, 9), st.integers(1, 3))
def test_damaged_streams_have_one_verdict(gaps: list[int], values: int, cols: int) -> None:
    """Any gaps and number of values: both backends refuse it, or give the same matrix."""
    stream = np.array([*gaps, *range(1, values + 1)], dtype=np.int16)
    counts = np.array([[len(gaps), values]])
    verdicts = []
    for backend in BACKENDS:
        try:
            out = expand(
                stream, counts, np.array([3]), np.zeros(4, np.int64), cols, np.int8, backend
            )
            verdicts.append(out.tolist())
        except FileError:
            verdicts.append(None)
    assert verdicts[0] == verdicts[1]
    places, zeros = [], 0  # referee
    for gap in gaps:
        zeros += gap
        if gap < 3:
            places.append(zeros)
            zeros += 1
    fits = len(places) == values and all(place < 4 * cols for place in places)
    assert (verdicts[0] is not None) == fits
