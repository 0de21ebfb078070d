"""LayerMerge on ResNet-20 and on a small MobileNetV2: how much faster, and what it costs.

    python benchmarks/layer-merge/run.py resnet20 --data images:CIFAR10
    python benchmarks/layer-merge/run.py mobilenet-v2-tiny --data F.npz --weights W.safetensors

The recipe `layer-merge` makes the tables, chooses, trains with the layers apart and merges. Speed
is that of one forward pass of 64 images on one thread, in interleaved rounds with the network as
given and with the same network with BatchNorm folded and weights in channels-last order; the second
is the fair one. The control is the network as given, trained as long in the same way. Settings are
the command's; validation accuracy is written down at every stage, the test split is looked at once,
at the end. Every part that is in the result file already is left as it is.

Bar: measured speed-up >= 1.5 at <= 1 point of accuracy lost.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import lamina
from lamina import artifact
from lamina.data import Data, TensorLoader, load, mirror, shift
from lamina.measure.cost import measured_macs, measured_params
from lamina.measure.latency import measure_ratios
from lamina.measure.stats import Stats
from lamina.network.source import Network
from lamina.plan import Budget, Edited
from lamina.recipes.followed import Followed
from lamina.recipes.merge import LayerMerge, rewritten
from lamina.stages import Way
from lamina.train import recover
from lamina.zoo import untrained, zoo

HERE = Path(__file__).parent
BATCH = 64
BAR = {"speedup": 1.5, "drop": 1.0}
MOVES = {"resnet20": 4, "mobilenet-v2-tiny": 2}  # pixels that training images are shifted by


def images(name: str, spec: str) -> Data:
    """The data of the user, with the usual augmentation of the train split."""
    data = load(spec)
    assert isinstance(data.train, TensorLoader)
    move, turn = shift(MOVES[name]), mirror()
    data.train.batch_size = 128
    data.train.augment = lambda x, g: move(turn(x, g), g)
    return data


def network(name: str, weights: Path | None, data: Data) -> Network:
    """The trained network; its example inputs are a batch of calibration images."""
    net = untrained(name) if weights else zoo(name)
    if weights:
        net.module.load_state_dict(load_file(weights))
    assert data.calibration is not None
    x = torch.cat([batch[0] for batch in data.calibration])[:BATCH]
    return replace(net, example_inputs=(x,), data=None)


def accuracy(module: nn.Module, loader: Any) -> float:
    """Percent of images classified right."""
    right = total = 0
    with torch.no_grad():
        for x, y in loader:
            right, total = right + int((module.eval()(x).argmax(1) == y).sum()), total + len(y)
    return round(100 * right / total, 3)


def speeds(net: Network, module: nn.Module) -> dict[str, Any]:
    """How fast a network is, over the original as given and as rewritten without loss."""
    base = rewritten(net).network.module
    [(fair, noise), (merged, _)], whole = measure_ratios(net, [base, module], 1, 60.0, None)
    [(ratio, spread)], _ = measure_ratios(replace(net, module=base), [module], 1, 60.0, None)
    return {
        "milliseconds": round(1000 * whole, 3),
        "over_given": round(1 / merged, 3),
        "rewritten_over_given": round(1 / fair, 3),
        "over_rewritten": round(1 / ratio, 3),
        "noise": round(max(noise, spread), 3),
        "batch": BATCH,
        "threads": 1,
    }


def merged(net: Network, data: Data, recipe: LayerMerge, seed: int, keep: Path | None) -> dict:
    """Follow the recipe, and measure what comes of it at every stage."""
    start = time.perf_counter()

    def watch(stage: str, done: int, of: int, text: str) -> None:
        if not done or done == of or done % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"{seconds:7.0f} s  {stage} {done}/{of} {text}", flush=True)

    way = Way(net, data, Budget(size="100%"), seed=seed, watch=watch)
    sites = lamina.discover(net)
    followed: Followed = recipe.follow(way, sites, Stats())
    final, applied = followed.final, followed.applied
    assert applied is not None
    for note in followed.notes:
        print(note, flush=True)
    file = artifact.pack(final.model, final.edits, net.source, {})
    loaded = artifact.restore(artifact.unpack(file), untrained(net.name).module).eval()
    x = net.example_inputs[0]
    with torch.no_grad():
        same = bool(torch.equal(loaded(x), final.model.eval()(x)))
    if keep:
        keep.write_bytes(file)
    return {
        "recipe": dict(followed.settings),
        "notes": list(followed.notes),
        "validation": {
            "before": accuracy(net.module, data.validation),
            "merged": accuracy(applied.model, data.validation),
            "trained": accuracy(final.model, data.validation),
        },
        "test": {
            "before": accuracy(net.module, data.test),
            "trained": accuracy(final.model, data.test),
        },
        "params": round(measured_params(final.model) / measured_params(net.module), 4),
        "macs": round(measured_macs(final.model, (x,)) / measured_macs(net.module, (x,)), 4),
        "convolutions": [
            sum(isinstance(m, nn.Conv2d) for m in module.modules())
            for module in (net.module, final.model)
        ],
        "speed": speeds(net, final.model),
        "file_bytes": len(file),
        "loads_bit_for_bit": same,
        "seconds": {s["name"]: s["seconds"] for s in way.stages},
    }


def control(net: Network, data: Data, recipe: LayerMerge, seed: int) -> dict[str, Any]:
    """Train the network as given, as long and in the same way."""
    trained = recover(net, Edited(net, ()), data, recipe.recovery(seed)).edited.model
    return {s: accuracy(trained, getattr(data, s)) for s in ("validation", "test")}


def machine() -> dict[str, Any]:
    return {
        "device": platform.machine() + " cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lamina": lamina.__version__,
    }


def command(given: argparse.Namespace) -> str:
    """What made a result, without the places of one machine."""
    paths = {"data": "DATA", "weights": "WEIGHTS"}
    words = ["python benchmarks/layer-merge/run.py", given.network]
    for name, value in vars(given).items():
        if name in ("network", "keep", "output") or value in (None, False):
            continue
        flag = f"--{name.replace('_', '-')}"
        words.append(flag if value is True else f"{flag} {paths.get(name, value)}")
    return " ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=MOVES)
    parser.add_argument("--data", required=True, help="what lamina.data.load reads")
    parser.add_argument("--weights", type=Path, help="state dict; default: those of the zoo")
    parser.add_argument("--speedup", type=float, default=1.6, help="asked for, over the fair one")
    parser.add_argument("--start", default="fit")
    parser.add_argument("--ends", default="learned")
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--distill", type=float, default=0.9)
    parser.add_argument("--no-control", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where to write the .lamina file")
    parser.add_argument("--output", type=Path, help="default: NETWORK.json beside this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    output = given.output or HERE / f"{given.network}.json"
    data = images(given.network, given.data)
    net = network(given.network, given.weights, data)
    recipe = LayerMerge(
        speedup=given.speedup, start=given.start, ends=given.ends, epochs=given.epochs,
        lr=given.lr, optimizer=given.optimizer, distill=given.distill, half=True,
    )  # fmt: skip
    found = json.loads(output.read_text()) if output.exists() else {}
    parts = {"merged": lambda: merged(net, data, recipe, given.seed, given.keep)}
    if not given.no_control and given.epochs:
        parts["control"] = lambda: control(net, data, recipe, given.seed)
    for name, make in parts.items():
        if name in found:
            continue
        found[name] = make()
        if name == "merged":
            row = found[name]
            drop = round(row["test"]["before"] - row["test"]["trained"], 3)
            row["drop"] = drop
            found["met"] = {
                "over_given": row["speed"]["over_given"] >= BAR["speedup"],
                "over_rewritten": row["speed"]["over_rewritten"] >= BAR["speedup"],
                "drop": drop <= BAR["drop"],
            }
        found |= {
            "network": given.network, "bar": BAR, "seed": given.seed, "machine": machine(),
            "command": command(given),
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        output.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
