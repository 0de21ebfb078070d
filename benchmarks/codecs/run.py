"""Size and speed of the rans codec on the five standard sources, and of adaptive on small tensors.

Run: python benchmarks/codecs/run.py [--count 10000000]. Prints a table; writes result.json.
Speed is process CPU time of one thread, best of a few runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lamina.codecs import adaptive, rans

SEED = 0


def make_sources(count: int, seed: int = SEED) -> dict[str, np.ndarray]:
    """Return name -> symbols [count]: absmax-quantised bell curves, and a sparse codebook."""
    rng = np.random.default_rng(seed)
    bell, peak = rng.standard_normal(count), rng.laplace(size=count)
    sparse = np.where(rng.random(count) < 0.9, 0, np.round(bell * 4.0).clip(-7, 7))
    sources = {
        "gauss int8": np.round(bell * 37.3),
        "laplace int8": np.round(peak * 17.4),
        "gauss int4": np.round(bell * 2.08),
        "laplace int4": np.round(peak * 1.0),
        "sparse90 4-bit": sparse,
    }
    bound = {"int8": 127, "int4": 7, "4-bit": 7}
    return {
        k: v.clip(-bound[k.split()[1]], bound[k.split()[1]]).astype(np.int32)
        for k, v in sources.items()
    }


def entropy_bytes(symbols: np.ndarray) -> float:
    """Return the order-0 entropy of all symbols together [bytes]."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / symbols.size)).sum() / 8)


def cpu_seconds(work: Callable[[], Any], rounds: int) -> float:
    """Return the least process CPU time of `rounds` calls."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def make_small(seed: int) -> dict[str, np.ndarray]:
    """Return name -> small tensors as rate-penalised training leaves them (dead rows, columns)."""
    rng = np.random.default_rng(seed)

    def grid(rows: int, cols: int, live_rows: int, live_cols: int, count: int) -> np.ndarray:
        out = np.zeros((rows, cols), dtype=np.int32)
        r, c = rng.choice(rows, live_rows, False), rng.choice(cols, live_cols, False)
        where = rng.choice(live_rows * live_cols, count, False)
        size = np.minimum(rng.geometric(0.7, count), 3) * rng.choice([-1, 1], count)
        out[r[where // live_cols], c[where % live_cols]] = size
        return out

    line = np.where(rng.random(500) < 0.2, np.round(rng.laplace(0, 2, 500)), 0)
    return {
        "500x800 .3%": grid(500, 800, 80, 250, 1200),
        "50x500 3%": grid(50, 500, 30, 150, 750),
        "20x25 dense": np.round(rng.laplace(0, 2.5, (20, 25))).clip(-8, 8).astype(np.int32),
        "500 vector": line.astype(np.int32),
    }


def run(count: int, rounds: int) -> dict[str, Any]:
    """Measure everything; return what goes into result.json."""
    rows = []
    for name, symbols in make_sources(count).items():
        ideal = entropy_bytes(symbols)
        for backend in ("numba", "numpy"):
            data = rans.encode(symbols, backend=backend)
            assert np.array_equal(rans.decode(data, symbols.shape, backend=backend), symbols)
            enc = cpu_seconds(lambda b=backend, s=symbols: rans.encode(s, backend=b), rounds)
            dec = cpu_seconds(
                lambda b=backend, s=symbols, d=data: rans.decode(d, s.shape, backend=b), rounds
            )
            row = {
                "source": name,
                "backend": backend,
                "entropy [bits]": round(ideal * 8 / count, 4),
                "over entropy [%]": round(100 * (len(data) / ideal - 1), 3),
                "encode [Msym/s]": round(count / enc / 1e6, 1),
                "decode [Msym/s]": round(count / dec / 1e6, 1),
            }
            rows.append(row)
            print(*(f"{value!s:>16}" for value in row.values()), flush=True)
    small = []
    for seed in range(3):
        for name, symbols in make_small(seed).items():
            row = {
                "tensor": name,
                "seed": seed,
                "entropy [bytes]": round(entropy_bytes(symbols)),
                "rans [bytes]": len(rans.encode(symbols)),
                "adaptive [bytes]": len(adaptive.encode(symbols)),
            }
            small.append(row)
            print(*(f"{value!s:>16}" for value in row.values()), flush=True)
    return {"sources": rows, "small": small}


def machine() -> str:
    """Return the processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    """Parse the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    import numba

    result = {
        "seed": SEED,
        "count": args.count,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": 1,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
        },
        **run(args.count, args.rounds),
    }
    Path(__file__).with_name("result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
