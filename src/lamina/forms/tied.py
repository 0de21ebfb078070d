"""The tied form: a layer whose weight is another layer's, one Parameter for both."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lamina.errors import FileError

Settings = Mapping[str, int]


def index_of(root: nn.Module, path: str) -> int:
    """Return the number of a module in the order of `named_modules`, by which a tie names it.

    Raises:
        FileError: there is no such module.

    Example:
        >>> index_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "1")
        2
    """
    for number, (name, _) in enumerate(root.named_modules()):
        if name == path:
            return number
    raise FileError("the network has no such module", path)


def tie(root: nn.Module, path: str, settings: Settings) -> None:
    """Let a layer use another one's weight from now on: both hold the same Parameter.

    Args:
        root: the network, which is changed in place.
        path: of the layer that gives its own weight up.
        settings: `with`: the number of the other layer (`index_of`); `bias` 1: its bias too.

    Raises:
        FileError: the settings are other ones, or the two layers do not have weights of one shape.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> tie(net, "1", {"with": 1})
        >>> net[1].weight is net[0].weight, net[1].bias is net[0].bias
        (True, False)
    """
    where = f"tie {path} {dict(settings)}"[:200]
    modules = list(root.modules())
    number, both = settings.get("with", -1), settings.get("bias", 0)
    if (
        not set(settings) <= {"with", "bias"}
        or {type(number), type(both)} != {int}
        or not 0 <= number < len(modules)
        or both not in (0, 1)
    ):
        raise FileError("a tie does not fit the network", where, "it names no module of it")
    follower, leader = root.get_submodule(path), modules[number]
    if follower is leader:
        raise FileError("a tie does not fit the network", where, "a layer is tied with itself")
    for leaf in ("weight", "bias")[: 1 + both]:
        old, new = follower._parameters.get(leaf), leader._parameters.get(leaf)
        if old is None or new is None or old.shape != new.shape or old.dtype != new.dtype:
            why = f"the two layers have no {leaf} of one shape and dtype"
            raise FileError("a tie does not fit the network", where, why)
    for leaf in ("weight", "bias")[: 1 + both]:
        follower._parameters[leaf] = leader._parameters[leaf]
