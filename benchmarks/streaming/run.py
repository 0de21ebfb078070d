"""Streaming: a folder of random weights, larger than the memory that may be used, to a file.

    python benchmarks/streaming/run.py --gb 4 --out benchmarks/streaming/result.json
    python benchmarks/streaming/run.py --gb 1.4 --samples 8 --out .../calibrated.json

Makes a Llama of the wanted size in a temporary folder, shard by shard, compresses it in a process
of its own (`lamina.compress(folder, budget, stream=True)`), and checks the file in another: every
tensor is decoded, a few are compared with the original. Peak memory is the process's own
`ru_maxrss` [MiB], imports and the writing of the file included. With `--samples` it is calibrated,
block by block, on so many samples of random tokens; else it is free of data.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN, WIDE, HEADS, WORDS = 2048, 5632, 16, 32000
SHARDS = 8
COMPRESS = """
import json, resource, sys, time
start = time.perf_counter()
import lamina
from lamina.run import open_run
folder, out, budget, samples, tokens, words = *sys.argv[1:4], *map(int, sys.argv[4:])
data = None
if samples:
    import torch
    torch.manual_seed(0)
    ids = torch.randint(0, words, (samples, tokens))
    data = [{"input_ids": i[None], "attention_mask": torch.ones_like(i[None])} for i in ids]
with open_run(out) as run:
    result = lamina.compress(folder, data, budget, stream=True, run=run)
facts = result.report.dict()
use = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({
    "peak_mb": round(use.ru_maxrss / 1024, 1), "cpu_s": round(use.ru_utime + use.ru_stime, 1),
    "wall_s": round(time.perf_counter() - start, 1), "file": facts["size"]["file"],
    "planned": facts["size"]["planned"], "original": facts["size"]["original"],
    "limit": facts["size"]["limit"], "error": facts["error"]["predicted"],
    "rounds": len(facts["rounds"]), "stages": facts["stages"],
}))
"""
CHECK = """
import json, resource, sys, time
import torch
from lamina import artifact
from lamina.network.lazy import open_lazily
start = time.perf_counter()
package, lazy = artifact.read(sys.argv[2]), open_lazily(sys.argv[1])
worst, count = 0.0, 0
for i, name in enumerate(package.records):
    dense = package.dense(name)
    assert tuple(dense.shape) == tuple(lazy.state[name].shape) and bool(dense.isfinite().all())
    count += dense.numel()
    if i % 7 == 0:
        given = lazy.rows(name, 0, 1).float()
        close = dense.reshape(lazy.stored[name].rows, -1)[:1].float()
        worst = max(worst, float((close - given).norm() / given.norm()))
use = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"tensors": len(package.records), "values": count, "worst_row": worst,
                  "peak_mb": round(use.ru_maxrss / 1024, 1), "cpu_s": round(use.ru_utime, 1)}))
"""


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama with so many blocks."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for i in range(layers):
        at = f"model.layers.{i}"
        found |= {f"{at}.self_attn.{leaf}_proj.weight": (HIDDEN, HIDDEN) for leaf in "qkvo"}
        found |= {f"{at}.mlp.{leaf}_proj.weight": (WIDE, HIDDEN) for leaf in ("gate", "up")}
        found[f"{at}.mlp.down_proj.weight"] = (HIDDEN, WIDE)
        for leaf in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}.{leaf}.weight"] = (HIDDEN,)
    found["model.norm.weight"] = (HIDDEN,)
    found["lm_head.weight"] = (WORDS, HIDDEN)
    return found


def make_folder(folder: Path, gigabytes: float, dtype: str) -> dict[str, Any]:
    """Write config, shards and index; one tensor is in memory at a time."""
    size = {"float32": 4, "bfloat16": 2}[dtype]
    block = 4 * HIDDEN**2 + 3 * HIDDEN * WIDE
    layers = max(1, round((gigabytes * 1e9 / size - 2 * WORDS * HIDDEN) / block))
    shapes = shapes_of(layers)
    whole = sum(int(np.prod(shape)) for shape in shapes.values()) * size
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": WIDE, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "vocab_size": WORDS, "tie_word_embeddings": False,
        "dtype": dtype,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    groups: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        if held >= whole / SHARDS and len(groups) < SHARDS:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += int(np.prod(shape)) * size
    draw = np.random.default_rng(0)
    index = {}
    for i, names in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        header, at = {}, 0
        for name in names:
            end = at + int(np.prod(shapes[name])) * size
            kind = {"float32": "F32", "bfloat16": "BF16"}[dtype]
            header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [at, end]}
            index[name], at = file, end
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(head)) + head)
            for name in names:
                out.write(_values(draw, shapes[name], dtype))
    told = {"metadata": {"total_size": whole}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))
    largest = max(int(np.prod(shape)) for shape in shapes.values()) * size
    return {"bytes": whole, "shards": len(groups), "tensors": len(shapes), "layers": layers,
            "largest_tensor": largest, "dtype": dtype}  # fmt: skip


def _values(draw: Any, shape: tuple[int, ...], dtype: str) -> bytes:
    if len(shape) == 1:
        values = np.ones(shape, np.float32)
    else:
        values = draw.standard_normal(shape, dtype=np.float32) * np.float32(shape[1] ** -0.5)
    if dtype == "float32":
        return values.tobytes()
    return bytes((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def measured(code: str, *words: str) -> dict[str, Any]:
    """Run a script in a process of its own, and return what it printed last."""
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env={**os.environ, **one}, check=True,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--gb", type=float, default=0.2)
    ask.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    ask.add_argument("--size", default="12%")
    ask.add_argument("--samples", type=int, default=0, help="that calibrate")
    ask.add_argument("--tokens", type=int, default=128, help="of a sample")
    ask.add_argument("--out", type=Path)
    ask.add_argument("--folder", type=Path, help="Where the temporary folder is made.")
    given = ask.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        model, run = Path(place) / "model", Path(place) / "run"
        model.mkdir()
        start = time.perf_counter()
        facts = {"model": make_folder(model, given.gb, given.dtype), "budget": given.size}
        facts["made_s"] = round(time.perf_counter() - start, 1)
        facts["calibrated_on"] = {"samples": given.samples, "tokens": given.tokens}
        told = (given.samples, given.tokens, WORDS)
        facts["compress"] = measured(COMPRESS, str(model), str(run), given.size, *map(str, told))
        facts["check"] = measured(CHECK, str(model), str(run / "net.lamina"))
    text = json.dumps(facts, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
