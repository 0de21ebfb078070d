"""The report of a streamed run: what `report.collect` tells of a network that was never whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

from lamina._version import __version__
from lamina.data import Data
from lamina.measure.quality import metric_named
from lamina.network.lazy import Lazy
from lamina.network.sites import Sites
from lamina.plan import Budget, Candidates, Plan
from lamina.plan.curves import prices, report_curves
from lamina.report.collect import _thin, machine
from lamina.report.owners import owner, owners_of, site_rows
from lamina.streaming.parts import Part, Written


def collect(
    lazy: Lazy, data: Data | None, sites: Sites, plan: Plan, parts: Sequence[Part],
    written: Written, candidates: Candidates, *, limit: float | None, seed: int = 0,
    samples: int = 0, metric: Any = "agreement", rounds: Sequence[Mapping[str, Any]] = (),
    stages: Sequence[Mapping[str, Any]] = (), notes: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Return a report's facts; what needs a forward pass of the whole network is not measured."""
    edits = [edit for part in parts for edit in part.edits]
    owners = owners_of(sites, edits)
    ledger = [
        {
            "part": name, "site": None if form is None else owner(name, owners), "bytes": size,
            "form": form, "codec": codec,
        }
        for name, size, form, codec in written.ledger
    ]  # fmt: skip
    network = lazy.network
    judged = metric_named(metric)
    limits = {} if limit is None else {"bytes": limit}
    return {
        "lamina": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "machine": machine(),
        "network": {
            "name": network.name, "source": network.source, "digest": plan.network,
            "params": plan.original.params, "params_after": plan.predicted.params,
            "macs": plan.original.macs, "bytes": plan.original.bits / 8,
        },
        "data": {
            "name": (data.name or None) if data else None, "samples": samples, "validation": None,
        },
        "budget": {
            "text": Budget.from_json(plan.budget).describe(), "limits": limits,
            "met": {name: bool(written.size <= most) for name, most in limits.items()},
        },
        "size": {
            "original": plan.original.bits / 8, "planned": plan.predicted.bits / 8,
            "file": written.size, "limit": limit,
            "ratio": plan.original.bits / 8 / max(1, written.size),
        },
        "ledger": ledger,
        "sites": site_rows(network, sites, plan, ledger, {}),
        "refusals": [{"where": r.where, "what": r.what, "why": r.why} for r in sites.refusals],
        "quality": {"metric": judged.name, "unit": judged.unit, "validation": None, "test": None,
                    "fidelity": None},
        "error": {"predicted": plan.error, "measured_applied": None, "measured": None,
                  "objective": plan.objective},
        "latency": None,
        "curve": {"points": [list(p) for p in _thin(plan.curve)],
                  "planned": [plan.predicted.bits / 8, plan.error], "final": None},
        "rounds": list(rounds),
        "curves": report_curves(candidates, plan),
        "prices": prices(candidates, plan) if candidates else {},
        "seconds": None,
        "recovery": None,
        "stages": list(stages),
        "notes": list(notes),
    }  # fmt: skip
