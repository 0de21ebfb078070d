from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.codecs.classes import ENTRY_BITS, cluster, entropy_bits, histograms

SIZES = st.tuples(st.integers(1, 30), st.integers(1, 30))


def planted(rows: int = 240, cols: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Rows of three kinds in random order, and the kind of each."""
    rng = np.random.default_rng(1)
    kinds = rng.permutation(np.arange(rows) % 3)
    scale = np.array([0.3, 1.5, 7.0])[kinds]
    return np.rint(rng.laplace(0, scale[:, None], (rows, cols))).clip(-40, 40).astype(
        np.int32
    ), kinds


def cost_slowly(counts: np.ndarray, ids: np.ndarray) -> float:
    """Referee: bits of payload, tables and classes."""

    def bits(line: list[int]) -> float:
        return sum(-n * math.log2(n / sum(line)) for n in line if n)

    table = [counts[ids == k].sum(0).tolist() for k in range(ids.max() + 1)]
    entries = sum(1 for line in table for n in line if n)
    return sum(map(bits, table)) + bits(np.bincount(ids).tolist()) + ENTRY_BITS * entries


@given(SIZES, st.integers(-(2**31), 2**31 - 10), st.integers(0, 99))
def test_histograms_count(sizes: tuple[int, int], low: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    symbols = rng.integers(low, low + 7, sizes).astype(np.int32)
    found = histograms(symbols, low, 7)
    for row, counts in zip(symbols.tolist(), found.tolist(), strict=True):
        assert counts == [row.count(low + v) for v in range(7)]


def test_histograms_of_long_rows_are_made_in_pieces() -> None:
    symbols = np.zeros((3, (1 << 21) + 1), dtype=np.int32)
    symbols[1, 5] = symbols[2, :9] = 1
    size = symbols.shape[1]
    assert histograms(symbols, 0, 2).tolist() == [[size, 0], [size - 1, 1], [size - 9, 9]]


def test_entropy() -> None:
    counts = np.array([[0, 0, 0], [4, 0, 0], [2, 2, 0], [1, 2, 5]])
    exact = 8 * math.log2(8) - 2 * math.log2(2) - 5 * math.log2(5)
    np.testing.assert_allclose(entropy_bits(counts), [0, 0, 4, exact], atol=1e-9)


def test_planted_classes_are_found() -> None:
    symbols, kinds = planted()
    ids, bits = cluster(histograms(symbols, -40, 81), 3)
    assert ids.tolist() == kinds.tolist()  # classes are in rising order of bits a symbol
    assert bits == pytest.approx(cost_slowly(histograms(symbols, -40, 81), ids))
    one, whole = cluster(histograms(symbols, -40, 81), 1)
    assert not one.any()
    assert bits < 0.85 * whole


def test_rows_that_are_alike_are_worth_no_classes() -> None:
    symbols = np.random.default_rng(0).integers(-3, 4, (200, 300))
    counts = histograms(symbols, -3, 7)
    assert cluster(counts, 4)[1] > 0.999 * cluster(counts, 1)[1]


@given(SIZES, st.integers(1, 8), st.integers(0, 999))
def test_classes_are_whole_and_in_order(sizes: tuple[int, int], most: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = np.int64(rng.exponential(4, sizes) * (rng.random(sizes) < 0.5))
    ids, bits = cluster(counts, most)
    assert ids.shape == (len(counts),)
    assert set(ids.tolist()) == set(range(ids.max() + 1))
    assert ids.max() < most
    assert bits == pytest.approx(cost_slowly(counts, ids))
    table = np.stack([counts[ids == k].sum(0) for k in range(ids.max() + 1)])
    each = entropy_bits(table) / np.maximum(table.sum(1), 1)
    assert (np.diff(each) >= 0).all()
