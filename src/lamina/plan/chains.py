"""Proposing: every site's offers, chains of methods included, as a Pareto list per site."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from lamina.errors import MethodError
from lamina.measure.stats import Cost, LayerStats, Stats
from lamina.methods.base import (
    Candidate,
    Method,
    Stage,
    Step,
    Weights,
    get_method,
    registry,
    weights_of,
)
from lamina.network.sites import Site, Sites
from lamina.network.source import Network

EXTENDED = (3, 1)  # points of a first, a second non-final method's curve that are extended
COMBINED = 24  # points kept of the joint curve of the layers one step leaves

Candidates = Mapping[str, tuple[Candidate, ...]]
Progress = Callable[[int, int, str], None]


def propose(
    network: Network,
    sites: Sites,
    stats: Stats,
    methods: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, tuple[Candidate, ...]]:
    """Ask every method for its offers on every layer site, and chain them through the stages.

    Args:
        network: the network, which is only read.
        sites: from `discover`.
        stats: from `measure`; data-free if `stats.samples == 0`.
        methods: names of the methods to ask; default: all. `keep` is always asked.
        progress: called with (sites done, sites in all, site name).

    Returns:
        Per site name its Pareto candidates, sorted by falling cost in bits.

    Raises:
        MethodError: an unknown method.
    """
    asked = choose_methods(methods)
    found: dict[str, tuple[Candidate, ...]] = {}
    for i, site in enumerate(sites.layers):
        if progress:
            progress(i, len(sites.layers), site.name)
        found[site.name] = propose_site(site, weights_of(network, site), stats.of(site.name), asked)
    if progress:
        progress(len(sites.layers), len(sites.layers), "")
    return found


def choose_methods(names: Sequence[str] | None) -> list[Method]:
    """Return the methods to ask, `keep` first.

    Raises:
        MethodError: a name is unknown, or the list is empty.
    """
    if names is None:
        return list(registry().values())
    if isinstance(names, str):
        raise MethodError("methods is a list of names", repr(names), "", f"write [{names!r}]")
    chosen = {"keep": get_method("keep")} | {name: get_method(name) for name in names}
    return list(chosen.values())


def propose_site(
    site: Site, weights: Weights, stats: LayerStats | None, methods: Sequence[Method]
) -> tuple[Candidate, ...]:
    """Return one layer's Pareto candidates over all chains of `methods`."""
    whole = _chains(site, weights, stats, methods, ())
    return pareto(whole)


def refusals(sites: Sites, methods: Sequence[Method]) -> list[tuple[str, str, str]]:
    """Return (site, method, why) for every method that cannot serve a site."""
    return [
        (site.name, method.name, why)
        for site in sites.layers
        for method in methods
        if (why := method.refuse(site))
    ]


def pareto(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Keep candidates that no other beats in error and in every cost; sorted by falling bits."""
    ordered = sorted(candidates, key=lambda c: (c.cost.bits, c.cost.macs, c.error, str(c.steps)))
    kept: list[Candidate] = []
    for c in ordered:
        if not any(_beats(k, c) for k in kept):
            kept.append(c)
    return tuple(reversed(kept))


def _beats(a: Candidate, b: Candidate) -> bool:
    return (
        a.error <= b.error
        and a.cost.bits <= b.cost.bits
        and a.cost.macs <= b.cost.macs
        and a.cost.params <= b.cost.params
        and a.cost.seconds <= b.cost.seconds
    )


def _chains(
    site: Site,
    weights: Weights,
    stats: LayerStats | None,
    methods: Sequence[Method],
    before: tuple[Stage, ...],
) -> list[Candidate]:
    """Return all chains for a layer whose non-final methods come after the stages `before`."""
    found: list[Candidate] = []
    for method in methods:
        if site.kind not in method.kinds or method.refuse(site):
            continue
        if method.final:
            found += method.propose(site, weights, stats)
        elif len(before) < len(EXTENDED) and all(method.stage > stage for stage in before):
            offers = pareto(method.propose(site, weights, stats))
            for offer in thin(offers, EXTENDED[len(before)]):
                found += _extend(offer, method, site, weights, stats, methods, before)
    return found


def _extend(
    offer: Candidate,
    method: Method,
    site: Site,
    weights: Weights,
    stats: LayerStats | None,
    methods: Sequence[Method],
    before: tuple[Stage, ...],
) -> list[Candidate]:
    """Extend a non-final offer by the joint curve of the layers it leaves."""
    leaves = method.leave(site, weights, stats, offer.steps[0].settings)
    curves = [
        thin(
            pareto(_chains(leaf.site, leaf.weights, leaf.stats, methods, (*before, method.stage))),
            COMBINED,
        )
        for leaf in leaves
    ]
    together = join(curves, "sum" if stats is not None else "max")
    return [
        Candidate(
            site.name,
            offer.steps + c.steps,
            replace(c.cost, macs=offer.cost.macs, params=offer.cost.params),
            offer.error + c.error,
        )
        for c in together
    ]


def join(curves: Sequence[Sequence[Candidate]], how: str = "sum") -> list[Candidate]:
    """Return the joint curve of several layers that are chosen together (a Pareto list).

    Errors add up (`"sum"`), or the largest counts (`"max"`, data-free); costs add up.
    """
    joint = [Candidate("", (), Cost(), 0.0)]
    for curve in curves:
        both = [
            Candidate(
                "",
                a.steps + b.steps,
                a.cost + b.cost,
                a.error + b.error if how == "sum" else max(a.error, b.error),
            )
            for a in joint
            for b in curve
        ]
        joint = list(thin(pareto(both), COMBINED))
    return joint


def thin(candidates: Sequence[Candidate], count: int) -> tuple[Candidate, ...]:
    """Keep at most `count` candidates, spread evenly over the log of the bits, ends included."""
    if len(candidates) <= count:
        return tuple(candidates)
    if count < 2:
        return tuple(candidates[:count])
    logs = [math.log(max(c.cost.bits, 1.0)) for c in candidates]
    top, bottom = logs[0], logs[-1]
    wanted = [top + (bottom - top) * i / (count - 1) for i in range(count)]
    picks = {min(range(len(logs)), key=lambda j: (abs(logs[j] - w), j)) for w in wanted[1:-1]}
    return tuple(candidates[i] for i in sorted(picks | {0, len(logs) - 1}))


def total(costs: Iterable[Cost]) -> Cost:
    """Add costs up."""
    whole = Cost()
    for cost in costs:
        whole = whole + cost
    return whole


def dump_candidates(found: Candidates) -> bytes:
    """Return candidates as JSON bytes."""
    import json

    return json.dumps(
        {
            name: [
                {
                    "steps": [[s.method, s.at, dict(s.settings)] for s in c.steps],
                    "cost": vars(c.cost),
                    "error": c.error,
                }
                for c in offers
            ]
            for name, offers in found.items()
        }
    ).encode()


def parse_candidates(data: bytes) -> dict[str, tuple[Candidate, ...]]:
    """Undo `dump_candidates`."""
    import json

    return {
        name: tuple(
            Candidate(
                name,
                tuple(Step(method, at, settings) for method, at, settings in offer["steps"]),
                Cost(**offer["cost"]),
                offer["error"],
            )
            for offer in offers
        )
        for name, offers in json.loads(data).items()
    }
