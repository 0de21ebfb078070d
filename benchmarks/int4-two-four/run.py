"""A small encoder, fine-tuned on movie polarity, with 4-bit weights and activations and 2:4.

    python benchmarks/int4-two-four/run.py --model FOLDER --data vaderSentiment-0.5.zip \
        --files OUT [--seed 0] [--only dense control int4-2:4]

FOLDER is all-MiniLM-L6-v2 (config.json, model.safetensors, tokenizer), `--data` see `movies.py`.
Every part is run once and kept in the result file; one that is there already is skipped. Parts are
scored on validation data; the test split is looked at with `--test`, once what to run is decided.

`dense`: the pretrained encoder with a new head, fine-tuned. `control`: the same network, trained
on for as many epochs as the recipe takes, so that both have had the same in total (`control-3` in a
result: for three). `int4-2:4`: the recipe on the `dense` network, which teaches its outputs; 2:4
and 4 bits begin column by column, each making up for those before. Variants: `three-epochs`, half
as many; `without-distillation`, from labels alone; `with-hidden`, from hidden states too;
`sparse-only` and `quantized-only`, its halves; `post-training`, no epoch at all; `magnitude`: what
was tried first: masks by magnitude, an epoch sparse, two with 4 bits as well, slower, with dropout.
Word embeddings are not fine-tuned (their form in the file is the recipe's). Training computes in
bfloat16 where that is safe; every score is of float32 forwards, of a recipe's of the network that
its file gives back.

Bar: 4-bit weights and activations with 2:4 within one point of the dense fine-tuned network; which
is the better of `dense` and `control`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import movies

from lamina.artifact import restore, unpack
from lamina.data import Data
from lamina.measure.quality import evaluate
from lamina.measure.stats import Stats
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.plan import Budget
from lamina.recipes.transformer import IntTwoFour
from lamina.stages import Way, packed
from lamina.train.dropout import Dropout
from lamina.train.quantized import QuantizedNetwork
from lamina.train.quantizing import Tuning, tune

HERE = Path(__file__).parent
EPOCHS, LATER = 2.0, 6.0  # of dense fine-tuning, and of all that comes after
DENSE = Tuning(epochs=EPOCHS, lr=1e-4, decay=0.01, dropout=None, half=True)
TUNED = Tuning(lr=4e-4, range_lr=1e-2, decay=0.01, dropout=None, distill=0.9, half=True)
RECIPE = IntTwoFour(phases=(("both", LATER),), score="obs", begin="mse", tuning=TUNED)
FIRST = Tuning(
    lr=1e-4, range_lr=1e-3, decay=0.01, dropout=Dropout("linear", 0.1, 0.0), distill=0.5, half=True
)
RECIPES = {
    "int4-2:4": RECIPE,
    "three-epochs": replace(RECIPE, phases=(("both", 3.0),)),
    "with-hidden": replace(RECIPE, tuning=replace(TUNED, hidden=1.0)),
    "without-distillation": replace(RECIPE, tuning=replace(TUNED, distill=0.0)),
    "sparse-only": replace(RECIPE, phases=(("sparse", LATER),)),
    "quantized-only": replace(RECIPE, phases=(("quantized", LATER),)),
    "post-training": replace(RECIPE, phases=(("both", 0.0),)),
    "magnitude": replace(
        RECIPE, phases=(("sparse", 1.0), ("both", 2.0)), score="magnitude", begin="percentile",
        tuning=FIRST,
    ),
}  # fmt: skip


def score(module: torch.nn.Module, data: Data, split: str) -> float:
    """Return the accuracy on a split [%]."""
    return round(float(evaluate(module, getattr(data, split), "accuracy")), 3)


def freeze_words(module: movies.Classifier) -> movies.Classifier:
    """Take the embedding tables out of training, in place."""
    for name, p in module.named_parameters():
        p.requires_grad_("embeddings" not in name or "LayerNorm" in name)
    return module


class Bench:
    """The parts, and what they have in common."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.seed = args, args.seed
        self.data = movies.make_data(args.data, args.model, args.seed, args.train)
        self.files = Path(args.files)
        self.files.mkdir(parents=True, exist_ok=True)

    def fine_tune(self, module: movies.Classifier, tuning: Tuning) -> movies.Classifier:
        net = QuantizedNetwork(freeze_words(module), [])
        tune(net, None, self.data, tuning, "logits", progress=say)
        return module

    def load(self, part: str) -> torch.nn.Module:
        """Return what a part made: of a recipe, what its file gives back."""
        module = movies.build(self.args.model, self.seed)
        if part in RECIPES:
            return restore(unpack(self.file(part).read_bytes()), module).eval()
        module.load_state_dict(torch.load(self.file(part), weights_only=True))
        return freeze_words(module).eval()

    def file(self, part: str) -> Path:
        kind = "lamina" if part in RECIPES else "pt"
        return self.files / f"{part.replace(':', '')}-{self.seed}.{kind}"

    def dense(self) -> dict[str, Any]:
        module = self.fine_tune(
            movies.build(self.args.model, self.seed), replace(DENSE, seed=self.seed)
        )
        torch.save(module.state_dict(), self.file("dense"))
        return {"settings": asdict(DENSE)}

    def control(self) -> dict[str, Any]:
        later = replace(DENSE, epochs=LATER, lr=5e-5, seed=self.seed + 100)
        module = self.fine_tune(self.load("dense"), later)  # type: ignore[arg-type]
        torch.save(module.state_dict(), self.file("control"))
        return {"settings": asdict(later)}

    def recipe(self, part: str) -> dict[str, Any]:
        """Follow a recipe from the dense network."""
        batch = next(iter(self.data.validation))
        example = {k: v[:2] for k, v in batch.items() if k != "labels"}
        network = Network(self.load("dense"), (), example, name="minilm", loss="logits")
        way = Way(
            network=network, data=replace(self.data, validation=None), seed=self.seed,
            budget=Budget.parse("100%"), watch=watch,
        )  # fmt: skip
        followed = RECIPES[part].follow(way, discover(network), Stats())
        file = packed(followed.final, followed.plan)
        self.file(part).write_bytes(file)
        return {
            "bytes": len(file), "notes": followed.notes, "settings": asdict(RECIPES[part]),
        }  # fmt: skip


def watch(stage: str, done: int, steps: int, text: str) -> None:
    if steps and done:
        say(done, steps, f"{stage} {text}")


def say(done: int, steps: int, text: str) -> None:
    print(f"{done}/{steps} {text} cpu {time.process_time():.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--train", type=int, default=4000, help="snippets to train on; 0: all others"
    )
    parser.add_argument("--only", nargs="*", default=["dense", "control", *RECIPES])
    parser.add_argument("--test", action="store_true", help="look at the test split too")
    parser.add_argument("--results", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.results or HERE / f"minilm-{args.seed}.json"
    found = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    bench = Bench(args)
    for part in args.only:
        row = found["parts"].get(part, {})
        start, cpu = time.perf_counter(), time.process_time()
        if not row:
            row = bench.recipe(part) if part in RECIPES else getattr(bench, part)()
            row |= {
                "seconds": round(time.perf_counter() - start),
                "cpu_seconds": round(time.process_time() - cpu),
            }
        for split in ("validation", "test") if args.test else ("validation",):
            if split not in row:
                row[split] = score(bench.load(part), bench.data, split)
        print(part, json.dumps({k: v for k, v in row.items() if k != "settings"}), flush=True)
        found = json.loads(path.read_text()) if path.exists() else found  # another part's run
        found["parts"][part] = row
        found |= {
            "date": datetime.date.today().isoformat(), "torch": torch.__version__,
            "machine": platform.machine(), "train": bench.data.train.dataset_size,
            "seed": args.seed,
        }  # fmt: skip
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
