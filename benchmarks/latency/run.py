"""Real speed: `latency="0.5x"` on ResNet-20 at batch 64 and on a 12-layer encoder at 128 tokens.

    python benchmarks/latency/run.py [--only resnet20|encoder] [--asked 0.5x] [--weights FILE]

Each network is compressed under a latency budget with one thread, untrained, and then measured
once more: the original and the compressed network in turn, on the wall clock, by code that shares
nothing with the planner's. Writes `benchmarks/latency/result.json`: what was asked, predicted and
measured, every round, and the quality that is left. The encoder has random weights whose spectra
fall like those of trained ones, so its quality says nothing; its times do.

`--weights` is a state dict of ResNet-20 (`.safetensors`, or a checkpoint of
`benchmarks/zoo/train_fetched.py`), `--data` the images of CIFAR-10 as JPEG; without them its
weights are random, and planning is data-free. Calibration and test images are used, none to train.
All ratios are to the network as it is given, BatchNorm, plain order of weights and all; what the
lossless rewriting alone gives is the first of the rounds. `--methods` limits what is tried.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lamina
from lamina.errors import InfeasibleError
from lamina.network.source import Network
from lamina.run import open_run
from lamina.zoo import build

HERE = Path(__file__).resolve().parent
ROUNDS = 31  # of the last measurement


class Layer(nn.Module):
    """An encoder layer (pre-norm): attention and a feed-forward part, of plain Linear layers.

    Args:
        width: of the tokens.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.mix = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.mix(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """A stack of encoder layers over tokens [n, tokens, width], and a head on their mean."""

    def __init__(self, layers: int = 12, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(x)).mean(1))


def fall(module: nn.Module, power: float = 0.5) -> None:
    """Give the Linear layers spectra that fall like `i ** -power`, at the scale they had."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
                wanted = torch.arange(1, len(s) + 1).float() ** -power
                layer.weight.copy_(u @ torch.diag(wanted * (s.norm() / wanted.norm())) @ v)


def encoder() -> Network:
    torch.manual_seed(0)
    module = Encoder().eval()
    fall(module)
    return Network(module, (torch.randn(1, 128, 768),), name="encoder-12x768", loss="features")


def resnet20(weights: Path | None) -> Network:
    module = build("resnet20")
    if weights is not None and weights.suffix == ".safetensors":
        from safetensors.torch import load_file

        module.load_state_dict(load_file(weights))
    elif weights is not None:
        module.load_state_dict(torch.load(weights, weights_only=True)["network"])
    return Network(module.eval(), (torch.randn(64, 3, 32, 32),), name="resnet20", loss="logits")


def times(original: nn.Module, compressed: nn.Module, inputs: tuple[Any, ...]) -> dict[str, float]:
    """Time both networks in turn: medians of the wall clock, and of the ratio of each round."""
    found: list[tuple[float, float]] = []
    torch.set_num_threads(1)
    with torch.inference_mode():
        for i in range(ROUNDS + 3):
            row = []
            for module in (original.eval(), compressed.eval()):
                start = time.perf_counter()
                module(*inputs)
                row.append(time.perf_counter() - start)
            if i >= 3:
                found.append((row[0], row[1]))
    ratios = sorted(b / a for a, b in found)
    return {
        "original_s": median(a for a, _ in found),
        "compressed_s": median(b for _, b in found),
        "ratio": median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],  # type: ignore[dict-item]
    }


def go(network: Network, data: Any, asked: str, methods: list[str] | None) -> dict[str, Any]:
    """Compress one network under a latency budget, and measure what came of it."""
    start = time.perf_counter()
    facts: dict[str, Any] = {"asked": asked, "methods": methods}
    try:
        with open_run(HERE.parents[1] / "runs" / "latency" / network.name) as run:
            result = lamina.compress(
                network, data, lamina.Budget(latency=asked), recover=None, methods=methods, run=run,
                watch=lambda stage, done, of, text: print(f"  {stage} {done}/{of} {text}")
                if done == of else None,
            )  # fmt: skip
    except InfeasibleError as error:
        return {**facts, "infeasible": str(error), "nearest_s": error.nearest["seconds"],
                "seconds": time.perf_counter() - start}  # fmt: skip
    told = result.report.dict()
    fresh = times(network.module, result.model, network.example_inputs)
    quality = told["quality"]["test"]
    return facts | {
        "measured": fresh,
        "met_within_3_percent": fresh["ratio"] <= 1.03 * float(asked.removesuffix("x")),
        "reported": told["latency"],
        "rounds": told["rounds"],
        "accuracy_on_test": quality,
        "fidelity": told["quality"]["fidelity"],
        "rewritten": list(result.plan.rewrite),
        "error": told["error"],
        "bytes": [told["size"]["original"], told["size"]["file"]],
        "macs": [told["network"]["macs"], result.plan.predicted.macs],
        "sites": {s["site"]: s["chain"] for s in told["sites"]},
        "stages": {s["name"]: s["seconds"] for s in told["stages"]},
        "notes": [n for n in told["notes"] if "Latency" in n or "of the" in n],
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("resnet20", "encoder"))
    parser.add_argument("--asked", default="0.5x")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--methods", type=lambda text: text.split(","))
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = HERE / "result.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found["machine"] = {
        "date": date.today().isoformat(), "python": platform.python_version(),
        "torch": str(torch.__version__), "threads": 1, "rounds": ROUNDS,
    }  # fmt: skip
    if args.only != "resnet20":
        found["encoder"] = go(encoder(), None, args.asked, args.methods or ["alds"])
        print(json.dumps(found["encoder"], indent=1))
    if args.only != "encoder":
        data = lamina.data.load(args.data) if args.data else None
        if data is not None:
            data = {"calibration": data.calibration, "test": data.test}
        found["resnet20"] = go(resnet20(args.weights), data, args.asked, args.methods)
        print(json.dumps(found["resnet20"], indent=1))
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
