"""The choice of each layer on the HTML page: its curves as a chart, and its chains as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamina.report import formats as f
from lamina.report.charts import Axis, Point, curves_plot, span
from lamina.report.reasons import Curve, amount, neighbours, prices_of, times
from lamina.report.reasons import Point as Offer
from lamina.report.section import Facts

LAYERS = 12  # that are shown; all are in report.json
COLOURS = 9  # of chains; the others are grey
DEPTH = 1e9  # errors so many times below a layer's largest are drawn on the axis
AXES = {  # what a chart may have from left to right
    "bytes": ("bytes", f.tick_size),
    "macs": ("multiply-accumulates", f.count),
    "params": ("parameters", f.count),
    "seconds": ("latency", f.seconds),
}


def layer_curves(facts: Facts) -> list[dict[str, Any]]:
    """Return what the page shows of each layer's choice, those with the most bytes, in order.

    Returns:
        per layer its name, what it takes, charts, legend, and rows of two tables.
    """
    curves = facts.get("curves") or {}
    size = {site["site"]: site["bytes_before"] for site in facts["sites"]}
    largest = sorted(curves, key=lambda name: -size.get(name, 0.0))[:LAYERS]
    colour = colours(curves)
    price = prices_of(facts)
    others = [r for r in AXES if r != "bytes" and r in price]
    found = []
    for name in curves:
        taken = next((p for p in curves[name] if p["taken"]), None)
        if name not in largest or taken is None:
            continue
        curve = [p for p in curves[name] if p["error"] is not None]
        chains = list(dict.fromkeys(p["chain"] for p in curve))
        charts = [chart(name, curve, taken, r, colour) for r in ["bytes", *others]]
        found.append(
            {
                "name": name,
                "takes": taken["steps"],
                "at": f"{f.size(taken['bits'] / 8)}, error {f.number(taken['error'])}",
                "charts": [c for c in charts if c],
                "legend": [(colour[chain], chain) for chain in chains],
                "near": near(curve, taken, price),
                "chains": [chain_row(curve, taken, chain, price) for chain in chains],
            }
        )
    return found


def colours(curves: Mapping[str, Curve]) -> dict[str, str]:
    """Return a class for each chain, the same in every layer; the most usual ones differ."""
    count: dict[str, int] = {}
    for curve in curves.values():
        for p in curve:
            count[p["chain"]] = count.get(p["chain"], 0) + 1
    order = sorted(count, key=lambda chain: (-count[chain], chain))
    return {chain: f"c{i}" if i < COLOURS else "small" for i, chain in enumerate(order)}


def chart(
    name: str,
    curve: Curve,
    taken: Offer,
    resource: str,
    colour: Mapping[str, str],
) -> Any:
    """Return a layer's curves over one resource as SVG, or None where there is nothing to draw."""
    from markupsafe import Markup

    words, write = AXES[resource]
    largest = max((p["error"] for p in curve), default=0.0)
    known = [p["error"] for p in curve if p["error"] > largest / DEPTH]
    drawn = [(p, amount(p, resource)) for p in curve if amount(p, resource) > 0]
    if not known or len({x for _, x in drawn}) < 2:
        return None
    low, high = span(known, True)

    def place(p: Offer) -> Point:
        return amount(p, resource), max(low, p["error"])

    lines = [(kind, [place(p) for p, _ in drawn if p["chain"] == c]) for c, kind in colour.items()]
    ring = place(taken) if taken["error"] is not None and amount(taken, resource) > 0 else None
    x = Axis(*span([x for _, x in drawn], True), write, True, words)
    label = f"{name}: predicted error against {words} of every chain"
    svg = curves_plot(label, x, Axis(low, high, f.tick, True), [c for c in lines if c[1]], ring)
    return Markup(svg)


def near(curve: Curve, taken: Offer, price: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Return the taken point between its neighbours, as rows."""
    smaller, larger = neighbours(curve, taken, price)
    rows = (("next cheaper", smaller), ("taken", taken), ("next dearer", larger))
    return [
        (word, f.size(p["bits"] / 8), f.count(p["macs"]), f.seconds(p["seconds"] or None),
         f.number(p["error"]), p["steps"])
        for word, p in rows
        if p is not None
    ]  # fmt: skip


def chain_row(
    curve: Curve, taken: Offer, chain: str, price: Mapping[str, float]
) -> tuple[str, ...]:
    """Return a chain's points, range and cost for the taken point's error, as a row."""
    line = [p for p in curve if p["chain"] == chain]
    sizes = [p["bits"] / 8 for p in line]
    ratio = times(line, taken, price)
    same = "never" if ratio is None else f.ratio(ratio)
    ends = dict.fromkeys((f.size(min(sizes)), f.size(max(sizes))))
    return (chain, str(len(line)), " to ".join(ends), same)
