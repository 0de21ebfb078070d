"""Proposing: every site's offers, chains of methods included, as a Pareto list per site.

A method that is not final (low rank, pruning) offers points, and each point is ended by every final
method, on the layers it leaves. These layers form families: the encoders of all ranks of one layer
are alike. A final method that can offers for a whole family at once (`methods.base.Alike`): there
few tensors are really coded, and no step is tried that is much finer than what the point has lost
already. That is what makes it cheap to extend every point instead of a few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from lamina.codecs.alike import spread
from lamina.errors import MethodError
from lamina.measure.stats import Cost, LayerStats, Stats
from lamina.methods.base import (
    Alike,
    Candidate,
    Leaf,
    Method,
    Spanning,
    Stage,
    Step,
    Weights,
    find_method,
    get_method,
    registry,
    spanning,
    weights_of,
)
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan.fronts import COMBINED, join, pareto, thin

__all__ = ["COMBINED", "EXTENDED", "Candidates", "join", "pareto", "propose_layers", "thin"]

EXTENDED = (24, 1)  # points of a first, a second non-final method's curve that are extended
VALUES_SHARE = 3  # a method that shapes nothing but values gets one in so many of these
NESTED = 2  # layers of a family on which a second non-final method is tried
NEGLIGIBLE = 0.01  # of what a point has lost already

Candidates = Mapping[str, tuple[Candidate, ...]]
Progress = Callable[[int, int, str], None]
Line = list[Candidate]


def propose_layers(
    network: Network,
    sites: Sites,
    stats: Stats,
    methods: Sequence[Method],
    progress: Progress | None = None,
) -> dict[str, tuple[Candidate, ...]]:
    """Ask methods for their offers on every layer site, and chain them through the stages.

    Returns:
        Per site name its Pareto candidates, sorted by falling cost in bits.
    """
    found: dict[str, tuple[Candidate, ...]] = {}
    for i, site in enumerate(sites.layers):
        if progress:
            progress(i, len(sites.layers), site.name)
        weights = weights_of(network, site)
        found[site.name] = propose_site(site, weights, stats.of(site.name), methods)
    if progress:
        progress(len(sites.layers), len(sites.layers), "")
    return found


def choose_methods(names: Sequence[str] | None) -> list[Method]:
    """Return the methods of layers to ask, `keep` first; those of no `asked` only by name.

    Raises:
        MethodError: a name is unknown, or the list is empty.
    """
    if names is None:
        return [m for m in registry().values() if getattr(m, "asked", True)]
    if isinstance(names, str):
        raise MethodError("methods is a list of names", repr(names), "", f"write [{names!r}]")
    chosen = {"keep": get_method("keep")} | {name: find_method(name) for name in names}
    return [method for method in chosen.values() if not isinstance(method, Spanning)]


def choose_spanning(names: Sequence[str] | None) -> list[Spanning]:
    """Return the methods to ask that span layers."""
    return [method for name, method in spanning().items() if names is None or name in names]


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


def _chains(
    site: Site,
    weights: Weights,
    stats: LayerStats | None,
    methods: Sequence[Method],
    before: tuple[Stage, ...] = (),
) -> list[Candidate]:
    """Return all chains for a layer whose non-final methods come after the stages `before`."""
    return extend_family([Leaf(site, weights, stats)], [0.0], methods, before)[0]


def extend_family(
    family: Sequence[Leaf], floors: Sequence[float], methods: Sequence[Method],
    before: tuple[Stage, ...],
) -> list[Line]:  # fmt: skip
    """Return all chains for every layer of a family.

    Args:
        family: layers alike; before the first step it is one layer alone.
        floors: the error that was made before each of them.
        methods: to ask; `keep` is not asked for what a step has left, whose cost is known.
        before: stages of the steps that left the family.
    """
    found: list[Line] = [[] for _ in family]
    for method in methods:
        served = [i for i, leaf in enumerate(family) if serves(method, leaf.site)]
        if not method.final:
            if len(before) < len(EXTENDED) and all(method.stage > stage for stage in before):
                _begin_with(method, family, floors, methods, before, served, found)
        elif not before or method.name != "keep":
            for i, line in zip(
                served, _offers(method, family, floors, served, before), strict=True
            ):
                found[i] += line
    return found


def serves(method: Method, site: Site) -> bool:
    """Return whether a method takes a site."""
    return site.kind in method.kinds and not method.refuse(site)


def _offers(
    method: Method, family: Sequence[Leaf], floors: Sequence[float], served: Sequence[int],
    before: tuple[Stage, ...],
) -> list[tuple[Candidate, ...]]:  # fmt: skip
    """Return a final method's offers for the served layers of a family."""
    leaves = [family[i] for i in served]
    if before and isinstance(method, Alike):
        return method.propose_alike(leaves, [floors[i] for i in served])
    return [tuple(method.propose(leaf.site, leaf.weights, leaf.stats)) for leaf in leaves]


def _begin_with(
    method: Method, family: Sequence[Leaf], floors: Sequence[float], methods: Sequence[Method],
    before: tuple[Stage, ...], served: Sequence[int], found: list[Line],
) -> None:  # fmt: skip
    """Add the chains that begin with a non-final method, to the lines of the layers it serves."""
    names: dict[object, tuple[str, ...]] = {}
    ends = not any(_follows(later, method, len(before)) for later in methods)
    picks: list[tuple[int, Candidate, tuple[Leaf, ...]]] = []
    for k in spread(len(served), NESTED if before else len(served)):
        leaf = family[served[k]]
        offers = pareto(method.propose(leaf.site, leaf.weights, leaf.stats))
        for offer in _points(method, offers, len(before)):
            if ends:
                steps = _keeps(method, leaf, offer, names)
                found[served[k]].append(replace(offer, steps=offer.steps + steps))
                continue
            settings = offer.steps[0].settings
            left = method.leave(leaf.site, leaf.weights, leaf.stats, settings)
            picks.append((served[k], offer, left))
    lines: list[list[Line]] = [[[] for _ in left] for _, _, left in picks]
    for place in range(max((len(left) for _, _, left in picks), default=0)):
        members = [n for n, (_, _, left) in enumerate(picks) if place < len(left)]
        members.sort(key=lambda n: picks[n][1].cost.bits)
        alike = extend_family(
            [picks[n][2][place] for n in members],
            [floors[picks[n][0]] + picks[n][1].error for n in members],
            methods,
            (*before, method.stage),
        )
        for n, line in zip(members, alike, strict=True):
            lines[n][place] = line
    for (i, offer, left), curves in zip(picks, lines, strict=True):
        how = "sum" if family[i].stats is not None else "max"
        found[i] += end_offer(offer, left, curves, how, floors[i])


def _follows(later: Method, method: Method, depth: int) -> bool:
    """Return whether a method may shape what another leaves; `keep` shapes nothing."""
    if later.final:
        return later.name != "keep"
    return depth + 1 < len(EXTENDED) and later.stage > method.stage


def _keeps(
    method: Method, leaf: Leaf, offer: Candidate, names: dict[object, tuple[str, ...]]
) -> tuple[Step, ...]:
    """Return the steps that keep what an offer leaves.

    To describe a wide layer's factors is slow, so it is done once for each kind of structure: the
    names of what is left are those of its parts.
    """
    settings = offer.steps[0].settings
    edits = method.structure(leaf.site, settings)
    kind = (leaf.site.name, *((edit.form, *sorted(edit.settings)) for edit in edits))
    if kind not in names:
        left = method.leave(leaf.site, leaf.weights, leaf.stats, settings)
        names[kind] = tuple(each.site.name for each in left)
    return tuple(Step("keep", name) for name in names[kind])


def ended_by(
    method: Method, last: Method, site: Site, weights: Weights, stats: LayerStats | None
) -> list[Candidate]:
    """Return a layer's chains of one non-final method and one final one, or `keep`, after it."""
    found: list[Line] = [[]]
    _begin_with(method, [Leaf(site, weights, stats)], [0.0], [last], (), [0], found)
    return found[0]


def _points(method: Method, offers: tuple[Candidate, ...], depth: int) -> Sequence[Candidate]:
    """Return the points of a non-final method's curve that are extended."""
    count = EXTENDED[depth]
    if method.stage >= Stage.VALUES:
        count = -(-count // VALUES_SHARE)
    if count > 1:
        return thin(offers, count)
    return offers[len(offers) // 2 :][:count]  # one alone: neither end is of much use


def end_offer(
    offer: Candidate, leaves: Sequence[Leaf], curves: Sequence[Line], how: str, floor: float
) -> list[Candidate]:
    """End a non-final offer: its layers kept as they are, or on their joint curve.

    Args:
        offer: of one step.
        leaves: what it leaves.
        curves: what later stages offer for each of these; may be empty.
        how: errors of the leaves come together: `"sum"` or `"max"`.
        floor: the error made before the offer.
    """
    keeps = _kept(offer, leaves)
    steps = tuple(step for keep in keeps for step in keep.steps)
    ended = [Candidate(offer.site, offer.steps + steps, offer.cost, offer.error)]
    if not any(curves):
        return ended
    each = [
        thin(pareto(curve), COMBINED) if curve else (keep,)
        for curve, keep in zip(curves, keeps, strict=True)
    ]
    fixed = sum(leaf.bits for leaf in leaves)
    for c in _useful(join(each, how), floor + offer.error):
        cost = replace(
            c.cost, bits=c.cost.bits + fixed, macs=offer.cost.macs, params=offer.cost.params
        )
        ended.append(Candidate(offer.site, offer.steps + c.steps, cost, offer.error + c.error))
    return ended


def _kept(offer: Candidate, leaves: Sequence[Leaf]) -> list[Candidate]:
    """Return what an offer's layers cost as they are: shares of what it costs itself."""
    sizes = [sum(t.numel() for t in leaf.weights.values()) for leaf in leaves]
    bits = max(0.0, offer.cost.bits - sum(leaf.bits for leaf in leaves))
    return [
        Candidate(
            leaf.site.name,
            (Step("keep", leaf.site.name),),
            Cost(bits=bits * size / max(1, sum(sizes))),
            0.0,
        )
        for leaf, size in zip(leaves, sizes, strict=True)
    ]


def _useful(line: Sequence[Candidate], floor: float) -> list[Candidate]:
    """Drop points that only take back an error far below what was lost before; keep the first."""
    small = [c for c in line if c.error <= NEGLIGIBLE * floor]
    return [c for c in line if c.error > NEGLIGIBLE * floor] + small[-1:]


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
