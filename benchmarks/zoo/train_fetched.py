"""Train a network of the zoo on data fetched by the user, and record how it went.

    python benchmarks/zoo/train_fetched.py resnet20 --data images:CIFAR10 --weights OUT

`--data` is what `lamina.data.load` reads. For `resnet20`, `vgg11-bn` and `vgg16` it is the folder
of CIFAR-10 as JPEG (`train/<class>/*.jpg`, `test/<class>/*.jpg`); for `gpt-tiny` the `.npz` that
`brown.py` beside this file writes; for the others that of `fashion.py`. Writes
`OUT/NAME.safetensors` and `benchmarks/zoo/NAME.json`. The weights are those after the last epoch:
no run selects anything by validation or test, both are measured once, at its end. A run that was
stopped goes on from `OUT/NAME-SEED.checkpoint`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from datetime import date
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.data import TensorLoader, load, mirror, shift
from lamina.measure.quality import evaluate
from lamina.zoo import build

ROOT = Path(__file__).resolve().parents[2]
JPEG = "CIFAR-10 as JPEG"
NETWORKS_DATA = {"resnet20": JPEG, "vgg16": JPEG, "vgg11-bn": JPEG, "gpt-tiny": "Brown corpus"}
STORED_HALF = ("gpt-tiny",)  # in float16: the file ships with the package
Recipe = dict[str, float]
SGD: Recipe = {"adam": 0, "batch": 128, "decay": 5e-4}
ADAM: Recipe = {"adam": 1, "batch": 128, "decay": 5e-2, "shift": 0, "mirror": 0}
RECIPES: dict[str, Recipe] = {
    "resnet20": SGD | {"epochs": 50, "rate": 0.4, "shift": 4, "mirror": 1},
    "vgg16": SGD | {"epochs": 8, "rate": 0.1, "shift": 4, "mirror": 1},
    "vgg11-bn": SGD | {"epochs": 20, "rate": 0.1, "shift": 4, "mirror": 1},
    "small-cnn": SGD | {"epochs": 12, "rate": 0.2, "shift": 2, "mirror": 0},
    "mobilenet-v2-tiny": SGD | {"epochs": 20, "rate": 0.2, "decay": 1e-4, "shift": 2, "mirror": 1},
    "vit-tiny": ADAM | {"epochs": 16, "rate": 2e-3, "shift": 2, "mirror": 1},
    "mlp-mixer-tiny": ADAM | {"epochs": 16, "rate": 2e-3, "shift": 2, "mirror": 1},
    "gpt-tiny": ADAM | {"epochs": 8, "rate": 3e-3, "batch": 16, "decay": 1e-1},
}


def optimizer_of(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return SGD with momentum, or AdamW whose decay leaves vectors (norms, biases) alone."""
    if not recipe["adam"]:
        return torch.optim.SGD(
            network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=recipe["decay"]
        )
    matrices = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe["decay"]}, {"params": vectors}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)


def loss_of(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy of classes, or of the next tokens [nats]."""
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return F.cross_entropy(network(x).flatten(0, -2).float(), y.flatten())


def train(
    network: nn.Module, loader: TensorLoader, recipe: Recipe, saved: Path, half: bool
) -> None:
    """Train with a one-cycle rate; bfloat16 activations where `half`."""
    epochs = int(recipe["epochs"])
    optimizer = optimizer_of(network, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=recipe["rate"],
        total_steps=epochs * len(loader),
        pct_start=0.2,
        cycle_momentum=not recipe["adam"],
    )
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    loader.set_epoch(first)
    for epoch in range(first, epochs):
        network.train()
        total = 0.0
        for x, y in loader:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = loss_of(network, x, y)
            optimizer.zero_grad()
            loss.backward()
            if recipe["adam"]:
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(x)
        print(f"epoch {epoch + 1:3d}/{epochs}  loss {total / loader.dataset_size:.4f}", flush=True)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"schedule": schedule.state_dict(), "epoch": epoch + 1}
        torch.save(state, saved.with_suffix(".part"))
        saved.with_suffix(".part").rename(saved)


def scores(network: nn.Module, splits: dict[str, TensorLoader]) -> dict[str, dict[str, float]]:
    """Return accuracy [%] by split, and for tokens the perplexity too, in float32."""
    loss = {k: evaluate(network, v, "loss") for k, v in splits.items()}
    found = {"accuracy_percent": {k: evaluate(network, v) for k, v in splits.items()}}
    found["loss_nats"] = loss
    if splits["test"].x.dim() == 2:
        found["perplexity"] = {k: math.exp(v) for k, v in loss.items()}
    return {key: {k: round(v, 3) for k, v in each.items()} for key, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--data", required=True, help="what lamina.data.load reads")
    parser.add_argument("--weights", type=Path, required=True, help="folder for what is written")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--half", action="store_true", help="bfloat16 activations")
    parser.add_argument("--record", type=Path, default=ROOT / "benchmarks/zoo")
    arguments = parser.parse_args()

    recipe = dict(RECIPES[arguments.name])
    recipe["epochs"] = arguments.epochs or recipe["epochs"]
    torch.set_num_threads(arguments.threads)
    data = load(arguments.data)
    loader = data.train
    assert isinstance(loader, TensorLoader)
    loader.seed, loader.batch_size = arguments.seed, int(recipe["batch"])
    if recipe["shift"]:
        move, turn = shift(int(recipe["shift"])), mirror()
        loader.augment = (lambda x, g: move(turn(x, g), g)) if recipe["mirror"] else move
    network = build(arguments.name, seed=arguments.seed).to(memory_format=torch.channels_last)

    arguments.weights.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    saved = arguments.weights / f"{arguments.name}-{arguments.seed}.checkpoint"
    train(network, loader, recipe, saved, arguments.half)
    seconds = time.perf_counter() - start

    name = arguments.name if arguments.seed == 0 else f"{arguments.name}-{arguments.seed}"
    network = network.to(memory_format=torch.contiguous_format)
    weights = arguments.weights / f"{name}.safetensors"
    if arguments.name in STORED_HALF:
        network = network.half()
    save_model(network, str(weights))  # of tied tensors one
    network = network.float()  # with the values that were stored
    weights.chmod(0o644)  # safetensors leaves it readable to its owner alone
    splits = {"validation": data.validation, "test": data.test}
    record = {
        "network": arguments.name,
        "parameters": sum(p.numel() for p in network.parameters()),
        **scores(network, splits),
        "recipe": recipe,
        "half": arguments.half,
        "data": NETWORKS_DATA.get(arguments.name, "Fashion-MNIST"),
        "seed": arguments.seed,
        "threads": arguments.threads,
        "seconds": round(seconds, 1),
        "device": platform.machine() + " cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "date": date.today().isoformat(),
    }
    (arguments.record / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if isinstance(v, dict)}))


if __name__ == "__main__":
    main()
