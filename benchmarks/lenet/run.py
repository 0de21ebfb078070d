"""LeNets on the shipped digits: how small a file at how much loss of test accuracy.

    python benchmarks/lenet/run.py [CASE ...] [--seeds 0,1,2]

Cases are in CASES below. The test split is looked at once per run, after compression. Results are
merged into result.json, so that cases can be run one at a time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

import lamina
from lamina.artifact import unpack
from lamina.measure.quality import evaluate

HERE = Path(__file__).parent
CASES = {  # name: (network, size, recovery epochs or None, bar on the ratio, bar on the drop)
    "demo": ("lenet-5", "1%", "auto", 100, 0.3),
    "lenet-5 1/400": ("lenet-5", "1/400", 80, 400, 0.3),
    "lenet-5 1/800": ("lenet-5", "1/800", 150, 800, 0.3),
    "lenet-300-100 1/120": ("lenet-300-100", "1/120", 80, 120, 0.3),
    "lenet-5 post-training 1/16": ("lenet-5", "1/16", None, 16, 0.3),
    "lenet-5 post-training 1/64": ("lenet-5", "1/64", None, 16, 0.3),
}


def run(name: str, seed: int) -> dict[str, object]:
    network, size, epochs, ratio, drop = CASES[name]
    net = lamina.zoo(network)
    recover = lamina.Recovery(epochs=epochs, seed=seed) if isinstance(epochs, int) else epochs
    start = time.perf_counter()
    result = lamina.compress(net, net.data, size, recover=recover, seed=seed)
    seconds = time.perf_counter() - start
    before = evaluate(net.module, net.data.test, "accuracy")
    after = evaluate(result.model, net.data.test, "accuracy")
    original = sum(p.numel() * p.element_size() for p in net.module.parameters())
    ledger = dict(unpack(result.file).ledger)
    coded = sum(v for k, v in ledger.items() if k not in ("header", "checksum"))
    return {
        "seed": seed,
        "bytes": len(result.file),
        "ratio": round(original / len(result.file), 1),
        "test_before": before,
        "test_after": after,
        "drop": round(before - after, 2),
        "validation_after": evaluate(result.model, net.data.validation, "accuracy"),
        "seconds": round(seconds, 1),
        "not_coded_bytes": len(result.file) - coded,
        "planned_bytes": round(result.plan.predicted.bits / 8),
        "size_predicted": prediction(result) if recover is None else None,
        "bar": {"ratio": ratio, "drop": drop},
        "met": original / len(result.file) >= ratio and before - after <= drop + 1e-9,
    }


def prediction(result: Any) -> dict[str, float]:
    """How far the plan is off: the file [%], and the worst site beyond 64 bytes + 2 % [bytes]."""
    facts = result.report.dict()
    planned, file = facts["size"]["planned"], facts["size"]["file"]
    worst = max(
        abs(s["bytes_planned"] - s["bytes_file"]) - 64 - 0.02 * s["bytes_file"]
        for s in facts["sites"]
    )
    return {"off_percent": round(100 * (planned / file - 1), 3), "worst_site_excess": round(worst)}


def machine() -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = HERE / "result.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in args.cases:
        rows = [run(name, int(seed)) for seed in args.seeds.split(",")]
        results[name] = {
            "date": datetime.date.today().isoformat(),
            "versions": {"lamina": lamina.__version__, "torch": torch.__version__},
            "machine": machine(),
            "command": f"python benchmarks/lenet/run.py {name!r} --seeds {args.seeds}",
            "runs": rows,
        }
        for row in rows:
            print(name, {k: v for k, v in row.items() if k != "bar"}, flush=True)
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
