"""Fuzz the reader of `.lamina` files: mutated files must be refused or be what they declare.

Run: python benchmarks/fuzz/run.py [--cases 100000] [--seed 0]. Writes result.json; the bytes of a
finding are written beside it, and the exit status is 1. The compiled loops run with bounds checks,
so that a read past an array's end is a finding too, and the process may not take more than 4 GiB.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MOST_MEMORY = 4 << 30  # bytes of address space beyond what the imports take


def confine() -> None:
    """Let the system refuse memory that no file may ask for."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--uncompiled", type=float, default=0.02, help="share run without numba too"
    )
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:  # code without checks must not be found, nor left
        os.environ.update(
            NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=cache, LAMINA_THREADS="1", OMP_NUM_THREADS="1"
        )
        result, ok = run(told)
    told.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(0 if ok else 1)


def run(told: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Return what result.json holds, and whether nothing was found."""
    sys.path.insert(0, str(HERE.parents[1]))
    import numpy as np
    import torch
    from tests.attacks.files import valid_files
    from tests.attacks.fuzz import fuzz_one, search

    import lamina

    torch.set_num_threads(1)
    seeds = valid_files()
    start = time.perf_counter()
    for data in seeds.values():  # compile everything before memory is bounded
        fuzz_one(data)
    confine()
    compiled = time.perf_counter() - start
    start, used = time.perf_counter(), time.process_time()
    findings, coverage, counts = search(seeds, told.cases, told.seed, told.uncompiled)
    for finding in findings:
        name = f"finding-{told.seed}-{finding.case}.lamina"
        (told.output.parent / name).write_bytes(finding.data)
    lines = Counter(Path(code.co_filename).name for code, _, _ in coverage.seen)
    result = {
        "cases": told.cases,
        "seed": told.seed,
        "findings": [{"case": f.case, "error": f.error} for f in findings],
        "counts": counts,
        "seeds": len(seeds),
        "edges": len(coverage.seen),
        "edges_by_file": dict(sorted(lines.items())),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "compile_seconds": round(compiled, 1),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "lamina": lamina.__version__,
    }
    return result, not findings


if __name__ == "__main__":
    main()
