"""DeepCABAC (the reference NNC codec) on integer matrices: size and speed, as JSON on stdout.

It needs an environment of its own, for its package forces an old numpy:

    python -m venv nnc
    nnc/bin/pip install --no-deps nncodec==2.1.3
    nnc/bin/pip install "numpy<2"
    nnc/bin/python benchmarks/codecs/deepcabac.py MATRICES.npz

Only the compiled coder is loaded, by its file, because the package around it imports torchvision.
`real.py` runs this script.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import time
from typing import Any

import numpy as np


def load_coder() -> Any:
    """Return the extension module of nncodec."""
    files = importlib.metadata.files("nncodec") or []
    path = next(f.locate() for f in files if f.name.startswith("deepCABAC.") and f.suffix == ".so")
    spec = importlib.util.spec_from_file_location("deepCABAC", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(path: str) -> None:
    """Code every matrix with each setting; print the results."""
    cabac = load_coder()
    matrices = {name: np.ascontiguousarray(a, np.int32) for name, a in np.load(path).items()}
    off = (cabac.HdspMode.AlwaysOff, np.zeros(2, np.int8))
    results = []
    for unary in (1, 10):
        for tuned in (0, 1):
            size, count, encode, decode = 0, 0, 0.0, 0.0
            for name, matrix in matrices.items():
                skips = np.zeros(matrix.shape[0], np.int32)
                start = time.process_time()
                coder = cabac.Encoder()
                coder.initCtxModels(unary, tuned)
                coder.encodeLayer(matrix, 0, 0, 0, 0, 0, skips, *off, 0, 0)
                code = coder.finish()
                encode += time.process_time() - start
                best, out = float("inf"), np.zeros_like(matrix)
                for _ in range(3):
                    start = time.process_time()
                    reader = cabac.Decoder()
                    reader.setStream(code)
                    reader.initCtxModels(unary)
                    reader.decodeLayer(out, 0, 0, 0, 0, *off, 0, 0)
                    best = min(best, time.process_time() - start)
                decode += best
                assert np.array_equal(out, matrix), name
                size, count = size + len(code), count + matrix.size
            results.append(
                {
                    "codec": f"DeepCABAC (unary {unary}, {'tuned' if tuned else 'untuned'})",
                    "bits per weight": round(8 * size / count, 4),
                    "encode [Msym/s]": round(count / encode / 1e6, 1),
                    "decode [Msym/s]": round(count / decode / 1e6, 1),
                }
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
