"""Layer Fusion: a ResNet-20 and a small GPT whose layers share weights, retrained in between.

    python benchmarks/layer-fusion/run.py resnet20 --data images:CIFAR10 --files OUT
    python benchmarks/layer-fusion/run.py gpt-tiny --weights gpt-tiny.safetensors --data brown.npz \
        --files OUT [--only fused-20]

Every part is run once and kept in the result file; a part that is there already is skipped.
`resnet20`: `fused` is the recipe at 30 % of the unique parameters (3.33 times fewer), `longer`
trains it on, `oneshot` is the same in one step with the same training, `control` the same training
of the original with nothing shared. `gpt-tiny`: `fused-54`, `fused-31`, `fused-20` are the recipe
at so many percent of the unique parameters (four, two and one block for eight), `quantized` is the
file of the last, compressed to 5 % of the original's float32 bytes and trained on. Both splits are
measured once at the end of a part, and no setting was swept on the test split; but `longer` and
the training of `quantized` were written after the test scores of the parts they go on from.

Bars (Layer Fusion's abstract): 3.33 times fewer within 2 points; 20 % of the unique parameters
within 5 perplexity points, and the quantized file within the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model

import lamina
from lamina.artifact import pack
from lamina.data import Data, TensorLoader, load, mirror, shift
from lamina.measure.quality import evaluate
from lamina.measure.stats import Stats
from lamina.network.source import Network
from lamina.opening import open_model
from lamina.plan import Budget, Edited
from lamina.recipes.fusion import LayerFusion
from lamina.recipes.retraining import scaled_dropout
from lamina.stages import Way, packed
from lamina.train import Recovery, recover
from lamina.zoo import build

HERE = Path(__file__).parent
METRIC = {"resnet20": "accuracy", "gpt-tiny": "perplexity"}
BARS = {"resnet20": 2.0, "gpt-tiny": 5.0}
RESNET = LayerFusion(
    keep=0.3, steps=4, epochs=14, last=0.6, lr=0.2, optimizer="sgd", decay=5e-4, half=True
)
GPT = LayerFusion(
    keep=0.2, steps=1, unit="block", pattern="neighbours", epochs=3, lr=3e-3, decay=0.1, half=True
)


LONGER: dict[str, tuple[str, dict[str, Any]]] = {  # which part goes on, and how
    "longer": (
        "fused",
        {"epochs": 6.0, "optimizer": "sgd", "lr": 0.1, "decay": 1e-4, "distill": 0.7},
    ),
}


def settings_of(part: str, given: dict[str, Any]) -> LayerFusion:
    """Return the recipe of a part, with what the command line says instead."""
    parts = {
        "fused": (RESNET, {}),
        "oneshot": (RESNET, {"steps": 1}),
        "control": (RESNET, {"steps": 1, "keep": 1.0}),
        "fused-54": (GPT, {"keep": 0.54, "epochs": 2.0}),
        "fused-31": (GPT, {"keep": 0.31, "epochs": 3.0}),
        "fused-20": (GPT, {}),
    }
    base, own = parts[part]
    return LayerFusion(**{**asdict(base), **own, **given})


def network_of(name: str, weights: Path | None) -> Network:
    if weights is None:
        return lamina.zoo(name)
    module = build(name)
    load_model(module, weights)
    example = torch.zeros(2, 3, 32, 32) if name == "resnet20" else torch.zeros(2, 128).long()
    return Network(module.eval(), (example,), source=f"zoo:{name}", name=name, loss="logits")


def data_of(name: str, spec: str, seed: int) -> Data:
    data = load(spec)
    assert isinstance(data.train, TensorLoader)
    data.train.seed = seed
    data.train.batch_size = 128 if name == "resnet20" else 16
    if name == "resnet20":
        move, turn = shift(4), mirror()
        data.train.augment = lambda x, g: move(turn(x, g), g)
    return data


def scores(name: str, module: torch.nn.Module, data: Data) -> dict[str, float]:
    splits = {"validation": data.validation, "test": data.test}
    found = {k: evaluate(module.eval(), v, METRIC[name]) for k, v in splits.items() if v}
    return {k: round(v, 3) for k, v in found.items()}


def fused(name: str, part: str, network: Network, data: Data, given: Any) -> dict[str, Any]:
    """Run the recipe, write its file, and measure the network that the file holds."""
    recipe = settings_of(part, given.settings)
    sites = lamina.discover(network)
    say = {"every": 0.0}

    def watch(stage: str, done: int, total: int, text: str) -> None:
        if stage == "recover" and total > 1 and time.perf_counter() - say["every"] > 60:
            say["every"] = time.perf_counter()
            print(f"  {part} {done}/{total} {text}", flush=True)

    way = Way(network, data, Budget.parse("100%"), seed=given.seed, watch=watch)
    followed = recipe.follow(way, sites, Stats(network=network.digest()))
    print(*followed.notes, sep="\n", flush=True)
    file = given.files / f"{name}-{part}-{given.seed}.lamina"
    file.write_bytes(packed(followed.final, followed.plan))
    model = lamina.load(file)
    whole = sum(p.numel() for p in network.module.parameters())
    params = sum(p.numel() for p in model.parameters())
    return {
        "params": params,
        "share": round(params / whole, 4),
        "times_fewer": round(whole / params, 3),
        "bytes": file.stat().st_size,
        "after": scores(name, model, data),
        "settings": asdict(recipe),
        "notes": list(followed.notes),
    }


def control(network: Network, data: Data, given: Any) -> dict[str, Any]:
    """Train the original as the fused network is trained, with nothing shared."""
    one = settings_of("control", given.settings)
    recovery = Recovery(
        epochs=one.epochs, optimizer=one.optimizer, lr=one.lr, distill=one.distill, rate=False,
        decay=one.decay, half=one.half, seed=given.seed,
    )  # fmt: skip
    trained = recover(network, Edited(network, ()), data, recovery).edited.model
    whole = sum(p.numel() for p in network.module.parameters())
    return {
        "params": whole, "share": 1.0, "times_fewer": 1.0,
        "after": scores("resnet20", trained, data), "settings": asdict(one),
    }  # fmt: skip


def longer(name: str, part: str, network: Network, data: Data, given: Any) -> dict[str, Any]:
    """Train a fused network on, taught by the original, with less dropout."""
    base, own = LONGER[part]
    first = open_model(str(given.files / f"{name}-{base}-{given.seed}.lamina"))
    whole = sum(p.numel() for p in network.module.parameters())
    params = sum(p.numel() for p in first.module.parameters())
    for module in first.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = scaled_dropout(module.p, params, whole)
    settings = {**own, **given.settings}
    recovery = Recovery(**settings, rate=False, half=True, seed=given.seed + 1)
    said = 0.0

    def say(step: int, steps: int, text: str) -> None:
        nonlocal said
        if time.perf_counter() - said > 60:
            said = time.perf_counter()
            print(f"  {part} {step}/{steps} {text}", flush=True)

    trained = recover(network, Edited(first, first.edits), data, recovery, progress=say).edited
    file = given.files / f"{name}-{part}-{given.seed}.lamina"
    file.write_bytes(pack(trained.model, trained.edits, network.source, {}))
    model = lamina.load(file)
    return {
        "params": sum(p.numel() for p in model.parameters()), "share": round(params / whole, 4),
        "times_fewer": round(whole / params, 3), "bytes": file.stat().st_size,
        "after": scores(name, model, data), "settings": settings | {"of": base},
    }  # fmt: skip


def quantized(network: Network, data: Data, given: Any) -> dict[str, Any]:
    """Compress the file of `fused-20` further, to 5 % of the original's bytes, training on."""
    whole = sum(p.numel() for p in network.module.parameters())
    limit = int(0.05 * 4 * whole)
    source = given.files / f"gpt-tiny-fused-20-{given.seed}.lamina"
    recovery = None
    if given.recover:
        # On the text alone: the teacher would be the fused network, worse than it can become.
        recovery = Recovery(
            epochs=given.recover, lr=2e-3, distill=0.0, decay=0.1, half=True, seed=given.seed
        )
    first = open_model(str(source))
    for module in first.module.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # a fifth of the parameters do not overfit any more
    result = lamina.compress(
        first, data, Budget(size=f"{limit}B"), recover=recovery, metric="perplexity",
        methods=("rdoq",), samples=given.samples, seed=given.seed,
    )  # fmt: skip
    file = given.files / f"gpt-tiny-quantized-{given.seed}.lamina"
    result.save(file)
    model = lamina.load(file)
    params = sum(p.numel() for p in model.parameters())
    return {
        "params": params, "share": round(params / whole, 4),
        "times_fewer": round(whole / params, 3), "bytes": file.stat().st_size,
        "bytes_share": round(file.stat().st_size / (4 * whole), 5),
        "after": scores("gpt-tiny", model, data),
        "settings": {
            "of": source.name, "size": limit, "recover": given.recover, "samples": given.samples,
        },
    }  # fmt: skip


def judge(name: str, row: dict[str, Any], before: dict[str, float]) -> dict[str, Any]:
    """Add what a part loses on test, and whether it keeps to the bar."""
    sign = 1 if METRIC[name] == "accuracy" else -1
    lost = sign * (before["test"] - row["after"]["test"])
    return row | {"lost": round(lost, 3), "within_bar": lost <= BARS[name]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=METRIC)
    parser.add_argument("--data", required=True, help="what lamina.data.load reads")
    parser.add_argument("--weights", type=Path, help="the original's; not needed where it ships")
    parser.add_argument("--files", type=Path, required=True, help="folder for .lamina files")
    parser.add_argument("--only", nargs="+", help="these parts alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000, help="of calibration")
    parser.add_argument("--recover", type=float, default=0.0, help="epochs after quantization")
    parser.add_argument("--settings", type=json.loads, default={}, help="of the recipe, as JSON")
    parser.add_argument("--output", type=Path, help="result file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.files.mkdir(parents=True, exist_ok=True)
    out = given.output or HERE / f"{given.name}-{given.seed}.json"
    parts = {
        "resnet20": ["fused", "longer", "oneshot", "control"],
        "gpt-tiny": ["fused-20", "quantized", "fused-54", "fused-31"],
    }[given.name]
    data = data_of(given.name, given.data, given.seed)
    network = network_of(given.name, given.weights)
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"parts": {}}
    if "before" not in found:
        whole = sum(p.numel() for p in network.module.parameters())
        found |= {
            "network": given.name, "metric": METRIC[given.name], "bar": BARS[given.name],
            "params": whole, "seed": given.seed, "before": scores(given.name, network.module, data),
        }  # fmt: skip
        print(json.dumps(found), flush=True)
    for part in given.only or parts:
        if part in found["parts"]:
            continue
        start = time.perf_counter()
        if part == "control":
            row = control(network, data, given)
        elif part in LONGER:
            row = longer(given.name, part, network, data, given)
        elif part == "quantized":
            row = quantized(network, data, given)
        else:
            row = fused(given.name, part, network, data, given)
        row = judge(given.name, row, found["before"])
        row["seconds"] = round(time.perf_counter() - start)
        row["seed"] = given.seed
        print(
            part, json.dumps({k: row[k] for k in ("share", "after", "lost", "seconds")}), flush=True
        )
        if out.exists():  # another part may have been written meanwhile
            found["parts"] = json.loads(out.read_text())["parts"]
        found["parts"][part] = row
        found |= {
            "date": datetime.date.today().isoformat(),
            "device": f"{platform.machine()} cpu, {torch.get_num_threads()} thread",
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
