"""The settings that recipes have in common, and their checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lamina.errors import MethodError


@dataclass(frozen=True)
class Pruning:
    """How a recipe prunes and retrains.

    Args:
        density: share of all weights of the layers that stays; what each layer keeps of its own
            follows from its measured sensitivity.
        keep: shares of layers that shall not follow from it, by name pattern or operation.
        rounds: of pruning and retraining; shares fall by equal factors.
        epochs: of retraining after each round but the last [passes over the training data].
        last: of retraining after the last round.
        lr: peak learning rate (Adam, one cycle).
        decay: of weights (L2, decoupled): each step takes its learning rate times this of them. The
            paper finds it the better regulariser where pruning is followed by retraining.
        distill: weight of the original's outputs against the labels, 0..1; the papers have none.
            Without labels the outputs are all there is. Chosen, as the other defaults, by agreement
            with the original on the validation split of the shipped digits.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> Pruning(density=0.05, keep={"conv1": 0.66}).rounds
        5
    """

    density: float = 0.07
    keep: Mapping[str, float] = field(default_factory=dict)
    rounds: int = 5
    epochs: float = 3.0
    last: float = 40.0
    lr: float = 2e-3
    decay: float = 0.1
    distill: float = 0.9

    def __post_init__(self) -> None:
        for name, share in {"density": self.density, **self.keep}.items():
            if not is_number(share) or not 0 < share <= 1:
                raise MethodError("a share is over 0 and at most 1", f"{name}={share!r}")
        check_whole("rounds", self.rounds, 1)
        check_training(self.epochs, self.lr)
        check_training(self.last, self.lr)
        if not is_number(self.decay) or self.decay < 0:
            raise MethodError("decay is 0 or more", f"decay={self.decay!r}")
        if not is_number(self.distill) or not 0 <= self.distill <= 1:
            raise MethodError("distill is between 0 and 1", f"distill={self.distill!r}")


def check_training(epochs: float, lr: float) -> None:
    """Refuse what nothing can be trained with.

    Raises:
        MethodError: names the setting.
    """
    if not is_number(epochs) or epochs < 0:
        raise MethodError("epochs are 0 or more", f"epochs={epochs!r}")
    if not is_number(lr) or lr <= 0:
        raise MethodError("a learning rate is over 0", f"lr={lr!r}")


def check_whole(name: str, value: object, least: int, most: int | None = None) -> None:
    """Refuse what is no whole number within bounds.

    Raises:
        MethodError: names the setting.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value or (most is not None and value > most):  # type: ignore[operator]
        bounds = f"{least} or more" if most is None else f"{least} to {most}"
        raise MethodError(f"{name} is a whole number, {bounds}", f"{name}={value!r}")


def is_number(value: object) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
