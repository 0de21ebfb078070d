"""Three quarters of ResNet-20's parameters removed, and retrained: what it costs in accuracy.

    python benchmarks/low-rank/target.py --data images:CIFAR10 --weights A B C [--only 0]

The planner shares a quarter of the parameters out over `alds` and `tucker` pairs and triples, and
the network is trained for `--epochs`, taught by the original. Accuracy is of the whole test split,
before and after; the original is not trained further. Bar: at most 0.5 points lost at 25 % of the
parameters (ALDS's paper: 0.47 points at 25.1 %, after 182 epochs).
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from run import HERE, accuracy, images, machine, network

import lamina
from lamina.data import Data
from lamina.measure.cost import measured_macs, measured_params
from lamina.train import Recovery, recover

METHODS = ("alds", "tucker")


def run(weights: Path, data: Data, seed: int, keep: float, recovery: Recovery) -> dict[str, Any]:
    net = network(weights)
    sites = lamina.discover(net)
    stats = lamina.measure(net, sites, data, seed=seed)
    offers = lamina.propose(net, sites, stats, METHODS)
    plan = lamina.plan(net, sites, stats, offers, lamina.Budget(params=f"{100 * keep}%"))
    edited = lamina.apply(net, plan, sites, stats)
    before = {s: accuracy(net.module, getattr(data, s)) for s in ("validation", "test")}
    start = time.perf_counter()
    trained = recover(net, edited, data, recovery).edited.model
    seconds = time.perf_counter() - start
    after = {s: accuracy(trained, getattr(data, s)) for s in ("validation", "test")}
    row = {
        "seed": seed,
        "params": round(measured_params(trained) / measured_params(net.module), 4),
        "macs": round(
            measured_macs(trained, net.example_inputs)
            / measured_macs(net.module, net.example_inputs),
            4,
        ),
        "before": before,
        "after": after,
        "drop": round(before["test"] - after["test"], 3),
        "training_seconds": round(seconds),
        "chains": {n: d.describe() for n, d in plan.sites.items()},
    }
    print(json.dumps({k: v for k, v in row.items() if k != "chains"}), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="what lamina.data.load reads")
    parser.add_argument("--weights", nargs="+", type=Path, required=True)
    parser.add_argument("--only", type=int, help="this seed alone")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--decay", type=float, default=0.0)
    parser.add_argument("--distill", type=float, default=0.7)
    parser.add_argument("--file", type=Path, default=HERE / "target.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = images(given.data)
    file = given.file
    found = json.loads(file.read_text()) if file.exists() else {"rows": []}
    for seed, weights in enumerate(given.weights):
        if given.only not in (None, seed):
            continue
        settings = {n: getattr(given, n) for n in ("epochs", "lr", "optimizer", "decay", "distill")}
        recovery = Recovery(**settings, half=True, rate=False, seed=seed)
        row = run(weights, data, seed, given.keep, recovery)
        row |= settings
        rows = [r for r in found["rows"] if r["seed"] != seed]
        rows = sorted([*rows, row], key=lambda r: r["seed"])
        drops = [r["drop"] for r in rows]
        found = {
            "bar": {"params": 0.25, "drop": 0.5},
            "drop_mean": round(mean(drops), 3),
            "met": [r["params"] <= 0.25 and r["drop"] <= 0.5 for r in rows],
            "rows": rows,
            "machine": machine(),
            "date": datetime.date.today().isoformat(),
        }
        file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
