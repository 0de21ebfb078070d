"""Which layers of a network share a weight next, and making them share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from lamina.errors import DataError, InfeasibleError, MethodError
from lamina.forms import Edit, Plain, find_tensor, install
from lamina.forms.tied import index_of
from lamina.measure.stats import LayerStats, Stats
from lamina.methods.layer_fusion.align import Hidden, align
from lamina.methods.layer_fusion.distances import DISTANCES, distances
from lamina.methods.layer_fusion.drop import block_of
from lamina.methods.layer_fusion.fuse import (
    Partition,
    along,
    combine,
    joined,
    members_of,
    merge_order,
    mix,
    shared_error,
    solve,
)
from lamina.network.sites import Site, Sites
from lamina.plan.allocate import allocate

UNITS = ("layer", "block")
PATTERNS = ("nearest", "neighbours", "cycle")
MEASURES = (*DISTANCES, "loss")


@dataclass(frozen=True)
class Bundle:
    """Families whose members are grouped alike: those of the blocks of a network, or just one.

    Args:
        families: each with as many members.
        layers: the members of each family, as layer sites.
        blocks: the modules that hold the members, where they are whole blocks.
    """

    families: tuple[Site, ...]
    layers: tuple[tuple[Site, ...], ...]
    blocks: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of members."""
        return len(self.layers[0])

    @property
    def saved(self) -> int:
        """Parameters that one group less takes less."""
        return sum(int(np.prod(family.shape)) for family in self.families)

    @property
    def name(self) -> str:
        return ", ".join(family.name for family in self.families)


def find_bundles(
    sites: Sites, exclude: Sequence[str] = (), unit: str = "layer"
) -> tuple[Bundle, ...]:
    """Return what can share weights.

    Args:
        sites: of the network.
        exclude: patterns of names of layers that share nothing.
        unit: `"layer"`: every family is grouped by itself; `"block"`: families with one member in
            each of the same blocks are grouped alike, so that whole blocks share their weights.

    Raises:
        MethodError: unknown unit; nothing can share; a pattern names no layer.
    """
    if unit not in UNITS:
        raise MethodError("unknown unit", repr(unit), "", f"choose from {', '.join(UNITS)}")
    layers = {site.name: site for site in sites.layers}
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise MethodError("exclude names no layer", repr(pattern), "",
                              f"the layers are {', '.join(layers)}")  # fmt: skip
    found: dict[object, list[tuple[Site, tuple[Site, ...], tuple[str, ...]]]] = {}
    for family in sites.families:
        if any(fnmatchcase(name, pattern) for name in family.members for pattern in exclude):
            continue
        members = tuple(layers[name] for name in family.members)
        blocks = tuple(block_of(family, i) for i in range(len(members)))
        whole = unit == "block" and len(set(blocks)) == len(blocks)
        key = blocks if whole else family.name
        found.setdefault(key, []).append((family, members, blocks if whole else ()))
    if not found:
        raise MethodError(
            "the recipe layer-fusion finds no layers to fuse", "",
            "no two layers have one role and shape",
        )  # fmt: skip
    return tuple(
        Bundle(tuple(f for f, _, _ in same), tuple(m for _, m, _ in same), same[0][2])
        for same in found.values()
    )


# --- which ---------------------------------------------------------------------------------------


def choose_groups(
    module: nn.Module,
    bundles: Sequence[Bundle],
    now: Sequence[Partition],
    limit: float,
    stats: Stats,
    *,
    distance: str = "euclidean",
    pattern: str = "nearest",
    spent: float | None = None,
    saved: Sequence[int] | None = None,
) -> list[Partition]:
    """Return the groups of each bundle so that parameters keep to a limit, the nearest ones first.

    Every bundle has a line of partitions, each coarser than what is tied already; one of each is
    chosen, exactly, so that the distances that were bridged are least in sum. Distances count
    relative to the mean one of their family, so that families are alike to each other.

    Args:
        module: the network as it is.
        bundles: what can share.
        now: their partitions as they are.
        limit: unique parameters that may be left.
        stats: for `distance="loss"`.
        distance: see `distances.DISTANCES`, or `"loss"`: what sharing is predicted to cost.
        pattern: `"nearest"`: any two groups; `"neighbours"`: groups of layers in a row; `"cycle"`:
            every n-th layer, whatever the distances.
        spent: parameters now; None: those of the module.
        saved: what one group less takes less, by bundle; None: its weights.

    Raises:
        InfeasibleError: all together the limit is not reached; `nearest` says what is.
        DataError: predicted costs need statistics.
    """
    if spent is None:
        spent = float(sum(p.numel() for p in module.parameters()))
    lines = [
        _line(_apart(module, bundle, part, stats, distance), part, pattern)
        for bundle, part in zip(bundles, now, strict=True)
    ]
    each = saved if saved is not None else [bundle.saved for bundle in bundles]
    fixed = spent - sum(s * len(set(part)) for s, part in zip(each, now, strict=True))
    errors = [np.array([cost for _, cost in line], dtype=np.float64) for line in lines]
    costs = [
        np.array([[float(size * len(set(part)))] for part, _ in line])
        for size, line in zip(each, lines, strict=True)
    ]
    try:
        chosen = allocate(errors, costs, np.array([limit - fixed]), "sum")
    except InfeasibleError:
        least = fixed + sum(float(c.min()) for c in costs)
        raise InfeasibleError(
            "no sharing fits the budget", f"params={limit:,.0f}",
            f"with one weight for each family {least:,.0f} are left, {fixed:,.0f} of them alone",
            f"the nearest feasible budget is params={least:.0f}", {"params": least},
        ) from None  # fmt: skip
    return [line[i][0] for line, i in zip(lines, chosen.choice, strict=True)]


def _line(apart: Tensor, now: Partition, pattern: str) -> list[tuple[Partition, float]]:
    """Return partitions that are coarser and coarser, with the distances bridged since now."""
    if pattern == "cycle":
        found = {now: 0.0}
        for groups in range(len(now) - 1, 0, -1):
            part = along(len(now), groups, "cycle")
            if len(now) % groups or joined(now, part) != part:
                continue  # cycles of another length would grow together to one group
            inside = [apart[i, j] for g in members_of(part) for i in g for j in g if i < j]
            found.setdefault(part, float(sum(inside)) / len(now))
        return list(found.items())
    total, line = 0.0, []
    for part, height in merge_order(apart, start=now, neighbours=pattern == "neighbours"):
        total += height
        line.append((part, total))
    return line


def _apart(
    module: nn.Module, bundle: Bundle, now: Partition, stats: Stats, distance: str
) -> Tensor:
    """Return the distances of the members of a bundle `[n, n]`, over all its families."""
    total = torch.zeros(bundle.count, bundle.count, dtype=torch.float64)
    for layers in bundle.layers:
        weights = weights_now(module, layers, now)
        if distance == "loss":
            seen = [_known(stats, layer) for layer in layers]
            for i in range(len(layers)):
                for j in range(i):
                    pair = [weights[i], weights[j]]
                    cost = shared_error(layers[i], pair, [seen[i], seen[j]], combine(pair))
                    total[i, j] = total[j, i] = total[i, j] + cost
            continue
        found = distances([w.flatten(1) for w in weights], distance)
        mean = found.sum() / max(1, len(layers) * (len(layers) - 1))
        total += found / mean.clamp_min(1e-300) / len(bundle.layers)
    return total


def _known(stats: Stats, layer: Site) -> LayerStats:
    seen = stats.of(layer.name)
    if seen is None:
        raise DataError(
            "predicted costs of sharing need calibration data", layer.name, "",
            "give some, or choose another distance",
        )  # fmt: skip
    return seen


def weights_now(module: nn.Module, layers: Sequence[Site], now: Partition) -> list[Tensor]:
    """Return the weight of each layer: that of the first of its group, the others may be gone."""
    first = {label: layers[now.index(label)] for label in set(now)}
    return [find_tensor(module, first[label].weight).detach() for label in now]


# --- making them share ---------------------------------------------------------------------------


def fuse_groups(
    module: nn.Module,
    bundles: Sequence[Bundle],
    before: Sequence[Partition],
    after: Sequence[Partition],
    *,
    how: str = "mean",
    rescale: bool = False,
    hidden: Mapping[str, Hidden] | None = None,
    stats: Stats | None = None,
    drop: bool = False,
) -> tuple[str, ...]:
    """Let the layers of each group hold one Parameter, in place; biases and norms stay their own.

    Args:
        module: the network.
        bundles: what shares.
        before, after: the groups as they are, and as they shall be (coarser).
        how, rescale: see `fuse.combine`; `"solve"` needs `stats`.
        hidden: neurons that may be put in one order first, by layer; None: they stay.
        stats: of the layers.
        drop: the other blocks of a group become nothing.

    Returns:
        names of the layers whose neurons have moved.
    """
    changed = [
        (layers, [g for g in members_of(new) if len({old[i] for i in g}) > 1], old)
        for bundle, old, new in zip(bundles, before, after, strict=True)
        for layers in bundle.layers
    ]
    moved: tuple[str, ...] = ()
    if hidden:
        names = [[layers[i].name for i in g] for layers, groups, _ in changed for g in groups]
        moved = align(module, hidden, names)
    edits: list[Edit] = []
    for layers, groups, old in changed:
        weights = weights_now(module, layers, old)
        for group in groups:
            inside = [weights[i] for i in group]
            if how == "solve":
                known = [_known(stats or Stats(), layers[i]) for i in group]
                one = solve(layers[group[0]], inside, known)
            else:
                one = combine(inside, how, rescale)
            edits.append(Edit(layers[group[0]].weight, "values", values=Plain(one)))
    install(module, edits)
    install(module, structure_of(module, bundles, after, before if drop else None))
    return moved


def mix_groups(
    module: nn.Module, bundles: Sequence[Bundle], groups: Sequence[Partition], seed: int
) -> None:
    """Swap half of the entries between the layers of each group, in place; none is lost."""
    edits = []
    for bundle, partition in zip(bundles, groups, strict=True):
        for layers in bundle.layers:
            for group in members_of(partition):
                weights = [find_tensor(module, layers[i].weight).detach() for i in group]
                seed += 1
                edits += [
                    Edit(layers[i].weight, "values", values=Plain(w))
                    for i, w in zip(group, mix(weights, seed), strict=True)
                ]
    install(module, edits)


def structure_of(
    module: nn.Module,
    bundles: Sequence[Bundle],
    groups: Sequence[Partition],
    dropped: Sequence[Partition] | None = None,
) -> list[Edit]:
    """Return the edits that let groups share, on a network in which no module is gone.

    Args:
        module: the network.
        bundles, groups: what shares.
        dropped: the others of each group become nothing instead: all that did not before, in these
            partitions.
    """
    edits = []
    for number, (bundle, partition) in enumerate(zip(bundles, groups, strict=True)):
        for group in members_of(partition):
            if dropped is not None:
                old = dropped[number]
                gone = [i for i in group[1:] if i == old.index(old[i])]
                edits += [Edit(bundle.blocks[i], "identity") for i in gone]
                continue
            for layers in bundle.layers:
                leader = layers[group[0]].module
                edits += [
                    Edit(layers[i].module, "tie", {"with": index_of(module, leader)})
                    for i in group[1:]
                ]
    return edits
