"""ONNX files of an encoder in onnxruntime: ours with integer products beside its own dynamic int8.

    python benchmarks/onnx/run.py FOLDER [--tokens 128] [--rounds 60] [--texts FILE] [--out F]

FOLDER is a Hugging Face folder of an encoder (all-MiniLM-L6-v2). It is exported in float32 and with
`int8=True`; `onnxruntime.quantization.quantize_dynamic` makes two more files of our float32 one,
with one scale per tensor (its default) and one per channel. All four run on one thread, one after
the other in an order drawn anew in every round, on a batch of one. Times are those of the
processor in this thread, so that other work on the machine counts less; the wall clock is kept as
well. `--texts` (one a line) gives the cosines of mean-pooled embeddings to those of torch.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from lamina.exporting import write_onnx
from lamina.network.pretrained import open_folder

HERE = Path(__file__).resolve().parent


def session_of(path: Path) -> Any:
    """Open a file on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feed_of(session: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, np.ndarray]:
    """Return what a session takes of ids and mask."""
    given = {"input_ids": ids, "attention_mask": mask}
    return {i.name: given[i.name].numpy() for i in session.get_inputs()}


def times_of(sessions: dict[str, Any], tokens: int, vocabulary: int, rounds: int) -> dict[str, Any]:
    """Return median seconds by file, and the median over rounds of each one's ratio to others."""
    ids = torch.randint(1000, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    feeds = {name: feed_of(s, ids, torch.ones_like(ids)) for name, s in sessions.items()}
    spent: dict[str, list[float]] = {name: [] for name in sessions}
    walls: dict[str, list[float]] = {name: [] for name in sessions}
    order = list(sessions)
    draw = random.Random(0)
    for turn in range(rounds + 5):
        draw.shuffle(order)
        for name in order:
            begun, wall = time.thread_time(), time.perf_counter()
            sessions[name].run(None, feeds[name])
            if turn >= 5:  # the first runs plan their memory
                spent[name].append(time.thread_time() - begun)
                walls[name].append(time.perf_counter() - wall)
    ours = spent["lamina int8"]
    return {
        "processor_ms": {n: round(1e3 * median(t), 3) for n, t in spent.items()},
        "wall_ms": {n: round(1e3 * median(t), 3) for n, t in walls.items()},
        "speed_of_ours_to": {
            n: round(median(b / a for a, b in zip(ours, t, strict=True)), 3)
            for n, t in spent.items() if n != "lamina int8"
        },
    }  # fmt: skip


def cosines_of(sessions: dict[str, Any], module: Any, folder: str, texts: list[str]) -> Any:
    """Return the mean cosine of mean-pooled embeddings to those of torch, by file."""
    from transformers import AutoTokenizer

    cut = AutoTokenizer.from_pretrained(folder)
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for text in texts:
        row = cut(text, truncation=True, max_length=64, return_tensors="pt")
        ids, mask = row["input_ids"], row["attention_mask"]
        with torch.no_grad():
            wanted = module(input_ids=ids, attention_mask=mask).last_hidden_state.mean(1)[0]
        for name, session in sessions.items():
            got = torch.from_numpy(session.run(None, feed_of(session, ids, mask))[0]).mean(1)[0]
            found[name].append(float(torch.cosine_similarity(got, wanted, dim=0)))
    return {name: round(mean(values), 5) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    network = open_folder(args.folder)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        wide = write_onnx(network, place / "float32.onnx")
        small = write_onnx(network, place / "int8.onnx", int8=True)
        print(wide.line(), small.line(), sep="\n", flush=True)
        quantize_dynamic(wide.path, place / "theirs.onnx")
        quantize_dynamic(wide.path, place / "channels.onnx", per_channel=True)
        files = {
            "float32": wide.path, "lamina int8": small.path, "onnxruntime int8":
            place / "theirs.onnx", "onnxruntime int8 per channel": place / "channels.onnx",
        }  # fmt: skip
        sessions = {kind: session_of(path) for kind, path in files.items()}
        result: dict[str, Any] = {
            "model": Path(args.folder).resolve().parent.name, "batch": 1, "tokens": args.tokens,
            "threads": 1, "rounds": args.rounds,
            **times_of(sessions, args.tokens, network.module.config.vocab_size, args.rounds),
            "bytes": {kind: path.stat().st_size for kind, path in files.items()},
            "error": {"float32": wide.error, "lamina int8": small.error},
        }  # fmt: skip
        if args.texts:
            lines = [t.strip() for t in args.texts.read_text(encoding="utf-8").splitlines()]
            texts = [t for t in lines if len(t) > 80][:40]
            result["cosine"] = cosines_of(sessions, network.module, args.folder, texts)
            result["texts"] = len(texts)
    result |= {
        "device": platform.processor() or platform.machine(), "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__, "date": date.today().isoformat(),
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
