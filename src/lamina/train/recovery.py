"""What the user may say about training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lamina.errors import BudgetError


@dataclass(frozen=True)
class Recovery:
    """How to train after the edits.

    Args:
        epochs: passes over the training data (may be a fraction); None: as many as a fixed amount
            of work allows, which is bounded in time but the same on every machine.
        optimizer: `"adam"`, or `"sgd"` with momentum .9, which long trainings of convolutional
            networks may prefer; it cannot train grid steps.
        lr: peak learning rate of weights (one cycle); None: for Adam the more, the further the size
            has to come down, from 5e-4 (it fits already) to 2e-3 (four times and more). Far walks
            need the noise; short ones are only hurt by it. For SGD fifty times that.
        step_lr: peak learning rate of the logarithms of grid steps; None: 2e-3.
        distill: weight of distillation from the original network, 0..1; the rest is the labels'.
        temperature: of the distillation.
        decay: of weights that are matrices: each step takes its learning rate times this of them
            (SGD: it is added to the gradient).
        hidden: weight of matching hidden outputs of the layers both networks have.
        rate: let a penalty on coded length move the size to the budget's.
        price: where the price of a bit starts: loss that all bits of the limit together cost.
        start: `"planned"`: from the values of the plan; `"wide"`: from the original values on grids
            no wider than half a standard deviation.
        half: compute in bfloat16 where that is safe (weights stay as they are): faster on hardware
            that has it, slower on other.
        seed: of data order and of dropout.

    Raises:
        BudgetError: a setting that training cannot use.

    Example:
        >>> Recovery(epochs=3).start
        'planned'
    """

    epochs: float | None = None
    optimizer: str = "adam"
    lr: float | None = None
    step_lr: float | None = None
    distill: float = 0.7
    temperature: float = 2.0
    decay: float = 0.0
    hidden: float = 0.0
    rate: bool = True
    price: float = 0.1
    start: str = "planned"
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        rates = {"lr": self.lr, "step_lr": self.step_lr}
        above = {"temperature": self.temperature}
        above |= {name: rate for name, rate in rates.items() if rate is not None}
        above |= {"price": self.price, "epochs": 1.0 if self.epochs is None else self.epochs}
        for name, value in above.items():
            if not (math.isfinite(value) and value > 0):
                raise BudgetError("cannot use a recovery", f"{name}={value}", "it is over zero")
        if not 0 <= self.distill <= 1:
            raise BudgetError("cannot use a recovery", f"distill={self.distill}", "it is 0..1")
        for name, value in {"hidden": self.hidden, "decay": self.decay}.items():
            if not (math.isfinite(value) and value >= 0):
                raise BudgetError("cannot use a recovery", f"{name}={value}", "it is 0 or more")
        if self.optimizer not in ("adam", "sgd"):
            why = "it is 'adam' or 'sgd'"
            raise BudgetError("cannot use a recovery", f"optimizer={self.optimizer!r}", why)
        if self.start not in ("planned", "wide"):
            why = "it is 'planned' or 'wide'"
            raise BudgetError("cannot use a recovery", f"start={self.start!r}", why)

    def rates(self, walk: float) -> tuple[float, float]:
        """Return the peak learning rates of weights and of steps.

        Args:
            walk: size at the beginning over size at the end.

        Example:
            >>> Recovery().rates(1.0)
            (0.0005, 0.002)
        """
        scale = 50 if self.optimizer == "sgd" else 1
        lr = self.lr if self.lr is not None else scale * min(2e-3, 5e-4 * max(walk, 1.0))
        return lr, self.step_lr if self.step_lr is not None else 2e-3
