"""Planning a real 200-layer network: `python benchmarks/planner/network.py`.

Times the stages after calibration, one thread: `propose` (one method's offers on every layer),
then `plan`, then `plan` for new budgets, and the gap to the MILP optimum. Writes `network.json`.
"""

from __future__ import annotations

import datetime
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import lamina
from lamina.plan.allocate import milp
from lamina.plan.costs import fixed_cost, original_cost
from lamina.plan.decide import limits_of

LAYERS, WIDTH, SEED = 200, 32, 0


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    layers: list[nn.Module] = []
    for _ in range(LAYERS - 1):
        layers += [nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.5)]
    module = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    batches = [torch.randn(50, WIDTH) for _ in range(4)]
    network = lamina.Network(module, (batches[0][:1],), name="mlp-200")
    sites = lamina.discover(network)
    stats = lamina.measure(network, sites, batches)
    lamina.propose(network, sites, stats, ["rdoq"])  # compiles what is compiled
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    candidates = lamina.propose(network, sites, stats, ["rdoq"])
    seconds["propose"] = time.perf_counter() - start
    rows = []
    for size in ("20%", "10%", "5%"):
        start = time.perf_counter()
        plan = lamina.plan(network, sites, stats, candidates, lamina.Budget(size=size))
        took = time.perf_counter() - start
        original, fixed = original_cost(network, sites), fixed_cost(network, sites)
        _, limits = limits_of(lamina.Budget(size=size), original, fixed)
        names = [site.name for site in sites.layers]
        best = milp(
            [np.array([c.error for c in candidates[n]]) for n in names],
            [np.array([[c.cost.bits] for c in candidates[n]]) for n in names],
            limits,
        )
        gap = plan.error / best.error - 1
        rows.append({"size": size, "plan_seconds": round(took, 3), "gap_to_milp": round(gap, 5)})
    result = {
        "date": datetime.date.today().isoformat(),
        "seed": SEED,
        "threads": 1,
        "device": platform.processor() or platform.machine(),
        "versions": {"lamina": lamina.__version__, "torch": torch.__version__},
        "layers": LAYERS,
        "width": WIDTH,
        "candidates": sum(len(c) for c in candidates.values()),
        "propose_seconds": round(seconds["propose"], 2),
        "plans": rows,
    }
    Path(__file__).with_name("network.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
