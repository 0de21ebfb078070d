"""Collecting: everything a report says, as one JSON document of facts."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lamina._version import __version__
from lamina.artifact import Package
from lamina.data import Data
from lamina.errors import BudgetError
from lamina.forms import Edit
from lamina.methods.base import registry, weights_of
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan import Budget, Candidates, Edited, Plan
from lamina.plan.chains import refusals
from lamina.plan.curves import prices, report_curves
from lamina.plan.rewrite import FORMS as REWRITING
from lamina.report.compare import (
    FEWEST,
    SITES,
    affordable,
    measure_latency,
    measure_quality,
    site_errors,
    take_reference,
)

POINTS = 400  # of the rate-distortion curve that are kept


def collect(
    network: Network,
    data: Data | None,
    sites: Sites,
    plan: Plan,
    edited: Edited,
    final: Edited,
    package: Package,
    file_bytes: int,
    *,
    metric: Any = "agreement",
    samples: int = 0,
    seed: int = 0,
    limit: float | None = None,
    history: Sequence[Mapping[str, float]] | None = None,
    recovery: Mapping[str, Any] | None = None,
    candidates: Candidates | None = None,
    base: Network | None = None,
) -> dict[str, Any]:
    """Measure what came of a compression and return it as facts; `Report` shows them.

    Args:
        network: the original.
        data: its loaders, or None; validation and test are only looked at here, never decided on.
        sites, plan: what was found, and what was decided.
        edited, final: the network after the plan, and after recovery (the same where none was).
        package: what the file holds.
        file_bytes: the size of the file [bytes].
        metric: as in `evaluate`.
        samples: of calibration.
        seed: of the run.
        limit: the budget's limit on the file [bytes].
        history, recovery: of training; None where none was.
        candidates: what the plan chose from, for the curves of the layers; None: there are none.
        base: the network that the sites are of, where the plan begins with a rewriting.

    Raises:
        DataError: the metric cannot be measured.
    """
    owners = owners_of(sites, final.edits)
    ledger = ledger_of(package, owners)
    assert sum(row["bytes"] for row in ledger) == file_bytes, "the ledger must add up to the file"
    notes: list[str] = []
    quality = measure_quality(network, data, metric, edited.model, final.model)
    latency, why = measure_latency(network, final.model)
    if latency is None:
        notes.append(f"latency was not measured: {why}")
    base = base or network
    errors, applied, measured = _errors(network, base, data, sites, plan, edited, final, notes)
    limits, met = _budget(plan, limit, file_bytes, quality, latency, notes)
    return {
        "lamina": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "machine": machine(),
        "network": {
            "name": network.name,
            "source": network.source,
            "digest": plan.network,
            "params": plan.original.params,
            "macs": plan.original.macs,
            "bytes": plan.original.bits / 8,
        },
        "data": {
            "name": (data.name or None) if data else None,
            "samples": samples,
            "validation": _validated(data, quality),
        },
        "budget": {"text": _text(plan), "limits": limits, "met": met},
        "size": {
            "original": plan.original.bits / 8,
            "planned": plan.predicted.bits / 8,
            "file": file_bytes,
            "limit": limit,
            "ratio": plan.original.bits / 8 / max(1, file_bytes),
        },
        "ledger": ledger,
        "sites": [_site(base, s, plan, ledger, errors) for s in sites.layers],
        "refusals": [{"where": r.where, "what": r.what, "why": r.why} for r in sites.refusals],
        "quality": quality,
        "error": {
            "predicted": plan.error,
            "measured_applied": applied,
            "measured": measured,
            "objective": plan.objective,
        },
        "latency": latency,
        "curve": {
            "points": [list(p) for p in _thin(plan.curve)],
            "planned": [plan.predicted.bits / 8, plan.error],
            "final": None if measured is None else [file_bytes, measured],
        },
        "rounds": [],
        "curves": report_curves(candidates or {}, plan),
        "prices": prices(candidates, plan) if candidates else {},
        "seconds": _seconds(candidates or {}, plan),
        "recovery": None
        if history is None
        else {
            "steps": int(history[-1]["step"]) if history else 0,
            "settings": dict(recovery or {}),
            "history": [dict(row) for row in history],
        },
        "stages": [],
        "notes": notes + _refused(sites),
    }


def _seconds(candidates: Candidates, plan: Plan) -> dict[str, Any] | None:
    """Return the measured latency of each layer before and as planned; None if none was timed."""
    if not plan.original.seconds:
        return None
    before = {  # a layer as it is: nothing slower was offered
        name: max((c.cost.seconds for c in offers), default=0.0)
        for name, offers in candidates.items()
    }
    sites = {
        name: {"before": before[name], "after": decided.cost.seconds}
        for name, decided in plan.sites.items()
        if before.get(name)
    }
    whole = {"original": plan.original.seconds, "predicted": plan.predicted.seconds}
    return {**whole, "sites": sites}


def owners_of(sites: Sites, edits: Sequence[Edit]) -> dict[str, str]:
    """Return which site owns a name: tensors by their names, replaced modules by `path.`.

    Example:
        >>> site = Site("fc", module="fc", weight="fc.weight", bias="fc.bias")
        >>> owners_of(Sites((site,)), [Edit("fc", "low_rank")])
        {'fc.weight': 'fc', 'fc.bias': 'fc', 'fc.': 'fc'}
    """
    owners: dict[str, str] = {}
    replaced = {e.path for e in edits if e.form != "values"}
    for site in sites.layers:
        for name in (site.weight, site.bias, *site.aliases):
            if name:
                owners.setdefault(name, site.name)
        if site.module in replaced:
            owners.setdefault(f"{site.module}.", site.name)
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


def machine() -> dict[str, Any]:
    """Return what the report was made on."""
    return {
        "cpu": _cpu(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()


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


def _errors(
    network: Network,
    base: Network,
    data: Data | None,
    sites: Sites,
    plan: Plan,
    edited: Edited,
    final: Edited,
    notes: list[str],
) -> tuple[dict[str, float], float | None, float | None]:
    """Return measured errors: of each site alone, after the plan, and after recovery."""
    loader = None
    if data is not None:
        loader = data.calibration if data.calibration is not None else data.validation
    if loader is None:
        notes.append("errors were not measured: there is no data")
        return {}, None, None
    count = len(sites.layers)
    each = affordable(plan.original.macs, count + 3)
    apart = count <= SITES and each >= FEWEST
    if not apart:
        why = f"there are {count} layers" if count > SITES else "the network is large"
        notes.append(f"errors were not measured layer by layer: {why}")
        each = max(FEWEST, affordable(plan.original.macs, 3))
    reference = take_reference(network, loader, each)
    owners = owners_of(sites, edited.edits)
    own = {
        site.name: tuple(
            e for e in edited.edits
            if owner(_inside(e), owners) == site.name and e.form not in REWRITING
        )
        for site in sites.layers
    }  # fmt: skip
    if any(e.form == "narrow" for e in edited.edits):
        notes.append("errors were not measured layer by layer: layers share the channels that went")
        apart = False
    errors = site_errors(base, own, reference) if apart else {}
    applied = reference.error(edited.model)
    measured = applied if final is edited else reference.error(final.model)
    return errors, applied, measured


def _inside(edit: Edit) -> str:
    """Return the name by which an edit's owner is looked up."""
    return edit.path if edit.form == "values" else f"{edit.path}."


def _budget(
    plan: Plan,
    limit: float | None,
    file_bytes: int,
    quality: Mapping[str, Any],
    latency: Mapping[str, Any] | None,
    notes: list[str],
) -> tuple[dict[str, float], dict[str, bool | None]]:
    """Return the limits in absolute units, and whether each is met (None: not known)."""
    spent: dict[str, float | None] = {
        "bytes": file_bytes,
        "macs": plan.predicted.macs,
        "params": plan.predicted.params,
        "seconds": latency["after_s"] if latency else None,
    }
    limits: dict[str, float] = {}
    try:
        budget = Budget.from_json(plan.budget)
        whole = {"bytes": plan.original.bits / 8, "macs": plan.original.macs,
                 "params": plan.original.params}  # fmt: skip
        if latency:
            whole["seconds"] = latency["before_s"]
        elif budget.latency is not None:
            budget = replace(budget, latency=None)
        limits = budget.resolve(whole)
        if budget.max_drop is not None:
            limits["max_drop"] = float(budget.max_drop)
            held = quality["validation"]
            spent["max_drop"] = held["drop"] if held else None
    except BudgetError as error:
        if limit is None:
            notes.append(f"the budget's limits are not known: {error}")
    if limit is not None:
        limits["bytes"] = limit
    met: dict[str, bool | None] = {}
    for name, most in limits.items():
        used = spent[name]
        met[name] = None if used is None else bool(used <= most)
    return limits, met


def _text(plan: Plan) -> str:
    try:
        return Budget.from_json(plan.budget).describe()
    except BudgetError:
        return "as planned"


def _refused(sites: Sites) -> list[str]:
    """Return one note per method that cannot serve some layers."""
    found: dict[str, list[tuple[str, str]]] = {}
    for site, method, why in refusals(sites, list(registry().values())):
        found.setdefault(method, []).append((site, why))
    count = len(sites.layers)
    return [
        f"{method} does not serve {len(rows)} of {count} layers (first {rows[0][0]}: {rows[0][1]})"
        for method, rows in sorted(found.items())
    ]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / POINTS))
    return [p for i, p in enumerate(points) if i % step == 0 or i == len(points) - 1]


def _validated(data: Data | None, quality: Mapping[str, Any]) -> int | None:
    """Return how many validation samples were looked at."""
    if data is None or data.validation is None:
        return None
    return int(quality["fidelity"]["after"]["samples"])
