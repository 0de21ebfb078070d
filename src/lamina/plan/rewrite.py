"""Rewriting: the same network, to rounding, in a form that may run faster. Nothing is decided here.

`fold` lets a layer take over the BatchNorm behind it: y = g (W x + b - m) / s + h is one layer with
the weight g W / s and the bias g (b - m) / s + h (m and s^2: the moments that training left; s with
the norm's epsilon). `channels_last` orders the weights of convolutions as the hardware reads them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lamina.errors import NetworkError, PlanError
from lamina.forms import Edit, Plain, conv_weights, install, is_channels_last
from lamina.forms.edit import HOOKS
from lamina.forms.rewritten import KINDS, NORMS
from lamina.network.isolate import isolated
from lamina.network.source import Network, main_output
from lamina.network.tensors import Tensors, named_tensors
from lamina.network.trace import Flow, Op, trace

NAMES = ("fold", "channels_last")
STABLE = "stable "  # and a box: a network without the units that are stable there (`plan.stable`)
FORMS = ("biased", "identity", "layout")
LAYOUT = Edit("", "layout", {"channels_last": 1})


@dataclass(frozen=True)
class Rewritten:
    """A rewritten copy of a network, and how to get there.

    Args:
        network: the copy.
        names: what was done, of `NAMES`.
        edits: structural edits that turn the network as given into this one, but for its layout.
        values: edits of values: what the folded layers hold.
        last: edits that come after every other structural one: the layout.
        folds: the layers and norms that were folded.
    """

    network: Network
    names: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()
    values: tuple[Edit, ...] = ()
    last: tuple[Edit, ...] = ()
    folds: tuple[tuple[str, str], ...] = ()


def rewrite(
    network: Network,
    names: Sequence[str] = NAMES,
    folds: Sequence[tuple[str, str]] | None = None,
) -> Rewritten:
    """Return a rewritten copy of a network, which computes the same to rounding.

    Args:
        network: with example inputs, for `fold`; unchanged.
        names: what to do, of `"fold"` and `"channels_last"`; a plan may also name a lossless
            structure, `"stable LOW,HIGH"`, with the other names around it as they were.
        folds: from `find_folds`, where they are known already.

    Raises:
        PlanError: an unknown name, or there is nothing to fold.
        NetworkError: the network cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> rewrite(Network(net, (torch.randn(2, 3, 8, 8),))).network.module
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    if any(name.startswith(STABLE) for name in names):
        return _restructured(network, names)
    if unknown := [name for name in names if name not in NAMES]:
        raise PlanError("unknown rewriting", unknown[0], "", f"there are {', '.join(NAMES)}")
    pairs: tuple[tuple[str, str], ...] = ()
    if "fold" in names:
        pairs = tuple(find_folds(network) if folds is None else folds)
        if not pairs:
            raise PlanError("there is no BatchNorm to fold", network.name, "", "plan again")
    edits, values = [], []
    for layer, norm in pairs:
        module, bn = network.module.get_submodule(layer), network.module.get_submodule(norm)
        if module._parameters.get("bias") is None:
            edits.append(Edit(layer, "biased"))
        edits.append(Edit(norm, "identity"))
        weight, bias = folded(module, bn)
        values.append(Edit(f"{layer}.weight", "values", values=Plain(weight)))
        values.append(Edit(f"{layer}.bias", "values", values=Plain(bias)))
    last = (LAYOUT,) if "channels_last" in names else ()
    made = replace(network, module=copy_module(network.module))
    install(made.module, (*edits, *values, *last))
    chosen = tuple(name for name in NAMES if name in names)
    return Rewritten(made, chosen, tuple(edits), tuple(values), last, pairs)


def compose(first: Rewritten, second: Rewritten) -> Rewritten:
    """Return two rewritings in a row as one; the second is of the first one's network."""
    late = {edit.path for edit in second.values}
    values = (*(edit for edit in first.values if edit.path not in late), *second.values)
    return Rewritten(
        second.network, (*first.names, *second.names), (*first.edits, *second.edits), values,
        (*first.last, *second.last), (*first.folds, *second.folds),
    )  # fmt: skip


def _restructured(network: Network, names: Sequence[str]) -> Rewritten:
    """Find a plan's lossless structure again, and do what the plan says after it."""
    from lamina.plan.stable import Box, find_structure

    at = next(i for i, name in enumerate(names) if name.startswith(STABLE))
    found = find_structure(network, Box.parse(names[at].removeprefix(STABLE))).rewritten
    if found is None or found.names != tuple(names[: at + 1]):
        raise PlanError(
            "the plan's lossless structure was not found again", names[at], "", "plan again"
        )
    rest = tuple(names[at + 1 :])
    return compose(found, rewrite(found.network, rest)) if rest else found


def find_folds(network: Network) -> tuple[tuple[str, str], ...]:
    """Return the (layer, BatchNorm) module paths of a network that can become one layer.

    A BatchNorm is folded where it has moments, reads nothing but one Linear or Conv1d-3d, and
    nobody else reads that; and where both are used once, share no tensor and have no hooks.

    Args:
        network: with example inputs; without, or where the data flow is not known, there are none.
    """
    if not any(type(m) in NORMS for m in network.module.modules()):
        return ()
    flow = trace(network)
    return () if isinstance(flow, str) else tuple(_Folds(network.module, flow).pairs())


def orders(module: nn.Module) -> bool:
    """Whether a network has convolutions whose weights can be put in channels-last order."""
    weights = conv_weights(module)
    if not any(not is_channels_last(weight) for weight in weights):
        return False
    tensors = named_tensors(module)
    mine = {id(weight) for weight in weights}
    shared = [n for n, t in tensors.by_name.items() if id(t) in mine and n in tensors.overlaps]
    return not shared and all(type(weight) is nn.Parameter for weight in weights)


def same(network: Network, made: Network) -> bool:
    """Whether two networks give the same on the example inputs, to rounding."""
    try:
        before, after = _run(network), _run(made)
    except Exception:  # what a user's forward may raise: a view that needs the old order, say
        return False
    if before.shape != after.shape or before.dtype != after.dtype or not before.numel():
        return False
    close = torch.finfo(before.dtype).eps ** 0.5 if before.is_floating_point() else 0.0
    apart = (before.double() - after.double()).abs().max()
    return bool(apart <= close * before.double().abs().max().clamp_min(1e-30))


def folded(layer: nn.Module, norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of the one layer that does what a layer and its BatchNorm do.

    Computed in float64, and rounded once to the layer's dtype.
    """

    def wide(owner: nn.Module, name: str, default: float) -> torch.Tensor:
        tensor: Any = getattr(owner, name)
        if tensor is None:
            tensor = torch.full((len(weight),), default)
        return tensor.detach().to(weight.device, torch.float64)

    weight: Any = layer.weight
    scale = wide(norm, "weight", 1.0) / (wide(norm, "running_var", 1.0) + norm.eps).sqrt()  # type: ignore[operator]
    shift = scale * (wide(layer, "bias", 0.0) - wide(norm, "running_mean", 0.0))
    bias = shift + wide(norm, "bias", 0.0)
    dense = weight.detach().double() * scale.reshape(-1, *[1] * (weight.dim() - 1))
    return dense.to(weight.dtype), bias.to(weight.dtype)


def copy_module(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module.

    Raises:
        NetworkError: the module cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise NetworkError(
            "the network cannot be copied", type(module).__name__, str(error), "use inplace=True"
        ) from error


class _Folds:
    """Looks for layers and their BatchNorms in the data flow of one network."""

    def __init__(self, root: nn.Module, flow: Flow) -> None:
        self.root, self.outputs, self.after = root, set(flow.outputs), flow.followers()
        self.tensors: Tensors = named_tensors(root)
        self.readers = flow.readers(self.tensors.first)
        self.paths = Counter(id(m) for _, m in root.named_modules(remove_duplicate=False))
        self.ran = Counter(op.module for op in flow.ops)

    def pairs(self) -> list[tuple[str, str]]:
        found = []
        for path, layer in self.root.named_modules():
            if path and type(layer) in KINDS and self._alone(path, layer):
                norm = self._norm(path, layer)
                if norm is not None:
                    found.append((path, norm))
        return found

    def _norm(self, path: str, layer: nn.Module) -> str | None:
        """Return the path of the BatchNorm that alone reads a layer."""
        uses = self.readers.get(f"{path}.weight", [])
        op = uses[0] if len(uses) == 1 else None
        after = self.after.get(op.name, []) if op is not None else []
        if op is None or op.module != path or op.name in self.outputs or len(after) != 1:
            return None
        norm = after[0]
        if norm.target != "batch_norm" or len(norm.inputs) != 1 or not self._dense(layer, op):
            return None
        bn = self.root.get_submodule(norm.module)
        if type(bn) not in NORMS or getattr(bn, "running_mean", None) is None:
            return None
        fits = bn.num_features == layer._parameters["weight"].shape[0]  # type: ignore[union-attr]
        if not fits or self.ran[norm.module] != 1 or not self._alone(norm.module, bn):
            return None
        finite = all(bool(t.isfinite().all()) for t in folded(layer, bn))
        return norm.module if finite else None

    def _dense(self, layer: nn.Module, op: Op) -> bool:
        """Whether the layer's outputs lie along the dimension that a BatchNorm looks at."""
        weight = layer._parameters["weight"]
        assert weight is not None
        return len(op.shape) == weight.dim() and op.shape[1] == weight.shape[0]

    def _alone(self, path: str, module: nn.Module) -> bool:
        """Whether a module is used once, shares no tensor, and nobody listens to it."""
        if self.paths[id(module)] != 1 or any(getattr(module, hooks) for hooks in HOOKS):
            return False
        held = {**module._parameters, **module._buffers}
        names = [f"{path}.{leaf}" for leaf, tensor in held.items() if tensor is not None]
        known = [name for name in names if name in self.tensors.first]
        if any(self.tensors.aliases(n) or n in self.tensors.overlaps for n in known):
            return False
        return all(type(t) in (torch.Tensor, nn.Parameter, nn.Buffer) and not t.is_meta
                   for t in held.values() if t is not None)  # fmt: skip


def _run(network: Network) -> torch.Tensor:
    with isolated(network) as (module, args, kwargs), torch.no_grad():
        return main_output(module(*args, **kwargs))
