"""Scheduled dropout: rates that fall while a network is quantized, which regularises enough.

Rates live in `nn.Dropout` modules, and where a forward calls dropout as a function, in attributes
of the module or of its config (`attention_dropout`, `hidden_dropout_prob`). All of them are
followed, and put back afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from lamina.errors import MethodError

SCHEDULES = ("constant", "linear", "cosine")
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True)
class Dropout:
    """How dropout rates go over a training.

    Args:
        schedule: `"constant"` (at `first`), `"linear"` or `"cosine"` from `first` to `last`.
        first, last: rates, 0 to under 1. Where a rate is 0 in the network it stays 0.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> [round(Dropout("linear").at(t), 3) for t in (0.0, 0.5, 1.0)]
        [0.1, 0.05, 0.0]
    """

    schedule: str = "linear"
    first: float = 0.1
    last: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            why = f"choose from {', '.join(SCHEDULES)}"
            raise MethodError("unknown schedule of dropout", repr(self.schedule), "", why)
        for name, rate in {"first": self.first, "last": self.last}.items():
            if not 0 <= rate < 1:
                raise MethodError("a dropout rate is 0 to under 1", f"{name}={rate!r}")

    def at(self, share: float) -> float:
        """Return the rate once `share` of the training is done."""
        share = min(max(share, 0.0), 1.0)
        if self.schedule == "constant":
            return self.first
        if self.schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.first + (self.last - self.first) * share


@contextmanager
def dropout_follows(module: nn.Module, dropout: Dropout) -> Iterator[Callable[[float], None]]:
    """Give a function that sets every rate to what it is after a share of the training.

    Args:
        module: the network; its rates are restored when the block ends, whatever happens.
        dropout: the schedule.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3))
        >>> with dropout_follows(net, Dropout("linear", 0.1, 0.0)) as follow:
        ...     follow(0.5)
        ...     print(net[1].p)
        0.05
        >>> net[1].p
        0.3
    """
    places = list(_places(module))

    def follow(share: float) -> None:
        rate = dropout.at(share)
        for owner, name, _ in places:
            setattr(owner, name, rate)

    try:
        yield follow
    finally:
        for owner, name, before in places:
            setattr(owner, name, before)


def _places(module: nn.Module) -> Iterator[tuple[Any, str, float]]:
    """Yield every rate over 0: its owner, the attribute, and the rate."""
    seen: set[int] = set()
    for part in module.modules():
        owners: list[Any] = [part]
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "__dict__") and not isinstance(config, nn.Module):
            owners.append(config)
        for owner in owners:
            if id(owner) in seen:
                continue
            seen.add(id(owner))
            for name, value in list(vars(owner).items()):
                rate = name == "p" if isinstance(owner, DROPOUTS) else "dropout" in name
                if rate and isinstance(value, float) and 0 < value < 1:
                    yield owner, name, value
