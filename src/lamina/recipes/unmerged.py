"""Networks whose layers are about to be merged: rows of convolutions while they train, one after.

While it trains, a span is a `Row`: its kept convolutions with their BatchNorms, all padding at the
first, no activation between. At the end each row becomes one convolution, as edits of the original.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import MethodError
from lamina.forms import Edit, Plain, install
from lamina.forms.merged import CONVS, LEARNED, made_of
from lamina.methods.layer_merge import form_of
from lamina.methods.layer_merge.merging import (
    Conv,
    grown,
    merge,
    scaled,
    total_padding,
    with_identity,
)
from lamina.network.source import Network
from lamina.plan.apply import copy_module
from lamina.recipes.runs import Link, Run


@dataclass(frozen=True)
class Change:
    """What becomes of a span of a run: one convolution of some of its layers, or nothing.

    Args:
        run: the run.
        first, last: the span: links `first` to `last - 1`.
        kept: links that stay, by position in the run.
        act: number of the activation the merged convolution ends with, 0: none. Where an activation
            module follows the span, it stays where it is.
        whole: the run's block becomes the one convolution, its skip included.
        middle: taps along each axis that are left of the merged kernel, 0: all. Only a fit can
            begin with fewer than all.
    """

    run: Run
    first: int
    last: int
    kept: tuple[int, ...]
    act: int = 0
    whole: bool = False
    middle: int = 0

    @property
    def links(self) -> tuple[Link, ...]:
        return self.run.links[self.first : self.last]

    @property
    def path(self) -> str:
        """Path of the module that the merged convolution stands for."""
        return self.run.block if self.whole else self.links[0].site.module

    @property
    def gone(self) -> tuple[str, ...]:
        """Paths of the other modules that become nothing."""
        if self.whole:
            return ()
        convs = [link.site.module for link in self.links[1:]]
        norms = [link.norm for link in self.links if link.norm]
        return (*convs, *norms, *(link.through for link in self.links[:-1] if link.act))

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps of the merged kernel; of the identity one."""
        full = self._full
        return tuple(min(k, self.middle) for k in full) if self.middle else full

    @property
    def _full(self) -> tuple[int, ...]:
        sites = [self.run.links[i].site for i in self.kept]
        if not sites:
            return (1,) * len(self.links[0].site.kernel)
        return grown([s.kernel for s in sites], [s.stride for s in sites])

    @property
    def outline(self) -> Conv:
        """The merged convolution without values, on the meta device."""
        sites = [self.run.links[i].site for i in self.kept]
        strides = [s.stride for s in sites]
        padding = total_padding([s.padding for s in sites], strides)
        kernel, groups = self.kernel, math.gcd(*(s.groups for s in sites))
        cut = ((full - k) // 2 for full, k in zip(self._full, kernel, strict=True))
        outputs, inputs = sites[-1].shape[0], sites[0].shape[1] * sites[0].groups
        return Conv(
            torch.empty(outputs, inputs // groups, *kernel, device="meta"),
            torch.empty(outputs, device="meta"),
            tuple(math.prod(axis) for axis in zip(*strides, strict=True)),
            tuple(p - c for p, c in zip(padding, cut, strict=True)),
            groups,
        )

    @property
    def skip(self) -> bool:
        return self.whole and self.run.skip

    def __str__(self) -> str:
        names = [self.run.links[i].site.name for i in self.kept]
        size = "x".join(map(str, self.kernel)) + (" in the middle" if self.middle else "")
        span = f"{self.links[0].site.name}..{self.links[-1].site.name}"
        return f"{span} to {size} of {', '.join(names)}" if names else f"{span} to nothing"


class Row(nn.Module):
    """Convolutions and BatchNorms in a row, what they take added to what they give, an activation.

    It lives while a network trains: no file knows it.
    """

    def __init__(self, layers: Sequence[nn.Module], skip: bool, act: int, channels: int) -> None:
        super().__init__()
        self.layers, self.act, self.code, self.skip = (
            nn.Sequential(*layers),
            made_of(act, channels),
            act,
            skip,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return self.act(y + x if self.skip else y)

    def merged(self) -> Conv:
        """Return the one convolution that this is in evaluation mode, in float64."""
        convs: list[Conv] = []
        for layer in self.layers:
            if isinstance(layer, CONVS):
                convs.append(conv_of(layer))
            else:
                convs[-1] = scaled(convs[-1], *affine_of(layer))
        one = merge(convs)
        return with_identity(one) if self.skip else one


def conv_of(layer: Any) -> Conv:
    """Return a convolution module as plain data, in float64."""
    weight = layer.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().double()
    return Conv(weight, bias, tuple(layer.stride), tuple(layer.padding), layer.groups)


def affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a BatchNorm in evaluation mode, in float64."""
    var, mean = norm.running_var.detach().double(), norm.running_mean.detach().double()
    weight = torch.ones_like(var) if norm.weight is None else norm.weight.detach().double()
    bias = torch.zeros_like(var) if norm.bias is None else norm.bias.detach().double()
    scale = weight / (var + norm.eps).sqrt()
    return scale, bias - scale * mean


def link_conv(root: nn.Module, link: Link) -> Conv:
    """Return the convolution of a link with its BatchNorm folded in."""
    conv = conv_of(root.get_submodule(link.site.module))
    return scaled(conv, *affine_of(root.get_submodule(link.norm))) if link.norm else conv


def unmerge(
    network: Network,
    changes: Sequence[Change],
    fits: Mapping[int, tuple[Conv, Tensor, Tensor]] | None = None,
) -> Network:
    """Return a copy of a network in which every change is a row that can be trained.

    Args:
        network: the original.
        changes: that do not overlap.
        fits: by position of the change, the convolution that the row begins as, with mean and
            variance of what its weight gives; of others, its own layers.
    """
    fits = fits or {}
    module = copy_module(network.module)
    for number, change in enumerate(changes):
        if not change.kept:
            made: nn.Module = nn.Identity()
        elif number in fits:
            layers = _fitted(module, change, *fits[number])
            made = Row(layers, change.skip, change.act, change.outline.outputs)
        else:
            made = Row(_own(module, change), change.skip, change.act, change.outline.outputs)
        old = module.get_submodule(change.path)
        made.train(old.training)
        for path in change.gone:
            _put(module, path, nn.Identity())
        _put(module, change.path, made)
    return replace(network, module=module)


def blank(change: Change) -> tuple[Conv, Tensor, Tensor]:
    """Return values of no use to begin a change with: what is timed needs no better ones."""
    out = change.outline
    g = torch.Generator().manual_seed(0)
    scale = math.sqrt(math.prod(out.weight.shape[1:]))
    weight = torch.randn(out.weight.shape, generator=g, dtype=torch.float64) / scale
    zeros = torch.zeros(out.outputs, dtype=torch.float64)
    return replace(out, weight=weight, bias=zeros), zeros, torch.ones_like(zeros)


def _own(root: nn.Module, change: Change) -> list[nn.Module]:
    """Return the kept layers of a change, all padding at the first."""
    layers: list[nn.Module] = []
    kept = [change.run.links[i] for i in change.kept]
    convs: list[Any] = [copy.deepcopy(root.get_submodule(link.site.module)) for link in kept]
    whole = total_padding([c.padding for c in convs], [c.stride for c in convs])
    for i, (conv, link) in enumerate(zip(convs, kept, strict=True)):
        conv.padding = tuple(whole) if i == 0 else (0,) * len(whole)
        layers.append(conv)
        if link.norm:
            layers.append(copy.deepcopy(root.get_submodule(link.norm)))
    return layers


def _fitted(
    root: nn.Module, change: Change, conv: Conv, mean: Tensor, var: Tensor
) -> list[nn.Module]:
    """Return a fitted convolution, with the last layer's BatchNorm set to change nothing."""
    like: Any = root.get_submodule(change.links[-1].site.module)
    axes = len(conv.kernel)
    norm: Any = None
    if change.links[-1].norm:
        norm = copy.deepcopy(root.get_submodule(change.links[-1].norm))
    layer: Any = CONVS[axes - 1](
        conv.inputs, conv.outputs, conv.kernel, conv.stride, conv.padding,  # type: ignore[arg-type]
        groups=conv.groups, bias=norm is None or not norm.affine,
    ).to(like.weight.device, like.weight.dtype)  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(conv.weight)
        if layer.bias is not None:
            layer.bias.copy_(conv.bias)
            return [layer]
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.weight.copy_((var + norm.eps).sqrt())
        norm.bias.copy_(mean + conv.bias)
    return [layer, norm]


def merged_edits(network: Network, trained: Network, changes: Sequence[Change]) -> list[Edit]:
    """Return the edits that make the merged network from the original.

    Structure first, then the values of every parameter that is left.

    Args:
        network: the original.
        trained: from `unmerge`, perhaps trained.
        changes: as given to `unmerge`.
    """
    structure: list[Edit] = []
    values: list[Edit] = []
    merged: set[str] = set()
    for change in changes:
        structure += [Edit(path, "identity") for path in change.gone]
        row = trained.module.get_submodule(change.path)
        merged |= {change.path, *change.gone}
        if not isinstance(row, Row):
            structure.append(Edit(change.path, "identity"))
            continue
        one = row.merged()
        act = {"activation": row.code} if row.code else {}
        structure.append(Edit(change.path, "merged", form_of(one) | act))
        dtype = next(row.parameters()).dtype
        inner = f"{change.path}.0" if row.code else change.path
        values.append(Edit(f"{inner}.weight", "values", values=Plain(one.weight.to(dtype))))
        values.append(Edit(f"{inner}.bias", "values", values=Plain(one.bias.to(dtype))))
        if row.code == LEARNED:
            slope = row.act.weight.detach().cpu().clone()  # type: ignore[union-attr, operator]
            values.append(Edit(f"{change.path}.1.weight", "values", values=Plain(slope)))
    for name, p in trained.module.named_parameters():
        if not any(name.startswith(f"{path}.") for path in merged):
            values.append(Edit(name, "values", values=Plain(p.detach().cpu().clone())))
    return [*structure, *values]


def merge_network(
    network: Network, trained: Network, changes: Sequence[Change]
) -> tuple[Network, tuple[Edit, ...]]:
    """Return the merged network, with the edits that make it from the original.

    Raises:
        MethodError: it does not compute what the unmerged one does.
    """
    edits = tuple(merged_edits(network, trained, changes))
    module = copy_module(network.module)
    install(module, edits)
    held = dict(trained.module.named_buffers())
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in held and held[name].shape == buffer.shape:
                buffer.copy_(held[name])
    made = replace(network, module=module)
    before = trained.forward(*network.example_inputs, **network.example_kwargs).double()
    after = made.forward(*network.example_inputs, **network.example_kwargs).double()
    apart = float((before - after).abs().max() / before.abs().max().clamp_min(1e-30))
    if before.shape != after.shape or not apart < 1e-2:
        why = f"outputs differ by {apart:.2g} of the largest"
        raise MethodError("merging changed what the network computes", network.name, why)
    return made, edits


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
