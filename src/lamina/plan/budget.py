"""What must hold in the end: a size, a latency, MACs, parameters, a drop of the metric.

A limit is written the way people write it, and each field reads a factor in its own sense:

    field    absolute                      relative to the original network
    size     "4MB" "512KiB" 4_000_000      "10%"   "1/400"   "12x" (twelve times smaller)
    params   "1.5M" 1_500_000              "50%"   "1/2"     "2x"  (half as many)
    macs     "300G" 3e11                   "50%"   "1/2"     "2x"  (half as many)
    latency  "3ms" 0.003 (seconds)         "50%"   "1/2"     "0.5x" (half of the time)

Where a factor could be read in two ways ("0.5x" of a size, "2x" of a latency) it is refused, and
the message spells out what could have been meant. Units ignore case; "b" is bytes, never bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import NoReturn

from lamina.errors import BudgetError

_DECIMAL = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BINARY = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}
_BYTES = {"": 1.0, "b": 1.0} | {
    unit + tail: value for unit, value in (_DECIMAL | _BINARY).items() for tail in ("", "b")
}
_COUNT = {"": 1.0, "b": 1e9} | _DECIMAL  # "7B" parameters are seven billion
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ns": 1e-9}

_UNITS = {"size": _BYTES, "latency": _SECONDS, "macs": _COUNT, "params": _COUNT}
_RESOURCE = {"size": "bytes", "latency": "seconds", "macs": "macs", "params": "params"}
_EXAMPLES = {
    "size": "'4MB', '10%', '12x' or '1/400'",
    "latency": "'3ms', '50%' or '0.5x'",
    "macs": "'300M', '50%' or '2x'",
    "params": "'1.5M', '50%' or '2x'",
    "max_drop": "0.3",
}
_SHOWN = {  # the units that `describe` writes, largest first
    "size": (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)),
    "latency": (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)),
    "macs": (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)),
    "params": (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)),
}

_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?"
_QUANTITY = re.compile(rf"({_NUMBER})\s*([a-z\u00b5\u03bc]*|%)", re.IGNORECASE)
_RATIO = re.compile(rf"({_NUMBER})\s*/\s*({_NUMBER})", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """What the compressed network must keep to; several limits may hold at once.

    Args:
        size: the file on disk: `"4MB"`, `"512KiB"`, `"10%"`, `"1/400"`, `"12x"`, or bytes.
        latency: the time of one forward pass: `"3ms"`, `"50%"`, `"0.5x"`, or seconds.
        macs: multiply-accumulates of one forward pass: `"300M"`, `"50%"`, `"2x"`, or a count.
        params: parameters: `"1.5M"`, `"50%"`, `"2x"`, or a count.
        max_drop: how many points of the user's metric may be lost, at least 0.

    Raises:
        BudgetError: a limit cannot be read, means nothing, or none is given.

    Example:
        >>> budget = Budget(size="12x", latency="0.5x")
        >>> budget.resolve({"bytes": 24e6, "seconds": 0.008})
        {'bytes': 2000000.0, 'seconds': 0.004}
        >>> Budget(size="200%")
        Traceback (most recent call last):
        ...
        lamina.errors.BudgetError: cannot read budget at size='200%': a budget is at most 100% \
of the original; try '4MB', '10%', '12x' or '1/400'
    """

    size: str | float | None = None
    latency: str | float | None = None
    macs: str | float | None = None
    params: str | float | None = None
    max_drop: str | float | None = None

    def __post_init__(self) -> None:
        for name in _NAMES:
            value = _tidy(name, getattr(self, name))
            if value is not None and name == "max_drop":
                value = _drop(value)
            elif value is not None:
                _limit(name, value)
            object.__setattr__(self, name, value)
        if all(getattr(self, name) is None for name in _NAMES):
            raise BudgetError(
                "the budget is empty",
                why="nothing would be compressed",
                fix="give at least one of " + ", ".join(_NAMES),
            )

    @classmethod
    def parse(cls, given: Budget | str | float | Mapping[str, object]) -> Budget:
        """The budget that a user wrote: a size, a list of `name=value`, a mapping, or a Budget.

        Args:
            given: `"2%"` or bytes (a size), `"size=2%, latency=0.5x"`, or `{"size": "2%"}`.

        Raises:
            BudgetError: it cannot be read, or a name is unknown or comes twice.

        Example:
            >>> Budget.parse("2%") == Budget(size="2%")
            True
            >>> Budget.parse("size=4MB, max_drop=0.3")
            Budget(size='4MB', latency=None, macs=None, params=None, max_drop=0.3)
        """
        if isinstance(given, Budget):
            return given
        if isinstance(given, Mapping):
            return cls.from_json(given)
        if isinstance(given, str) and "=" in given:
            return cls.from_json(_pairs(given))
        if isinstance(given, (str, Real)):
            return cls(size=given)  # type: ignore[arg-type]
        raise BudgetError(
            "cannot read budget",
            f"a {type(given).__name__}",
            "a budget is a size, a mapping or a lamina.Budget",
            f"try {_EXAMPLES['size']}, or lamina.Budget(size=..., latency=...)",
        )

    @classmethod
    def from_json(cls, given: Mapping[str, object]) -> Budget:
        """The budget of a JSON object, the inverse of `to_json`.

        Raises:
            BudgetError: a name is unknown, or a limit cannot be read.

        Example:
            >>> Budget.from_json({"latency": "3ms"}).latency
            '3ms'
        """
        for name in given:
            if name not in _NAMES:
                raise BudgetError(
                    "cannot read budget",
                    _shown(name),
                    "no limit has this name",
                    "choose from " + ", ".join(_NAMES),
                )
        return cls(**given)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, str | float]:
        """The limits that are set, as a JSON object.

        Example:
            >>> Budget(size="4MB", max_drop="0.3").to_json()
            {'size': '4MB', 'max_drop': 0.3}
        """
        return {name: value for name in _NAMES if (value := getattr(self, name)) is not None}

    def resolve(self, original: Mapping[str, float]) -> dict[str, float]:
        """The limits in absolute units, for one network.

        Args:
            original: what the network costs now: `"bytes"`, `"seconds"`, `"macs"`, `"params"`;
                only those that a relative limit refers to are needed.

        Returns:
            The limits that are set, under the same keys. `max_drop` is no resource, so not here.

        Raises:
            BudgetError: a relative limit refers to a cost that is missing, or not positive.

        Example:
            >>> Budget(size="1/400", macs="1.5M").resolve({"bytes": 1_720_000})
            {'bytes': 4300.0, 'macs': 1500000.0}
        """
        limits: dict[str, float] = {}
        for name, resource in _RESOURCE.items():
            value = getattr(self, name)
            if value is None:
                continue
            amount, relative = _limit(name, value)
            limits[resource] = (
                amount * _known(name, value, resource, original) if relative else amount
            )
        return limits

    def describe(self) -> str:
        """The budget as short text that `parse` reads back.

        Example:
            >>> Budget(size=4_000_000, latency=0.003, max_drop=0.3).describe()
            'size=4MB, latency=3ms, max_drop=0.3'
        """
        return ", ".join(
            f"{name}={_written(name, value)}" for name, value in self.to_json().items()
        )


_NAMES = tuple(field.name for field in fields(Budget))


def _refuse(name: str, value: object, why: str, fix: str = "") -> NoReturn:
    raise BudgetError(
        "cannot read budget", f"{name}={_shown(value)}", why, fix or f"try {_EXAMPLES[name]}"
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 48 else text[:45] + "..."


def _tidy(name: str, value: object) -> str | float | None:
    """The value as a plain str, int or float, so that it compares, prints and dumps as JSON."""
    if value is None:
        return None
    if isinstance(value, str):
        return str(value).strip()
    if isinstance(value, bool) or not isinstance(value, Real):
        _refuse(name, value, f"a {type(value).__name__} is neither text nor a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        _refuse(name, value, "it is not a finite number")
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _drop(value: str | float) -> float:
    number = value
    if isinstance(value, str):
        if not re.fullmatch(_NUMBER, value, re.IGNORECASE):
            why = "max_drop is a plain number of points of your metric"
            _refuse("max_drop", value, why, "write 0.3 for 0.3 points")
        number = float(value)
    if not math.isfinite(number := float(number)) or number < 0:
        _refuse("max_drop", value, "a drop is finite and at least 0 points")
    return number + 0.0  # -0.0 becomes 0.0


def _limit(name: str, value: str | float) -> tuple[float, bool]:
    """What a limit says: an absolute amount in base units, or a share of the original in (0, 1]."""
    if not isinstance(value, str):
        return _absolute(name, value, float(value)), False
    if not value:
        _refuse(name, value, "it is empty")
    if ratio := _RATIO.fullmatch(value):
        over = float(ratio[2])
        return _share(name, value, float(ratio[1]) / over if over > 0 else math.nan), True
    if not (quantity := _QUANTITY.fullmatch(value)):
        _refuse(name, value, "it is neither an amount nor a share of the original")
    number, unit = float(quantity[1]), quantity[2].lower()
    if unit == "%":
        return _share(name, value, number / 100), True
    if unit == "x":
        return _share(name, value, _factor(name, value, number)), True
    if unit not in _UNITS[name]:
        if not unit:
            _refuse(name, value, "a time needs a unit", f"write '{value}ms', or '50%' for half")
        _refuse(name, value, f"'{quantity[2]}' is no unit of {name}")
    scale = _UNITS[name][unit]
    # By a division where that is the exact one: 25 / 1e6 is 25e-6, but 25 * 1e-6 is not.
    amount = number * scale if scale >= 1 else number / round(1 / scale)
    return _absolute(name, value, amount), False


def _absolute(name: str, value: object, amount: float) -> float:
    if not math.isfinite(amount) or amount <= 0:
        _refuse(name, value, "a budget is positive and finite")
    if name != "latency" and amount < 1:
        hint = f"write '{amount * 100:g}%' for a share" if amount > 1e-6 else ""
        _refuse(name, value, f"it is less than one {_RESOURCE[name].removesuffix('s')}", hint)
    return amount


def _share(name: str, value: object, share: float) -> float:
    if not share > 0 or not math.isfinite(share):
        _refuse(name, value, "a share of the original is positive and finite")
    if share > 1:
        _refuse(name, value, "a budget is at most 100% of the original")
    return share


def _factor(name: str, value: object, factor: float) -> float:
    """The share a factor means: `latency` multiplies the time, everything else divides."""
    if not factor > 0 or not math.isfinite(factor):
        _refuse(name, value, "a factor is positive and finite")
    if name == "latency":
        if factor > 1:
            faster = (
                f"write '{100 / factor:.4g}%' or '{1 / factor:.4g}x' for {factor:g} times faster"
            )
            _refuse(name, value, f"'{factor:g}x' of the original's time would be slower", faster)
        return factor
    if factor < 1:
        smaller = f"did you mean '{100 * factor:g}%', or '{1 / factor:.4g}x'?"
        _refuse(name, value, f"'12x' means twelve times less, so '{factor:g}x' would grow", smaller)
    return 1 / factor


def _known(name: str, value: object, resource: str, original: Mapping[str, float]) -> float:
    now = original.get(resource)
    if now is None or not math.isfinite(now) or now <= 0:
        raise BudgetError(
            "cannot apply budget",
            f"{name}={_shown(value)}",
            f"it is a share of the original's {resource}, "
            + ("which were not measured" if now is None else f"which are {now:g}"),
            "give an absolute limit instead",
        )
    return float(now)


def _pairs(text: str) -> dict[str, object]:
    pairs: dict[str, object] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name in pairs:
            why = f"{name!r} comes twice" if equals else f"{_shown(part)} is not name=value"
            fix = "write 'size=4MB, latency=50%'"
            raise BudgetError("cannot read budget", _shown(text), why, fix)
        pairs[name] = value
    return pairs


def _written(name: str, value: str | float) -> str:
    """The value as text; a number in the largest unit that gives exactly this number back."""
    if isinstance(value, str) or name == "max_drop":
        return str(value)
    for unit, scale in _SHOWN[name]:
        text = f"{value / scale:.15g}{unit}"
        if value >= scale and _limit(name, text)[0] == value:
            return text
    return f"{value!r}{_SHOWN[name][0][0] if name == 'latency' else ''}"
