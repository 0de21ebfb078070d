"""Train a network of the zoo on images fetched by the user, and record how it went.

    python benchmarks/zoo/train_images.py resnet20 --data images:CIFAR10 --weights OUT

`--data` is what `lamina.data.load` reads: for `resnet20` and `vgg16` the folder of CIFAR-10 as
JPEG (`train/<class>/*.jpg`, `test/<class>/*.jpg`), for `small-cnn` a `.npz` that
`fashion.py` beside this file writes. Writes `OUT/NAME.safetensors` (half precision where
`--half`) and `benchmarks/zoo/NAME.json`. The weights are those after the last epoch: no run
selects anything by validation or test, both are measured once, at its end. A run that was
stopped goes on from `OUT/NAME.checkpoint`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

import numpy
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from lamina.data import TensorLoader, load, mirror, shift
from lamina.zoo import build

ROOT = Path(__file__).resolve().parents[2]
RECIPES: dict[str, dict[str, float]] = {
    "resnet20": {"epochs": 50, "rate": 0.4, "decay": 5e-4, "shift": 4, "mirror": 1},
    "vgg16": {"epochs": 8, "rate": 0.1, "decay": 5e-4, "shift": 4, "mirror": 1},
    "small-cnn": {"epochs": 12, "rate": 0.2, "decay": 5e-4, "shift": 2, "mirror": 0},
}


def accuracy(network: nn.Module, loader: TensorLoader) -> float:
    """Percent of samples classified right, over one pass of `loader`, in float32."""
    network.eval()
    with torch.no_grad():
        right = sum(int((network(x).argmax(1) == y).sum()) for x, y in loader)
    return 100 * right / loader.dataset_size


def train(
    network: nn.Module, loader: TensorLoader, recipe: dict[str, float], saved: Path, half: bool
) -> None:
    """Train with SGD, momentum and a one-cycle rate; bfloat16 activations where `half`."""
    epochs = int(recipe["epochs"])
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=recipe["decay"]
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe["rate"], total_steps=epochs * len(loader), pct_start=0.2
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
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(x)
        print(f"epoch {epoch + 1:3d}/{epochs}  loss {total / loader.dataset_size:.4f}", flush=True)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"schedule": schedule.state_dict(), "epoch": epoch + 1}
        torch.save(state, saved.with_suffix(".part"))
        saved.with_suffix(".part").rename(saved)


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
    move, turn = shift(int(recipe["shift"])), mirror()
    loader.seed, loader.batch_size = arguments.seed, 128
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
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, weights)
    weights.chmod(0o644)  # safetensors leaves it readable to its owner alone
    splits = {"validation": data.validation, "test": data.test}
    record = {
        "network": arguments.name,
        "parameters": sum(p.numel() for p in network.parameters()),
        "accuracy_percent": {k: round(accuracy(network, v), 3) for k, v in splits.items()},
        "recipe": recipe,
        "half": arguments.half,
        "data": arguments.data.partition(":")[0] + " CIFAR-10 as JPEG"
        if arguments.data.startswith("images:")
        else "Fashion-MNIST",
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
    print(json.dumps(record["accuracy_percent"]))


if __name__ == "__main__":
    main()
