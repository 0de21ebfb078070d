"""Reference networks that ship with Lamina, with trained weights where they have any.

Adding a network is adding a file to this folder: a module with a dict `ZOO` of name -> factory,
and, if the network is to be had trained, `weights/<name>.safetensors` beside it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

import torch
from torch import nn

from lamina.errors import NetworkError

if TYPE_CHECKING:
    from lamina.network.source import Network

__all__ = ["build", "names", "zoo"]


@cache
def _factories() -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = import_module(f"{__name__}.{info.name}")
        for name, factory in getattr(module, "ZOO", {}).items():
            if name in found:
                raise NetworkError("two networks of the zoo have one name", name)
            found[name] = factory
    return found


def names() -> list[str]:
    """The names of all networks of the zoo, sorted.

    Example:
        >>> "lenet-5" in names()
        True
    """
    return sorted(_factories())


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
    factory = _factories().get(name)
    if factory is None:
        known = ", ".join(names())
        raise NetworkError("no such network in the zoo", repr(name), fix=f"choose from {known}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return factory()


def zoo(name: str) -> Network:
    """Open a network of the zoo: trained weights, example input and the data it was trained on.

    Args:
        name: one of `names()`.

    Returns:
        A Network in eval mode; `.module` is the nn.Module, `.data` its loaders.

    Raises:
        NetworkError: there is no such network, or it has no trained weights.
        DataError: the packaged data is damaged.

    Example:
        >>> zoo("lenet-5").source
        'zoo:lenet-5'
    """
    from safetensors.torch import load_file

    from lamina.data import load
    from lamina.network.source import Network

    module = build(name)
    resource = files(__name__) / "weights" / f"{name}.safetensors"
    if not resource.is_file():
        raise NetworkError(
            "no trained weights in the zoo",
            repr(name),
            fix=f"train it with benchmarks/zoo/train.py {name}, or use lamina.zoo.build",
        )
    with as_file(resource) as path:
        module.load_state_dict(load_file(path))
    data = load("mnist-10k")
    x = next(iter(data.calibration or ()))[0][:2]
    return Network(
        module=module.eval(),
        example_inputs=(x,),
        source=f"zoo:{name}",
        name=name,
        data=data,
        loss="logits",
    )
