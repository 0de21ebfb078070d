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
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan import Budget, Candidates, Edited, Plan
from lamina.plan.curves import prices, report_curves
from lamina.report.compare import measure_latency, measure_quality
from lamina.report.measured import measure_errors
from lamina.report.owners import (
    asked_for,
    ledger_of,
    owner,
    owners_of,
    refused_by,
    site_rows,
    spans_of,
)

__all__ = ["collect", "ledger_of", "machine", "owner", "owners_of"]

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
    methods: Sequence[str] | None = None,
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
        methods: names of the methods that were to choose from; None: all.

    Raises:
        DataError: the metric cannot be measured.
    """
    spans = spans_of(plan, sites)
    owners = owners_of(sites, final.edits, spans)
    ledger = ledger_of(package, owners)
    assert sum(row["bytes"] for row in ledger) == file_bytes, "the ledger must add up to the file"
    notes: list[str] = []
    quality = measure_quality(network, data, metric, edited.model, final.model)
    latency, why = measure_latency(network, final.model)
    if latency is None:
        notes.append(f"latency was not measured: {why}")
    base = base or network
    errors, applied, measured = measure_errors(
        network, base, data, sites, plan, edited, final, notes
    )
    notes += _on_disk(network)
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
            "params_after": sum(p.numel() for p in final.model.parameters()),  # a tied one once
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
        "sites": site_rows(base, sites, plan, ledger, errors),
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
        "seconds": _seconds(candidates or {}, plan, spans),
        "recovery": None
        if history is None
        else {
            "steps": int(history[-1]["step"]) if history else 0,
            "settings": dict(recovery or {}),
            "history": [dict(row) for row in history],
        },
        "stages": [],
        "notes": notes + refused_by(sites, *asked_for(plan, methods, bool(candidates))),
    }


def _seconds(
    candidates: Candidates, plan: Plan, spans: Sequence[Site] = ()
) -> dict[str, Any] | None:
    """Return the measured latency of each layer before and as planned; None if none was timed."""
    if not plan.original.seconds:
        return None
    before = {  # a layer as it is: nothing slower was offered
        name: max((c.cost.seconds for c in offers), default=0.0)
        for name, offers in candidates.items()
    }
    before |= {span.name: sum(before.get(m, 0.0) for m in span.members) for span in spans}
    over = {span.name for span in spans}
    sites = {
        name: {"before": before.get(name, 0.0), "after": decided.cost.seconds}
        for name, decided in plan.sites.items()
        if before.get(name) or name in over
    }
    whole = {"original": plan.original.seconds, "predicted": plan.predicted.seconds}
    return {**whole, "sites": sites}


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


def _on_disk(network: Network) -> list[str]:
    """Say what sizes refer to, where the original was opened from files of another size."""
    seen = {(t.data_ptr(), tuple(t.shape)): t for t in network.module.state_dict().values()}
    size = sum(t.numel() * t.element_size() for t in seen.values())
    if network.packed_bytes:
        return [
            f"Compressed before: opened from a .lamina file of {network.packed_bytes:,} bytes. "
            f"Sizes and ratios refer to its tensors written out ({size / 1e6:.1f} MB), quality and "
            "errors to the network in that file; what it had lost by then is not counted. Where "
            "there is the original, compress that."
        ]
    if not network.disk_bytes or abs(size / network.disk_bytes - 1) < 0.05:
        return []
    kind = "GGUF" if network.folder.endswith(".gguf") else "safetensors"
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in seen.values()})
    return [
        f"Original: {network.disk_bytes / 1e6:.1f} MB on disk ({kind}), {size / 1e6:.1f} MB as "
        f"{' and '.join(dtypes)} in memory. Sizes and ratios refer to the file on disk."
    ]


def _text(plan: Plan) -> str:
    try:
        return Budget.from_json(plan.budget).describe()
    except BudgetError:
        return "as planned"


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / POINTS))
    return [p for i, p in enumerate(points) if i % step == 0 or i == len(points) - 1]


def _validated(data: Data | None, quality: Mapping[str, Any]) -> int | None:
    """Return how many validation samples were looked at."""
    if data is None or data.validation is None:
        return None
    return int(quality["fidelity"]["after"]["samples"])
