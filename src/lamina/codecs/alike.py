"""Lengths of many tensors alike, of which few are coded.

A planner asks what the layers of a hundred candidate ranks would take, each at a dozen steps.
`estimate` answers in a moment, and how far it is off changes slowly with the step and with the
size of the tensor. So three tensors of such a family are really coded, at three steps each, and
the others are corrected by what these have shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

ROWS, POINTS = 3, 3  # of a family, of a curve: how many are coded
OFFSET = 32.0  # bytes; below about so many an estimate is off by bytes, and above by a share

Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Curve:
    """Lengths of one tensor in several versions.

    Args:
        places: where the versions lie on an axis that all curves share (log of the step), rising.
        quick: estimated lengths [bytes].
        exact: the true lengths of some versions, by their index.
    """

    places: tuple[float, ...]
    quick: tuple[float, ...]
    exact: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        places: Sequence[float],
        versions: Sequence[Thing],
        estimate: Callable[[Thing], float],
        length: Callable[[Thing], float] | None,
    ) -> Curve:
        """Measure the versions of one tensor; some of them exactly where `length` is given."""
        exact = {}
        if length is not None:
            count = POINTS if len(versions) > 3 else 2
            exact = {i: length(versions[i]) for i in spread(len(versions), count)}
        return cls(tuple(places), tuple(map(estimate, versions)), exact)

    def ratio(self, places: Sequence[float]) -> np.ndarray:
        """Return by how much the estimates are off at these places."""
        at = sorted(self.exact)
        known = [(self.exact[i] + OFFSET) / (self.quick[i] + OFFSET) for i in at]
        return np.interp(places, [self.places[i] for i in at], known)


def spread(count: int, few: int) -> list[int]:
    """Return the indices of a few of `count` things, evenly spread, both ends among them.

    Example:
        >>> spread(10, 3), spread(2, 3)
        ([0, 4, 9], [0, 1])
    """
    return sorted({round(i) for i in np.linspace(0, count - 1, min(few, count))}) if count else []


def corrected(curves: Sequence[Curve]) -> list[list[float]]:
    """Return the lengths of all curves [bytes], in the order of their sizes.

    Estimates are corrected by what the nearest curves with exact lengths were off at that place.

    Example:
        >>> small = Curve((0.0, 1.0), (968.0, 468.0), {0: 1018.0, 1: 518.0})
        >>> corrected([small, Curve((0.0,), (1968.0,))])
        [[1018.0, 518.0], [2068.0]]
    """
    known = [i for i, curve in enumerate(curves) if curve.exact]
    lengths = []
    for i, curve in enumerate(curves):
        quick = np.array(curve.quick)
        if curve.places and known:
            low = max((k for k in known if k <= i), default=known[0])
            high = min((k for k in known if k >= i), default=known[-1])
            share = (i - low) / (high - low) if high > low else 0.0
            ratio = (1 - share) * curves[low].ratio(curve.places)
            ratio = ratio + share * curves[high].ratio(curve.places)
            quick = np.maximum((quick + OFFSET) * ratio - OFFSET, 0.0)
        lengths.append(quick.tolist())
    return lengths
