"""What the user may say about training."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from lamina.errors import BudgetError

WORDS = {
    "optimizer": ("adam", "sgd"),
    "start": ("planned", "wide"),
    "parts": ("all", "scales"),
}


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
        half: mixed precision: matrix products, of the original too, in bfloat16 where torch's
            autocast holds that safe; weights, gradients and the optimizer stay in float32. Faster
            on hardware that has it, slower on other.
        accumulate: batches that one step of the optimizer is made of. Several processes share the
            samples of each batch, so their number changes nothing but the time.
        clip: largest norm of a step's gradient; 0: any.
        parts: what is trained: `"all"`; or `"scales"`: norms, biases and the steps of grids, while
            the integers of every matrix stay, and the file does not grow (where a size is asked
            for, not beyond it).
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
    accumulate: int = 1
    clip: float = 0.0
    parts: str = "all"
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
        least = {"hidden": self.hidden, "decay": self.decay, "clip": self.clip}
        for name, value in least.items():
            if not (math.isfinite(value) and value >= 0):
                raise BudgetError("cannot use a recovery", f"{name}={value}", "it is 0 or more")
        whole = isinstance(self.accumulate, int) and not isinstance(self.accumulate, bool)
        if not whole or self.accumulate < 1:
            where = f"accumulate={self.accumulate!r}"
            raise BudgetError("cannot use a recovery", where, "it is a whole number of batches")
        for name, known in WORDS.items():
            if getattr(self, name) not in known:
                why = f"it is {known[0]!r} or {known[1]!r}"
                raise BudgetError("cannot use a recovery", f"{name}={getattr(self, name)!r}", why)

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Recovery:
        """Read settings from text, as the command line takes them.

        Args:
            text: `name=value`, separated by commas.
            seed: where the text has none.

        Raises:
            BudgetError: there is no such setting, or its value is of another kind.

        Example:
            >>> made = Recovery.parse("epochs=2,parts=scales,half=true")
            >>> made.epochs, made.parts, made.half
            (2.0, 'scales', True)
        """
        found: dict[str, Any] = {"seed": seed}
        kinds = {f.name: str(f.type) for f in fields(cls)}
        for part in text.split(","):
            name, _, value = (word.strip() for word in part.partition("="))
            if name not in kinds:
                why = f"there are {', '.join(kinds)}"
                raise BudgetError("no such setting of a recovery", repr(name), why)
            try:
                found[name] = _read(value, kinds[name])
            except ValueError:
                where = f"{name}={value}"
                raise BudgetError("cannot use a recovery", where, f"it is {kinds[name]}") from None
        return cls(**found)

    @property
    def squeezes(self) -> bool:
        """Whether training can bring a file down to a size: by a penalty on coded length."""
        return self.rate and self.parts == "all"

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


def _read(text: str, kind: str) -> Any:
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind == "str":
        return text
    return int(text) if kind == "int" else float(text)
