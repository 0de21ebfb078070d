"""All spectra of a language model of a billion parameters: `python benchmarks/spectra/run.py`.

Folds k in {1, 2, 4, 8} of every matrix of a Llama shape (16 layers, 112 matrices, 0.97 billion
weights), random weights generated layer by layer, as a reader of a file would meet them. The bar:
6 minutes and 2 GB on 2 cores. Exactness is checked against the SVD of a smaller matrix of each
shape. Writes `result.json` beside itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import sys
import time
from pathlib import Path

import torch

import lamina
from lamina.measure.spectra import fold_spectra

FOLDS = (1, 2, 4, 8)
LAYERS = 16
SHAPES = {
    "q": (2048, 2048),
    "k": (512, 2048),
    "v": (512, 2048),
    "o": (2048, 2048),
    "gate": (8192, 2048),
    "up": (8192, 2048),
    "down": (2048, 8192),
}
SMALLER = 8  # the matrices that are compared with an SVD are smaller by so much
BARS = {"seconds": 360.0, "gigabytes": 2.0}


def random_weight(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """A weight with a spectrum that falls: noise, and a strong part of low rank."""
    f, n = shape
    noise = torch.randn(f, n, generator=generator)
    left = torch.randn(f, 32, generator=generator)
    right = torch.randn(32, n, generator=generator)
    scale = torch.logspace(0.5, -1, 32)
    return noise.addmm_(left * scale, right).mul_(n**-0.5)


def worst_error(exact: bool, generator: torch.Generator) -> dict[str, float]:
    """Largest relative error of a singular value against torch's SVD in float64, per shape."""
    found = {}
    for name, (f, n) in SHAPES.items():
        weight = random_weight((f // SMALLER, n // SMALLER), generator)
        spectra, off = fold_spectra(weight, FOLDS, exact=exact), 0.0
        for k in FOLDS:
            for part, values in zip(weight.double().chunk(k, 1), spectra[k], strict=True):
                true = torch.linalg.svdvals(part)
                off = max(off, float(((values - true).abs() / true).max()))
        found[name] = off
    return found


def peak_gigabytes() -> float:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def device() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="float32 Gram matrices (exact=False)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = torch.Generator().manual_seed(given.seed)
    errors = worst_error(not given.fast, generator)
    before = peak_gigabytes()
    wall = cpu = making = 0.0
    each: dict[str, float] = dict.fromkeys(SHAPES, 0.0)
    weights = matrices = 0
    for layer in range(given.layers):
        for name, shape in SHAPES.items():
            start = time.perf_counter()
            weight = random_weight(shape, generator)
            making += time.perf_counter() - start
            start, used = time.perf_counter(), time.process_time()
            spectra = fold_spectra(weight, FOLDS, exact=not given.fast)
            wall += time.perf_counter() - start
            cpu += time.process_time() - used
            each[name] += time.process_time() - used
            energy = float(weight.double().square().sum())
            for values in spectra.values():  # a spectrum holds the whole energy
                assert abs(float(values.square().sum()) / energy - 1) < 1e-5
            weights, matrices = weights + weight.numel(), matrices + 1
        print(f"layer {layer}: {wall:.1f} s, {peak_gigabytes():.2f} GB", flush=True)
    result = {
        "task": "spectra",
        "command": "python benchmarks/spectra/run.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "seed": given.seed,
        "device": device(),
        "threads": given.threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lamina": lamina.__version__,
        },
        "exact": not given.fast,
        "folds": list(FOLDS),
        "layers": given.layers,
        "matrices": matrices,
        "weights": weights,
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "making_weights_seconds": round(making, 1),
        "cpu_seconds_per_matrix": {k: round(v / given.layers, 2) for k, v in each.items()},
        "peak_gigabytes": round(peak_gigabytes(), 3),
        "peak_gigabytes_at_start": round(before, 3),
        "worst_relative_error": errors,
        "bars": BARS,
        "met": wall <= BARS["seconds"] and peak_gigabytes() <= BARS["gigabytes"],
    }
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
