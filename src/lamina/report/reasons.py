"""What a report says of the decision itself: the rounds it took, every choice, and its latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.plan.allocate import hull
from lamina.report import formats as f
from lamina.report.section import Facts, Section

Point = Mapping[str, Any]
Curve = Sequence[Point]
SAME = 1 + 1e-9
UNITS = {"bytes": "byte", "macs": "multiply-accumulate", "params": "parameter", "seconds": "second"}


def rounds(facts: Facts) -> Section | None:
    """What was asked, predicted and measured each time the plan was tried; None where none was."""
    unit = facts["quality"]["unit"]
    rows = tuple(
        (f"{row['round']:.0f}", row["asked"], amounts(row["predicted"], unit),
         amounts(row["measured"], unit), "kept" if row["kept"] else "", row["note"])
        for row in facts.get("rounds") or ()
    )  # fmt: skip
    if not rows:
        return None
    return Section(
        "rounds",
        "Rounds: asked, predicted, measured",
        ("", "asked", "predicted", "measured", "", "note"),
        frozenset({0}),
        rows,
        note="A plan is made from predictions; each round carries one out and measures it, and the "
        "next one is corrected by what was found.",
    )


def amounts(values: Mapping[str, Any], unit: str = "") -> str:
    """Return named numbers as text.

    Example:
        >>> amounts({"bytes": 17_243, "error": 0.0123}), amounts({"drop": 0.31}, "points")
        ('17.2 kB, error 0.0123', '0.31 points lost')
    """
    words = {
        "bytes": f.size,
        "seconds": f.seconds,
        "drop": lambda v: f.drop(v, unit),
        "max_drop": lambda v: f.drop(v, unit),
        "macs": lambda v: f"{f.count(v)} MACs",
        "params": lambda v: f"{f.count(v)} parameters",
    }
    parts = [
        words[name](value) if name in words else f"{name} {f.number(value)}"
        for name, value in values.items()
    ]
    return ", ".join(parts) or f.NONE


def choices(facts: Facts) -> Section | None:
    """What each layer takes, its neighbours, and the best other chain; None without curves."""
    rows, price = [], prices_of(facts)
    for name, curve in (facts.get("curves") or {}).items():
        taken = next((p for p in curve if p["taken"]), None)
        if taken is not None:
            smaller, larger = neighbours(curve, taken, price)
            rows.append((name, taken["chain"], _at(taken), _at(smaller), _at(larger),
                         rival(curve, taken, price)))  # fmt: skip
    if not rows:
        return None
    said = [f"{f.number(value)} per {UNITS.get(name, name)}" for name, value in price.items()]
    note = (
        "Bytes and predicted error of the point taken, of its neighbours on the lower hull of what "
        "was offered, and the best other chain"
    )
    if said:
        note += f". The error that one more unit saves at this budget: {', '.join(said)}"
    if len(said) > 1:
        note += "; the prices say what is cheaper"
    return Section(
        "choices",
        "What each layer could have been",
        ("layer", "takes", "at", "next cheaper", "next dearer", "for the same error"),
        frozenset(),
        tuple(rows),
        note=f"{note}.",
    )


def _at(point: Point | None) -> str:
    return f.NONE if point is None else f"{f.size(point['bits'] / 8)}, {f.number(point['error'])}"


def prices_of(facts: Facts) -> dict[str, float]:
    """Return the prices of what is scarce, by resource."""
    return {name: value for name, value in (facts.get("prices") or {}).items() if value}


def paid(point: Point, price: Mapping[str, float]) -> float:
    """Return what a point costs at these prices; without any its bytes.

    Example:
        >>> paid({"bits": 800, "macs": 10}, {}), paid({"bits": 800, "macs": 10}, {"macs": 2.0})
        (100.0, 20.0)
    """
    if not price:
        return float(point["bits"]) / 8
    return sum(p * amount(point, name) for name, p in price.items())


def amount(point: Point, resource: str) -> float:
    """Return what a point costs in one resource, sizes in bytes."""
    return float(point["bits"] / 8 if resource == "bytes" else point.get(resource) or 0.0)


def neighbours(
    curve: Curve, taken: Point, price: Mapping[str, float]
) -> tuple[Point | None, Point | None]:
    """Return the points of the lower hull next to the taken one, by cost; None at an end."""
    known = [p for p in curve if p["error"] is not None]
    if not known:
        return None, None
    order = [known[i] for i in hull([p["error"] for p in known], [paid(p, price) for p in known])]
    here = paid(taken, price)
    below = [p for p in order if paid(p, price) * SAME < here]
    above = [p for p in order if paid(p, price) > here * SAME]
    return (below[-1] if below else None), (above[0] if above else None)


def times(line: Curve, taken: Point, price: Mapping[str, float]) -> float | None:
    """Return how much more points cost than the taken one at no more error; None if none can."""
    most, here = taken["error"], paid(taken, price)
    if most is None:
        return None
    able = [paid(p, price) for p in line if p["error"] is not None and p["error"] <= most * SAME]
    return min(able) / here if able and here > 0 else None


def rival(curve: Curve, taken: Point, price: Mapping[str, float]) -> str:
    """Return what the best other chain costs for no more error, in words."""
    names = dict.fromkeys(p["chain"] for p in curve if p["chain"] != taken["chain"])
    if not names:
        return "no other chain was offered"
    lines = {name: [p for p in curve if p["chain"] == name] for name in names}
    found = [(ratio, name) for name, line in lines.items() if (ratio := times(line, taken, price))]
    if not found:
        return "no other chain reaches it"
    what = "bytes" if set(price) <= {"bytes"} else "price"
    return f"{min(found)[1]}, {f.ratio(min(found)[0])} the {what}"


def latency(facts: Facts) -> Section | None:
    """Predicted latency layer by layer, and the whole, predicted and measured; None if untimed."""
    timed = facts.get("seconds")
    if not timed or not timed["sites"]:
        return None
    rows = [
        (name, f.seconds(s["before"]), f.seconds(s["after"]), _faster(s["before"], s["after"]))
        for name, s in timed["sites"].items()
    ]
    before = timed["original"] - sum(s["before"] for s in timed["sites"].values())
    after = timed["predicted"] - sum(s["after"] for s in timed["sites"].values())
    rows.append(("everything else", f.seconds(max(0.0, before)), f.seconds(max(0.0, after)), ""))
    note = "Layers are timed one by one, at the inputs they see, in turn with what may replace them"
    took = facts["latency"]
    if took and took["after_s"] is not None:
        note += (
            f". The whole network was then measured: {f.seconds(took['after_s'])}, "
            f"{f.seconds(timed['predicted'])} predicted"
        )
    return Section(
        "latency",
        "Latency layer by layer",
        ("layer", "before", "predicted", ""),
        frozenset({1, 2}),
        tuple(rows),
        ("the network", f.seconds(timed["original"]), f.seconds(timed["predicted"]),
         _faster(timed["original"], timed["predicted"])),
        f"{note}.",
    )  # fmt: skip


def _faster(before: float, after: float) -> str:
    if not before or after <= 0 or 0.97 <= before / after <= 1.03:
        return ""
    ratio = before / after
    return f"{f.ratio(ratio)} faster" if ratio > 1 else f"{f.ratio(1 / ratio)} slower"
