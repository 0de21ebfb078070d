"""Charts as inline SVG: drawn by us, coloured by the page, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 18, 12, 44


@dataclass(frozen=True)
class Axis:
    """One axis: its range, its scale, and how its numbers are written."""

    low: float
    high: float
    write: Callable[[float], str]
    log: bool = False
    title: str = ""

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high one."""
        if self.log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(value)
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Return round values inside the range, about five of them.

        Example:
            >>> Axis(0, 10, str).ticks(), Axis(50, 2e6, str, log=True).ticks()
            ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [100.0, 1000.0, 10000.0, 100000.0, 1000000.0])
        """
        return _decades(self.low, self.high) if self.log else _steps(self.low, self.high)


def _steps(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 2:
        marks = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        return [m for m in marks if low * 0.999 <= m <= high * 1.001]
    stride = math.ceil((last - first + 1) / 6)
    return [10.0**e for e in range(first, last + 1, stride)]


def span(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """Return a range around values, with some air, never empty.

    Example:
        >>> span([5, 5]), [round(v) for v in span([10, 1000], log=True)]
        ((2.5, 7.5), [7, 1445])
    """
    low, high = min(values), max(values)
    if log:
        air = max(0.08 * math.log10(high / low), 0.15)
        return 10 ** (math.log10(low) - air), 10 ** (math.log10(high) + air)
    air = 0.06 * (high - low) or abs(high) / 2 or 0.5
    return low - air, high + air


def plot(
    label: str,
    x: Axis,
    y: Axis,
    line: Sequence[Point],
    *,
    marks: Sequence[tuple[str, Point]] = (),
    vertical: float | None = None,
    horizontal: float | None = None,
) -> str:
    """Return a line chart as an SVG element.

    Args:
        label: what it shows, for readers who do not see it.
        x, y: the axes.
        line: (x, y) points.
        marks: (class, point): `"planned"` is a ring, anything else a diamond.
        vertical, horizontal: where a dashed limit lies.
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = _frame(label, x, y)
    if vertical is not None and x.low <= vertical <= x.high:
        h, _ = _at(x, y, (vertical, y.low))
        parts.append(f'<path class="limit" d="M{h:.1f} {TOP}V{bottom}"/>')
    if horizontal is not None and y.low <= horizontal <= y.high:
        _, v = _at(x, y, (x.low, horizontal))
        parts.append(f'<path class="limit" d="M{LEFT} {v:.1f}H{right}"/>')
    if line:
        parts.append(_line("line", x, y, line))
    for kind, point in marks:
        h, v = _at(x, y, point)
        shape = f'<circle cx="{h:.1f}" cy="{v:.1f}" r="6"' if kind == "planned" else _diamond(h, v)
        parts.append(f'{shape} class="mark {escape(kind)}"/>')
    return "".join(parts) + "</svg>"


def curves_plot(
    label: str, x: Axis, y: Axis, curves: Sequence[tuple[str, Sequence[Point]]], taken: Point | None
) -> str:
    """Return several curves and the point taken as an SVG element.

    Args:
        label: what it shows, for readers who do not see it.
        x, y: the axes.
        curves: (class, points): every point is a dot, and a line joins those that no other point of
            the curve beats.
        taken: a point with a ring around it.
    """
    parts = _frame(label, x, y)
    for kind, points in curves:
        parts.append(_line(f"line {escape(kind)}", x, y, lower(points)))
        for point in points:
            h, v = _at(x, y, point)
            parts.append(f'<circle cx="{h:.1f}" cy="{v:.1f}" r="2.5" class="dot {escape(kind)}"/>')
    if taken is not None:
        h, v = _at(x, y, taken)
        parts.append(f'<circle cx="{h:.1f}" cy="{v:.1f}" r="7" class="mark taken"/>')
    return "".join(parts) + "</svg>"


def lower(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both, from left to right.

    Example:
        >>> lower([(3, 1), (1, 5), (2, 6), (4, 1)])
        [(1, 5), (3, 1)]
    """
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _frame(label: str, x: Axis, y: Axis) -> list[str]:
    """Return the start of a chart: its element, its grid and its axes."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" class="plot">'
    ]
    for value in y.ticks():
        _, v = _at(x, y, (x.low, value))
        parts.append(f'<path class="grid" d="M{LEFT} {v:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{v + 4.5:.1f}" class="end">{_say(y, value)}</text>')
    for value in x.ticks():
        h, _ = _at(x, y, (value, y.low))
        parts.append(f'<path class="grid" d="M{h:.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{h:.1f}" y="{bottom + 18}" class="mid">{_say(x, value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    if x.title:
        middle = (LEFT + right) / 2
        parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="mid">{escape(x.title)}</text>')
    return parts


def _at(x: Axis, y: Axis, point: Point) -> Point:
    """Return where a point lies in the element."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    return (
        LEFT + x.place(point[0]) * (right - LEFT),
        bottom - y.place(point[1]) * (bottom - TOP),
    )


def _line(kind: str, x: Axis, y: Axis, points: Sequence[Point]) -> str:
    path = "L".join("{:.1f} {:.1f}".format(*_at(x, y, point)) for point in points)
    return f'<path class="{kind}" d="M{path}"/>'


def _say(axis: Axis, value: float) -> str:
    return escape(axis.write(value))


def _diamond(h: float, v: float) -> str:
    return f'<path d="M{h:.1f} {v - 8:.1f}l8 8l-8 8l-8 -8z"'


def bar(label: str, parts: Sequence[tuple[str, float]]) -> str:
    """Return a stacked bar over the whole width as an SVG element.

    Args:
        label: what it shows, for readers who do not see it.
        parts: (class, amount).
    """
    whole = sum(amount for _, amount in parts) or 1.0
    at, cells = 0.0, []
    for kind, amount in parts:
        wide = 1000 * amount / whole
        if wide > 0:
            cells.append(
                f'<rect x="{at:.2f}" y="0" width="{wide:.2f}" height="10" class="{escape(kind)}"/>'
            )
        at += wide
    head = '<svg viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" class="bar" '
    return f'{head}aria-label="{escape(label)}">{"".join(cells)}</svg>'
