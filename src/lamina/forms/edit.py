"""Edits: what changed in a network, as data; and the one function that puts them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms.affine import Affine
from lamina.forms.tied import tie
from lamina.forms.values import Codebook, Grid, Plain, Sparse, Values


@dataclass(frozen=True)
class Edit:
    """One change: a module replaced by a form, or a parameter's values held in a form.

    Args:
        path: module path (structural forms) or parameter / buffer name (forms of values); `""`,
            the whole network, for `layout` alone.
        form: `"low_rank"`, ... or `"values"`.
        settings: the integers that, with the replaced module, say what the new module is.
        values: the values of the tensor at `path`; only where `form == "values"`.
    """

    path: str
    form: str
    settings: Mapping[str, int] = field(default_factory=dict)
    values: Values | None = None


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
Build = Callable[[nn.Module, Mapping[str, int]], nn.Module]
BUILDERS: dict[str, Build] = {}  # structural forms, filled by the form files
OF_ALL = ("layout",)  # forms of a whole network: they change it in place, and nothing else
TIE = "tie"  # changes no layer, but whose weight it holds


def builder(form: str) -> Callable[[Build], Build]:
    """Register the function that builds a structural form from the module it replaces."""

    def register(build: Build) -> Build:
        BUILDERS[form] = build
        return build

    return register


def install(root: nn.Module, edits: Iterable[Edit]) -> None:
    """Put edits into a module tree, in order, in place.

    The same function serves `apply` and `load`, so a loaded network is the applied one. Values are
    written into the existing parameters: ties, hooks, device, dtype and flags stay as they are.

    Raises:
        FileError: an edit names a path or a form that is not there, or a shape that does not fit.
    """
    for edit in edits:
        if edit.form == "values":
            _write(root, edit)
        elif edit.form == TIE:
            _tie(root, edit)
        else:
            _replace(root, edit)


def _replace(root: nn.Module, edit: Edit) -> None:
    build = BUILDERS.get(edit.form)
    if build is None:
        raise FileError("unknown form", edit.form, "this version does not have it", "update lamina")
    if (edit.path == "") != (edit.form in OF_ALL):
        why = "it is one of the whole network" if edit.path else "it is one of a layer"
        raise FileError("an edit is in the wrong place", f"{edit.form} at {edit.path!r}", why)
    if not edit.path:
        build(root, edit.settings)
        return
    parent_path, _, leaf = edit.path.rpartition(".")
    try:
        parent = root.get_submodule(parent_path)
        old = parent.get_submodule(leaf)
    except AttributeError as error:
        raise FileError(
            "an edit names a module the skeleton does not have", edit.path, str(error)
        ) from None
    try:
        new = build(old, edit.settings)
    except FileError as error:  # the builder knows the integers, but not where they are for
        where = f"{edit.path} ({error.where})" if error.where else edit.path
        raise FileError(error.what, where, error.why, error.fix) from None
    new.train(old.training)
    for hooks in HOOKS:
        getattr(new, hooks).update(getattr(old, hooks))
    new._is_full_backward_hook = old._is_full_backward_hook  # or backward hooks never run
    setattr(parent, leaf, new)


def _tie(root: nn.Module, edit: Edit) -> None:
    try:
        tie(root, edit.path, edit.settings)
    except AttributeError as error:
        raise FileError(
            "an edit names a module the skeleton does not have", edit.path, str(error)
        ) from None


def _write(root: nn.Module, edit: Edit) -> None:
    if not isinstance(edit.values, (Plain, Sparse, Codebook, Grid, Affine)):
        raise FileError("an edit has no values", edit.path)
    target = find_tensor(root, edit.path)
    dense = edit.values.dense()
    if target.shape != dense.shape:
        raise FileError(
            "shapes differ",
            edit.path,
            f"file {tuple(dense.shape)}, network {tuple(target.shape)}",
            "give the skeleton the file was made from",
        )
    with torch.no_grad():
        target.copy_(dense)


def find_tensor(root: nn.Module, name: str) -> torch.Tensor:
    """Return the parameter or buffer called `name`.

    Raises:
        FileError: the network has no such tensor.
    """
    path, _, leaf = name.rpartition(".")
    try:
        owner = root.get_submodule(path)
    except AttributeError:
        owner = nn.Module()
    # Not getattr: a computed tensor (weight norm) would swallow what is written into it.
    tensor = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if not isinstance(tensor, torch.Tensor):
        raise FileError(
            "the network has no such tensor",
            name,
            "the skeleton is not the one the file was made from",
        )
    return tensor
