"""Runs: convolutions that follow each other with nothing but BatchNorm and activations between.

A run is what layers can be merged in. Where its input is added to its output, and one module does
all of this and nothing else, the whole module can become one convolution.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lamina.forms.merged import ACTIVATIONS, made_of
from lamina.network.isolate import isolated
from lamina.network.sites import Refusal, Site, Sites
from lamina.network.source import Network
from lamina.network.tensors import named_tensors
from lamina.network.trace import Flow, Op, trace

# What an operation of the data flow may be, by the number of the form that holds it.
CODES = {
    "relu": 1,
    "relu6": 2,
    "hardtanh": 2,
    "silu": 3,
    "hardswish": 4,
    "leaky_relu": 5,
    "elu": 6,
    "gelu": 7,
    "tanh": 8,
    "sigmoid": 9,
}
TWICE = (1, 2)  # activations that change nothing the second time
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CLOSE = 1e-4  # of the largest output: how near a block must come to what the run says it does


@dataclass(frozen=True)
class Link:
    """One convolution of a run, and what its output goes through before the next.

    Args:
        site: the convolution.
        norm: path of the BatchNorm behind it, or `""`.
        act: number of the activation behind that (see `forms.merged`), 0: none.
        through: path of the module that runs the activation and nothing else, or `""`.
    """

    site: Site
    norm: str = ""
    act: int = 0
    through: str = ""

    @property
    def reducible(self) -> bool:
        """Whether it may become the identity: it keeps channels and size."""
        s = self.site
        same = all(
            isinstance(p, int) and 2 * p == k - 1 for p, k in zip(s.padding, s.kernel, strict=True)
        )
        return s.shape[0] == s.shape[1] * s.groups and set(s.stride) == {1} and same


@dataclass(frozen=True)
class Run:
    """Convolutions in a row.

    Args:
        links: the convolutions, in order.
        skip: its input is added to its output, inside `block`.
        block: path of the module that does all of this and nothing else, or `""`.
        ends: number of the activation that `block` ends with, 0: none.
        after: number of the activation that follows the run in any case, over the sum with another
            branch too, 0: none.
        idle: the block may become nothing: its input is already what its last activation makes.
    """

    links: tuple[Link, ...]
    skip: bool = False
    block: str = ""
    ends: int = 0
    after: int = 0
    idle: bool = False

    @property
    def name(self) -> str:
        return f"{self.links[0].site.name}..{self.links[-1].site.name}"


def find_runs(network: Network, sites: Sites) -> tuple[tuple[Run, ...], tuple[Refusal, ...]]:
    """Return the runs of a network in the order they run, and the convolutions in none, and why.

    Args:
        network: with example inputs.
        sites: from `discover`.
    """
    flow = trace(network)
    if isinstance(flow, str):
        return (), (Refusal("runs", "merging layers", flow),)
    walk = _Walk(network.module, flow, sites)
    runs = [walk.run(row) for row in walk.rows()]
    doubtful = {r.block for r in runs if r.block} - _as_said(network, runs)
    runs = [replace(r, skip=False, block="", ends=0, idle=False) if r.block in doubtful else r
            for r in runs]  # fmt: skip
    return tuple(runs), tuple(Refusal(n, "merging layers", why) for n, why in walk.refused.items())


class _Walk:
    """Follows the data flow of one network from convolution to convolution."""

    def __init__(self, root: nn.Module, flow: Flow, sites: Sites) -> None:
        self.root, self.flow, self.after = root, flow, flow.followers()
        self.ops = {op.name: op for op in flow.ops}
        self.outputs = set(flow.outputs)
        self.tensors = named_tensors(root)
        self.readers = flow.readers(self.tensors.first)
        self.ran: dict[str, list[Op]] = {}
        for op in flow.ops:
            self.ran.setdefault(op.module, []).append(op)
        self.paths = Counter(id(m) for _, m in root.named_modules(remove_duplicate=False))
        self.refused: dict[str, str] = {}
        self.sites: dict[str, Site] = {}  # by the name of the convolution's op
        for site in sites.layers:
            if site.op == "conv":
                why = self._refuse(site)
                if why:
                    self.refused[site.name] = why
                else:
                    self.sites[self.readers[self.tensors.first[site.weight]][0].name] = site

    def rows(self) -> Iterator[list[tuple[Link, list[Op]]]]:
        """Yield the rows of links, each link with its operations."""
        links = {name: self._link(name) for name in self.sites}
        following = {name: self._next(ops[-1]) for name, (_, ops) in links.items()}
        later = {name for name in following.values() if name}
        for name in links:
            if name in later:
                continue
            row, here = [], name
            while here:
                row.append(links[here])
                here = following[here]
            yield row

    def run(self, row: list[tuple[Link, list[Op]]]) -> Run:
        """Return a row as a run: with its skip, its block and what follows."""
        links, ops = tuple(link for link, _ in row), [op for _, part in row for op in part]
        source, tail = ops[0].inputs[0], ops[-1]
        after = links[-1].act
        total = self._only(tail)
        joined = total is not None and total.target == "add" and len(total.inputs) == 2
        act = self._only(total) if joined and total is not None else None
        if joined and not after and act is not None and act.target in CODES:
            after = CODES[act.target]
        skips = joined and total is not None and set(total.inputs) == {source, tail.name}
        if skips and total is not None:
            tried = [([*ops, total, act], after)] if act is not None and after else []
            for whole, ends in (*tried, ([*ops, total], 0)):
                block = self._block([op for op in whole if op is not None])
                if block and not links[-1].act:
                    before = self.ops.get(source)
                    code = CODES.get(before.target, 0) if before is not None else 0
                    idle = not ends or (ends in TWICE and code == ends)
                    return Run(links, True, block, ends, after, idle)
            return Run(links, after=after)
        return Run(links, False, self._block(ops), links[-1].act, after)

    def _refuse(self, site: Site) -> str:
        """Return why a convolution can be merged with none, or `""`."""
        if site.rigid or site.aliases:
            return site.rigid or f"its weight is tied to {site.aliases[0]}"
        uses = self.readers.get(self.tensors.first[site.weight], [])
        if len(uses) != 1 or uses[0].module != site.module or len(uses[0].inputs) != 1:
            return "it is not used once, as itself"
        if set(site.dilation) != {1}:
            return f"its dilation is {site.dilation}"
        if site.padding_mode != "zeros" or not all(isinstance(p, int) for p in site.padding):
            return f"its padding is {site.padding_mode} {site.padding}"
        return "" if self._alone(site.module) else "its module is used more than once"

    def _alone(self, path: str) -> bool:
        return bool(path) and self.paths[id(self.root.get_submodule(path))] == 1

    def _only(self, op: Op) -> Op | None:
        """Return the one operation that reads a result, if nobody else wants it."""
        after = self.after.get(op.name, [])
        return after[0] if len(after) == 1 and op.name not in self.outputs else None

    def _link(self, name: str) -> tuple[Link, list[Op]]:
        here, link = self.ops[name], Link(self.sites[name])
        ops = [here]
        while (op := self._only(here)) is not None and len(op.inputs) == 1:
            once = len(self.ran[op.module]) == 1 and self._alone(op.module)
            if op.target == "batch_norm" and not link.norm and not link.act and once:
                norm = self.root.get_submodule(op.module)
                if type(norm) not in NORMS or norm.running_mean is None:
                    break
                link = replace(link, norm=op.module)
            elif op.target in CODES and not link.act:
                code = CODES[op.target]
                known = once and type(self.root.get_submodule(op.module)) is ACTIVATIONS[code]
                link = replace(link, act=code, through=op.module if once and known else "")
            else:
                break
            here = op
            ops.append(op)
        return link, ops

    def _next(self, tail: Op) -> str:
        op = self._only(tail)
        return op.name if op is not None and op.name in self.sites else ""

    def _block(self, ops: list[Op]) -> str:
        """Return the path of the module that runs these operations and no other, or `""`."""
        wanted = {op.name for op in ops}
        path = ops[0].module.rpartition(".")[0]
        while path:
            inside = {
                o.name for o in self.flow.ops
                if o.module == path or o.module.startswith(f"{path}.")
            }  # fmt: skip
            if inside == wanted:
                return path if self._alone(path) else ""
            if not inside <= wanted:
                return ""
            path = path.rpartition(".")[0]
        return ""


def _as_said(network: Network, runs: list[Run]) -> set[str]:
    """Return the blocks that compute what their runs say, on the example inputs."""
    blocks = {run.block: run for run in runs if run.block}
    seen: dict[str, list[Any]] = {path: [] for path in blocks}
    good = set()
    with isolated(network) as (module, args, kwargs), torch.no_grad():
        for path in blocks:

            def note(_m: nn.Module, given: Any, named: Any, made: Any, path: str = path) -> None:
                seen[path].append((given, named, made))

            module.get_submodule(path).register_forward_hook(note, with_kwargs=True)
        module(*args, **kwargs)
        for path, calls in seen.items():
            if len(calls) != 1 or len(calls[0][0]) != 1 or calls[0][1]:
                continue
            (x,), _, made = calls[0]
            y = computed(module, blocks[path], x)
            if isinstance(made, torch.Tensor) and made.shape == y.shape:
                apart = float((made - y).abs().max())
                if apart <= CLOSE * float(y.abs().max().clamp_min(1e-30)):
                    good.add(path)
    return good


def computed(root: nn.Module, run: Run, x: torch.Tensor) -> torch.Tensor:
    """Return what a run, with its skip and its last activation, makes of an input."""
    y = x
    for link in run.links:
        y = root.get_submodule(link.site.module)(y)
        y = root.get_submodule(link.norm)(y) if link.norm else y
        y = made_of(link.act)(y)
    return made_of(run.ends)(y + x) if run.skip else y
