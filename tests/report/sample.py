"""Facts of a run as they look: LeNet-5 at a hundredth of its size."""

from __future__ import annotations

import copy
import math
from typing import Any

LAYERS = (  # name, op, shape, bias, macs, bytes in the file, planned, predicted, measured
    ("conv1", "conv", [20, 1, 5, 5], 20, 288_000, 402, 1_210, 3.1e-4, 4.4e-4),
    ("conv2", "conv", [50, 20, 5, 5], 50, 1_600_000, 4_877, 18_650, 2.74e-3, 2.1e-3),
    ("fc1", "linear", [500, 800], 500, 400_000, 10_704, 50_020, 6.12e-3, 7.9e-3),
    ("fc2", "linear", [10, 500], 10, 5_000, 878, 2_930, 8.8e-4, 1.02e-3),
)
CHAINS = (
    "rdoq(step=0.0518)",
    "rdoq(step=0.0312)",
    "alds(folds=2, rank=61) -> rdoq(step=0.0297) | rdoq(step=0.0411)",
    "rdoq(step=0.0604)",
)


def sample() -> dict[str, Any]:
    """Return the facts; the caller's own copy."""
    return copy.deepcopy(_FACTS)


def _site(i: int) -> dict[str, Any]:
    name, op, shape, bias, macs, file, planned, predicted, measured = LAYERS[i]
    params = math.prod(shape) + bias
    return {
        "site": name, "op": op, "shape": shape, "chain": CHAINS[i],
        "params_before": params, "params_after": params if name != "fc1" else 82_000,
        "macs_before": macs, "macs_after": macs if name != "fc1" else 81_500,
        "bytes_before": 4 * params, "bytes_planned": planned, "bytes_file": file,
        "error_predicted": predicted, "error_measured": measured,
    }  # fmt: skip


def _row(part: str, site: str | None, size: int, form: str | None, codec: str | None) -> Any:
    return {"part": part, "site": site, "bytes": size, "form": form, "codec": codec}


_LEDGER = [
    _row("header", None, 352, None, None),
    _row("checksum", None, 4, None, None),
    _row("conv1.weight", "conv1", 350, "grid", "adaptive"),
    _row("conv1.bias", "conv1", 52, "grid", "rans"),
    _row("conv2.weight", "conv2", 4_790, "grid", "adaptive"),
    _row("conv2.bias", "conv2", 87, "grid", "rans"),
    _row("fc1.0.weight", "fc1", 6_114, "grid", "adaptive"),
    _row("fc1.1.weight", "fc1", 4_010, "grid", "adaptive"),
    _row("fc1.1.bias", "fc1", 580, "grid", "rans"),
    _row("fc2.weight", "fc2", 840, "grid", "adaptive"),
    _row("fc2.bias", "fc2", 38, "plain", "raw"),
]
_FILE = sum(row["bytes"] for row in _LEDGER)
_STEPS = range(83, 3_321, 83)  # forty looks


def _far(samples: int, agreement: float, kl: float) -> dict[str, Any]:
    return {"agreement": agreement, "kl": kl, "cosine": 0.9991, "sqnr_db": 24.1,
            "samples": samples, "loss": "logits", "predictions": 1.0}  # fmt: skip


def _points(i: int) -> list[dict[str, Any]]:
    """Return two chains of a layer: grids, one of which is taken, and low rank twice as dear."""
    shape, bias, macs, planned, predicted = (LAYERS[i][k] for k in (2, 3, 4, 6, 7))
    params = math.prod(shape) + bias

    def point(chain: str, factor: float, k: int, taken: bool = False) -> dict[str, Any]:
        return {
            "chain": chain, "steps": f"{chain}(step={0.03 * 2**k:.3g})",
            "params": params / factor, "bits": 8 * planned * factor * 0.7**k,
            "macs": macs / factor, "seconds": 1e-5 * (i + 1) / factor,
            "error": predicted * 2.0**k, "taken": taken,
        }  # fmt: skip

    line = [point("rdoq", 1, k, taken=k == 0) for k in range(-3, 4)]
    low = [point("alds > rdoq", 2, k) for k in range(-2, 3)]
    return [*low, *line, point("keep", 1, 0) | {"bits": 32.0 * params, "error": 0.0}]


_FACTS: dict[str, Any] = {
    "lamina": "0.1.0",
    "date": "2026-11-22T10:30:00+00:00",
    "seed": 0,
    "machine": {"cpu": "AMD EPYC 7B13", "system": "Linux-6.1-x86_64", "python": "3.11.2",
                "torch": "2.13.0", "threads": 1},
    "network": {"name": "lenet-5", "source": "zoo:lenet-5", "digest": "4f1c0ad2b77e9a31",
                "params": 431_080, "macs": 2_293_000, "bytes": 1_724_320},
    "data": {"name": "mnist-10k", "samples": 1_000, "validation": 1_000},
    "budget": {"text": "size=1%", "limits": {"bytes": 17_243.2}, "met": {"bytes": True}},
    "size": {"original": 1_724_320, "planned": 73_166, "file": _FILE, "limit": 17_243.2,
             "ratio": 1_724_320 / _FILE},
    "ledger": _LEDGER,
    "sites": [_site(i) for i in range(len(LAYERS))],
    "refusals": [
        {"where": "conv1 .. conv2", "what": "chain", "why": "max_pool2d lies between the layers"},
    ],
    "quality": {
        "metric": "accuracy", "unit": "points",
        "validation": {"before": 98.7, "applied": 98.5, "after": 98.6, "drop": 0.1,
                       "applied_drop": 0.2},
        "test": {"before": 98.55, "after": 98.4, "drop": 0.15},
        "fidelity": {"applied": _far(1_000, 99.3, 9.8e-3), "after": _far(1_000, 99.1, 1.31e-2)},
    },
    "error": {"predicted": 1.005e-2, "measured_applied": 1.12e-2, "measured": 1.44e-2,
              "objective": "sum"},
    "latency": {"before_s": 3.14e-4, "after_s": 2.71e-4, "ratio": 3.14 / 2.71, "batch": 1,
                "rounds": 11, "threads": 1},
    "curve": {
        "points": [[73_166 * 1.1**i, 1.005e-2 * 0.82**i] for i in range(-40, 33)],
        "planned": [73_166, 1.005e-2],
        "final": [_FILE, 1.44e-2],
    },
    "rounds": [
        {"round": 1, "why": "latency", "asked": "latency=0.9x",
         "predicted": {"bytes": 73_100.0, "error": 1.1e-2, "seconds": 2.7e-4},
         "measured": {"seconds": 2.9e-4}, "kept": False, "note": "0.923 of the original's time"},
        {"round": 2, "why": "max_drop", "asked": "max_drop=0.5",
         "predicted": {"bytes": 73_166.0, "error": 1.005e-2}, "measured": {"drop": 0.2},
         "kept": True, "note": "accuracy within the limit"},
    ],
    "curves": {LAYERS[i][0]: _points(i) for i in range(len(LAYERS))},
    "prices": {"bytes": 3.1e-7},
    "seconds": {
        "original": 3.2e-4, "predicted": 2.7e-4,
        "sites": {"conv2": {"before": 1.5e-4, "after": 1.5e-4},
                  "fc1": {"before": 1e-4, "after": 5e-5}},
    },
    "recovery": {
        "steps": 3_320,
        "settings": {"epochs": None, "lr": 2e-3, "distill": 0.7, "rate": True, "seed": 0},
        "history": [
            {"step": float(s), "loss": 0.09 + 0.25 * math.exp(-s / 600) + 0.02 * math.sin(s / 70),
             "bytes": 17_100 + 56_000 * math.exp(-s / 900), "price": 1e-6 * 1.1 ** (s / 83)}
            for s in _STEPS
        ],
    },
    "stages": [
        {"name": "discover", "seconds": 1.21, "cached": False},
        {"name": "measure", "seconds": 6.4, "cached": True},
        {"name": "propose", "seconds": 14.2, "cached": False},
        {"name": "plan", "seconds": 0.31, "cached": False},
        {"name": "apply", "seconds": 0.9, "cached": False},
        {"name": "recover", "seconds": 96.0, "cached": False},
        {"name": "pack", "seconds": 0.4, "cached": False},
    ],
    "notes": ["alds does not serve 1 of 4 layers (first conv1: one input channel)"],
}  # fmt: skip
