"""Sites that span layers: what methods see of them, what they offer, which layers they claim."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lamina.forms import Edit
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import (
    Candidate,
    Leaf,
    Method,
    Parts,
    Passage,
    Spanning,
    Stage,
    Weights,
    spanning,
    weights_of,
)
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan.chains import EXTENDED, Candidates, end_offer, extend_family
from lamina.plan.fronts import pareto, thin

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
SLOPES = {"prelu", "leaky_relu"}
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Span:
    """A site that spans layers, and the methods that take it."""

    site: Site
    methods: tuple[Spanning, ...]


def find_spans(sites: Sites, methods: Sequence[Spanning] | None = None) -> tuple[Span, ...]:
    """Return the sites that methods find, each once, in the order they are found."""
    found: dict[str, Span] = {}
    for method in spanning().values() if methods is None else methods:
        for site in method.places(sites):
            if site.kind in method.kinds and not method.refuse(site):
                old = found.get(site.name, Span(site, ()))
                found[site.name] = Span(site, (*old.methods, method))
    return tuple(found.values())


def span_refusals(
    sites: Sites, methods: Sequence[Spanning] | None = None
) -> list[tuple[str, str, str]]:
    """Return (site, method, why) for every place that a spanning method looked at and refuses."""
    return [
        (site.name, method.name, why)
        for method in (spanning().values() if methods is None else methods)
        for site in method.places(sites)
        if (why := method.refuse(site))
    ]


def parts_of(network: Network, sites: Sites, stats: Stats, site: Site) -> Parts:
    """Return what a spanning method sees of a chain or a family: tensors and statistics.

    Args:
        network: which the tensors are of; only read.
        sites, stats: of it.
        site: the chain or family.

    Example:
        >>> from lamina.network.discover import discover
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> network = Network(net, (torch.zeros(1, 3),))
        >>> sites = discover(network)
        >>> parts_of(network, sites, Stats(), sites.chains[0]).passages
        ((Passage(op='relu', module='1', tensors={}),),)
    """
    layers = {layer.name: layer for layer in sites.layers}
    members = tuple(
        Leaf(layers[name], weights_of(network, layers[name]), stats.of(name))
        for name in site.members
    )
    if site.kind != "chain":
        return Parts(members)
    links = zip(site.members, site.members[1:], strict=False)
    return Parts(
        members,
        tuple(
            tuple(
                Passage(op, path, _tensors(network.module, op, path))
                for op, path in zip(ops, paths, strict=True)
            )
            for ops, paths in zip(site.between, site.through, strict=True)
        ),
        tuple(stats.cross.get(f"{a}->{b}") for a, b in links),
    )


def _tensors(root: nn.Module, op: str, path: str) -> Weights:
    module = root.get_submodule(path) if path else None
    if isinstance(module, NORMS) and module.running_mean is not None:
        mean, variance = module.running_mean.double(), module.running_var
        assert variance is not None
        scale = (variance.double() + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight.detach().double()
        shift = -mean * scale
        if module.bias is not None:
            shift = shift + module.bias.detach().double()
        return {"scale": scale, "shift": shift}
    if op in SLOPES and module is not None:
        slope = getattr(module, "weight", getattr(module, "negative_slope", None))
        if slope is not None:
            return {"slope": torch.as_tensor(slope).detach().double().reshape(-1)}
    return {}


def propose_spans(
    network: Network,
    sites: Sites,
    stats: Stats,
    methods: Sequence[Method],
    spans: Sequence[Span],
    progress: Progress | None = None,
) -> dict[str, tuple[Candidate, ...]]:
    """Ask spanning methods for their offers, each ended by the methods of later stages.

    Returns:
        by span name its Pareto candidates; spans without any are left out.
    """
    found: dict[str, tuple[Candidate, ...]] = {}
    for number, span in enumerate(spans):
        if progress:
            progress(number, len(spans), span.site.name)
        parts = parts_of(network, sites, stats, span.site)
        line: list[Candidate] = []
        for method in span.methods:
            line += span_line(network, span.site, method, parts, methods)
        if line:
            found[span.site.name] = pareto(line)
    if progress:
        progress(len(spans), len(spans), "")
    return found


def span_line(
    network: Network, site: Site, method: Spanning, parts: Parts, methods: Sequence[Method]
) -> list[Candidate]:
    """Return the chains that begin with one spanning method at one site, beaten ones included."""
    offers = pareto(method.propose(site, parts))
    how = "sum" if all(m.stats is not None for m in parts.members) else "max"
    found: list[Candidate] = []
    for offer in thin(offers, EXTENDED[0]):
        settings = offer.steps[0].settings
        edits = method.structure(site, settings)
        offer = replace(offer, cost=offer.cost + _around(network, site, edits))
        leaves = method.leave(site, parts, settings)
        curves = [_curve(leaf, methods, method.stage, offer.error) for leaf in leaves]
        found += end_offer(offer, leaves, curves, how, 0.0)
    return found


def _curve(leaf: Leaf, methods: Sequence[Method], stage: Stage, floor: float) -> list[Candidate]:
    """Return the chains that later stages offer for what a span leaves."""
    useful = [m for m in methods if m.final or m.stage > stage]
    if not any(m.name != "keep" for m in useful):
        return []
    return extend_family([leaf], [floor], useful, (stage,))[0]


def _around(network: Network, site: Site, edits: Iterable[Edit]) -> Cost:
    """Return what edits cost or save outside the members: names in the file, norms that go."""
    params, bits = 0.0, 0.0
    known = dict(network.module.named_modules())
    for edit in edits:
        bits += 8.0 * len(json.dumps([edit.path, edit.form, dict(edit.settings)]))
        if edit.form == "identity" and edit.path not in site.members and edit.path in known:
            gone = known[edit.path]
            params -= sum(p.numel() for p in gone.parameters())
            held = (*gone.parameters(), *gone.buffers())
            bits -= sum(8.0 * t.numel() * t.element_size() for t in held)
    return Cost(params=params, bits=bits)


def claims_of(
    sites: Sites, candidates: Candidates
) -> tuple[list[str], list[set[int]]]:  # fmt: skip
    """Return the names of all sites that have offers, and which layers each of them claims.

    Example:
        >>> one, two = Site("a"), Site("b")
        >>> chain = Site("a..b", "chain", members=("a", "b"), between=((),), through=((),))
        >>> offers = {"a": (), "b": (), "a..b": (Candidate("a..b", (), Cost(), 0.0),)}
        >>> claims_of(Sites((one, two), (chain,)), offers)
        (['a', 'b', 'a..b'], [{0}, {1}, {0, 1}])
    """
    order = {site.name: i for i, site in enumerate(sites.layers)}
    names = list(order)
    claims = [{i} for i in range(len(names))]
    for name in spans_in(sites, candidates):
        names.append(name)
        claims.append({order[member] for member in sites[name].members})
    return names, claims


def spans_in(sites: Sites, candidates: Mapping[str, Any]) -> list[str]:
    """Return the names of spans that have something, in the order given."""
    layers = {site.name for site in sites.layers}
    return [name for name, offers in candidates.items() if name not in layers and offers]
