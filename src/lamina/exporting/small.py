"""Filling a model that `transformers` is opening with the tensors of a small file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina import artifact
from lamina.artifact import Package
from lamina.artifact.records import Record
from lamina.errors import FileError
from lamina.exporting.folders import read_small, skeleton_of
from lamina.forms import Edit, check_indices, find_tensor
from lamina.network.skeletons import PREFIX

LEAVES = ("weight", "bias")


@dataclass
class Small:
    """A file on its way into a model: its layers are in, its tensors wait to be taken.

    Args:
        tensors: by the names of the model that is being opened; what Lamina or transformers ties
            comes under all its names, as one Parameter.
        ties: names of one tensor each, to be tied again once all are where they belong.
        whole: the model, or a network of the file's class with the model inside it.
        last: edits that only change how tensors lie in memory, put in once they have values.
        stand_ins: layers that bear a weight and a bias for a while, see `_install`.
    """

    tensors: dict[str, torch.Tensor]
    ties: tuple[tuple[str, ...], ...]
    whole: nn.Module
    last: tuple[Edit, ...] = field(default_factory=tuple)
    stand_ins: tuple[nn.Module, ...] = field(default_factory=tuple)

    @property
    def targets(self) -> list[str]:
        """The names of the model's tensors that the file has."""
        return list(self.tensors)

    def take(self) -> dict[str, torch.Tensor]:
        """Return the tensors, and keep none."""
        taken, self.tensors = self.tensors, {}
        return taken

    def finish(self, model: nn.Module) -> None:
        """Do what has to wait until the tensors are in their places.

        Raises:
            FileError: an index of the file points outside its channels.
        """
        for layer in self.stand_ins:
            for leaf in LEAVES:
                layer.__dict__.pop(leaf, None)
        for first, *others in self.ties:
            leader = find_tensor(model, first)
            for name in others:
                path, _, leaf = name.rpartition(".")
                owner = model.get_submodule(path)
                if isinstance(leader, nn.Parameter) and find_tensor(model, name).device == (
                    leader.device
                ):
                    owner._parameters[leaf] = leader
        artifact.install_edits(self.whole, self.last)
        check_indices(model)

    @staticmethod
    def of(files: Sequence[str] | None, model: Any, dtype: torch.dtype) -> Small:
        """Read a folder's file and put its edits into a model whose tensors are on `meta`.

        Args:
            files: what transformers found: the one file.
            model: of the file's class, or another with the same base model: a base alone, or a
                base with another head.
            dtype: what floats shall become, other than what the file was made of.

        Raises:
            FileError: the file is damaged, or does not fit the model.
        """
        if not files or len(files) != 1:
            raise FileError("the folder has no file of lamina's", str(files)[:200])
        package = read_small(Path(files[0]))
        whole, rename = _place(package, model)
        late = tuple(edit for edit in package.edits if edit.form == "layout")
        stand_ins = _install(whole, [e for e in package.edits if e.form != "layout"])
        state = artifact.tensors_of(model, meta=True)
        held = {rename(name): name for name in package.records}
        known = {name: package.records[old] for name, old in held.items() if name in state}
        _check_shapes(known, state)
        groups: dict[int, list[str]] = {}
        for name, tensor in state.items():
            groups.setdefault(id(tensor), []).append(name)
        exact = _dtype_of(package.skeleton) == dtype
        kept = _kept(model, dtype)
        tensors: dict[str, torch.Tensor] = {}
        for names in groups.values():
            stored = [name for name in names if name in known]
            if not stored:
                continue  # a head that the file does not have: transformers tells of it
            with torch.device("cpu"):  # transformers calls this in a context of `meta`
                values = package.dense(held[stored[-1]])
            meta = state[names[0]]
            if not exact and values.is_floating_point() and not kept(names[0]):
                values = values.to(meta.dtype)
            if isinstance(meta, nn.Parameter):
                values = nn.Parameter(values, meta.requires_grad)
            tensors |= dict.fromkeys(names, values)
        ties = tuple(tuple(names) for names in groups.values() if len(names) > 1)
        return Small(tensors, ties, whole, late, stand_ins)


def _place(package: Package, model: Any) -> tuple[nn.Module, Callable[[str], str]]:
    """Return what the file's edits go into, and what its tensors are called in the model.

    The class that is opened need not be the file's: `AutoModel` takes the base model out of a
    network with a head. Edits name layers by paths of the file's class, and ties by numbers of
    its modules, so a skeleton of that class is built and the model put into its place there.
    """
    kind = json.loads(package.skeleton.removeprefix(PREFIX))["class"]
    if kind == type(model).__name__:
        return model, lambda name: name
    with torch.device("cpu"):
        whole: Any = skeleton_of(package)
    here, there = model.base_model, whole.base_model
    if type(here) is not type(there):
        raise FileError(
            "the file is of another network", f"{kind}, opened as {type(model).__name__}",
            "they have no base model in common", f"open it with AutoModel or {kind}",
        )  # fmt: skip
    inner = "" if here is model else f"{model.base_model_prefix}."
    outer = "" if there is whole else f"{whole.base_model_prefix}."
    if outer:
        setattr(whole, whole.base_model_prefix, here)
    else:
        whole = here

    def rename(name: str) -> str:
        return inner + name[len(outer) :] if name.startswith(outer) else name

    return whole, rename


def _install(whole: nn.Module, edits: Sequence[Edit]) -> tuple[nn.Module, ...]:
    """Put edits in; return the layers that became several.

    Before transformers is done it initialises what was not loaded, block by block, and asks some
    blocks for `block.layer.weight`, though only to see that it needs nothing. Layers that became
    several have none: until then they bear an empty one that says it is done.
    """
    done = torch.empty(0, device="cpu")
    done._is_hf_initialized = True  # type: ignore[attr-defined]
    biased = {e.path: _has_bias(whole, e.path) for e in reversed(edits) if e.path}
    artifact.install_edits(whole, edits)
    made = []
    for path, bias in biased.items():
        try:
            layer = whole.get_submodule(path)
        except AttributeError:  # within what a later edit replaced
            continue
        if "weight" not in layer._parameters:
            layer.__dict__["weight"] = done
            layer.__dict__.setdefault("bias", done if bias else None)
            made.append(layer)
    return tuple(made)


def _has_bias(whole: nn.Module, path: str) -> bool:
    try:
        return whole.get_submodule(path)._parameters.get("bias") is not None
    except AttributeError:
        return False


def _dtype_of(skeleton: str) -> torch.dtype:
    name = json.loads(skeleton.removeprefix(PREFIX))["config"].get("dtype")
    found = getattr(torch, str(name or "float32"), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


def _check_shapes(held: Mapping[str, Record], state: Mapping[str, torch.Tensor]) -> None:
    for name, record in held.items():
        if record.shape != tuple(state[name].shape):
            why = f"file {record.shape}, config.json {tuple(state[name].shape)}"
            raise FileError("the file does not fit its folder", name, why)


def _kept(model: Any, dtype: torch.dtype) -> Callable[[str], bool]:
    """Return which tensors transformers keeps in float32 whatever dtype is asked for."""
    parts = set()
    if dtype in (torch.float16, torch.bfloat16):
        parts |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        parts |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    patterns = [re.compile(rf"((^|\.){part}($|\.))") for part in parts]
    return lambda name: any(pattern.search(name) for pattern in patterns)
