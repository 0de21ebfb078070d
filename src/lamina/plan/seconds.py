"""Seconds as a cost: what runs under a candidate, its measured time, and the gate for slow ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lamina.errors import LaminaError, MethodError
from lamina.forms import install
from lamina.measure.latency import LatencyTable, Structure, structure_key
from lamina.methods.base import Candidate, Step, find_method, get_method
from lamina.network.layers import describe
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan.chains import Candidates
from lamina.plan.spans import spans_in


def structure_of(network: Network, site: Site, steps: Sequence[Step]) -> Structure:
    """Return the structural edits of a chain at a site, without values; `()` where all stays.

    Args:
        network: as it is; only the outline of its layers is looked at.
        site: a layer, or a span of them.
        steps: its chain.

    Raises:
        MethodError: a step names an unknown method or a layer that no step has left, or its
            settings do not fit the layer.
    """
    first = next((step for step in steps if step.at == site.name), None)
    if first is None:
        return ()
    found = tuple(find_method(first.method).structure(site, first.settings))
    made: nn.Module | None = None
    for step in steps:
        if step is first or not _may_reshape(step):
            continue
        here = site
        if found or site.kind != "layer":  # earlier steps have left layers of other shapes or names
            if made is None:
                made = outline(network.module)
                install(made, found)
            here = _left(made, step)
        edits = tuple(get_method(step.method).structure(here, step.settings))
        if made is not None:
            install(made, edits)
        found += edits
    return found


def outline(module: nn.Module) -> nn.Module:
    """Return a copy of a network without values, on the meta device: it takes no memory.

    Example:
        >>> outline(nn.Linear(3, 2)).weight.device
        device(type='meta')
    """
    kept: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        kept[id(tensor)] = empty
    return copy.deepcopy(module, kept)


def _left(made: nn.Module, step: Step) -> Site:
    """Return the layer that a later step works on, as earlier steps have left it."""
    path, _, _ = step.at.rpartition(".")
    try:
        found = describe(step.at, made.get_submodule(step.at), made.get_submodule(path))
    except AttributeError:
        found = ()
    if len(found) != 1:
        raise MethodError("a step has no layer to work on", f"{step.method} at {step.at}")
    return found[0]


def structures_of(
    network: Network, sites: Sites, candidates: Candidates
) -> dict[str, tuple[str, list[Structure]]]:
    """Return, by site that has any, the path of its layer and what may stand there.

    Edits that reach outside the layer cannot be timed by a table, and are left out.
    """
    found: dict[str, tuple[str, list[Structure]]] = {}
    for site in sites.layers:
        given = {
            structure_key(site.module, edits): edits
            for c in candidates.get(site.name, ())
            if (edits := structure_of(network, site, c.steps)) and inside(site, edits)
        }
        if given:
            found[site.name] = (site.module, list(given.values()))
    return found


def inside(site: Site, edits: Structure) -> bool:
    """Whether edits stay within the site's layer."""
    return all(
        edit.path == site.module or edit.path.startswith(f"{site.module}.") for edit in edits
    )


def reshape_edits(
    network: Network, sites: Sites, chosen: Mapping[str, Sequence[Step]]
) -> Structure:
    """Return the structural edits of a whole choice: by site name, its chain."""
    return tuple(
        edit for name, steps in chosen.items() for edit in structure_of(network, sites[name], steps)
    )


def span_structures(
    network: Network, sites: Sites, candidates: Candidates
) -> dict[str, tuple[str, dict[str, Structure]]]:
    """Return, by span that has any, what it is like, and what may stand there by `span_key`.

    Spans of equal layers with equal operations between them are alike in what they take.
    """
    layers = {site.name: site for site in sites.layers}
    found: dict[str, tuple[str, dict[str, Structure]]] = {}
    for name in spans_in(sites, candidates):
        span = sites[name]
        given = {
            span_key(span, edits): edits
            for c in candidates[name]
            if (edits := structure_of(network, span, c.steps))
        }
        if given:
            members = [layers[member] for member in span.members]
            like = [
                (repr(network.module.get_submodule(m.module)), m.positions, m.extent)
                for m in members
            ]
            found[name] = repr((span.kind, like, span.between)), given
    return found


def span_key(span: Site, structure: Structure) -> str:
    """Return a structure at a span as text, the same for spans that are alike.

    Example:
        >>> from lamina.forms import Edit
        >>> span = Site("a..b", "chain", members=("a", "b"), through=(("act",),))
        >>> span_key(span, (Edit("act", "identity"), Edit("b.0", "low_rank", {"rank": 1})))
        '[["<act>", "identity", {}], ["<1>.0", "low_rank", {"rank": 1}]]'
    """
    names = {member: f"<{i}>" for i, member in enumerate(span.members)}
    between = [path for paths in span.through for path in paths if path]
    names |= {path: f"<act{i or ''}>" for i, path in enumerate(between)}
    rows = []
    for edit in structure:
        inside = [n for n in names if edit.path == n or edit.path.startswith(f"{n}.")]
        own = max(inside, key=len, default="")
        path = f"{names[own]}{edit.path.removeprefix(own)}" if own else edit.path
        rows.append([path, edit.form, dict(edit.settings)])
    return json.dumps(rows, sort_keys=True)


def with_seconds(
    network: Network, sites: Sites, candidates: Candidates, table: LatencyTable
) -> tuple[dict[str, tuple[Candidate, ...]], int]:
    """Put measured seconds into candidates, and drop the structures that save no time.

    A layer that stays as it is keeps its own time; a candidate whose structure is not faster than
    the layer it replaces by more than noise, or was not measured, is dropped (the speed gate).
    Sites without structures are in the table's fixed time, so their candidates cost no seconds.
    What a span saves was measured on the whole network: it takes what its layers take, less that;
    below zero where layers that are in the fixed time have gone.

    Returns:
        the candidates by site, and how many structures were dropped.
    """
    found: dict[str, tuple[Candidate, ...]] = {}
    dropped: set[tuple[str, str]] = set()
    layers = {site.name for site in sites.layers}
    for name in (*layers_of(sites), *spans_in(sites, candidates)):
        site = sites[name]
        dense = sum(table.dense.get(n, 0.0) for n in site.members or (name,))
        kept = []
        for c in candidates.get(name, ()):
            edits = structure_of(network, site, c.steps)
            seconds: float | None = dense
            if edits and name in layers:
                key = structure_key(site.module, edits)
                seconds = _gated(table.ratios.get(name, {}).get(key), dense, dense)
            elif edits:
                key = span_key(site, edits)
                seconds = _gated(table.spans.get(name, {}).get(key), dense, table.whole)
            if seconds is None:
                dropped.add((name, key))
            else:
                kept.append(replace(c, cost=replace(c.cost, seconds=seconds)))
        found[name] = tuple(kept)
    return found, len(dropped)


def layers_of(sites: Sites) -> list[str]:
    """Return the names of all layers, in order."""
    return [site.name for site in sites.layers]


def _gated(measured: tuple[float, float] | None, dense: float, whole: float) -> float | None:
    """Return what takes `dense` less what was saved of `whole` [s]; None where that is noise."""
    ratio, noise = measured or (1.0, 0.0)
    return dense + (ratio - 1) * whole if ratio + noise < 1 else None


def count_structures(structures: Mapping[str, tuple[str, Iterable[Structure]]]) -> int:
    """Return how many structures there are over all sites."""
    return sum(len(list(given)) for _, given in structures.values())


def _may_reshape(step: Step) -> bool:
    """Whether a step could change a layer's form: told by a layer that is none."""
    method = get_method(step.method)
    if method.final:
        return False
    try:
        return bool(method.structure(Site(step.at, module=step.at), step.settings))
    except (LaminaError, ArithmeticError, LookupError, TypeError, ValueError):
        return True
