"""One forward pass with hooks: where each weight is used, how often, and who else reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from lamina.network.isolate import NO_INPUTS, batch_size, isolated, one_line
from lamina.network.layers import EMBEDDING
from lamina.network.sites import Site
from lamina.network.source import Network

MULTIPLIES = ("linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm")


@dataclass(frozen=True)
class Uses:
    """What one forward pass showed, by weight name.

    Args:
        positions: output positions per sample at which the weight was applied, over all calls.
        calls: how often its module, or a raw read that multiplies by it, ran.
        raw: the module path that read the weight outside its own module's forward.
        extents: of a convolution, the spatial sizes of the inputs it was given.
    """

    positions: Mapping[str, float] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)
    raw: Mapping[str, str] = field(default_factory=dict)
    extents: Mapping[str, frozenset[tuple[int, ...]]] = field(default_factory=dict)


def observe(network: Network, sites: Iterable[Site]) -> Uses | str:
    """Run the example inputs once through a copy, and see how the weights of `sites` are used.

    Works where export fails: only forward hooks and a function mode are needed, no graph.

    Returns:
        The uses, or why the pass failed, in one line.

    Example:
        >>> twice = Network(nn.Sequential(*[nn.Linear(3, 3)] * 2), (torch.zeros(4, 5, 3),))
        >>> observe(twice, [Site("0", module="0", weight="0.weight", shape=(3, 3))]).positions
        {'0.weight': 10.0}
    """
    if not network.example_inputs and not network.example_kwargs:
        return NO_INPUTS
    try:
        with isolated(network) as (module, args, kwargs), torch.no_grad():
            return _Watch(module, tuple(sites), batch_size(args, kwargs)).run(args, kwargs)
    except Exception as error:  # whatever a user's forward may raise
        return f"the network fails on its example inputs ({one_line(error)})"


class _Watch(TorchFunctionMode):
    """Follows the stack of running modules, and the functions that are given a watched weight."""

    def __init__(self, root: nn.Module, sites: tuple[Site, ...], batch: int) -> None:
        super().__init__()
        self.root, self.batch = root, batch
        self.stack: list[tuple[str, nn.Module]] = []
        self.positions: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.raw: dict[str, str] = {}
        self.extents: dict[str, frozenset[tuple[int, ...]]] = {}
        self.owners: dict[int, list[Site]] = {}
        self.weights: dict[int, list[tuple[Site, nn.Module]]] = {}  # biases too
        for site in sites:
            owner = root.get_submodule(site.module)
            self.owners.setdefault(id(owner), []).append(site)
            parent = site.module.rpartition(".")[0]
            if site.module and isinstance(root.get_submodule(parent), nn.MultiheadAttention):
                self.owners.setdefault(id(root.get_submodule(parent)), []).append(site)
            for name in (site.weight, site.bias):
                if name:
                    tensor = getattr(owner, name.rpartition(".")[2])
                    self.weights.setdefault(id(tensor), []).append((site, owner))

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Uses:
        handles = []
        for path, module in self.root.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks, and its weights are no sites
            handles.append(module.register_forward_pre_hook(self._enter(path)))
            # The user's own hooks run outside push and pop: what they read is a raw read.
            leave = module.register_forward_hook(
                self._leave, prepend=True, with_kwargs=True, always_call=True
            )
            handles.append(leave)
        try:
            with self:
                self.root(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return Uses(self.positions, self.calls, self.raw, self.extents)

    def _enter(self, path: str) -> Any:
        def push(module: nn.Module, args: Any) -> None:
            self.stack.append((path, module))

        return push

    def _leave(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self.stack and self.stack[-1][1] is module:
            self.stack.pop()
        for site in self.owners.get(id(module), ()):
            total = count_positions(site, module, args, kwargs, output)
            self._count(site, self.batch if total is None else total)
            first = args[0] if args else next(iter(kwargs.values()), None)
            if site.op == "conv" and isinstance(first, torch.Tensor):
                size = tuple(first.shape[-len(site.kernel) :])
                self.extents[site.weight] = self.extents.get(site.weight, frozenset()) | {size}

    def _count(self, site: Site, total: float) -> None:
        name = site.weight
        self.positions[name] = self.positions.get(name, 0.0) + total / self.batch
        self.calls[name] = self.calls.get(name, 0) + 1

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in (*args, *(kwargs or {}).values()):
            for item in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(item, torch.Tensor) and id(item) in self.weights:
                    self._read(func, item, result)
        return result

    def _read(self, func: Any, weight: torch.Tensor, result: Any) -> None:
        owners = self.weights[id(weight)]
        if any(module is owner for _, module in self.stack for _, owner in owners):
            return
        site = owners[0][0]
        path, reader = self.stack[-1] if self.stack else ("", self.root)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            # `next(self.parameters()).device` asks for any parameter, not for this one.
            if next(reader.parameters(), None) is weight:
                return
        elif not isinstance(reader, nn.MultiheadAttention) and isinstance(result, torch.Tensor):
            multiplies = name in MULTIPLIES or name.startswith("conv")
            if tuple(weight.shape) == site.shape and multiplies:
                width = site.shape[1] if site.transposed else site.shape[0]
                self._count(site, result.numel() / max(1, width))
        self.raw.setdefault(site.weight, path or "the network itself")


def count_positions(
    site: Site, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> float | None:
    """Return the positions, summed over the batch, at which one call applied a weight.

    A transposed convolution applies its weight at input positions, a bag at each index; the three
    parts of an attention's `in_proj_weight` run at the positions of query, key and value.

    Returns:
        None where inputs and output do not tell.
    """
    first = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(module, nn.MultiheadAttention):
        q, k, v = _attention_rows(args, kwargs)
        leaf = site.weight.rpartition(".")[2]
        parts = {"in_proj_weight": (q + k + v) / 3, "k_proj_weight": k, "v_proj_weight": v}
        return parts.get(leaf, q)
    if site.op == "recurrent":
        if isinstance(first, PackedSequence):
            return float(first.data.shape[0])
        return first.numel() / max(1, first.shape[-1]) if isinstance(first, torch.Tensor) else None
    if site.op == "conv_transpose" or isinstance(module, nn.EmbeddingBag):
        if not isinstance(first, torch.Tensor):
            return None
        return first.numel() / (1 if isinstance(module, EMBEDDING) else max(1, site.shape[0]))
    if not isinstance(output, torch.Tensor):
        return None
    if len(site.shape) == 3 and site.op == "linear":  # each token goes to a few experts
        kinds = (torch.int32, torch.int64)
        chosen = [v for v in (*args, *kwargs.values()) if getattr(v, "dtype", None) in kinds]
        return chosen[0].numel() / site.groups if chosen else None
    along_last = site.transposed or site.op == "embedding"
    width = site.shape[1] if along_last else site.shape[0]
    return output.numel() / max(1, width)


def _attention_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[float, ...]:
    named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    rows = []
    for name in ("query", "key", "value"):
        x = named[name]
        rows.append(x.numel() / max(1, x.size(-1)))
    return tuple(rows)
