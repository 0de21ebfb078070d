"""Latency tables: how long layers take on this machine, and what may stand in their place.

A table is measured at the inputs the layers really see: the network runs once on its example
inputs, whose batch is thus the batch of every latency, and each layer's own inputs are noted.
Layers of equal geometry are
measured once, and every time is told as a share of the whole network's in the same round.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lamina.forms import Edit, install
from lamina.measure.clock import (
    LEAST,
    ONE,
    Call,
    Job,
    Timer,
    check_timed,
    clock,
    middle,
    record_calls,
    whole_call,
)
from lamina.network.source import Network

CHUNK = 8  # structures that share a round with their dense layer, so that both are near in time
FEWEST = 8  # structures of one geometry that are measured even where time is short


Structure = tuple[Edit, ...]  # structural edits, as `Method.structure` says them
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class LatencyTable:
    """How long layers and what may stand in their place take.

    Args:
        whole: one forward pass of the original network [s].
        dense: by site, its layer as it is, all calls of one forward pass together [s].
        ratios: by site and structure (see `structure_key`): its time over the dense layer's, and
            what of that may be noise.
        threads: of torch.
        missed: structures that were not measured, because time was short.
        spans: by span and structure, the time of the whole network over that of the original where
            the structure stands in the span's place, and what of that may be noise.
    """

    whole: float
    dense: Mapping[str, float] = field(default_factory=dict)
    ratios: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    threads: int = 1
    missed: int = 0
    spans: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)

    @property
    def fixed(self) -> float:
        """What one forward pass takes outside the sites of the table [s], never negative."""
        return max(0.0, self.whole - sum(self.dense.values()))

    def dump(self) -> bytes:
        """Return the table as JSON."""
        return json.dumps(vars(self)).encode()

    @staticmethod
    def parse(data: bytes) -> LatencyTable:
        """Undo `dump`."""
        read = json.loads(data)
        for field_ in ("ratios", "spans"):
            read[field_] = {
                site: {key: (float(r), float(n)) for key, (r, n) in rows.items()}
                for site, rows in read.get(field_, {}).items()
            }
        return LatencyTable(**read)


def structure_key(module: str, structure: Structure) -> str:
    """Return a structure as text, the same for layers of equal geometry.

    Args:
        module: path of the layer.
        structure: structural edits at it, or inside what earlier ones have put there.

    Example:
        >>> structure_key("conv", (Edit("conv", "low_rank", {"rank": 3, "folds": 1}),))
        '[["", "low_rank", {"folds": 1, "rank": 3}]]'
    """
    rows = [[e.path.removeprefix(module), e.form, dict(e.settings)] for e in structure]
    return json.dumps(rows, sort_keys=True)


def measure_table(
    network: Network,
    structures: Mapping[str, tuple[str, Sequence[Structure]]],
    *,
    threads: int = 1,
    seconds: float = 60.0,
    timer: Timer | None = None,
    progress: Progress | None = None,
    last: Structure = (),
) -> LatencyTable:
    """Measure a network, its layers, and what may stand in their place.

    Args:
        network: the network, which is only read; its example inputs say the batch.
        structures: by site name, the path of its layer, and the structures to measure there; none:
            only what the layer itself takes.
        threads: of torch while measuring.
        seconds: what measuring may take, about.
        timer: times jobs in interleaved rounds; default: `clock`.
        progress: called with (geometries done, geometries in all, a site's name).
        last: edits of the whole network that will follow any structure (a layout).

    Raises:
        BudgetError: the network has no example inputs.
        DataError: the network does not take them.
        FileError: a structure does not fit its layer.
    """
    check_timed(network)
    timer = timer or clock
    paths = {name: path for name, (path, _) in structures.items()}
    calls = record_calls(network, sorted(set(paths.values())))
    groups: dict[str, list[str]] = {}
    for name, path in paths.items():
        if calls[path]:  # a layer that is not called (as itself) takes no time of its own
            layer = network.module.get_submodule(path)
            groups.setdefault(_geometry(layer, calls[path]), []).append(name)
    firsts = [names[0] for names in groups.values()]
    dense = [Job(network.module.get_submodule(paths[name]), calls[paths[name]]) for name in firsts]
    whole = Job(network.module, (whole_call(network),))
    rows = timer([whole, *dense], threads, seconds / 4)
    took = median(row[0] for row in rows)
    shares = [median(row[i + 1] / row[0] for row in rows) for i in range(len(dense))]
    counts = [len(names) for names in groups.values()]
    # Layers measured apart may add up to more than the whole, in which they overlap.
    scale = 1 / max(1.0, math.fsum(s * c for s, c in zip(shares, counts, strict=True)))
    wanted = [_union(structures, names) for names in groups.values()]
    plans = _afford([s * took for s in shares], [len(w) for w in wanted], seconds * 3 / 4)
    table = LatencyTable(took, {}, {}, threads, sum(map(len, wanted)) - sum(n for n, _ in plans))
    for i, (names, found, (most, time_left)) in enumerate(
        zip(groups.values(), wanted, plans, strict=True)
    ):
        if progress:
            progress(i, len(groups), names[0])
        kept = dict(_spread(sorted(found.items(), key=lambda kv: kv[1][0]), most))
        built = {key: edits for key, (_, edits) in kept.items()}
        ratios = _ratios(dense[i], paths[names[0]], built, threads, time_left, timer, last)
        for name in names:
            table.dense[name] = shares[i] * took * scale  # type: ignore[index]
            own = {structure_key(paths[name], s) for s in structures[name][1]}
            table.ratios[name] = {k: r for k, r in ratios.items() if k in own}  # type: ignore[index]
    if progress:
        progress(len(groups), len(groups), "")
    return table


def measure_ratio(
    network: Network, edited: nn.Module, *, threads: int = 1, seconds: float = 8.0,
    timer: Timer | None = None,
) -> tuple[float, float, float]:  # fmt: skip
    """Time an edited network against the original, in turn.

    Returns:
        the ratio of their times, what of it may be noise, and the original's time [s].
    """
    found, whole = measure_ratios(network, [edited], threads, seconds, timer)
    return *found[0], whole


def measure_ratios(
    network: Network, edited: Sequence[nn.Module], threads: int, seconds: float,
    timer: Timer | None,
) -> tuple[list[tuple[float, float]], float]:  # fmt: skip
    """Time several edited networks against the original, all in turn.

    Returns:
        for each the ratio of its time and what of it may be noise; and the original's time [s].
    """
    call = whole_call(network)
    jobs = [Job(module, (call,)) for module in (network.module, *edited)]
    rows = (timer or clock)(jobs, threads, seconds)
    found = [middle([row[i] / row[0] for row in rows]) for i in range(1, len(jobs))]
    return found, median(row[0] for row in rows)


def reshaped(network: Network, structure: Structure) -> nn.Module:
    """Return a copy of a network's module with structural edits and no values of their own.

    It computes nothing of use, but takes as long as one that does. New layers get values that
    keep the scale of what runs through them, or numbers too small for fast arithmetic could arise.
    """
    module = copy.deepcopy(network.module)
    known = {id(p) for p in module.parameters()}
    install(module, structure)
    _fill(module, known)
    return module


# --- its parts -----------------------------------------------------------------------------------


def _geometry(layer: nn.Module, calls: tuple[Call, ...]) -> str:
    tensors = [
        (name, tuple(t.shape), t.stride(), str(t.dtype)) for name, t in layer.state_dict().items()
    ]
    return repr((type(layer), repr(layer), tensors, calls))


def _union(
    structures: Mapping[str, tuple[str, Sequence[Structure]]], names: Sequence[str]
) -> dict[str, tuple[float, tuple[str, Structure]]]:
    """Return the structures of sites of one geometry by key, with a number to sort them by."""
    found: dict[str, tuple[float, tuple[str, Structure]]] = {}
    for name in names:
        path, given = structures[name]
        for s in given:
            size = float(math.prod(v for v in s[0].settings.values() if v > 0)) if s else 0.0
            found.setdefault(structure_key(path, s), (size, (path, s)))
    return found


def _afford(dense: list[float], counts: list[int], seconds: float) -> list[tuple[int, float]]:
    """Return per geometry how many structures are measured, and what that may take [s]."""
    work = [(1 + n) * max(ONE, t) for t, n in zip(dense, counts, strict=True)]
    plans = []
    for t, n, w in zip(dense, counts, work, strict=True):
        share = seconds * w / max(1e-12, math.fsum(work))
        most = int(share / (LEAST * max(ONE, t)))
        plans.append((min(n, max(FEWEST, most)), share))
    return plans


def _spread(rows: list[Any], most: int) -> Iterator[Any]:
    """Yield `most` rows evenly, ends included, as (key, (number, structure)) pairs."""
    if len(rows) <= most:
        yield from rows
        return
    yield from (rows[i] for i in sorted({round(k * (len(rows) - 1) / (most - 1))
                                         for k in range(most)}))  # fmt: skip


def _ratios(
    dense: Job, path: str, found: Mapping[str, tuple[str, Structure]], threads: int,
    seconds: float, timer: Timer, last: Structure,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    ratios: dict[str, tuple[float, float]] = {}
    keys = list(found)
    for start in range(0, len(keys), CHUNK):
        part = keys[start : start + CHUNK]
        jobs = [dense, *(Job(_built(dense.module, *found[key], last), dense.calls) for key in part)]
        rows = timer(jobs, threads, seconds * len(part) / len(keys))
        for i, key in enumerate(part):
            ratios[key] = middle([row[i + 1] / row[0] for row in rows])
    return ratios


def _built(layer: nn.Module, path: str, structure: Structure, last: Structure) -> nn.Module:
    """Return what a structure puts in a layer's place, apart from its network."""
    holder = nn.Module()
    holder.add_module("layer", copy.deepcopy(layer))
    known = {id(p) for p in holder.parameters()}
    install(holder, [
        Edit(f"layer{edit.path.removeprefix(path)}", edit.form, edit.settings)
        for edit in structure
    ])  # fmt: skip
    install(holder, last)
    _fill(holder, known)
    return holder.get_submodule("layer")


def _fill(module: nn.Module, known: set[int]) -> None:
    """Give new parameters values that keep the scale of what runs through them.

    Indices into channels are spread: the same channel over and over would be read from the cache.
    """
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            if id(p) not in known and p.is_floating_point() and p.dim() > 1:
                wide = math.sqrt(max(1, p[0].numel()))
                p.copy_(torch.randn(p.shape, generator=source) / wide)
        for part in module.modules():
            index, channels = getattr(part, "index", None), getattr(part, "channels", None)
            if isinstance(index, Tensor) and isinstance(channels, int) and index.numel():
                index.copy_(torch.linspace(0, channels - 1, index.numel()).round())
