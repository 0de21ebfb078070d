"""The largest layer of each LeNet in a Bloomier filter, against lossless codes of the same values.

    python benchmarks/weightless/run.py [NETWORK ...] [--seeds 0,1,2] [--densities 0.08,0.04]

The network is pruned and retrained, the layer at the given density; its survivors share k values,
which are trained. That very layer is then coded: in Deep Compression's first form (5 bit gaps,
nothing coded), with Huffman codes, by our shortest lossless codec, and as a filter with cells of t
bits. Each filter is decoded, frozen as it comes back, and everything after it is retrained; so is
everything after the lossless layer, for a fair comparison. The whole network is judged.

The number of bits is chosen by the mean over seeds of validation accuracy (at most `EQUAL` below
the lossless network's); the test split is only reported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import lamina
from lamina import codecs
from lamina.codecs import bloomier, huffman
from lamina.forms import Codebook, Edit, find_tensor
from lamina.measure.quality import evaluate
from lamina.network.discover import discover
from lamina.recipes.pruning import covered, shares_of
from lamina.recipes.retraining import Session
from lamina.recipes.settings import Pruning
from lamina.recipes.sharing import share
from lamina.recipes.weightless import filtered, frozen_by

HERE = Path(__file__).parent
LAYERS = {"lenet-300-100": "fc1", "lenet-5": "fc1"}  # the largest: 784 x 300 and 800 x 500
DENSITIES = (0.08, 0.04, 0.02, 0.01)
CLUSTERS = (4, 8)
CELLS = (2, 3, 4, 5, 6)  # bits above those of a value
EQUAL = 0.1  # points of accuracy that count as equal, in the mean over seeds
EPOCHS, LR = 3.0, 5e-4


def run(name: str, density: float, seed: int) -> list[dict[str, Any]]:
    """Prune once, then code the layer in every way; one row per number of shared values."""
    net = lamina.zoo(name)
    sites = covered(net, discover(net).layers, "weightless")
    site = next(s for s in sites if s.name == LAYERS[name])
    place = sites.index(site)
    pruning = Pruning(density=0.1, keep={site.name: density}, last=20)
    start = time.perf_counter()
    work = Session(net, net.data, seed, pruning, lambda *_: None)
    work.prune(sites, shares_of(net, sites, net.data, pruning))
    rows = []
    for clusters in CLUSTERS:
        one = work.fork()
        weight = find_tensor(one.module, site.weight)
        one.hold([Edit(site.weight, "values", values=share(weight, clusters))])
        one.train(EPOCHS, LR, sites, frozen=frozen_by(sites[:place]))
        values = one.values(site.weight)
        symbols = values.index.reshape(values.index.shape[0], -1).numpy()
        facts = huffman.describe(huffman.encode(symbols, width=5), symbols.shape)
        own, data = codecs.best(symbols)
        row: dict[str, Any] = {
            "seed": seed,
            "density": density,
            "clusters": clusters,
            "nonzeros": int((symbols != 0).sum()),
            "zeros": int((symbols == 0).sum()),
            "bytes": {
                "5 bit gaps": round(facts["entries"] * (facts["value_bits"] + 5) / 8),
                "huffman, 5 bit gaps": len(huffman.encode(symbols, width=5)),
                "huffman": len(huffman.encode(symbols)),
                "own": len(data),
            },
            "own": own,
            "lossless": retrained(one, site, sites, place, values, net.data),
            "filters": {},
        }
        for cells in CELLS:
            form = filtered(values, cells, seed)
            assert form.code is not None
            told = bloomier.describe(form.code[1], symbols.shape)
            if len(form.code[1]) > 1.3 * row["bytes"]["huffman"]:
                continue
            found = retrained(one, site, sites, place, form, net.data)
            row["filters"][str(told["bits"])] = {
                "bytes": len(form.code[1]),
                "wrong_zeros": int((form.index != 0).sum()) - row["nonzeros"],
                **found,
            }
        row["seconds"] = round(time.perf_counter() - start, 1)
        rows.append(row)
        print(name, {k: v for k, v in row.items() if k != "filters"}, flush=True)
        for bits, found in row["filters"].items():
            print("   t =", bits, found, flush=True)
    return rows


def retrained(
    work: Session, site: Any, sites: list[Any], place: int, values: Codebook, data: Any
) -> dict[str, float]:
    """Freeze the layer at these values, retrain what comes after it, and judge the network."""
    trial = work.fork()
    trial.hold([Edit(site.weight, "values", values=values)])
    trial.train(EPOCHS, LR, sites, frozen=(*frozen_by(sites[:place]), site.weight))
    return {
        "validation": evaluate(trial.module, data.validation, "accuracy"),
        "test": evaluate(trial.module, data.test, "accuracy"),
    }


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose the bits of each density and number of values, and say who is smaller."""
    found = []
    for key in sorted({(-r["density"], r["clusters"]) for r in rows}):
        same = [r for r in rows if (-r["density"], r["clusters"]) == key]
        sizes = {n: statistics.mean(r["bytes"][n] for r in same) for n in same[0]["bytes"]}
        common = set.intersection(*({int(b) for b in r["filters"]} for r in same))
        best: dict[str, Any] = {"bits": None}
        for bits in sorted(common):
            drops = {
                split: statistics.mean(
                    r["lossless"][split] - r["filters"][str(bits)][split] for r in same
                )
                for split in ("validation", "test")
            }
            if drops["validation"] <= EQUAL + 1e-9:
                size = statistics.mean(r["filters"][str(bits)]["bytes"] for r in same)
                best = {"bits": bits, "bytes": size, "drop_test": drops["test"]}
                best |= {f"over {n}": round(size / s, 3) for n, s in sizes.items()}
                break
        found.append({"density": -key[0], "clusters": key[1], "bytes": sizes, "filter": best})
    return found


def machine() -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=list(LAYERS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--densities", default=",".join(map(str, DENSITIES)))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = HERE / "result.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in args.networks:
        rows: list[dict[str, Any]] = []
        for density in map(float, args.densities.split(",")):
            for seed in map(int, args.seeds.split(",")):
                rows += run(name, density, seed)
            results[name] = {
                "date": datetime.date.today().isoformat(),
                "versions": {"lamina": lamina.__version__, "torch": torch.__version__},
                "machine": machine(),
                "command": f"python benchmarks/weightless/run.py {name} --seeds {args.seeds}",
                "layer": LAYERS[name],
                "equal": EQUAL,
                "verdicts": judge(rows),
                "runs": rows,
            }
            path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        for verdict in results[name]["verdicts"]:
            print(name, verdict, flush=True)


if __name__ == "__main__":
    main()
