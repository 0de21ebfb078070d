"""What a report says, section by section, already in words; terminal, Markdown and HTML show it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lamina.report import formats as f
from lamina.report.reasons import choices, latency, rounds
from lamina.report.section import Facts, Section, own_rows

__all__ = ["Facts", "Section", "sections", "speed", "verdict"]

LIMITS = {
    "bytes": ("size", f.exact),
    "macs": ("multiply-accumulates", f.count),
    "params": ("parameters", f.count),
    "seconds": ("latency", f.seconds),
}


def sections(facts: Facts) -> list[Section]:
    """Return what there is to say, in the order people ask for it."""
    found = [
        asked(facts),
        got(facts),
        rounds(facts),
        layers(facts),
        choices(facts),
        latency(facts),
        ledger(facts),
        refused(facts),
        notes(facts),
        made(facts),
    ]
    return [section for section in found if section is not None]


def asked(facts: Facts) -> Section:
    """What the user gave."""
    network, data, limits = facts["network"], facts["data"], facts["budget"]["limits"]
    rows = [
        ("network", f"{network['name']} ({_kind(network['source'])})"),
        ("", f"{f.count(network['params'])} parameters, {f.count(network['macs'])} "
             f"multiply-accumulates, {f.size(network['bytes'])}"),
        ("budget", facts["budget"]["text"]),
    ]  # fmt: skip
    for name, most in limits.items():
        if name == "max_drop":
            unit = facts["quality"]["unit"]
            rows.append(("", f"at most {f.score(most, unit)} {unit} lost".replace("  ", " ")))
        else:
            words, form = LIMITS.get(name, (name, f.number))
            rows.append(("", f"{words}: at most {form(most)}"))
    rows.append(("data", _data(data)))
    return Section("asked", "What you asked", (), frozenset(), tuple(rows))


def _kind(source: str) -> str:
    """Return where a network is from; of a pretrained one the class, for its configuration is long.

    Example:
        >>> _kind('transformers:{"class":"BertModel","config":{}}')
        'transformers, BertModel'
    """
    found = re.match(r'transformers:\{"class":"(\w+)"', source)
    return f"transformers, {found[1]}" if found else source


def _data(data: Mapping[str, Any]) -> str:
    if not data["samples"] and data["validation"] is None and data["name"] is None:
        return "none"
    parts = [f"{data['samples']:,} calibration samples"]
    if data["validation"] is not None:
        parts.append(f"{data['validation']:,} validation samples")
    return ", ".join([data["name"] or "yours", *parts])


def got(facts: Facts) -> Section:
    """What came of it: size, metric, fidelity, errors, latency."""
    size, quality, error = facts["size"], facts["quality"], facts["error"]
    rows = [
        (
            "file",
            f.size(size["original"]),
            f.size(size["file"]),
            f"{f.ratio(size['ratio'])} smaller",
        ),
        ("  to the byte", f.exact(size["original"]), f.exact(size["file"]), verdict(facts)),
    ]
    if (after := facts["network"].get("params_after")) is not None:
        whole = facts["network"]["params"]
        rows.append(("parameters", f.count(whole), f.count(after), _times(whole, after)))
    sites = own_rows(facts)
    before = sum(site["macs_before"] for site in sites)
    after = sum(site["macs_after"] for site in sites)
    rows.append(("multiply-accumulates", f.count(before), f.count(after), _times(before, after)))
    unit = quality["unit"]
    for split in ("test", "validation"):
        held = quality[split]
        if held:
            rows.append(
                (f"{quality['metric']}, {split}", f.score(held["before"], unit),
                 f.score(held["after"], unit), f.drop(held["drop"], unit))
            )  # fmt: skip
        if held and split == "validation" and facts["recovery"]:
            applied = f.drop(held["applied_drop"], unit)
            rows.append(("  before training", "", f.score(held["applied"], unit), applied))
    if quality["fidelity"]:
        close = quality["fidelity"]["after"]
        rows.append(
            ("same predictions", "", f.share(_percent(close["agreement"])),
             f"of {close['samples']:,} samples")
        )  # fmt: skip
    unit = "largest relative error" if error["objective"] == "minimax" else "nats per sample"
    rows.append(("predicted error", "", f.number(error["predicted"]), unit))
    if error["measured_applied"] is not None:
        rows.append(("measured error", "", f.number(error["measured_applied"]), "nats per sample"))
        if facts["recovery"]:
            rows.append(("  after training", "", f.number(error["measured"]), "nats per sample"))
    if facts["latency"]:
        took = facts["latency"]
        rows.append(
            (_batch(took), f.seconds(took["before_s"]), f.seconds(took["after_s"]),
             speed(took["ratio"]))
        )  # fmt: skip
    return Section(
        "got", "What you got", ("", "before", "after", ""), frozenset({1, 2}), tuple(rows)
    )


def verdict(facts: Facts) -> str:
    """Return whether the budget is met, in words."""
    met = facts["budget"]["met"]
    missed = [_limit(name) for name, held in met.items() if held is False]
    if missed:
        return f"over budget: {', '.join(missed)}"
    unknown = [_limit(name) for name, held in met.items() if held is None]
    if unknown:
        return f"budget not measured: {', '.join(unknown)}"
    return "budget met" if met else "no limit on the size"


def _limit(name: str) -> str:
    return "metric" if name == "max_drop" else LIMITS.get(name, (name, f.number))[0]


def _batch(took: Mapping[str, Any]) -> str:
    count, tokens = took.get("batch") or 1, took.get("tokens")
    if tokens:
        return f"latency, {count:,} x {tokens:,} tokens"
    return "latency, one sample" if count == 1 else f"latency, batch of {count:,}"


def _times(before: float, after: float) -> str:
    if not before or before == after:
        return "as before"
    return f"{f.ratio(before / after)} fewer" if 0 < after < before else ""


def _percent(value: float | None) -> float | None:
    return None if value is None else value / 100


def speed(ratio: float | None) -> str:
    """Return how many times faster, in words."""
    if ratio is None:
        return ""
    if 0.97 <= ratio <= 1.03:
        return "as fast as before"
    return f"{f.ratio(ratio)} faster" if ratio > 1 else f"{f.ratio(1 / ratio)} slower"


def layers(facts: Facts) -> Section:
    """Every layer: before, after, by which chain, predicted and measured error."""
    rows = tuple(_layer(site) for site in facts["sites"])
    totals = [sum(site[k] for site in own_rows(facts)) for k in
              ("bytes_before", "bytes_planned", "bytes_file")]  # fmt: skip
    note = (
        "Errors are in nats per sample: what the chain of one layer alone costs, predicted before "
        "and measured after it was applied"
    )
    if facts["error"]["objective"] == "minimax":
        note = "Predicted errors are relative (spectral norm): there was no data"
    if facts["recovery"]:
        note += "; training then moved all layers together"
    return Section(
        "layers",
        "Layer by layer",
        ("layer", "shape", "before", "planned", "in file", "chain", "predicted", "measured"),
        frozenset({2, 3, 4, 6, 7}),
        rows,
        ("all layers", "", *(f.size(t) for t in totals), "", "", "") if len(rows) > 1 else (),
        note + ".",
    )


def _layer(site: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the row of a layer or a span; a layer that is in a span says so, and what it was."""
    shape = str(site.get("holds") or "") or f"{site['op']} {f.shape(site['shape'])}"
    if "span" in site:
        return (f"  {site['site']}", shape, f.size(site["bytes_before"]), "", "", site["chain"],
                "", "")  # fmt: skip
    sizes = (f.size(site[k]) for k in ("bytes_before", "bytes_planned", "bytes_file"))
    errors = (f.number(site[k]) for k in ("error_predicted", "error_measured"))
    return (site["site"], shape, *sizes, site["chain"], *errors)


def ledger(facts: Facts) -> Section:
    """Every byte of the file."""
    whole = facts["size"]["file"]
    rows = tuple(
        (row["part"], row["site"] or "", _form(row), f"{row['bytes']:,}",
         f.share(row["bytes"] / max(1, whole)))
        for row in facts["ledger"]
    )  # fmt: skip
    total = sum(row["bytes"] for row in facts["ledger"])
    return Section(
        "ledger",
        "Every byte of the file",
        ("part", "layer", "held as", "bytes", "share"),
        frozenset({3, 4}),
        rows,
        ("the file", "", "", f"{total:,}", f.share(total / max(1, whole))),
    )


def _form(row: Mapping[str, Any]) -> str:
    parts = [row["form"], row["codec"] if row["form"] != "plain" else None]
    return ", ".join(p for p in parts if p)


def refused(facts: Facts) -> Section:
    """What could not be compressed, and why."""
    rows = tuple((r["where"], r["what"], r["why"]) for r in facts["refusals"])
    return Section(
        "refused",
        "What could not be compressed",
        ("where", "what", "why") if rows else (),
        frozenset(),
        rows or (("nothing was refused",),),
    )


def notes(facts: Facts) -> Section:
    """Everything else worth knowing."""
    rows = tuple((note,) for note in facts["notes"]) or (("none",),)
    return Section("notes", "Notes", (), frozenset(), rows)


def made(facts: Facts) -> Section:
    """How and where the result was made: enough to make it again."""
    machine = facts["machine"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    rows = [
        ("made", f"{f.date(facts['date'])}, seed {facts['seed']}"),
        ("with", f"lamina {facts['lamina']}, torch {machine['torch']}, "
                 f"python {machine['python']}, {threads}"),
        ("on", f"{machine['cpu']}, {machine['system']}"),
        ("from", f"network {facts['network']['digest']}"),
    ]  # fmt: skip
    stages = [
        f"{s['name']} {'(done before)' if s.get('cached') else f.seconds(s.get('seconds'))}"
        for s in facts["stages"]
    ]
    if stages:
        rows.append(("stages", ", ".join(stages)))
    if facts["recovery"]:
        rows.append(("training", f"{facts['recovery']['steps']:,} steps"))
    return Section("made", "How it was made", (), frozenset(), tuple(rows))
