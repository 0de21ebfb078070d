"""Does the predicted error rank edits as the measured loss does? Trained LeNet-5, single edits.

    python benchmarks/currency/run.py [--seed 0] [--network lenet-5] [--output FILE]

Four kinds of edit (low rank, uniform quantization, magnitude pruning, row removal) of several
strengths in each of the four layers, one at a time. Each is predicted from statistics of the 1,000
calibration digits, and measured as mean KL(original || edited) on the validation digits, which
calibration never sees. The score is Spearman's rank correlation over all edits, without and with
one measured probe a layer. Writes `result.json` beside this file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy
import scipy
import torch
from torch import Tensor, nn

from lamina.measure.calibrate import calibrate
from lamina.measure.quality import fidelity
from lamina.measure.stats import Stats, predict_error
from lamina.network.sites import Site, Sites, as_matrix, from_matrix
from lamina.network.source import Network
from lamina.zoo import zoo

GOALS = {"without_probe": 0.91, "with_probe": 0.96}


def low_rank(matrix: Tensor, share: float) -> Tensor:
    """Keep `share` of the singular values of `matrix [out, in]`."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    keep = max(1, round(share * len(s)))
    return (u[:, :keep] * s[:keep]) @ vh[:keep]


def quantize(matrix: Tensor, bits: float) -> Tensor:
    """Round to a uniform grid of `2^bits - 1` levels over the largest magnitude."""
    step = 2 * matrix.abs().max() / (2**bits - 2)
    return (matrix / step).round() * step


def prune(matrix: Tensor, share: float) -> Tensor:
    """Zero the `share` of weights of least magnitude."""
    cut = matrix.abs().flatten().kthvalue(max(1, round(share * matrix.numel()))).values
    return torch.where(matrix.abs() > cut, matrix, torch.zeros_like(matrix))


def drop_rows(matrix: Tensor, share: float) -> Tensor:
    """Zero the `share` of rows (outputs) of least norm."""
    count = max(1, round(share * len(matrix)))
    changed = matrix.clone()
    changed[matrix.norm(dim=1).argsort()[:count]] = 0
    return changed


EDITS = {
    "low rank": (low_rank, (0.8, 0.6, 0.4, 0.25, 0.15)),
    "quantization": (quantize, (8, 6, 5, 4, 3, 2)),
    "magnitude": (prune, (0.3, 0.5, 0.65, 0.8, 0.9, 0.95)),
    "rows": (drop_rows, (0.05, 0.1, 0.2, 0.35, 0.5)),
}


def layer_sites(module: nn.Module) -> Sites:
    """Describe the layers of a plain chain of Linear and Conv2d."""
    found = []
    for name, m in module.named_modules():
        conv = isinstance(m, nn.Conv2d)
        if not (conv or isinstance(m, nn.Linear)):
            continue
        geometry = {}
        if conv:
            geometry = {
                "kernel": m.kernel_size,
                "stride": m.stride,
                "padding": m.padding,
                "dilation": m.dilation,
            }
        names = {"module": name, "weight": f"{name}.weight", "bias": f"{name}.bias"}
        shape = tuple(m.weight.shape)
        found.append(Site(name, op="conv" if conv else "linear", shape=shape, **names, **geometry))
    return Sites(tuple(found))


def edited(weight: Tensor, site: Site) -> Iterator[tuple[str, float, Tensor]]:
    """Yield `(kind, strength, changed weight)` of every edit of one layer."""
    matrix = as_matrix(site, weight)[0]
    for kind, (edit, strengths) in EDITS.items():
        for strength in strengths:
            yield kind, strength, from_matrix(site, edit(matrix, strength)[None])


def measure_edits(network: Network, sites: Sites, plain: Stats, probed: Stats) -> list[dict]:
    """Predict and measure every edit; the network is put back after each."""
    import copy

    rows = []
    changed = copy.deepcopy(network.module)
    for site in sites.layers:
        target = changed.get_parameter(site.weight)
        before = target.detach().clone()
        matrix = as_matrix(site, before)
        for kind, strength, weight in edited(before, site):
            delta = as_matrix(site, weight) - matrix
            with torch.no_grad():
                target.copy_(weight)
            found = fidelity(network.module, changed, network.data.validation, loss="logits")
            rows.append(
                {
                    "layer": site.name,
                    "kind": kind,
                    "strength": strength,
                    "measured": found.kl,
                    "agreement": found.agreement,
                    "without_probe": predict_error(plain.of(site.name), matrix, delta),
                    "with_probe": predict_error(probed.of(site.name), matrix, delta),
                }
            )
        with torch.no_grad():
            target.copy_(before)
    return rows


def spearman(rows: list[dict], key: str) -> float:
    """Rank correlation of a prediction with the measurement."""
    pairs = [(r[key], r["measured"]) for r in rows]
    return float(scipy.stats.spearmanr(*zip(*pairs, strict=True)).statistic)


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Run the benchmark and write its result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", default="lenet-5")
    parser.add_argument("--output", default=None)
    options = parser.parse_args()
    suffix = "" if options.network == "lenet-5" else f"-{options.network}"
    seed = "" if options.seed == 0 else f"-seed{options.seed}"
    output = options.output or Path(__file__).with_name(f"result{suffix}{seed}.json")
    torch.set_num_threads(1)
    network = zoo(options.network)
    sites = layer_sites(network.module)
    start = time.perf_counter()
    plain = calibrate(network, sites, network.data, seed=options.seed, probe=False)
    middle = time.perf_counter()
    probed = calibrate(network, sites, network.data, seed=options.seed)
    end = time.perf_counter()
    rows = measure_edits(network, sites, plain, probed)
    scores = {key: round(spearman(rows, key), 4) for key in GOALS}
    by_layer = {
        site.name: round(spearman([r for r in rows if r["layer"] == site.name], "with_probe"), 4)
        for site in sites.layers
    }
    result = {
        "task": f"rank correlation of predicted and measured KL of single edits, {options.network}",
        "edits": len(rows),
        "spearman": scores,
        "goal": GOALS,
        "met": {key: scores[key] >= goal for key, goal in GOALS.items()},
        "spearman_by_layer": by_layer,
        "scale": {site.name: round(probed.layers[site.name].scale, 4) for site in sites.layers},
        "seconds": {
            "calibrate": round(middle - start, 2),
            "calibrate_and_probe": round(end - middle, 2),
        },
        "samples": {"calibration": plain.samples, "measured": 1000},
        "seed": options.seed,
        "device": processor(),
        "threads": 1,
        "date": date.today().isoformat(),
        "versions": {
            "lamina": importlib.metadata.version("lamina"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "scipy": scipy.__version__,
        },
        "rows": rows,
    }
    Path(output).write_text(json.dumps(result, indent=1) + "\n")
    print({k: v for k, v in result.items() if k not in ("rows", "versions")})


if __name__ == "__main__":
    main()
