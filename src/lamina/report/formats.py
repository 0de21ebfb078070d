"""Numbers as text: every number of a report, in whatever form it is read, is written here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

NONE = "-"  # not measured
SIZES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits.

    Example:
        >>> number(0.012), number(3.2e-07), number(4321.9), number(0), number(None)
        ('0.0120', '3.20e-07', '4,322', '0', '-')
    """
    if value is None or not math.isfinite(value):
        return NONE
    if not value:
        return "0"
    text = f"{value:#.{digits}g}"
    return text.removesuffix(".") if abs(float(text)) < 10**digits else f"{value:,.0f}"


def tick(value: float) -> str:
    """Return a round number, as on an axis.

    Example:
        >>> tick(0.1), tick(1e-5), tick(2000)
        ('0.1', '1e-05', '2,000')
    """
    return f"{value:g}" if abs(value) < 1000 else f"{value:,.0f}"


def count(value: float | None) -> str:
    """Return a count: whole below ten million, then with a unit.

    Example:
        >>> count(431080), count(25_557_032), count(4.1e9)
        ('431,080', '25.6 M', '4.10 G')
    """
    if value is None or not math.isfinite(value):
        return NONE
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= max(scale, 1e7) * 0.9995:
            return f"{number(value / scale)} {unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Return a size on disk, in decimal units.

    Example:
        >>> size(312), size(17243), size(1_724_320)
        ('312 B', '17.2 kB', '1.72 MB')
    """
    if value is None or not math.isfinite(value):
        return NONE
    for unit, scale in SIZES:
        if abs(value) >= scale * 0.9995:
            return f"{number(value / scale)} {unit}"
    return f"{value:.0f} B"


def tick_size(value: float) -> str:
    """Return a round size, as on an axis.

    Example:
        >>> tick_size(20_000), tick_size(2.5e6), tick_size(0)
        ('20 kB', '2.5 MB', '0 B')
    """
    unit, scale = next(((u, s) for u, s in SIZES if abs(value) >= s * 0.9995), ("B", 1.0))
    return f"{value / scale:g} {unit}"


def exact(value: float | None) -> str:
    """Return a size to the byte.

    Example:
        >>> exact(17243)
        '17,243 bytes'
    """
    return NONE if value is None else f"{value:,.0f} byte{'s' if round(value) != 1 else ''}"


def ratio(value: float | None) -> str:
    """Return how many times smaller (or faster) something is.

    Example:
        >>> ratio(100.04), ratio(1.234), ratio(4321)
        ('100x', '1.23x', '4,321x')
    """
    return NONE if value is None else f"{number(value)}x"


def share(value: float | None) -> str:
    """Return a share of one as percent.

    Example:
        >>> share(0.4567), share(0.0004), share(1)
        ('45.7%', '0.04%', '100%')
    """
    if value is None:
        return NONE
    percent = 100 * value
    return f"{percent:.2f}%" if percent < 9.995 else f"{number(percent)}%"


def score(value: float | None, unit: str = "") -> str:
    """Return a metric's value; points have two decimals.

    Example:
        >>> score(98.6, "points"), score(0.07123, "nats")
        ('98.60', '0.07123')
    """
    if value is None:
        return NONE
    return f"{value:.2f}" if unit == "points" else number(value, 4)


def drop(value: float | None, unit: str = "") -> str:
    """Return how much was lost, or gained.

    Example:
        >>> drop(0.3, "points"), drop(-0.05, "points"), drop(0.0, "points"), drop(0.1, "nats")
        ('0.30 points lost', '0.05 points gained', 'none lost', '0.1000 nats lost')
    """
    if value is None:
        return NONE
    text = score(abs(value), unit)
    if not float(text.replace(",", "")):
        return "none lost"
    return " ".join(w for w in (text, unit, "lost" if value > 0 else "gained") if w)


def seconds(value: float | None) -> str:
    """Return a time.

    Example:
        >>> seconds(0.000314), seconds(0.0125), seconds(75.2)
        ('0.314 ms', '12.5 ms', '1 min 15 s')
    """
    if value is None:
        return NONE
    if value < 1:
        return f"{number(1e3 * value)} ms"
    if value < 60:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{value / 3600:.1f} h"


def shape(value: Sequence[int]) -> str:
    """Return a tensor's shape.

    Example:
        >>> shape([20, 1, 5, 5]), shape([])
        ('20 x 1 x 5 x 5', 'scalar')
    """
    return " x ".join(str(n) for n in value) or "scalar"


def date(value: str) -> str:
    """Return an ISO date and time as people read it.

    Example:
        >>> date("2026-11-22T10:30:00+00:00")
        '22 November 2026, 10:30 UTC'
    """
    try:
        when = datetime.fromisoformat(value)
    except ValueError:
        return value
    zone = when.strftime(" %Z") if when.tzinfo else ""
    return f"{when.day} {when.strftime('%B %Y, %H:%M')}{zone}"
