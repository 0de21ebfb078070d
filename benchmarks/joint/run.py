"""One plan over all families against the best plan of each family alone, at equal budgets.

    python benchmarks/joint/run.py small-cnn --data fashion.npz
    python benchmarks/joint/run.py resnet20 --data images:CIFAR10
    python benchmarks/joint/run.py vit-tiny --data fashion.npz --families "single layers" joint

For every pair of limits (bytes, and latency where there is one) each family plans by itself, and
all plan together ("single layers": all methods that span no layers); post-training, no retraining.
Written down: the predicted error, test accuracy, agreement with the original, the file's bytes and
the measured latency (interleaved with the original, one thread). A family that cannot keep to the
limits is listed as such.

Bar: the joint plan is never worse than the best single family, and better somewhere. "Worse" is
judged by agreement with the original's predictions on the whole test split, to the noise of that
many images (two standard errors), and by the predicted error exactly.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lamina
from lamina.data import Data, TensorLoader, load
from lamina.errors import InfeasibleError
from lamina.measure.cost import latency
from lamina.measure.quality import evaluate
from lamina.run import open_run

HERE = Path(__file__).parent
FAMILIES: dict[str, tuple[str, ...] | None] = {
    "low rank": ("alds", "tucker"),
    "channels + rank": ("collaborative",),
    "quantization": ("rdoq",),
    "codebook": ("kmeans",),
    "single layers": ("alds", "tucker", "magnitude", "kmeans", "rdoq"),
    "joint": None,
}
BUDGETS: dict[str, tuple[dict[str, str], ...]] = {
    "small-cnn": (
        {"size": "12%"},
        {"size": "12%", "macs": "30%"},
        {"size": "25%", "latency": "0.35x"},
    ),
    "resnet20": (
        {"size": "12%"},
        {"size": "12%", "macs": "60%"},
    ),
    "vit-tiny": ({"size": "12%", "macs": "60%"}, {"size": "8%", "macs": "45%"}),
}
BATCH = 64  # images of one timed forward pass


def accuracy(model: Any, data: Data) -> float:
    return evaluate(model, data.test, "accuracy")


def timed(net: lamina.Network, model: Any) -> float:
    """Time over the original's, from interleaved rounds."""
    took = latency({"a": net.module, "b": model}, net.example_inputs, rounds=15)
    return took["b"] / took["a"]


def one(net: lamina.Network, data: Data, limits: dict[str, str], methods: Any, run: Path) -> Any:
    start = time.perf_counter()
    seen = Data(calibration=data.calibration, name=data.name)
    with open_run(run) as folder:
        try:
            result = lamina.compress(
                net, seen, lamina.Budget(**limits), methods=methods, recover=None, run=folder
            )
        except InfeasibleError as error:
            return {"infeasible": dict(error.nearest)}
    return {
        "error": result.plan.error,
        "bytes": len(result.file),
        "latency": round(timed(net, result.model), 3),
        "accuracy": round(accuracy(result.model, data), 3),
        "agreement": round(evaluate(result.model, data.test, "agreement", original=net), 3),
        "params": result.plan.predicted.params / result.plan.original.params,
        "macs": result.plan.predicted.macs / result.plan.original.macs,
        "chains": chains(result.plan),
        "seconds": round(time.perf_counter() - start, 1),
    }


def chains(plan: lamina.Plan) -> dict[str, int]:
    """How many layers took which chain."""
    counts: dict[str, int] = {}
    for decision in plan.sites.values():
        name = " > ".join(dict.fromkeys(step.method for step in decision.steps))
        counts[name] = counts.get(name, 0) + 1
    return counts


def judged(rows: dict[str, Any], samples: int) -> dict[str, Any]:
    """The joint plan against the best single family."""
    alone = {k: r for k, r in rows.items() if k != "joint" and "error" in r}
    joint = rows["joint"]
    if "error" not in joint or not alone:
        return {"joint_only": "error" in joint}
    best = max(alone, key=lambda k: alone[k]["agreement"])
    gain = joint["agreement"] - alone[best]["agreement"]
    share = min(max(joint["agreement"] / 100, 1e-3), 1 - 1e-3)
    noise = 200 * math.sqrt(2 * share * (1 - share) / samples)
    return {
        "best_family": best,
        "gain_points": round(gain, 3),
        "noise_points": round(noise, 3),
        "worse": gain < -noise,
        "better": gain > noise,
        "error_ratio": round(
            joint["error"] / max(min(r["error"] for r in alone.values()), 1e-12), 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(BUDGETS))
    parser.add_argument("--data", required=True, help="what lamina.data.load reads")
    parser.add_argument("--every", type=int, default=1, help="of the test images, every so many")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--run", type=Path, help="folder to continue in")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = load(given.data)
    test = data.test
    assert isinstance(test, TensorLoader) and test.y is not None
    test = TensorLoader(test.x[:: given.every], test.y[:: given.every], 128, prepare=test.prepare)
    data = replace(data, test=test)
    zoo = lamina.zoo(given.name)
    x = next(iter(data.calibration or ()))[0][:BATCH]
    net = lamina.Network(zoo.module, (x,), source=zoo.source, name=zoo.name, loss="logits")
    run = given.run or Path(tempfile.mkdtemp())
    before = accuracy(net.module, data)
    found = []
    for limits in BUDGETS[given.name]:
        rows: dict[str, Any] = {}
        for family in given.families:
            rows[family] = one(net, data, limits, FAMILIES[family], run)
            print(limits, family, json.dumps(rows[family]), flush=True)
        found.append({"limits": limits, "rows": rows, "judged": judged(rows, test.dataset_size)})
        print(json.dumps(found[-1]["judged"]), flush=True)
    result = {
        "network": given.name,
        "accuracy": before,
        "budgets": found,
        "bar": "never worse than the best single family, and better somewhere",
        "met": not any(f["judged"].get("worse") for f in found)
        and any(f["judged"].get("better") or f["judged"].get("joint_only") for f in found),
        "test_images": test.dataset_size,
        "batch": BATCH,
        "threads": 1,
        "seed": 0,
        "device": platform.machine() + " cpu",
        "versions": {"torch": torch.__version__, "lamina": lamina.__version__},
        "date": datetime.date.today().isoformat(),
    }
    (HERE / f"result-{given.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
