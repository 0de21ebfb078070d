"""MLP blocks that become one linear layer each: what every further one costs.

    python benchmarks/layer-collapse/run.py vit-tiny --data DATA --weights vit-tiny.safetensors
    python benchmarks/layer-collapse/run.py vit-tiny --control --data DATA --weights ...
    python benchmarks/layer-collapse/run.py errors --data DATA --weights vit-tiny.safetensors

One run goes through k = 1 .. n collapsed blocks: first those whose collapse is predicted to cost
least (`--order last`: from the last). For every k the activations of these blocks are pulled to
lines (`--identity`: to the identity) while the network is trained for `--epochs`, and the network
is measured with the blocks as blends and with the blocks collapsed; then training goes on.
`--control` is the same training, step for step, batch for batch, without any pull. `--direct` is
least squares alone: the blocks of the original, collapsed without any training; `--tuned` the same,
and then the training of the control. Bars: a third of
the blocks costs at most one point (`vit-tiny`) or 5 % of the perplexity (`gpt-tiny`) against the
control; of `vgg11-bn` at least 70 % of all parameters at half a point, for which the two blocks of
the classifier are collapsed and nothing is trained at all.

Nothing is selected: the one setting of a network is in SETTINGS, chosen on validation data with
fewer epochs, and test data are measured once for every point of the curve. A run that was stopped
goes on from `--work`. `errors` compares the fits of the method without any training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_model
from torch import nn

import lamina
from lamina.data import Data, load, mirror, shift
from lamina.measure.calibrate import calibrate
from lamina.measure.cost import measured_macs, measured_params
from lamina.measure.quality import evaluate
from lamina.methods.layer_collapse import FITS
from lamina.methods.layer_collapse.merging import merge
from lamina.methods.layer_collapse.places import activations_of
from lamina.network.discover import discover
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan.apply import copy_module
from lamina.plan.spans import parts_of
from lamina.recipes.blocks import (
    ORDERS,
    collapse_runs,
    find_blocks,
    join_blocks,
    lines_of,
    order_blocks,
)
from lamina.recipes.retraining import LaterEpochs
from lamina.train.slope import Pull, put_blends
from lamina.train.straighten import Straightening, straighten
from lamina.zoo import build

HERE = Path(__file__).resolve().parent
EPOCHS_APART, SAMPLES = 1000, 500
SETTINGS: dict[str, dict[str, Any]] = {
    "vit-tiny": {"epochs": 1.0, "lr": 1e-3, "decay": 0.05, "distill": 0.5, "batch": 128,
                 "steps": [1, 2, 3, 4, 5, 6], "metric": "accuracy", "shift": 2, "mirror": 1},
    "mlp-mixer-tiny": {"epochs": 1.0, "lr": 1e-3, "decay": 0.05, "distill": 0.5, "batch": 128,
                       "steps": [2, 4, 6, 8, 10, 12], "metric": "accuracy", "shift": 2,
                       "mirror": 1},
    "gpt-tiny": {"epochs": 0.5, "lr": 3e-4, "decay": 0.1, "distill": 0.5, "batch": 16,
                 "steps": [3, 8], "metric": "perplexity", "half": True},
    "vgg11-bn": {"epochs": 3.0, "lr": 5e-4, "decay": 5e-4, "distill": 0.7, "batch": 128,
                 "steps": [1, 2], "metric": "accuracy", "shift": 4, "mirror": 1, "half": True},
}  # fmt: skip


def open_network(name: str, weights: Path) -> Network:
    module = build(name)
    load_model(module, str(weights))
    example = torch.zeros(1, 128, dtype=torch.long) if name == "gpt-tiny" else None
    if example is None:
        example = torch.zeros(1, 3, 32, 32) if name == "vgg11-bn" else torch.zeros(1, 1, 28, 28)
    return Network(module.eval(), (example,), source=f"zoo:{name}", name=name)


def open_data(name: str, path: str, seed: int) -> Data:
    data, settings = load(path), SETTINGS[name]
    train: Any = data.train
    train.seed, train.batch_size = seed, settings["batch"]
    if "shift" in settings:
        move, turn = shift(settings["shift"]), mirror()
        train.augment = lambda x, g: move(turn(x, g), g)
    return data


def training(name: str, seed: int, epochs: float) -> Straightening:
    s = SETTINGS[name]
    return Straightening(epochs=epochs, lr=s["lr"], decay=s["decay"], distill=s["distill"],
                         half=s.get("half", False), pull=Pull(), seed=seed)  # fmt: skip


def measure(module: nn.Module, data: Data, metric: str) -> dict[str, float]:
    splits = {"validation": data.validation, "test": data.test}
    return {k: round(evaluate(module, v, metric), 3) for k, v in splits.items() if v is not None}


def walk(given: argparse.Namespace) -> None:
    """Go through all k, and write a row for each."""
    name, seed = given.part, given.seed
    settings = SETTINGS[name]
    network, data = open_network(name, given.weights), open_data(name, given.data, seed)
    sites = discover(network)
    found = find_blocks(network, sites)
    stats = calibrate(network, sites, data, samples=SAMPLES, seed=seed, probe=False)
    blocks = order_blocks(network, sites, stats, found, given.order)
    role = next((r for r in ("control", "direct", "tuned") if getattr(given, r)), "collapse")
    role = role if given.order == "loss" or given.control else f"{role} from the last"
    role = f"{role} to the identity" if given.identity else role
    tag = f"{name}-{role}-{seed}".replace(" ", "-")
    given.work.mkdir(parents=True, exist_ok=True)
    saved, file = given.work / f"{tag}.pt", given.output / f"{name}.json"
    module, first, rows = network.module, 1, []
    epochs = settings["epochs"] if given.epochs is None else given.epochs
    epochs = 0.0 if given.direct else epochs
    metric = settings["metric"]
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        module, first, rows = copy_module(module), state["k"] + 1, state["rows"]
        if not given.tuned:  # there every k starts from the original
            paths = _paths(blocks, state["k"]) if "collapse" in role else []
            lines = {} if given.identity else lines_of(network, sites, stats, blocks)
            blends = put_blends(module, paths, lines)
            module.load_state_dict(state["module"])
            for blend in blends.values():
                blend.snap()
    else:
        rows = [{"k": 0, "before": measure(module, data, metric),
                 "params": measured_params(module)}]  # fmt: skip
        print(json.dumps(rows[0]), flush=True)
    steps = list(range(1, len(blocks) + 1)) if given.direct else settings["steps"]
    steps = [k for k in steps if k <= (given.most or len(blocks))]
    for k in steps:
        if k < first:
            continue
        start = time.perf_counter()
        part = replace(data, train=LaterEpochs(data.train, EPOCHS_APART * (k + 100 * seed)))
        row: dict[str, Any] = {"k": k}
        if given.tuned:
            runs = join_blocks(sites, blocks[:k])
            module = collapse_runs(
                network, network.module, sites, runs, data, samples=SAMPLES
            ).model
        if epochs:
            paths = [] if given.control or given.tuned else _paths(blocks, k)
            lines = {} if given.identity else lines_of(network, sites, stats, blocks)
            result = straighten(
                network, module, paths, part, training(name, seed + k, epochs), lines=lines
            )
            module = result.module
            row["bends"] = {p: round(b, 4) for p, b in result.bends.items()}
            if not given.tuned:
                splits = data if given.control else replace(data, test=None)
                row["trained"] = measure(module, splits, metric)
        seconds = time.perf_counter() - start
        if not given.control:
            runs = join_blocks(sites, blocks[:k])
            small = module
            if not given.tuned:
                small = collapse_runs(network, module, sites, runs, data, samples=SAMPLES).model
            row["collapsed"] = measure(small, data, metric)
            row["params"] = measured_params(small)
            row["macs"] = measured_macs(small, network.example_inputs)
        row["seconds"] = round(seconds)
        rows.append(row)
        print(json.dumps(row), flush=True)
        state = {"k": k, "rows": rows, "module": module.state_dict()}
        torch.save(state, saved.with_suffix(".part"))
        saved.with_suffix(".part").rename(saved)
        write(
            file,
            role,
            rows,
            {"seed": seed, "settings": settings, "blocks": [b.name for b in blocks]},
        )


def _paths(blocks: list[Site], k: int) -> list[str]:
    return [p for block in blocks[:k] for p in activations_of(block)]


def write(file: Path, role: str, rows: list[dict[str, Any]], given: dict[str, Any]) -> None:
    """Put the rows of one role into the result, beside those of the other."""
    found = json.loads(file.read_text()) if file.exists() else {}
    facts = about()
    command = found.get("commands", {}) | {role: facts.pop("command")}
    found |= {**given, role: rows, **facts, "commands": command}
    file.write_text(json.dumps(found, indent=1) + "\n")


def about() -> dict[str, Any]:
    return {
        "command": " ".join(["python", "benchmarks/layer-collapse/run.py", *_shown(sys.argv[1:])]),
        "device": platform.machine() + " cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": numpy.__version__, "lamina": lamina.__version__},
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _shown(words: list[str]) -> list[str]:
    """The command without folders: where files lie is nobody's business."""
    shown, skip = [], False
    for word in words:
        if skip or word in ("--work", "--output"):
            skip = not skip
            continue
        kind, _, rest = word.rpartition(":")
        shown.append((f"{kind}:" if kind else "") + rest.rpartition("/")[2])
    return shown


# --- the fits, without training ------------------------------------------------------------------


def compare(given: argparse.Namespace) -> None:
    """Each block collapsed alone: relative output error and loss, by fit."""
    name = "vit-tiny"
    network, data = open_network(name, given.weights), open_data(name, given.data, 0)
    sites = discover(network)
    stats = calibrate(network, sites, data, samples=1000, seed=given.seed)
    layers = {site.name: site for site in sites.layers}
    rows = []
    for slope in (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0):
        rows.append({"prelu": slope, **{f: _relative(slope, f, given.seed) for f in FITS}})
        print(json.dumps(rows[-1]), flush=True)
    alone = []
    base = {m: evaluate(network.module, data.validation, m) for m in ("loss", "accuracy")}
    for block in find_blocks(network, sites):
        parts = parts_of(network, sites, stats, block)
        row: dict[str, Any] = {"block": block.name}
        for fit in FITS:
            one = Sites(tuple(layers[n] for n in block.members), (block,))
            small = collapse_runs(network, network.module, one, [block], data, fit, seed=given.seed)
            row[fit] = {
                "predicted": round(merge(parts, fit).error, 4),
                "loss": round(evaluate(small.model, data.validation, "loss") - base["loss"], 4),
                "accuracy": round(evaluate(small.model, data.validation), 2),
            }
        alone.append(row)
        print(json.dumps(row), flush=True)
    found = {"gaussian": rows, "alone": alone, "base": base, "seed": given.seed, **about()}
    (given.output / "errors.json").write_text(json.dumps(found, indent=1) + "\n")


def _relative(slope: float, fit: str, seed: int) -> float:
    """Relative output error of one fit for a random MLP of normal inputs, on inputs of its own."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(64, 256), nn.PReLU(init=slope), nn.Linear(256, 64)).eval()
    x, other = torch.randn(8000, 64), torch.randn(4000, 64)
    network = Network(module, (x[:2],), loss="features")
    sites = discover(network)
    runs = join_blocks(sites, find_blocks(network, sites))
    small = collapse_runs(
        network, module, sites, runs, Data(calibration=[x]), fit, samples=8000, seed=seed
    ).model
    with torch.no_grad():
        y, z = module(other), small(other)
    return round(float((y - z).norm() / (y - y.mean(0)).norm()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=[*SETTINGS, "errors"])
    parser.add_argument("--data", required=True, help="what lamina.data.load reads")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--control", action="store_true", help="train without collapsing")
    parser.add_argument("--tuned", action="store_true", help="collapse first, and train then")
    parser.add_argument("--identity", action="store_true", help="pull to it, not to lines")
    parser.add_argument("--order", choices=ORDERS, default="loss", help="of the blocks")
    parser.add_argument("--direct", action="store_true", help="collapse without training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, help="instead of the setting, for every k")
    parser.add_argument("--most", type=int, help="blocks at most")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="for checkpoints")
    parser.add_argument("--output", type=Path, default=HERE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "errors":
        compare(given)
    else:
        walk(given)


if __name__ == "__main__":
    main()
