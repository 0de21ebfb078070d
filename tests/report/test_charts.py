"""Charts: values land where they should, on axes with round numbers."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    bar,
    curves_plot,
    lower,
    plot,
    span,
)

positive = st.floats(1e-12, 1e12)


@given(st.lists(positive, min_size=1, max_size=9))
def test_a_span_holds_its_values(values: list[float]) -> None:
    for log in (False, True):
        low, high = span(values, log)
        assert low < min(values) and max(values) < high
        assert not log or low > 0


@given(positive, st.floats(1.01, 1e9))
def test_ticks_are_few_and_inside(low: float, factor: float) -> None:
    for log in (False, True):
        axis = Axis(low, low * factor, str, log)
        found = axis.ticks()
        assert found == sorted(set(found))
        assert len(found) <= 9
        assert all(low * 0.998 <= t <= low * factor * 1.002 for t in found)


def test_a_logarithmic_axis_is_one() -> None:
    axis = Axis(1, 10_000, str, log=True)
    assert [axis.place(v) for v in (1, 10, 100, 10_000)] == pytest.approx([0, 0.25, 0.5, 1])
    assert Axis(0, 10, str).place(2.5) == 0.25
    assert axis.place(1e-9) == 0 and axis.place(1e9) == 1


def test_points_are_drawn_inside_the_frame_and_in_their_place() -> None:
    svg = plot("l", Axis(0, 10, str), Axis(0, 1, str), [(0, 0), (5, 0.5), (10, 1), (99, 99)])
    found = re.search(r'class="line" d="M([^"]+)"', svg)
    assert found
    points = [tuple(float(n) for n in p.split()) for p in found[1].split("L")]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    middle = ((LEFT + right) / 2, (TOP + bottom) / 2)
    corner = (right, TOP)
    for point, place in zip(points, [(LEFT, bottom), middle, corner, corner], strict=True):
        assert point == pytest.approx(place, abs=0.06)


def test_a_limit_outside_the_frame_is_not_drawn() -> None:
    x, y = Axis(0, 10, str), Axis(0, 1, str)
    assert 'class="limit"' in plot("l", x, y, [], vertical=5)
    assert 'class="limit"' not in plot("l", x, y, [], vertical=50, horizontal=-1)


PLANE = st.lists(st.tuples(st.integers(0, 9).map(float), st.integers(0, 9).map(float)))


@given(PLANE)
def test_lower_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    def beaten(p: tuple[float, float]) -> bool:
        return any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)

    assert lower(points) == sorted({p for p in points if not beaten(p)})


def test_curves_have_a_dot_per_point_and_one_ring() -> None:
    x, y = Axis(1, 100, str, log=True), Axis(1e-4, 1, str, log=True)
    curves = [("c0", [(1, 1), (10, 0.01), (50, 0.5)]), ("c1", [(100, 1e-4)])]
    svg = curves_plot("l", x, y, curves, (10, 0.01))
    dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="2.5" class="dot (c\d)"', svg)
    assert [kind for *_, kind in dots] == ["c0"] * 3 + ["c1"]
    ring = re.search(r'cx="([\d.]+)" cy="([\d.]+)" r="7" class="mark taken"', svg)
    assert ring and ring.groups() == dots[1][:2]
    middle = ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)
    assert tuple(map(float, ring.groups())) == pytest.approx(middle, abs=0.06)
    line = re.search(r'class="line c0" d="M([^"]+)"', svg)
    assert line and line[1].count("L") == 1  # the third point is beaten by the second
    assert "taken" not in curves_plot("l", x, y, curves, None)


def test_labels_are_escaped() -> None:
    svg = plot('<b>"', Axis(0, 1, lambda v: "<i>", title="<u>"), Axis(0, 1, str), [])
    assert not re.search(r"<[bui]>", svg)
    assert "&lt;b&gt;&quot;" in svg


@given(st.lists(st.floats(0, 1e9), max_size=6))
def test_a_bar_is_full_or_empty(amounts: list[float]) -> None:
    svg = bar("b", [("c0", a) for a in amounts])
    widths = [float(w) for w in re.findall(r' width="([\d.]+)"', svg)]
    whole = 1000.0 if sum(amounts) > 0 else 0.0
    assert math.fsum(widths) == pytest.approx(whole, abs=0.05)
