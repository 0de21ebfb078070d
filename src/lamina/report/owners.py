"""Who owns what: the rows of layers and spans, the bytes of the file by owner, and refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.artifact import Package
from lamina.forms import Edit
from lamina.methods.base import Method, Spanning, registry, spanning, weights_of
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan import Plan
from lamina.plan.alternatives import held
from lamina.plan.chains import choose_spanning, refusals
from lamina.plan.offers import asked_methods
from lamina.plan.spans import span_refusals


def spans_of(plan: Plan, sites: Sites) -> tuple[Site, ...]:
    """Return the spans that a plan takes."""
    layers = {site.name for site in sites.layers}
    return tuple(sites[name] for name in plan.sites if name not in layers and name in sites)


def owners_of(sites: Sites, edits: Sequence[Edit], spans: Sequence[Site] = ()) -> dict[str, str]:
    """Return which site owns a name: tensors by their names, replaced modules by `path.`.

    Args:
        sites: all there are.
        edits: of the network.
        spans: that were taken: they own what their layers would, and what else they replace.

    Example:
        >>> site = Site("fc", module="fc", weight="fc.weight", bias="fc.bias")
        >>> owners_of(Sites((site,)), [Edit("fc", "low_rank")])
        {'fc.weight': 'fc', 'fc.bias': 'fc', 'fc.': 'fc'}
    """
    owners: dict[str, str] = {}
    replaced = {e.path for e in edits if e.form != "values"}
    taken = {member: span.name for span in spans for member in span.members}
    for site in sites.layers:
        for name in (site.weight, site.bias, *site.aliases):
            if name:
                owners.setdefault(name, taken.get(site.name, site.name))
        if site.module in replaced:
            owners.setdefault(f"{site.module}.", taken.get(site.name, site.name))
    layers = {site.name: site for site in sites.layers}
    for span in spans:
        between = {path for paths in span.through for path in paths}
        for path in replaced - {""}:
            around = any(layers[m].module.startswith(f"{path}.") for m in span.members)
            if path in between or around:
                owners.setdefault(f"{path}.", span.name)
    return owners


def owner(name: str, owners: Mapping[str, str]) -> str | None:
    """Return the site a tensor (or a module inside a site) belongs to, or None."""
    if name in owners:
        return owners[name]
    parts = name.split(".")
    prefixes = (".".join(parts[:i]) + "." for i in range(len(parts), 0, -1))
    return next((owners[p] for p in prefixes if p in owners), None)


def ledger_of(package: Package, owners: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the parts of the file: name, site, bytes, form of values and codec."""
    rows: list[dict[str, Any]] = []
    for part, size in package.ledger.items():
        record = package.records.get(part)
        rows.append(
            {
                "part": part,
                "site": None if record is None else owner(part, owners),
                "bytes": size,
                "form": None if record is None else record.form,
                "codec": package.codecs.get(part),
            }
        )
    return rows


def site_rows(
    network: Network,
    sites: Sites,
    plan: Plan,
    ledger: Sequence[Mapping[str, Any]],
    errors: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Return what a report says of every layer, and of every span the plan takes, in order.

    A span stands before the first of its layers. Their rows have the key `span`, and hold only what
    they were before: whatever sums rows leaves them out (`section.own_rows`).
    """
    spans = {member: span for span in spans_of(plan, sites) for member in span.members}
    rows: list[dict[str, Any]] = []
    told: set[str] = set()
    layers = {site.name: site for site in sites.layers}
    for site in sites.layers:
        span = spans.get(site.name)
        if span is None:
            rows.append(_site(network, site, plan, ledger, errors))
            continue
        if span.name not in told:
            told.add(span.name)
            rows.append(_span(network, span, layers, plan, ledger, errors))
        rows.append(_member(network, site, span))
    return rows


def _site(
    network: Network,
    site: Site,
    plan: Plan,
    ledger: Sequence[Mapping[str, Any]],
    errors: Mapping[str, float],
) -> dict[str, Any]:
    weights = weights_of(network, site).values()
    params = sum(t.numel() for t in weights)
    size = sum(t.numel() * t.element_size() for t in weights)
    decided = plan.sites.get(site.name)
    return {
        "site": site.name,
        "op": site.op,
        "shape": list(site.shape),
        "chain": decided.describe() if decided else "keep()",
        "params_before": params,
        "params_after": decided.cost.params if decided else params,
        "macs_before": site.macs,
        "macs_after": decided.cost.macs if decided else site.macs,
        "bytes_before": size,
        "bytes_planned": decided.cost.bits / 8 if decided else size,
        "bytes_file": sum(row["bytes"] for row in ledger if row["site"] == site.name),
        "error_predicted": decided.error if decided else 0.0,
        "error_measured": errors.get(site.name),
    }


def _span(
    network: Network,
    span: Site,
    layers: Mapping[str, Site],
    plan: Plan,
    ledger: Sequence[Mapping[str, Any]],
    errors: Mapping[str, float],
) -> dict[str, Any]:
    before = [_member(network, layers[name], span) for name in span.members]
    decided = plan.sites[span.name]
    return {
        "site": span.name,
        "op": span.kind,
        "shape": list(span.shape),
        "holds": held(span),
        "chain": decided.describe(),
        "params_before": sum(row["params_before"] for row in before),
        "params_after": decided.cost.params,
        "macs_before": sum(row["macs_before"] for row in before),
        "macs_after": decided.cost.macs,
        "bytes_before": sum(row["bytes_before"] for row in before),
        "bytes_planned": decided.cost.bits / 8,
        "bytes_file": sum(row["bytes"] for row in ledger if row["site"] == span.name),
        "error_predicted": decided.error,
        "error_measured": errors.get(span.name),
    }


def _member(network: Network, site: Site, span: Site) -> dict[str, Any]:
    weights = weights_of(network, site).values()
    return {
        "site": site.name,
        "span": span.name,
        "op": site.op,
        "shape": list(site.shape),
        "chain": f"in {span.name}",
        "params_before": sum(t.numel() for t in weights),
        "params_after": 0,
        "macs_before": site.macs,
        "macs_after": 0,
        "bytes_before": sum(t.numel() * t.element_size() for t in weights),
        "bytes_planned": 0,
        "bytes_file": 0,
        "error_predicted": None,
        "error_measured": None,
    }


def asked_for(
    plan: Plan, methods: Sequence[str] | None, proposed: bool
) -> tuple[list[Method], list[Spanning]]:
    """Return the methods of layers, and those of spans, that a run had to do with.

    Args:
        plan: what was decided.
        methods: names the user chose from; None: all that are asked unless told otherwise.
        proposed: whether they were asked at all; where the plan was given, or made by a recipe,
            those that it takes.
    """
    if not proposed:
        taken = {step.method for decided in plan.sites.values() for step in decided.steps}
        return (
            [method for name, method in registry().items() if name in taken],
            [method for name, method in spanning().items() if name in taken],
        )
    limits = plan.budget
    counts = limits.get("size") is not None or limits.get("max_drop") is not None
    asked = asked_methods(methods, counts, limits.get("latency") is not None)
    return asked, choose_spanning(methods)


def refused_by(sites: Sites, methods: Sequence[Method], spans: Sequence[Spanning]) -> list[str]:
    """Return one note per method that cannot serve some layers, or some spans of them.

    Args:
        sites: all there are.
        methods, spans: that were asked, see `asked_for`.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for site, method, why in refusals(sites, methods):
        found.setdefault(method, []).append((site, why))
    count = len(sites.layers)
    said = [
        f"{method} does not serve {len(rows)} of {count} layers (first {rows[0][0]}: {rows[0][1]})"
        for method, rows in sorted(found.items())
    ]
    over: dict[str, list[tuple[str, str]]] = {}
    for site, method, why in span_refusals(sites, spans):
        over.setdefault(method, []).append((site, why))
    places = {method.name: len(list(method.places(sites))) for method in spans}
    for method, rows in sorted(over.items()):
        first = f"first {rows[0][0]}: {rows[0][1]}"
        said.append(f"{method} does not serve {len(rows)} of {places[method]} spans ({first})")
    return said
