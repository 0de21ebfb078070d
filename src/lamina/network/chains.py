"""Chains: runs of layers with nothing but one path of simple operations between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from lamina.network.sites import Refusal, Site, cut
from lamina.network.tensors import Tensors
from lamina.network.trace import Flow, Op

__all__ = ["ELEMENTWISE", "NORM", "POOL", "cut", "find_chains", "own_passages"]

IDENTITY = {
    "contiguous",
    "clone",
    "detach",
    "alias",
    "to",
    "_to_copy",
    "type_as",
    "lift_fresh_copy",
}
ELEMENTWISE = {
    *(
        "relu",
        "relu6",
        "leaky_relu",
        "prelu",
        "rrelu",
        "elu",
        "celu",
        "selu",
        "gelu",
        "silu",
        "mish",
    ),
    *(
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "softplus",
        "softsign",
        "softshrink",
    ),
    *("hardshrink", "tanhshrink", "logsigmoid", "log_sigmoid", "threshold", "clamp", "clamp_min"),
    *("clamp_max", "abs", "neg", "exp", "sqrt", "rsqrt", "square", "pow", "reciprocal", "sign"),
    *("add", "sub", "rsub", "mul", "div", "dropout", "alpha_dropout", "feature_dropout"),
    *("feature_alpha_dropout", "erf", "sin", "cos"),
}
POOL = {
    f"{pool}{n}d"
    for pool in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
    for n in (1, 2, 3)
}
NORM = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
RESHAPE = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"}
MOVES = RESHAPE | {"permute", "transpose", "t", "numpy_T", "select", "slice", "expand", "pad"}


@dataclass(frozen=True)
class _Unit:
    """All ops of a layer that runs once: what it reads, and the one op that others read."""

    site: Site
    source: str
    result: str


def find_chains(
    sites: tuple[Site, ...], flow: Flow, tensors: Tensors
) -> tuple[tuple[Site, ...], tuple[Refusal, ...]]:
    """Return the maximal runs of two or more layers, and the links that only a reshape broke.

    Two layers are linked when the first one's only consumer leads, through operations on each
    value, pooling, normalisation, dropout or a flattening, each with one consumer, to the second. A
    layer that runs twice, or whose weight is tied, is in no chain. Constants and buffers may take
    part in what lies between: `add` can be a shift by one.
    """
    consumers: dict[str, list[Op]] = {}
    read = {name for op in flow.ops for name in op.inputs}.union(flow.outputs)
    for op in flow.ops:
        if op.target == "getitem" and op.name not in read:
            continue  # the indices of a pooling, say: nobody wants them
        for name in op.inputs:
            consumers.setdefault(name, []).append(op)
    units = {}
    readers, ran = flow.readers(tensors.first), _by_module(flow)
    for site in sites:
        unit = _unit(site, flow, consumers, readers, ran)
        if unit is not None:
            units[site.name] = unit
    entry = {
        op.name: unit
        for unit in units.values()
        for op in consumers.get(unit.source, ())
        if _inside(op, unit.site)
    }
    ops = {op.name: op for op in flow.ops}
    links: dict[str, tuple[str, tuple[Op, ...]]] = {}
    refusals = []
    for unit in units.values():
        target, between, broken = _follow(unit, ops, consumers, entry, set(flow.outputs))
        if target and broken:
            where = f"{unit.site.name} -> {target}"
            why = f"a {broken} with literal sizes lies between"
            refusals.append(Refusal(where, "chain", why))
        elif target:
            links[unit.site.name] = (target, between)
    return _runs(links, ran), tuple(refusals)


def _unit(
    site: Site,
    flow: Flow,
    consumers: Mapping[str, list[Op]],
    readers: Mapping[str, list[Op]],
    ran: Mapping[str, list[Op]],
) -> _Unit | None:
    if site.op == "recurrent" or site.aliases or site.name != site.module:
        return None
    uses = readers.get(site.weight, ())
    own = {op.name: op for op in ran.get(site.module, ())}
    if len(uses) != 1 or uses[0].name not in own:
        return None
    sources = {name for op in own.values() for name in op.inputs if name not in own}
    results = [
        name
        for name in own
        if name in flow.outputs or any(c.name not in own for c in consumers.get(name, ()))
    ]
    if len(sources) != 1 or len(results) != 1:
        return None
    return _Unit(site, sources.pop(), results[0])


def _by_module(flow: Flow) -> dict[str, list[Op]]:
    """Return the ops that ran inside each module, at any depth, by module path."""
    found: dict[str, list[Op]] = {}
    for op in flow.ops:
        path = op.module
        while path:
            found.setdefault(path, []).append(op)
            path = path.rpartition(".")[0]
    return found


def _inside(op: Op, site: Site) -> bool:
    return op.module == site.module or op.module.startswith(f"{site.module}.")


def _follow(
    unit: _Unit,
    ops: Mapping[str, Op],
    consumers: Mapping[str, list[Op]],
    entry: Mapping[str, _Unit],
    outputs: set[str],
) -> tuple[str, tuple[Op, ...], str]:
    """Follow the one path from a layer: where it leads, what lies between, what broke it.

    An op is listed under its label (see `_label`).
    """
    here, broken = unit.result, ""
    between: list[Op] = []
    while here not in outputs:
        after = [op for op in consumers.get(here, ()) if not _inside(op, unit.site)]
        if len(after) != 1:
            break
        op = after[0]
        if op.name in entry and entry[op.name].source == here:
            return entry[op.name].site.name, tuple(between), broken
        label = _label(op, ops[here])
        if label is None:
            if op.target not in MOVES or len(op.inputs) != 1:
                break
            broken, label = broken or op.target, ""
        if label:
            between.append(replace(op, target=label))
        here = op.name
    return "", (), ""


def _label(op: Op, before: Op) -> str | None:
    """Return how an op is listed between two layers, `""`: not at all; None: it ends the path."""
    if len(op.inputs) != 1:
        return None
    old, new = before.shape, op.shape
    if op.target in IDENTITY:
        return ""
    if op.target in POOL or (op.target in ELEMENTWISE | NORM and new == old):
        return op.target
    if op.target == "getitem" and before.target.startswith("adaptive_max_pool"):
        return ""
    if op.target in ("mean", "amax") and len(old) > 2 and old[1] not in old[2:]:
        # Over all positions of a channel: a global pool written by hand.
        return op.target if new in (old[:2], old[:2] + (1,) * (len(old) - 2)) else None
    if op.target in RESHAPE and old and new == old:
        return ""
    if op.target in RESHAPE and len(old) > 1 and new == (old[0], prod(old[1:])):
        return "flatten"
    return None


def _runs(
    links: Mapping[str, tuple[str, tuple[Op, ...]]], ran: Mapping[str, list[Op]]
) -> tuple[Site, ...]:
    followers = {target for target, _ in links.values()}
    chains = []
    for start in links:
        if start in followers:
            continue
        members: list[str] = [start]
        between: list[tuple[str, ...]] = []
        through: list[tuple[str, ...]] = []
        while members[-1] in links:
            target, ops = links[members[-1]]
            members.append(target)
            between.append(tuple(op.target for op in ops))
            through.append(tuple(_alone(op, ran) for op in ops))
        name = f"{start}..{members[-1]}"
        chains.append(
            Site(
                name,
                "chain",
                op="",
                positions=0.0,
                members=tuple(members),
                between=tuple(between),
                through=tuple(through),
            )
        )
    return tuple(chains)


def _alone(op: Op, ran: Mapping[str, list[Op]]) -> str:
    """Return the path of the module that ran an op and nothing else, or `""`."""
    return op.module if op.module and len(ran.get(op.module, ())) == 1 else ""


def own_passages(root: nn.Module, chains: tuple[Site, ...], flow: Flow) -> tuple[Site, ...]:
    """Take those modules out of `through` that run in another place too, by another path.

    A module that stands in two slots is a module of each: either can be replaced. But where its
    container stands in two places, what is put into one is in the other as well.
    """
    paths: dict[int, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    run = {op.module for op in flow.ops}

    def own(path: str) -> str:
        parent, _, leaf = path.rpartition(".")
        same = paths[id(root.get_submodule(parent))] if path else ()
        others = (f"{other}.{leaf}" if other else leaf for other in same if other != parent)
        return "" if any(other in run for other in others) else path

    return tuple(
        replace(chain, through=tuple(tuple(map(own, between)) for between in chain.through))
        for chain in chains
    )
