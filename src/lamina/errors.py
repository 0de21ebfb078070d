"""Every error Lamina raises, as one tree.

    LaminaError
    ├── BudgetError           the budget cannot be read, or means nothing here
    │   └── InfeasibleError   no plan fits it; `.nearest` is the nearest budget that can be met
    ├── NetworkError          the network cannot be opened, run or understood
    │   └── SiteError         one site of it cannot be compressed the way that was asked
    ├── DataError             the data cannot be opened, or does not fit the network
    ├── MethodError           an unknown method, or settings it does not have
    ├── PlanError             the plan cannot be read, or was made for another network
    ├── FileError             a `.lamina` file is damaged, hostile or from the future
    ├── RunError              the run folder cannot be used
    │   └── BusyError         another process is using it
    └── MissingExtraError     an optional dependency is missing

Each error is one line that says what happened, where (path, type, shape), why, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping


class LaminaError(Exception):
    """The root of every error that Lamina raises.

    Args:
        what: what happened, as a short clause.
        where: the place: a path, a layer, a type, a shape.
        why: the reason, if it is not plain from `what`.
        fix: what the user can do about it.

    Example:
        >>> print(LaminaError("cannot read budget", "'-3MB'", "a size is positive", "try '3MB'"))
        cannot read budget at '-3MB': a size is positive; try '3MB'
    """

    def __init__(self, what: str, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        line = what
        if where:
            line += f" at {where}"
        if why:
            line += f": {why}"
        if fix:
            line += f"; {fix}"
        super().__init__(" ".join(line.split()))


class BudgetError(LaminaError):
    """The budget cannot be read, or means nothing for this network."""


class InfeasibleError(BudgetError):
    """No plan fits the budget; `nearest` is the nearest one that can be met, by resource."""

    def __init__(
        self,
        what: str,
        where: str = "",
        why: str = "",
        fix: str = "",
        nearest: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(what, where, why, fix)
        self.nearest = dict(nearest or {})


class NetworkError(LaminaError):
    """The network cannot be opened, run or understood."""


class SiteError(NetworkError):
    """One site cannot be compressed the way that was asked."""


class DataError(LaminaError):
    """The data cannot be opened, or does not fit the network."""


class MethodError(LaminaError):
    """A method is unknown, or was given settings it does not have."""


class PlanError(LaminaError):
    """The plan cannot be read, or was made for another network."""


class FileError(LaminaError):
    """A `.lamina` file is damaged, hostile, or from a future version."""


class RunError(LaminaError):
    """The run folder cannot be used."""


class BusyError(RunError):
    """Another process is using the run folder."""


class MissingExtraError(LaminaError):
    """An optional dependency is missing; the message carries the install line."""
