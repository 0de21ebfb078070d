"""A smaller chain as edits of the network it was read from."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from lamina.forms import Edit, Plain, install
from lamina.forms.narrow import widths as sizes_of
from lamina.network.source import Network
from lamina.plan.rewrite import STABLE, Rewritten, copy_module
from lamina.plan.stable.box import Box
from lamina.plan.stable.read import Chain, Layer
from lamina.plan.stable.shrink import Shrunk


def carried(network: Network, first: Rewritten, chain: Chain, made: Shrunk, box: Box) -> Rewritten:
    """Return the network with the smaller chain in it.

    Args:
        network: as given.
        first: it with its BatchNorms folded.
        chain: what `first` was read as.
        made: what is left of it.
        box: for whose inputs it computes the same.
    """
    edits, values = edits_of(first.network.module, chain, made)
    touched = {edit.path for edit in edits} | {edit.path.rpartition(".")[0] for edit in values}
    earlier = tuple(e for e in first.values if e.path.rpartition(".")[0] not in touched)
    edits, values = (*first.edits, *edits), (*earlier, *values)
    before = Box.parse(network.box) if network.box else box
    done = replace(
        network, module=copy_module(network.module), edits=(*network.edits, *edits),
        box=box.meet(before).text(),
    )  # fmt: skip
    install(done.module, (*edits, *values))
    return Rewritten(done, (*first.names, STABLE + box.text()), edits, values, (), first.folds)


def edits_of(
    root: nn.Module, chain: Chain, made: Shrunk
) -> tuple[tuple[Edit, ...], tuple[Edit, ...]]:
    """Return the structural edits and the values that turn a chain's network into a smaller one."""
    edits, values = [], []
    before = {layer.path: layer for layer in chain.layers}
    for layer in made.chain.layers:
        old = before[layer.path]
        same = old.weight.shape == layer.weight.shape
        if same and torch.equal(old.weight, layer.weight) and torch.equal(old.bias, layer.bias):
            continue
        edits += _shape(root.get_submodule(layer.path), layer)
        weight = root.get_submodule(layer.path)._parameters["weight"]
        assert weight is not None
        values.append(_value(f"{layer.path}.weight", layer.weight, weight))
        if _has_bias(root, layer):
            values.append(_value(f"{layer.path}.bias", layer.bias, weight))
    edits += [Edit(path, "identity") for path in made.gone]
    return tuple(edits), tuple(values)


def _shape(module: nn.Module, layer: Layer) -> list[Edit]:
    """Return the edits that give a layer its new sizes, and a bias where it needs one."""
    found = []
    if module._parameters.get("bias") is None and bool(layer.bias.any()):
        found.append(Edit(layer.path, "biased"))
    now = sizes_of(module)
    outputs, inputs = layer.weight.shape[:2]
    if now is None or (inputs, outputs) == now:  # of groups no channel was removed
        return found
    form = "narrow" if inputs <= now[0] and outputs <= now[1] else "resized"
    return [*found, Edit(layer.path, form, {"inputs": inputs, "outputs": outputs})]


def _has_bias(root: nn.Module, layer: Layer) -> bool:
    held = root.get_submodule(layer.path)._parameters.get("bias") is not None
    return held or bool(layer.bias.any())


def _value(path: str, value: torch.Tensor, like: torch.Tensor) -> Edit:
    return Edit(path, "values", values=Plain(value.to(like.dtype).contiguous()))
