"""ResNet-20 on CIFAR-10 as JPEG: ALDS, its baselines and the data-aware form, side by side.

    python benchmarks/low-rank/run.py --data images:CIFAR10 --weights A.safetensors B... [--only 0]
    python benchmarks/low-rank/run.py --merge

Every network (one a seed) is compressed by every selector to the same shares of its parameters,
all of them counted, BatchNorm and biases included. Accuracies on every second image of the test
split (5,000, all classes alike) are written down: as compressed, after re-estimating BatchNorm
moments on the calibration images, and at two shares after the same short retraining (same data,
steps and settings for all). Data-free selectors see no
image before retraining. Calibration is 1,000 images of the train split; nothing was chosen by test.

Bars: ALDS >= every data-free baseline at 30-75 % removed; data-aware ALDS loses at most a third of
what ALDS loses at 50 % removed, compress-only, and stays ahead after recalibration.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import lamina
from lamina.data import Data, TensorLoader, load, mirror, shift
from lamina.measure.cost import measured_params
from lamina.network.source import Network
from lamina.plan import Edited, apply
from lamina.recipes.filters import prune
from lamina.recipes.low_rank import select
from lamina.train import Recovery, recalibrate, recover
from lamina.zoo import build

HERE = Path(__file__).parent
KEEPS = (0.7, 0.5, 0.35, 0.25)
STAGES = ("raw", "recalibrated", "retrained")
RETRAINED = (0.5, 0.25)  # of these
SELECTORS = (
    *("alds", "svd", "svd-energy", "l-rank", "filters"),
    *("pca", "filters-aware", "data-aware"),
)
DATA_FREE = ("svd", "svd-energy", "l-rank", "filters")
RETRAIN = Recovery(epochs=0.25, lr=2e-3, distill=0.7, temperature=2.0, half=True)


def images(spec: str) -> Data:
    """The data of the user, with the usual augmentation of the train split."""
    data = load(spec)
    assert isinstance(data.train, TensorLoader)
    move, turn = shift(4), mirror()
    data.train.batch_size = 128
    data.train.augment = lambda x, g: move(turn(x, g), g)
    return data


def accuracy(module: nn.Module, loader: Any) -> float:
    """Percent of images classified right."""
    right = total = 0
    module = module.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for x, y in loader:
            x = x.contiguous(memory_format=torch.channels_last)
            right, total = right + int((module(x).argmax(1) == y).sum()), total + len(y)
    return round(100 * right / total, 3)


def every_second(loader: TensorLoader) -> TensorLoader:
    """Half of a split; folders are read class by class, so all classes stay alike."""
    assert loader.y is not None
    return TensorLoader(loader.x[::2], loader.y[::2], 128, prepare=loader.prepare)


def network(weights: Path) -> Network:
    module = build("resnet20")
    module.load_state_dict(load_file(weights))
    example = (torch.zeros(2, 3, 32, 32),)
    return Network(module.eval(), example, source="zoo:resnet20", name="resnet20", loss="logits")


def compressed(net: Network, sites: Any, stats: Any, selector: str, keep: float) -> Edited:
    if selector == "filters":  # by norm, uniformly; better here than with the constants folded in
        return prune(net, sites, stats, keep, compensate="none")
    if selector == "filters-aware":
        return prune(net, sites, stats, keep, scope="currency", compensate="regress")
    return apply(net, select(net, sites, stats, selector, keep), sites, stats)


def run(weights: Path, data: Data, seed: int, selectors: list[str]) -> dict[str, Any]:
    net = network(weights)
    assert data.calibration is not None and data.test is not None
    sites = lamina.discover(net)
    stats = lamina.measure(net, sites, data, seed=seed)
    assert isinstance(data.test, TensorLoader)
    test = every_second(data.test)
    before, dense = accuracy(net.module, test), measured_params(net.module)
    print(f"seed {seed}: {before} % of {dense:,.0f} parameters", flush=True)
    rows = []
    for selector in selectors:
        for keep in KEEPS:
            start = time.perf_counter()
            edited = compressed(net, sites, stats, selector, keep)
            row = {"selector": selector, "keep": keep, "seconds": time.perf_counter() - start}
            row["params"] = measured_params(edited.model) / dense
            row["raw"] = accuracy(edited.model, test)
            recalibrate(edited.model, data.calibration)
            row["recalibrated"] = accuracy(edited.model, test)
            if keep in RETRAINED:
                settings = replace(RETRAIN, seed=seed)
                trained = recover(net, edited, data, settings).edited.model
                row["retrained"] = accuracy(trained, test)
            row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
            rows.append(row)
            print(json.dumps(row), flush=True)
    return {"seed": seed, "accuracy": before, "params": dense, "rows": rows}


def merge() -> dict[str, Any]:
    """Means and spreads over seeds, and the bars."""
    runs = [json.loads(p.read_text()) for p in sorted(HERE.glob("seed-*.json"))]
    table: dict[str, dict[str, Any]] = {}
    for selector in dict.fromkeys(r["selector"] for r in runs[0]["rows"]):
        for keep in KEEPS:
            found = [
                (r["accuracy"], row)
                for r in runs
                for row in r["rows"]
                if (row["selector"], row["keep"]) == (selector, keep)
            ]
            cell: dict[str, Any] = {"params": round(mean(row["params"] for _, row in found), 4)}
            stages = [s for s in STAGES if s in found[0][1]]
            for stage in stages:
                drops = [before - row[stage] for before, row in found]
                cell[stage] = round(mean(row[stage] for _, row in found), 2)
                cell[f"{stage}_drop"] = round(mean(drops), 2)
                cell[f"{stage}_spread"] = round(stdev(drops), 2) if len(drops) > 1 else None
            table.setdefault(selector, {})[str(keep)] = cell
    ahead = {
        f"{stage} keep {keep}": {
            b: round(
                table[b][str(keep)][f"{stage}_drop"] - table["alds"][str(keep)][f"{stage}_drop"], 2
            )
            for b in (*DATA_FREE, "pca")
            if b in table
        }
        for stage in STAGES
        for keep in (KEEPS if stage != "retrained" else RETRAINED)
    }
    ratio = {
        stage: round(
            table["data-aware"]["0.5"][f"{stage}_drop"] / table["alds"]["0.5"][f"{stage}_drop"], 3
        )
        for stage in STAGES
    }
    return {
        "accuracy": [r["accuracy"] for r in runs],
        "table": table,
        "alds_ahead_by_points": ahead,
        "data_aware_loss_over_alds_loss_at_half": ratio,
        "bar": {"data_aware_loss_over_alds_loss_at_half": 1 / 3},
        "seeds": [r["seed"] for r in runs],
        "retraining": vars(RETRAIN),
        "machine": runs[0]["machine"],
        "date": runs[0]["date"],
    }


def machine() -> dict[str, Any]:
    return {
        "device": platform.machine() + " cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lamina": lamina.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="what lamina.data.load reads")
    parser.add_argument("--weights", nargs="+", type=Path, help="one network a seed")
    parser.add_argument("--only", type=int, help="this seed alone")
    parser.add_argument("--selectors", default=",".join(SELECTORS))
    parser.add_argument("--merge", action="store_true", help="only sum the seeds up")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.merge:
        data = images(given.data)
        for seed, weights in enumerate(given.weights):
            if given.only in (None, seed):
                found = run(weights, data, seed, given.selectors.split(","))
                found |= {"machine": machine(), "date": datetime.date.today().isoformat()}
                (HERE / f"seed-{seed}.json").write_text(json.dumps(found, indent=1) + "\n")
    result = merge()
    (HERE / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["data_aware_loss_over_alds_loss_at_half"]))


if __name__ == "__main__":
    main()
