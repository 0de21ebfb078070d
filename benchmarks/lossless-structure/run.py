"""Lossless structure: units that can be removed with proof from L1-trained MLPs on MNIST digits.

Run: python benchmarks/lossless-structure/run.py [--seeds 0 1 2] [--output result.json]. Trains
784-50-50-10 and 784-100-100-10 with two L1 weights each, taken by its gradient or
by its proximal step (weights become exactly zero), on the digits that ship with Lamina (7,000
to train on, pixels in [0, 1]), removes what is proven on the box [0, 1], and measures: units
removed (bar: 15 %), accuracy on the 2,000 test digits before and after, the largest difference of
the outputs at 100,000 points of the box, corners included (bar: 1e-5), seconds, the rungs that
decided, and file sizes. Nothing is chosen on any result: every row is reported. Finished rows are
kept in the output file, and a second run goes on behind them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from itertools import product
from pathlib import Path
from typing import Any

import scipy
import torch
from torch import Tensor, nn

import lamina
from lamina.data import load
from lamina.data.mnist import MEAN, STD
from lamina.measure.bounds import Limits
from lamina.measure.bounds.witness import points_of
from lamina.network.source import Network
from lamina.plan.stable import Box, differences, find_structure

CASES = ((50, 1e-3), (50, 2e-4), (100, 5e-4), (100, 1e-4))  # width, L1 weight
POINTS = 100_000
BOX = Box((0.0,), (1.0,))


def mlp(width: int) -> nn.Module:
    """Return 784 - width - width - 10 with ReLUs."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, 10),
    )  # fmt: skip


def pixels(images: Tensor) -> Tensor:
    """Undo the shipped loader's normalisation."""
    return (images * STD + MEAN).clamp(0, 1)


def train(width: int, l1: float, seed: int, epochs: int, by: str) -> nn.Module:
    """Train with SGD and an L1 term, by its gradient or by its proximal step.

    The proximal step makes weights exactly zero, the gradient only small.
    """
    torch.manual_seed(seed)
    data, module = load("mnist-10k"), mlp(width)
    steps = epochs * len(list(data.train))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weights = [layer.weight for layer in module if isinstance(layer, nn.Linear)]
    for _ in range(epochs):
        for images, labels in data.train:
            loss = nn.functional.cross_entropy(module(pixels(images)), labels)
            if by == "gradient":
                loss = loss + l1 * sum(weight.abs().sum() for weight in weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            shrink = l1 * optimizer.param_groups[0]["lr"] / (1 - 0.9)  # momentum sums gradients
            with torch.no_grad():
                for weight in weights if by == "proximal" else ():
                    weight.copy_(weight.sign() * (weight.abs() - shrink).clamp(min=0))
            rate.step()
    return module.eval()


def accuracy(module: nn.Module) -> float:
    """Return the accuracy on the test digits [%]."""
    right = total = 0
    with torch.no_grad():
        for images, labels in load("mnist-10k").test:
            right += int((module(pixels(images)).argmax(1) == labels).sum())
            total += len(labels)
    return 100 * right / total


def measure(
    width: int, l1: float, seed: int, epochs: int, by: str, limits: Limits
) -> dict[str, Any]:
    """Train one network, remove what can be removed, and measure."""
    start = time.perf_counter()
    module = train(width, l1, seed, epochs, by)
    network = Network(module, (torch.zeros(1, 1, 28, 28),), name="mlp")
    trained = time.perf_counter() - start
    start = time.perf_counter()
    found = find_structure(network, BOX, limits)
    seconds = time.perf_counter() - start
    made = found.rewritten.network if found.rewritten else network
    bounds = BOX.bounds((1, 28, 28))
    most, size = 0.0, 0.0
    for part in range(10):
        points = points_of(bounds, POINTS // 10, seed=1000 * seed + part)
        apart = differences(network, made, points)
        most, size = max(most, apart[0]), max(size, apart[1])
    units = found.log["units"]
    whats: dict[str, int] = {}
    rungs: dict[str, int] = {}
    hidden = [layer.weight for layer in module.children() if isinstance(layer, nn.Linear)][:-1]
    for entry in found.log["removed"]:
        whats[entry["what"]] = whats.get(entry["what"], 0) + 1
        rungs[entry["rung"]] = rungs.get(entry["rung"], 0) + 1
    entries = found.log["rounds"][0]["layers"].values()
    seen: dict[str, int] = {}
    for entry in entries:
        for rung, count in entry["both"].items():
            seen[rung] = seen.get(rung, 0) + count
    plain = lamina.compress(network, lossless=True)
    smaller = lamina.compress(made, lossless=True)
    whole = sum(before for before, _ in units.values())
    left = sum(after for _, after in units.values())
    return {
        "width": width, "l1": l1, "seed": seed, "epochs": epochs, "by": by,
        "train_seconds": round(trained, 1),
        "units": units, "removed": whole - left, "removed_percent": 100 * (whole - left) / whole,
        "reads_nothing": sum(int((weight == 0).all(1).sum()) for weight in hidden),
        "what": whats, "removed_by": rungs, "seen_both_by": seen,
        "open": sum(len(entry["open"]) for entry in entries),
        "accuracy_before": accuracy(network.module), "accuracy_after": accuracy(made.module),
        "largest_difference": most, "largest_output": size, "points": POINTS,
        "seconds": round(seconds, 2),
        "params": [sum(p.numel() for p in m.module.parameters()) for m in (network, made)],
        "bytes_raw": 4 * sum(p.numel() for p in network.module.parameters()),
        "bytes_lossless": len(plain.file), "bytes_lossless_structure": len(smaller.file),
    }  # fmt: skip


def main() -> None:
    """Parse the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--widths", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--by", nargs="+", default=["gradient", "proximal"])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=120.0, help="for the proofs of a network")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if args.output.exists():
        rows = json.loads(args.output.read_text())["rows"]
    for by, (width, l1), seed in product(args.by, CASES, args.seeds):
        key = {"width": width, "l1": l1, "seed": seed, "epochs": args.epochs, "by": by}
        if width not in args.widths or any(key.items() <= row.items() for row in rows):
            continue
        rows.append(measure(width, l1, seed, args.epochs, by, Limits(seconds=args.seconds)))
        print(json.dumps(rows[-1]), flush=True)
        result = {
            "date": datetime.date.today().isoformat(),
            "command": "python benchmarks/lossless-structure/run.py",
            "device": f"{platform.machine()}, CPU, 1 thread",
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__,
                "scipy": scipy.__version__, "lamina": lamina.__version__,
            },
            "bars": {"removed_percent": 15.0, "largest_difference": 1e-5},
            "rows": rows,
        }  # fmt: skip
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
