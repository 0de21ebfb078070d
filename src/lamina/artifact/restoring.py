"""Putting a file into a network: decoded straight into its parameters, a few threads at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lamina.artifact import streams
from lamina.artifact.container import memory_key, tensors_of
from lamina.artifact.reading import Package
from lamina.artifact.records import Record
from lamina.errors import FileError
from lamina.forms import Edit, check_indices, find_tensor, install

FIX = "give the skeleton the file was made from"
MOST_GROWTH = 2  # an edit leaves a layer at most twice as large
KINDS = (torch.Tensor, nn.Parameter, nn.Buffer)


def restore(package: Package, skeleton: nn.Module) -> nn.Module:
    """Put a package's edits and tensors into a skeleton, in place, and return it.

    A skeleton that does not fit is refused before any of its tensors is written. What is damaged
    inside a record shows only while it is decoded: then, too, there is a FileError, and the
    skeleton's tensors hold no values of use.

    Args:
        package: the file.
        skeleton: on any device. Parameters on the `meta` device, where they cost neither time nor
            memory until now, are made on the CPU.

    Raises:
        FileError: the skeleton is not the one the file was made from, or a record is damaged.
    """
    install_edits(skeleton, package.edits)
    state = tensors_of(skeleton, meta=True)
    check_shapes(package.records, state)
    _check_no_value_is_lost(skeleton, package.records)
    if _materialise(skeleton):
        state = tensors_of(skeleton)
    _check_complete(package.records, state)
    # Of names that the skeleton ties the last one wins, as if they were written in order.
    last = {memory_key(name, state[name]): name for name in package.records}
    tasks: list[streams.Task] = []
    others: list[tuple[str, torch.Tensor]] = []
    for name in last.values():
        record, tensor = package.records[name], find_tensor(skeleton, name)
        if type(tensor) in KINDS and tensor.device.type == "cpu" and tensor.is_contiguous():
            tasks += streams.fill(record, streams.memory_of(tensor))
        else:
            others.append((name, tensor))
    streams.run(tasks, streams.thread_count())
    with torch.no_grad():
        for name, tensor in others:
            tensor.copy_(streams.dense(package.records[name], streams.thread_count()))
    check_indices(skeleton)
    return skeleton


def install_edits(skeleton: nn.Module, edits: Sequence[Edit]) -> None:
    """Put a file's structural edits into a skeleton, in place.

    Each alone is bounded by what it replaces, but not edits of what others made.

    Raises:
        FileError: one does not fit the skeleton, or together they let it grow.
    """
    limit = MOST_GROWTH * _elements(skeleton)
    for edit in edits:
        install(skeleton, [edit])
        if _elements(skeleton) > limit:
            why = f"the network would be over {MOST_GROWTH} times its size"
            raise FileError("the edits let the network grow", edit.path, why, FIX)


def _elements(module: nn.Module) -> int:
    return sum(t.numel() for t in (*module.parameters(), *module.buffers()))


def check_shapes(held: Mapping[str, Record], state: Mapping[str, torch.Tensor]) -> None:
    """Refuse a skeleton that lacks one of the file's tensors, or has it otherwise.

    Raises:
        FileError: names the tensor.
    """
    for name, record in held.items():
        tensor = state.get(name)
        if tensor is None:
            why = "it has no such tensor"
            raise FileError("the skeleton does not fit the file", name, why, FIX)
        if (tuple(tensor.shape), tensor.dtype) != (record.shape, record.dtype):
            why = f"file {record.shape} {record.dtype}, "
            why += f"skeleton {tuple(tensor.shape)} {tensor.dtype}"
            raise FileError("the skeleton does not fit the file", name, why, FIX)


def _check_complete(held: Mapping[str, Record], state: Mapping[str, torch.Tensor]) -> None:
    """Refuse a skeleton with tensors of its own: their values would stay in the network."""
    stored = {memory_key(name, state[name]) for name in held}
    for name, tensor in state.items():
        if tensor.numel() and memory_key(name, tensor) not in stored:
            raise FileError("the skeleton does not fit the file", name, "the file lacks it", FIX)


def _check_no_value_is_lost(skeleton: nn.Module, held: Mapping[str, Record]) -> None:
    """Refuse tensors without values that no file holds: they were computed when it was built."""
    saved = tensors_of(skeleton, meta=True)
    for name, tensor in skeleton.named_buffers():
        if tensor.is_meta and tensor.numel() and name not in saved:
            raise FileError(
                "a skeleton on the meta device lacks values", name,
                "it is a buffer that is computed when the network is built, and not saved",
                "build the skeleton on the CPU",
            )  # fmt: skip


def _materialise(skeleton: nn.Module) -> bool:
    """Give parameters and buffers on the meta device memory, ties kept; return if there were any.

    Raises:
        FileError: one is of a class of its own.
    """
    made: dict[int, Any] = {}
    for path, module in skeleton.named_modules():
        for owned in (module._parameters, module._buffers):
            for leaf, tensor in owned.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if type(tensor) not in KINDS:
                    why = f"on the meta device it is a {type(tensor).__name__}"
                    raise FileError("the skeleton cannot be filled", f"{path}.{leaf}", why, FIX)
                if id(tensor) not in made:
                    made[id(tensor)] = new = torch.empty_like(tensor, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        made[id(tensor)] = nn.Parameter(new, tensor.requires_grad)
                owned[leaf] = made[id(tensor)]
    return bool(made)
