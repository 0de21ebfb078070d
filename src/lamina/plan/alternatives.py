"""Alternatives of a span: its layers apart; and those of a layer: the spans that would take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lamina.measure.stats import Stats
from lamina.methods.base import Candidate, Method, Spanning
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan.chains import Candidates, total
from lamina.plan.curves import Point, chain_of, point_of, priced
from lamina.plan.fronts import COMBINED, join, pareto, thin
from lamina.plan.plan import Plan
from lamina.plan.spans import parts_of, span_line, spans_in

SAME = 1 + 1e-9
APART = "layers apart"  # the chain of a span's layers, each on its own


def held(site: Site) -> str:
    """Return what a span holds, in words.

    Example:
        >>> through = (("act",),)
        >>> held(Site("a..b", "chain", members=("a", "b"), between=(("relu",),), through=through))
        'chain of a, act, b'
        >>> held(Site("*.fc", "family", shape=(4, 2), members=("1.fc", "2.fc")))
        'family of 1.fc, 2.fc, each 4 x 2'
    """
    if site.kind != "chain":
        shape = f", each {' x '.join(map(str, site.shape))}" if site.shape else ""
        return f"{site.kind} of {', '.join(site.members)}{shape}"
    parts = list(site.members[:1])
    through = site.through or tuple(("",) * len(ops) for ops in site.between)
    for ops, paths, member in zip(site.between, through, site.members[1:], strict=True):
        parts += [path or op for op, path in zip(ops, paths, strict=True)] + [member]
    return f"chain of {', '.join(parts)}"


def span_offers(
    network: Network, sites: Sites, stats: Stats, site: Site,
    spanning: Sequence[Spanning], methods: Sequence[Method],
) -> list[Candidate]:  # fmt: skip
    """Ask every spanning method for its offers at a span, and keep also those another one beats."""
    parts = parts_of(network, sites, stats, site)
    found: list[Candidate] = []
    for method in spanning:
        if site.kind in method.kinds and not method.refuse(site):
            lines: dict[str, list[Candidate]] = {}
            for c in span_line(network, site, method, parts, methods):
                lines.setdefault(chain_of(c.steps), []).append(c)
            found += [c for line in lines.values() for c in pareto(line)]
    return found


def apart(candidates: Candidates, site: Site, objective: str) -> list[Point]:
    """Return what a span's layers could be each on its own, together, as points of the curve."""
    each = [thin(pareto(candidates.get(name, ())), COMBINED) for name in site.members]
    if not all(each):
        return []
    how = "sum" if objective == "sum" else "max"
    return [replace(point_of(c), chain=APART) for c in join(each, how)]


def spans_over(
    candidates: Candidates, sites: Sites, plan: Plan, layer: str, price: Mapping[str, float]
) -> tuple[tuple[str, str], ...]:
    """Return the spans with offers that hold a layer, and why the plan takes none of them."""
    found = []
    for name in spans_in(sites, candidates):
        members = sites[name].members
        if layer not in members:
            continue
        elsewhere = [m for m in members if m not in plan.sites]
        if elsewhere:
            found.append((name, f"{elsewhere[0]} is in another span"))
            continue
        errors = [plan.sites[m].error for m in members]
        error = sum(errors) if plan.objective == "sum" else max(errors)
        here = priced(total(plan.sites[m].cost for m in members), price)
        able = [c for c in candidates[name] if c.error <= error * SAME]
        if not able:
            least = min(c.error for c in candidates[name])
            found.append((name, f"errs by {least:.3g} at least, its layers apart by {error:.3g}"))
            continue
        best = min(able, key=lambda c: priced(c.cost, price))
        ratio = priced(best.cost, price) / max(here, 1e-300)
        said = f"{chain_of(best.steps)} takes {ratio:.2f}x what its layers take apart"
        found.append((name, f"{said} for the same error"))
    return tuple(found)


def unheard(
    site: Site, spanning: Sequence[Spanning], points: Sequence[Point], sites: Sites
) -> tuple[tuple[str, str], ...]:
    """Return which spanning methods offer nothing for a span, and why."""
    names = {name for p in points for name in p.chain.replace(" | ", " > ").split(" > ")}
    found = []
    for method in spanning:
        if site.kind not in method.kinds:
            found.append((method.name, f"it serves {' and '.join(method.kinds)} sites only"))
        elif why := _refused(site, method, sites):
            found.append((method.name, why))
        elif method.name not in names:
            found.append((method.name, "it has no offer for it"))
    return tuple(found)


def _refused(site: Site, method: Spanning, sites: Sites) -> str:
    """Return why a method refuses a span, also where only its places say so."""
    places = [place for place in method.places(sites) if place.name == site.name]
    return next((why for place in (*places, site) if (why := method.refuse(place))), "")
