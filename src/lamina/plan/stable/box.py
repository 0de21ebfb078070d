"""The box: the inputs on which a network without its stable units equals the network as given."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lamina.errors import BudgetError, NetworkError
from lamina.measure.bounds import Bounds

FIX = "give LOW,HIGH, such as 0,1"


@dataclass(frozen=True)
class Box:
    """Ends of every input value: one pair for all of them, or one for each channel (dimension 1).

    Example:
        >>> Box.parse("0,1").text(), Box.parse((-0.5, 2)).text(), Box.parse("0,1;-1,1").text()
        ('0.0,1.0', '-0.5,2.0', '0.0,1.0;-1.0,1.0')
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def text(self) -> str:
        """Return the box as text, exactly: `low,high` of each channel, separated by semicolons."""
        return ";".join(f"{a!r},{b!r}" for a, b in zip(self.low, self.high, strict=True))

    def show(self) -> str:
        """Return the box for people, in short.

        Example:
            >>> Box((0.0,), (1 / 3,)).show(), Box((0.0, -1.0), (1.0, 1.0)).show()
            ('[0, 0.3333]', '[0, 1] x [-1, 1] by channel')
        """
        ends = [f"[{a:.4g}, {b:.4g}]" for a, b in zip(self.low, self.high, strict=True)]
        if len(ends) > 3:
            ends[2:] = ["..."]
        return " x ".join(ends) + (" by channel" if len(ends) > 1 else "")

    @staticmethod
    def parse(given: Any) -> Box:
        """Read a box: text, a (low, high) pair of numbers, or one of sequences (by channel).

        Raises:
            BudgetError: it is no box.
        """
        try:
            if isinstance(given, Box):
                return given
            if isinstance(given, str):
                ends = [[float(x) for x in pair.split(",")] for pair in given.split(";")]
                low, high = zip(*((a, b) for a, b in ends), strict=True)
            else:
                first, second = given
                low, high = _numbers(first), _numbers(second)
        except (TypeError, ValueError):
            raise BudgetError("cannot read the box", repr(given)[:80], "", FIX) from None
        if len(low) != len(high) or not low:
            raise BudgetError("cannot read the box", repr(given)[:80], "its ends differ", FIX)
        for a, b in zip(low, high, strict=True):
            if not (math.isfinite(a) and math.isfinite(b) and a <= b):
                why = f"{a} to {b} is no range"
                raise BudgetError("cannot read the box", repr(given)[:80], why, FIX)
        return Box(tuple(low), tuple(high))

    @staticmethod
    def around(batches: Iterable[torch.Tensor]) -> Box | None:
        """Return the smallest box that holds every input, or None where there are none.

        Inputs of more than two dimensions have a range per channel, others one for all values.

        Example:
            >>> Box.around([torch.tensor([[0.0, 3.0]]), torch.tensor([[-1.0, 1.0]])])
            Box(low=(-1.0,), high=(3.0,))
        """
        low: torch.Tensor | None = None
        high: torch.Tensor | None = None
        for batch in batches:
            if not batch.is_floating_point() or not batch.numel():
                return None
            wide = batch.detach().double().cpu()
            rows = wide.transpose(0, 1).flatten(1) if wide.dim() > 2 else wide.reshape(1, -1)
            least, most = rows.min(1).values, rows.max(1).values
            low = least if low is None else torch.minimum(low, least)
            high = most if high is None else torch.maximum(high, most)
        if low is None or high is None or not bool((low.isfinite() & high.isfinite()).all()):
            return None
        if bool((low == low[0]).all() & (high == high[0]).all()):
            low, high = low[:1], high[:1]
        return Box(tuple(low.tolist()), tuple(high.tolist()))

    def meet(self, other: Box) -> Box:
        """Return what is in both boxes; where they do not meet, this one.

        Example:
            >>> Box((0.0,), (1.0,)).meet(Box((-1.0,), (0.5,))).text()
            '0.0,0.5'
        """
        count = max(len(self.low), len(other.low))
        ends = [[end * count if len(end) == 1 else end for end in (one.low, one.high)]
                for one in (self, other)]  # fmt: skip
        if len(ends[0][0]) != len(ends[1][0]):
            return self
        low = tuple(map(max, ends[0][0], ends[1][0]))
        high = tuple(map(min, ends[0][1], ends[1][1]))
        return Box(low, high) if all(a <= b for a, b in zip(low, high, strict=True)) else self

    def bounds(self, shape: Sequence[int]) -> Bounds:
        """Return the ends of every value of one sample `[*shape]`.

        Raises:
            NetworkError: it has other channels.
        """
        count = len(self.low)
        if count != 1 and (not shape or count != shape[0]):
            why = f"the box has {count} channels, and an input {tuple(shape)}"
            raise NetworkError("the box does not fit the network", self.text()[:80], why, FIX)
        view = (count, *[1] * (len(shape) - 1)) if shape else ()
        low, high = (
            torch.tensor(end, dtype=torch.float64).reshape(view).expand(*shape).clone()
            for end in (self.low, self.high)
        )
        return Bounds(low, high)


def _numbers(value: Any) -> tuple[float, ...]:
    if isinstance(value, torch.Tensor):
        value = value.flatten().tolist()
    return tuple(float(x) for x in value) if isinstance(value, Sequence) else (float(value),)
