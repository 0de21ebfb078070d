"""How fast the planner allocates, and how far from the optimum: `python benchmarks/planner/run.py`.

200 sites (`--sites`) with 40 options each, rate-distortion curves like those of real layers
(quantizers at `a 2^(-2b)` of very different scale, low ranks with polynomial tails, noise on top),
at several budgets, with one resource and with two. The referee is `milp`. Writes `result.json`
beside itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402
import scipy  # noqa: E402

from lamina.plan.allocate import allocate, curve, milp  # noqa: E402

Result = TypeVar("Result")


def make(
    sites: int, options: int, resources: int, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Errors [options] and costs [options, resources] (bits, seconds) of every site."""
    rng = np.random.default_rng(seed)
    errors, costs = [], []
    for _ in range(sites):
        weights = int(10 ** rng.uniform(2.5, 6.5))
        scale = 10 ** rng.normal(-1, 1.2) * np.sqrt(weights) / 100
        bits = rng.uniform(0.3, 8, options)
        # A part of the options keeps only a share of the rank: fewer bits, and less time.
        share = np.where(rng.random(options) < 0.5, rng.uniform(0.05, 1, options), 1.0)
        tail = (1 - share) ** rng.uniform(1.5, 4)
        error = scale * (2 ** (-2 * bits) + tail * 0.3) * np.exp(rng.normal(0, 0.25, options))
        error[0], bits[0], share[0] = 0.0, 32.0, 1.0  # as it is
        size = np.ceil(weights * bits * share + 64)
        pace = rng.uniform(0.5, 2) * 1e-9 * rng.integers(1, 200)
        seconds = weights * pace * (0.2 + 0.8 * share) * np.where(bits < 4, 0.8, 1.0)
        errors.append(error)
        costs.append(np.stack([size, seconds], 1)[:, :resources])
    return errors, costs


def clock(run: Callable[[], Result], repeats: int = 5) -> tuple[float, float, Result]:
    """Median seconds of a call, by the clock and of the processor, and its result."""
    taken, used = [], []
    for _ in range(repeats):
        start, before = time.perf_counter(), time.process_time()
        result = run()
        taken.append(time.perf_counter() - start)
        used.append(time.process_time() - before)
    return statistics.median(taken), statistics.median(used), result


def measure(sites: int, options: int, seed: int, referee_gap: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for resources in (1, 2):
        errors, costs = make(sites, options, resources, seed)
        whole = np.array([cost[0] for cost in costs]).sum(0)
        for share in (0.02, 0.05, 0.1, 0.25):
            limits = whole * np.array([share, 0.5])[:resources]
            for objective in ("sum", "minimax"):
                seconds, cpu, found = clock(partial(allocate, errors, costs, limits, objective))
                start = time.perf_counter()
                best = milp(errors, costs, limits, objective, gap=referee_gap)
                row = {
                    "sites": sites,
                    "options": options,
                    "resources": resources,
                    "size": share,
                    "objective": objective,
                    "seconds": round(seconds, 4),
                    "cpu_seconds": round(cpu, 4),
                    "milp_seconds": round(time.perf_counter() - start, 3),
                    "error": found.error,
                    "milp_error": best.error,
                    "gap": found.error / best.error - 1,
                    "gap_to_bound": found.error / found.bound - 1,
                }
                assert all(np.array(found.cost) <= limits * (1 + 1e-12))
                print({k: v for k, v in row.items() if k not in ("sites", "options")}, flush=True)
                rows.append(row)
        seconds, _, _ = clock(partial(curve, errors, costs))
        rows.append({"resources": resources, "curve_seconds": round(seconds, 4)})
    return rows


def device() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=200)
    parser.add_argument("--options", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--referee-gap", type=float, default=1e-5, help="at which MILP stops")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    given = parser.parse_args()
    rows = measure(given.sites, given.options, given.seed, given.referee_gap)
    compared = [row for row in rows if "gap" in row]
    result = {
        "task": "planner",
        "date": datetime.date.today().isoformat(),
        "seed": given.seed,
        "device": device(),
        "referee_gap": given.referee_gap,
        "threads": 1,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "slowest_seconds": max(row["seconds"] for row in compared),
        "slowest_cpu_seconds": max(row["cpu_seconds"] for row in compared),
        "largest_gap": max(row["gap"] for row in compared),
        "rows": rows,
    }
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print({key: result[key] for key in ("slowest_seconds", "slowest_cpu_seconds", "largest_gap")})


if __name__ == "__main__":
    main()
