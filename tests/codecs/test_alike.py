"""Lengths of families: what is coded stays exact, the rest is corrected by it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina import codecs
from lamina.codecs.alike import OFFSET, Curve, corrected, spread


@given(st.integers(0, 40), st.integers(1, 9))
def test_spread_keeps_both_ends_and_is_even(count, few) -> None:
    picks = spread(count, few)
    assert len(picks) == min(count, few) and picks == sorted(set(picks))
    if count and few > 1:
        assert (picks[0], picks[-1]) == (0, count - 1)
        gaps = np.diff(picks)
        assert not len(gaps) or gaps.max() - gaps.min() <= 1


def curve(scale: float, bias: float, known: bool) -> Curve:
    """Estimates that are off by the same share and by the same bytes everywhere."""
    true = [scale * 2.0**-i for i in range(5)]
    quick = [(t + OFFSET) / bias - OFFSET for t in true]
    return Curve(tuple(range(5)), tuple(quick), {i: true[i] for i in (0, 2, 4)} if known else {})


def test_an_even_bias_is_taken_back_exactly() -> None:
    curves = [curve(1000.0 * (i + 1), 1.07, i in (0, 4)) for i in range(5)]
    for i, lengths in enumerate(corrected(curves)):
        assert lengths == pytest.approx([1000.0 * (i + 1) * 2.0**-k for k in range(5)])


def test_what_changes_with_the_size_is_interpolated() -> None:
    curves = [curve(4000.0, 1.0 + 0.1 * i, i in (0, 2)) for i in range(3)]
    assert corrected(curves)[1] == pytest.approx([4000.0 * 2.0**-k for k in range(5)])


def test_coded_lengths_stay_as_they_are_and_none_is_negative() -> None:
    curves = [Curve((0.0, 1.0), (5.0, 1.0), {0: 0.0, 1: 0.0}), Curve((0.5, 3.0), (2.0, 0.0))]
    assert corrected(curves)[0] == pytest.approx([0.0, 0.0])
    assert all(length >= 0 for line in corrected(curves) for length in line)
    assert corrected([]) == [] and corrected([Curve((), ())]) == [[]]
    assert corrected([Curve((0.0,), (7.0,))]) == [[7.0]], "nothing is known"


def test_few_versions_are_coded() -> None:
    coded: list[int] = []
    made = Curve.of(range(9), range(9), float, lambda i: coded.append(i) or 2.0 * i)
    assert coded == [0, 4, 8] and made.exact == {0: 0.0, 4: 8.0, 8: 16.0}
    assert Curve.of(range(9), range(9), float, None).exact == {}


def test_a_family_of_grids_is_as_long_as_predicted() -> None:
    """Ranks 2 to 40 of one matrix at seven steps: within 2 % and 64 bytes, few of them coded.

    The control: the estimates alone are not.
    """
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((40, 400)) * np.exp(rng.normal(0, 0.6, (40, 1)))
    steps = 2.0 ** np.arange(-2.0, 1.5, 0.5)
    family = [[np.rint(wide[:j] / s).astype(np.int32) for s in steps] for j in range(2, 41, 2)]
    known = spread(len(family), 3)
    curves = [
        Curve.of(steps, line, codecs.estimate, codecs.length if i in known else None)
        for i, line in enumerate(family)
    ]
    off, raw = [], []
    for line, lengths, made in list(zip(family, corrected(curves), curves, strict=True))[1::3]:
        for symbols, length, quick in zip(line, lengths, made.quick, strict=True):
            true = codecs.length(symbols)
            off.append(abs(length - true) - 0.02 * true - 64)
            raw.append(abs(quick - true) - 0.02 * true - 64)
    assert max(off) <= 0 < max(raw)
