from __future__ import annotations

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.codecs.tables import (
    LARGEST,
    OCTAVES,
    STEPS,
    difference,
    fit_exponents,
    frequencies,
    share,
    undo_difference,
    weights_of,
)

BITS = st.integers(11, 14)
TABLES = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(0, 1 << 30))


def share_slowly(weights: list[int], bits: int) -> list[int]:
    """Referee: the docstring, in whole numbers of any size."""
    spare = (1 << bits) - sum(1 for w in weights if w)
    found = [(1 if w else 0) + w * spare // sum(weights) for w in weights]
    found[weights.index(max(weights))] += (1 << bits) - sum(found)
    return found


def draw_counts(tables: int, entries: int, seed: int) -> np.ndarray:
    """Counts of many magnitudes, some zero, none of the tables empty."""
    rng = np.random.default_rng(seed)
    counts = np.int64(2.0 ** rng.uniform(0, 36, (tables, entries)))
    counts *= rng.random((tables, entries)) < 0.7
    counts[:, rng.integers(entries)] += 1
    return counts


@pytest.mark.parametrize("steps", STEPS)
def test_weights_are_exact_roots(steps: int) -> None:
    found = weights_of(steps).tolist()
    assert found[0] == 0
    assert found[-1] == LARGEST
    assert len(found) == OCTAVES * steps + 1
    with localcontext() as context:
        context.prec = 60
        for e in range(1, len(found)):
            exact = Decimal(2) ** (15 + Decimal(e) / steps)
            assert found[e] == int(exact + Decimal("1e-40"))


@given(TABLES, BITS)
def test_shares_are_those_of_whole_arithmetic(sizes: tuple[int, int, int], bits: int) -> None:
    weights = draw_counts(*sizes)
    found = share(weights, bits)
    assert (found.sum(1) == 1 << bits).all()
    assert ((found >= 1) == (weights > 0)).all()
    for row, slow in zip(found.tolist(), weights.tolist(), strict=True):
        assert row == share_slowly(slow, bits)


def test_the_largest_weights_do_not_overflow() -> None:
    weights = np.full((1, 16), 1 << 45)
    weights[0, 3] = 1
    assert share(weights, 14).tolist() == [share_slowly(weights[0].tolist(), 14)]


@given(TABLES, BITS, st.sampled_from(STEPS))
def test_frequencies_of_fitted_counts(sizes: tuple[int, int, int], bits: int, steps: int) -> None:
    counts = draw_counts(*sizes)
    exponents = fit_exponents(counts, steps)
    assert ((exponents > 0) == (counts > 0)).all()
    assert exponents.max(1).tolist() == [OCTAVES * steps] * len(counts)
    freq = frequencies(exponents, steps, bits)
    assert (freq.sum(1) == 1 << bits).all()
    assert ((freq >= 1) == (counts > 0)).all()


def test_a_table_without_entries_is_the_first_alone() -> None:
    exponents = np.array([[0, 0, 0], [0, 60, 0]])
    assert frequencies(exponents, 4, 11).tolist() == [[2048, 0, 0], [0, 2048, 0]]
    assert exponents[0].tolist() == [0, 0, 0]  # what was given is as it was


@pytest.mark.parametrize("steps", STEPS)
def test_what_coarse_weights_cost(steps: int) -> None:
    """Logarithms rounded to a step err by its square / 12 on average: ln 2 / 24 steps^2 bits."""
    counts = np.random.default_rng(0).integers(10_000, 40_000, (300, 64))
    exponents = fit_exponents(counts, steps)
    chance = counts / counts.sum(1, keepdims=True)
    weights = weights_of(steps)[exponents]
    lost = (chance * np.log2(chance * weights.sum(1, keepdims=True) / weights)).sum(1)
    assert (lost > 0).all()
    assert lost.mean() == pytest.approx(math.log(2) / 24 / steps**2, rel=0.15)
    shared = (chance * (14 + np.log2(chance / frequencies(exponents, steps, 14)))).sum(1)
    assert np.abs(shared - lost).mean() < 3e-4  # what whole frequencies cost


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_differences(tables: int, entries: int, seed: int) -> None:
    exponents = np.random.default_rng(seed).integers(0, 241, (tables, entries))
    coded = difference(exponents)
    assert undo_difference(coded.astype(np.int16)).tolist() == exponents.tolist()
    last = [0] * entries
    for t in range(tables):  # each from the one before, the first from entry to entry
        for v in range(entries):
            before = last[v] if t else (int(exponents[0, v - 1]) if v else 0)
            assert coded[t, v] == exponents[t, v] - before
        last = exponents[t].tolist()


def test_damaged_differences_do_not_overflow() -> None:
    wild = np.full((20, 512), (1 << 31) - 1, dtype=np.int32)
    found = undo_difference(wild)
    assert found[-1, -1] == ((1 << 31) - 1) * (512 + 19)
