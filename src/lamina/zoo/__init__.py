"""Reference networks that ship with Lamina, with trained weights where they have any.

Adding a network is adding a file to this folder: a module with a dict `ZOO` of name -> factory,
`EXAMPLE`, the shape of one input (and `VOCABULARY` where that is tokens), and `DATA`, the name of
what it is for; and, if the network is to be had trained, `weights/<name>.safetensors` beside it.
Data comes with a network where `lamina.data.load` knows it by that name, else the user brings it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

import torch
from torch import nn

from lamina.errors import NetworkError

if TYPE_CHECKING:
    from lamina.network.source import Network

__all__ = ["build", "names", "untrained", "zoo"]


SHIPPED = ("mnist-10k",)  # data that needs no fetching


@dataclass(frozen=True)
class Entry:
    """What the zoo knows of a network: how to build it, an input's shape and kind, its data."""

    build: Callable[[], nn.Module]
    example: tuple[int, ...] = ()
    data: str = ""
    vocabulary: int = 0


@cache
def _entries() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = import_module(f"{__name__}.{info.name}")
        shape, data = getattr(module, "EXAMPLE", ()), getattr(module, "DATA", "")
        for name, factory in getattr(module, "ZOO", {}).items():
            if name in found:
                raise NetworkError("two networks of the zoo have one name", name)
            found[name] = Entry(factory, shape, data, getattr(module, "VOCABULARY", 0))
    return found


def names() -> list[str]:
    """The names of all networks of the zoo, sorted.

    Example:
        >>> "lenet-5" in names()
        True
    """
    return sorted(_entries())


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a network of the zoo with random weights, the same for the same seed.

    Args:
        name: one of `names()`.
        seed: where the weights come from; torch's own random state is left as it was.

    Raises:
        NetworkError: there is no such network.

    Example:
        >>> sum(p.numel() for p in build("lenet-5").parameters())
        431080
    """
    entry = _entry(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return entry.build()


def _entry(name: str) -> Entry:
    if name not in _entries():
        known = ", ".join(names())
        raise NetworkError("no such network in the zoo", repr(name), fix=f"choose from {known}")
    return _entries()[name]


def zoo(name: str) -> Network:
    """Open a network of the zoo: trained weights, example input and, if it ships, its data.

    Args:
        name: one of `names()`.

    Returns:
        A Network in eval mode; `.module` is the nn.Module, `.data` its loaders. Data that does not
        ship is None (`load` opens what you fetched); the example input is noise then.

    Raises:
        NetworkError: there is no such network, or it has no trained weights.
        DataError: the packaged data is damaged.

    Example:
        >>> zoo("lenet-5").source, zoo("small-cnn").data
        ('zoo:lenet-5', None)
    """
    from safetensors.torch import load_model

    entry = _entry(name)
    resource = files(__name__) / "weights" / f"{name}.safetensors"
    if not resource.is_file():
        script = "train.py" if entry.data in SHIPPED else "train_fetched.py"
        raise NetworkError(
            "no trained weights in the zoo",
            repr(name),
            fix=f"train it with benchmarks/zoo/{script} {name}, or use lamina.zoo.build",
        )
    network = untrained(name)
    with as_file(resource) as path:
        load_model(network.module, path)  # of tied tensors one is stored
    return network


def untrained(name: str, seed: int = 0) -> Network:
    """Return a network of the zoo as `zoo` does, but with random weights.

    Args:
        name: one of `names()`.
        seed: where the weights come from.

    Raises:
        NetworkError: there is no such network.
        DataError: the packaged data is damaged.

    Example:
        >>> untrained("vgg16").example_inputs[0].shape
        torch.Size([2, 3, 32, 32])
    """
    from lamina.data import load
    from lamina.network.source import Network

    entry = _entry(name)
    data = load(entry.data) if entry.data in SHIPPED else None
    if data is not None:
        x = next(iter(data.calibration or ()))[0][:2]
    else:
        drawn = torch.Generator().manual_seed(0)
        x = torch.randn(2, *entry.example, generator=drawn)
        if entry.vocabulary:
            x = torch.randint(entry.vocabulary, (2, *entry.example), generator=drawn)
    return Network(
        module=build(name, seed).eval(),
        example_inputs=(x,),
        source=f"zoo:{name}",
        name=name,
        data=data,
        loss="logits",
    )
