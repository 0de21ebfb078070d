"""Opening networks and files: whatever a user passes as a model, and `.lamina` files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina import artifact
from lamina.data import Data, inputs_of
from lamina.errors import FileError, NetworkError
from lamina.network.load import open_network
from lamina.network.pretrained import (
    PREFIX,
    build_pretrained,
    described,
    is_folder,
    is_gguf,
    open_folder,
    open_gguf,
)
from lamina.network.source import Network
from lamina.run import write_atomic


def open_model(
    model: Any, example_inputs: Any = None, data: Data | None = None, skeleton: Any = None
) -> Network:
    """Return a Network for anything that `compress` takes as a model.

    Args:
        model: see `compress`.
        example_inputs: inputs of one forward pass; wins over what the model brings along.
        data: gives example inputs where there are none.
        skeleton: what a `.lamina` file of a network of one's own is put into: a module, a
            Network or `"file.py:function"`.

    Raises:
        NetworkError: it cannot be opened.
        FileError: a `.lamina` file is damaged, or needs a skeleton.
    """
    from lamina.zoo import names, zoo

    if isinstance(model, str) and model in names():
        network = zoo(model)
    elif isinstance(model, (str, Path)) and str(model).endswith(".lamina"):
        package = artifact.read(model)
        made = open_network(skeleton) if skeleton is not None else None
        network = made or replace(_skeleton(package, str(model)), source=package.skeleton)
        # What is made of this network is rebuilt from the same skeleton, through the same edits.
        restored = artifact.restore(package, network.module)
        network = replace(network, module=restored, edits=tuple(package.edits), box=package.box)
    elif isinstance(model, (str, Path)) and is_folder(model):
        network = open_folder(model)
    elif isinstance(model, (str, Path)) and is_gguf(model):
        network = open_gguf(model)
    elif isinstance(model, str) and ".py" not in model:
        raise NetworkError(
            "unknown network", repr(model), f"the zoo has {', '.join(names())}",
            "give a zoo name, a Hugging Face folder, file.py:function or a .lamina file",
        )  # fmt: skip
    else:
        network = open_network(model, example_inputs)
    if example_inputs is not None:
        network = replace(network, example_inputs=tuple(example_inputs))
    return network if data is None else with_example(network, data)


def with_example(network: Network, data: Data) -> Network:
    """Return a network with one sample of the data as its example, where it brought none along.

    A pretrained model's own example is drawn at random, and gives way.
    """
    bare = not network.example_inputs and not network.example_kwargs
    return replace(network, **_example(data)) if bare or network.task else network


def _example(data: Data) -> dict[str, Any]:
    """Return the inputs of one sample of the data, as an example."""
    for batch in data.calibration or data.train or ():
        args, kwargs = inputs_of(batch)
        first = tuple(a[:1] if isinstance(a, torch.Tensor) and a.dim() else a for a in args)
        named = {
            k: v[:1] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in kwargs.items()
        }
        return {"example_inputs": first, "example_kwargs": named}
    return {}


def _skeleton(package: artifact.Package, where: str, trust: Sequence[str] = ()) -> Network:
    """Rebuild a network's skeleton from what a file says of it.

    Raises:
        FileError: it cannot be rebuilt without the caller's help.
    """
    from lamina.zoo import names, untrained

    source = package.skeleton
    kind, _, name = source.partition(":")
    if kind == "zoo" and name in names():
        return untrained(name)
    if source.startswith(PREFIX):
        return described(build_pretrained(source, _held(package)))
    if kind == "python" and source in trust:
        return open_network(name)
    raise FileError(
        "the file does not say how to rebuild its network", where, f"its skeleton is {source!r}",
        "give skeleton=YourNet(), or on the command line --skeleton file.py:function",
    )  # fmt: skip


def _held(package: artifact.Package) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of what a file holds, by name."""
    return {name: (record.shape, record.dtype) for name, record in package.records.items()}


def load(
    path: str | Path, skeleton: nn.Module | None = None, trust: Sequence[str] = ()
) -> nn.Module:
    """Open a `.lamina` file as a plain `nn.Module` in evaluation mode.

    Args:
        path: the file.
        skeleton: a module of the class the file was made from; filled in place and returned. Zoo
            networks rebuild themselves. One built under `torch.device("meta")` costs no time for
            values that are overwritten anyway; it is filled on the CPU.
        trust: factories named in files that may be imported, e.g. `("python:net.py:build",)`.

    Raises:
        FileError: the file is damaged, or the skeleton is missing or does not fit.
    """
    from lamina.zoo import build, names

    package = artifact.read(path)
    kind, _, name = package.skeleton.partition(":")
    if skeleton is None and kind == "zoo" and name in names():
        skeleton = build(name)
    elif skeleton is None and package.skeleton.startswith(PREFIX):
        skeleton = build_pretrained(package.skeleton, _held(package))
    if skeleton is None:
        skeleton = _skeleton(package, str(path), trust).module
    return artifact.restore(package, skeleton).eval()


def save(result: Any, path: str | Path) -> None:
    """Write a `Result`, or a plain module (losslessly), as a `.lamina` file."""
    if isinstance(result, nn.Module):
        write_atomic(Path(path), artifact.pack(result, (), "module", {}))
    else:
        result.save(path)
