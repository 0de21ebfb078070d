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
from lamina.errors import BudgetError, DataError, FileError, NetworkError
from lamina.measure.bench import shape_of, shaped
from lamina.measure.clock import check_timed, record_calls
from lamina.network.examples import TIMED, example_of, is_drawn
from lamina.network.load import inputs_given, open_network
from lamina.network.pretrained import (
    PREFIX,
    build_pretrained,
    described,
    is_folder,
    is_gguf,
    open_folder,
    open_gguf,
)
from lamina.network.small_folders import small_file
from lamina.network.source import Network
from lamina.run import write_atomic


def open_model(
    model: Any, example_inputs: Any = None, data: Data | None = None, skeleton: Any = None
) -> Network:
    """Return a Network for anything that `compress` takes as a model.

    Args:
        model: see `compress`.
        example_inputs: inputs of one forward pass, a tuple or a mapping; wins over what the model
            brings along.
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
    elif isinstance(model, (str, Path)) and (file := small_file(model)) is not None:
        network = _reopened(file, skeleton)
        if file != Path(model):  # the folder's tokenizer is the network's
            network = replace(network, folder=str(model), name=Path(model).resolve().name)
    elif isinstance(model, (str, Path)) and is_folder(model):
        network = open_folder(model)
    elif isinstance(model, (str, Path)) and is_gguf(model):
        network = open_gguf(model)
    elif isinstance(model, (str, Path)) and ".py" not in str(model):
        raise _unknown(str(model), names())
    else:
        network = open_network(model, example_inputs)
    if example_inputs is not None:
        args, kwargs = inputs_given(example_inputs)
        network = replace(network, example_inputs=args, example_kwargs=kwargs)
    return network if data is None else with_example(network, data)


def _unknown(model: str, zoo: Sequence[str]) -> NetworkError:
    """Return what is wrong with a name that stands for nothing."""
    path = Path(model)
    if path.is_dir():
        held = ", ".join(sorted(inside.name for inside in path.iterdir())[:4])
        return NetworkError(
            "not a Hugging Face folder", model,
            f"it has no config.json, but {held}" if held else "it is empty",
            "name the folder that save_pretrained wrote",
        )  # fmt: skip
    if path.is_file():
        return NetworkError(
            "a file of weights alone says not which network they are of", model, "",
            "name the Hugging Face folder it lies in, or file.py:function",
        )  # fmt: skip
    if "/" in model or "\\" in model:
        return NetworkError("no such file or folder", model, "", "check the path")
    return NetworkError(
        "unknown network", repr(model), f"the zoo has {', '.join(zoo)}",
        "give a zoo name, a Hugging Face folder, file.py:function or a .lamina file",
    )  # fmt: skip


def _reopened(file: Path, skeleton: Any) -> Network:
    """Open a `.lamina` file as a network that can be compressed again."""
    package = artifact.read(file)
    made = open_network(skeleton) if skeleton is not None else None
    network = made or replace(_skeleton(package, str(file)), source=package.skeleton)
    # What is made of this network is rebuilt from the same skeleton, through the same edits.
    restored = artifact.restore(package, network.module)
    return replace(
        network, module=restored, edits=tuple(package.edits), box=package.box,
        packed_bytes=package.size,
    )  # fmt: skip


def with_example(network: Network, data: Data) -> Network:
    """Return a network with one sample of the data as its example, where it brought none along.

    A pretrained model's own example is drawn at random, and gives way.
    """
    bare = not network.example_inputs and not network.example_kwargs
    return replace(network, **_example(data)) if bare or network.task else network


def with_timed_example(network: Network) -> Network:
    """Return a network whose example is what a time should be of.

    A pretrained model's own example is drawn at random, two samples of a few tokens, which is
    enough to find its layers; a time is that of one sample, of 128 tokens where it reads text.
    """
    if not network.task or not is_drawn(network.module, network.example_kwargs):
        return network
    return replace(network, example_kwargs=example_of(network.module, 1, TIMED))


def with_shape(network: Network, batch: int = 0, tokens: int = 0) -> Network:
    """Return a network with so many samples, of so many tokens each, as its example.

    Args:
        network: with example inputs.
        batch, tokens: 0: as they are; where tokens are told all of them count, none is padding.

    Raises:
        BudgetError: there are no example inputs.
        DataError: they hold no tokens, or the network does not take so many.
    """
    if not batch and not tokens:
        return network
    check_timed(network)
    made = shaped(network, batch, tokens)
    masks = [name for name in made.example_kwargs if tokens and name.endswith("attention_mask")]
    whole = {name: torch.ones_like(made.example_kwargs[name]) for name in masks}
    made = replace(made, example_kwargs={**made.example_kwargs, **whole})
    try:
        record_calls(made, ())
    except BudgetError as error:
        raise DataError(
            "the network does not take inputs of this shape", shape_of(made), error.why,
            "give fewer --tokens, or another --batch",
        ) from error  # fmt: skip
    return made


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
        path: the file, or a folder that keeps one (`lamina export --to lamina-hf`).
        skeleton: a module of the class the file was made from; filled in place and returned. Zoo
            networks rebuild themselves. One built under `torch.device("meta")` costs no time for
            values that are overwritten anyway; it is filled on the CPU.
        trust: factories named in files that may be imported, e.g. `("python:net.py:build",)`.

    Raises:
        FileError: the file is damaged, or the skeleton is missing or does not fit.
    """
    from lamina.zoo import build, names

    package = artifact.read(small_file(path) or path)
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
