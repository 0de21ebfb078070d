"""A report as one HTML page that needs nothing else: no script, no network, no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lamina.report import formats as f
from lamina.report.charts import Axis, Point, bar, plot, span
from lamina.report.layers import layer_curves
from lamina.report.section import own_rows
from lamina.report.sections import Facts, sections, speed, verdict

COLOURS = 9  # of layers in the bar; the smaller ones share one
LEAST = 1e-6  # [nats per sample] errors below this are as good as none


def render_html(facts: Facts) -> str:
    """Return the page; everything that comes from the facts is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(
        name=facts["network"]["name"],
        date=f.date(facts["date"]),
        version=facts["lamina"],
        cards=headlines(facts),
        bytes=ledger_bar(facts),
        charts=charts(facts),
        curves=layer_curves(facts),
        sections={s.name: s for s in sections(facts)},
    )


def headlines(facts: Facts) -> list[dict[str, str]]:
    """Return the few numbers that matter most, as cards: value, words, detail, tone."""
    size, quality, took = facts["size"], facts["quality"], facts["latency"]
    held = facts["budget"]["met"].values()
    missed = any(met is False for met in held)
    cards = [
        {
            "value": f.ratio(size["ratio"]),
            "words": "smaller",
            "detail": f"{f.size(size['original'])} to {f.size(size['file'])}",
            "tone": "",
        },
        {
            "value": f.size(size["file"]),
            "words": "on disk",
            "detail": f"{f.exact(size['file'])}; {verdict(facts)}",
            "tone": "bad" if missed else "good" if held else "",
        },
    ]
    split = "test" if quality["test"] else "validation"
    scores = quality[split]
    if scores:
        unit = quality["unit"]
        cards.append(
            {
                "value": f.score(scores["after"], unit),
                "words": f"{quality['metric']}, {split}",
                "detail": f"{f.score(scores['before'], unit)} before; "
                f"{f.drop(scores['drop'], unit)}",
                "tone": "",
            }
        )
    elif quality["fidelity"]:
        close = quality["fidelity"]["after"]
        agreement = close["agreement"]
        cards.append(
            {
                "value": f.share(None if agreement is None else agreement / 100),
                "words": "same predictions",
                "detail": f"as the original on {close['samples']:,} samples",
                "tone": "",
            }
        )
    if took:
        count = took.get("batch") or 1
        cards.append(
            {
                "value": f.seconds(took["after_s"]),
                "words": "per sample" if count == 1 else f"per batch of {count:,}",
                "detail": f"{f.seconds(took['before_s'])} before; {speed(took['ratio'])}",
                "tone": "",
            }
        )
    return cards


def ledger_bar(facts: Facts) -> dict[str, Any]:
    """Return where the bytes are, before and in the file: two bars and their legend."""
    from markupsafe import Markup

    sites = own_rows(facts)
    order = sorted(sites, key=lambda s: -max(_shares(facts, s)))
    big = {s["site"]: f"c{i}" for i, s in enumerate(order[:COLOURS])}
    rows: dict[str, dict[str, Any]] = {}
    for site in sites:
        kind = big.get(site["site"], "small")
        name = site["site"] if kind != "small" else f"{len(order) - COLOURS} smaller layers"
        _add(rows, kind, name, site["bytes_before"], site["bytes_file"])
    before = facts["size"]["original"] - sum(s["bytes_before"] for s in sites)
    tensors = sum(r["bytes"] for r in facts["ledger"] if r["form"] and r["site"] is None)
    if before > 0 or tensors:
        _add(rows, "rest", "outside layers", max(0, before), tensors)
    frame = sum(r["bytes"] for r in facts["ledger"] if not r["form"])
    if frame:
        _add(rows, "frame", "header and checksum", 0, frame)
    whole = max(1, facts["size"]["file"])
    return {
        "before": Markup(bar("bytes before", [(k, r["before"]) for k, r in rows.items()])),
        "after": Markup(bar("bytes in the file", [(k, r["after"]) for k, r in rows.items()])),
        "sizes": (f.size(facts["size"]["original"]), f.size(facts["size"]["file"])),
        "legend": [
            {"kind": k, "name": r["name"], "before": f.size(r["before"]) if r["before"] else f.NONE,
             "after": f.size(r["after"]), "share": f.share(r["after"] / whole)}
            for k, r in rows.items()
        ],
    }  # fmt: skip


def _shares(facts: Facts, site: Mapping[str, Any]) -> tuple[float, float]:
    size = facts["size"]
    return (
        site["bytes_before"] / max(1, size["original"]),
        site["bytes_file"] / max(1, size["file"]),
    )


def _add(
    rows: dict[str, dict[str, Any]], kind: str, name: str, before: float, after: float
) -> None:
    row = rows.setdefault(kind, {"name": name, "before": 0.0, "after": 0.0})
    row["before"] += before
    row["after"] += after


def charts(facts: Facts) -> list[dict[str, Any]]:
    """Return the charts there are facts for: rate and distortion, size and loss in training."""
    found = [curve_chart(facts)]
    if facts["recovery"]:
        history = facts["recovery"]["history"]
        found.append(history_chart(history, "bytes", "Size while training", facts["size"]["limit"]))
        found.append(history_chart(history, "loss", "Loss while training", None))
    return [chart for chart in found if chart]


def curve_chart(facts: Facts) -> dict[str, Any] | None:
    """Return the rate-distortion curve, with what was planned and what came of it."""
    curve, limit = facts["curve"], facts["size"]["limit"]
    line = sorted(p for p in (_positive(p) for p in curve["points"]) if p)
    marks = []
    for kind in ("planned", "final"):
        point = _positive(curve[kind] or [], LEAST)
        if point:
            marks.append((kind, point))
    line = [(b, e) for b, e in line if e >= LEAST]
    points = line + [p for _, p in marks]
    if len(line) < 2:
        return None
    sizes = [b for b, _ in points] + ([limit] if limit else [])
    relative = facts["error"]["objective"] == "minimax"
    unit = "largest relative error" if relative else "error [nats per sample]"
    legend = [("line", "what plans can reach (predicted)")]
    words = {"planned": "the plan (predicted)", "final": "the file (measured)"}
    legend += [(kind, words[kind]) for kind, _ in marks]
    if limit:
        legend.append(("limit", "the budget"))
    return _chart(
        "Rate and distortion",
        f"The {unit} against the size of the file; both scales are logarithmic.",
        Axis(*span(sizes, True), f.tick_size, True, "size of the file"),
        Axis(*span([e for _, e in points], True), f.tick, True),
        line,
        legend,
        marks=marks,
        vertical=limit,
    )


def history_chart(
    history: Sequence[Mapping[str, Any]], key: str, title: str, limit: float | None
) -> dict[str, Any] | None:
    """Return how a number went while training."""
    line = [(float(r["step"]), float(r[key])) for r in history if _number(r.get(key))]
    if len(line) < 2 or line[0][0] == line[-1][0]:
        return None
    values = [v for _, v in line] + ([limit] if limit else [])
    low, high = span(values)
    words = "Bytes of the file it would give" if key == "bytes" else "The training loss"
    legend = [("line", "size of the file" if key == "bytes" else "loss")]
    if limit:
        legend.append(("limit", "the budget"))
    return _chart(
        title,
        f"{words}, step by step.",
        Axis(line[0][0], line[-1][0], f.count, title="step"),
        Axis(max(0.0, low), high, f.tick_size if key == "bytes" else f.tick),
        line,
        legend,
        horizontal=limit,
    )


def _chart(
    title: str, note: str, x: Axis, y: Axis, line: list[Point], legend: list[Any], **extra: Any
) -> dict[str, Any]:
    from markupsafe import Markup

    drawn = Markup(plot(f"{title}. {note}", x, y, line, **extra))
    return {"title": title, "note": note, "svg": drawn, "legend": legend}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _positive(point: Sequence[Any], least: float | None = None) -> Point | None:
    """Return a point that a logarithmic chart can show, or None."""
    if len(point) != 2 or not all(_number(v) for v in point) or point[0] <= 0:
        return None
    error = max(point[1], least) if least else point[1]
    return (float(point[0]), float(error)) if error > 0 else None
