"""The deep-compression recipe on both LeNets, beside the paper's tables.

    python benchmarks/deep-compression/run.py [NETWORK ...] [--seeds 0,1,2]

Bars: the whole file 40 (LeNet-300-100) and 39 (LeNet-5) times smaller than the parameters as
float32, and no drop of test accuracy beyond 0.1 points. The recipe's settings, those of
SETTINGS, were chosen on validation data. The test split is looked at once per run, after
compression.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import lamina
from lamina.artifact import Package, pack, unpack
from lamina.codecs import huffman
from lamina.forms import Codebook, Edit
from lamina.measure.quality import evaluate
from lamina.recipes import DeepCompression, Pruning

HERE = Path(__file__).parent
BARS = {"lenet-300-100": 40.0, "lenet-5": 39.0}  # times smaller
SETTINGS = {  # beside the recipe's defaults
    "lenet-300-100": DeepCompression(Pruning(density=0.09, last=60), epochs=20),
    "lenet-5": DeepCompression(),
}
DROP = 0.1  # points of test accuracy
# Han, Mao, Dally 2016, tables 2 and 3; the columns are those of HEADS.
PAPER = {
    "lenet-300-100": {
        "fc1": (8, 6, 4.4, 5, 3.7, 3.1, 2.32),
        "fc2": (9, 6, 4.4, 5, 4.3, 3.8, 3.04),
        "fc3": (26, 6, 4.3, 5, 3.2, 15.7, 12.70),
        "all": (8, 6, 5.1, 5, 3.7, 3.1, 2.49),
    },
    "lenet-5": {
        "conv1": (66, 8, 7.2, 5, 1.5, 78.5, 67.45),
        "conv2": (12, 8, 7.2, 5, 3.9, 6.0, 5.28),
        "fc1": (8, 5, 4.5, 5, 4.5, 2.7, 2.45),
        "fc2": (19, 5, 5.2, 5, 3.7, 6.9, 6.13),
        "all": (8, 5.3, 4.1, 5, 4.4, 3.05, 2.55),
    },
}
HEADS = ("kept %", "w bits", "coded", "idx bits", "coded", "size %", "coded %")


def run(name: str, seed: int) -> dict[str, Any]:
    net = lamina.zoo(name)
    start = time.perf_counter()
    result = lamina.compress(net, net.data, recipe=SETTINGS[name], seed=seed)
    seconds = time.perf_counter() - start
    before = evaluate(net.module, net.data.test, "accuracy")
    after = evaluate(result.model, net.data.test, "accuracy")
    original = 4 * sum(p.numel() for p in net.module.parameters())
    package = unpack(result.file)
    ours = len(own_code(result.model, package))
    ratio = original / len(result.file)
    drop = round(before - after, 2)
    return {
        "seed": seed,
        "bytes": len(result.file),
        "ratio": round(ratio, 1),
        "bytes_own_codecs": ours,
        "ratio_own_codecs": round(original / ours, 1),
        "test_before": before,
        "test_after": after,
        "drop": drop,
        "validation_before": evaluate(net.module, net.data.validation, "accuracy"),
        "validation_after": evaluate(result.model, net.data.validation, "accuracy"),
        "seconds": round(seconds, 1),
        "ledger": dict(package.ledger),
        "layers": layers(package),
        "bar": {"ratio": BARS[name], "drop": DROP},
        "met": ratio >= BARS[name] and drop <= DROP + 1e-9,
    }


def own_code(model: torch.nn.Module, package: Package) -> bytes:
    """The same values in the file our own codecs make of them, instead of Huffman's."""
    edits = [
        Edit(n, "values", values=replace(v, code=None) if isinstance(v, Codebook) else v)
        for n, v in package.tensors.items()
    ]
    return pack(model, tuple(edits), package.skeleton, package.plan)


def layers(package: Package) -> dict[str, list[float]]:
    """The paper's columns for each layer, and for all; every table is counted."""
    rows: dict[str, list[float]] = {}
    sums = torch.zeros(7, dtype=torch.float64)
    counts = torch.zeros(3, dtype=torch.float64)  # entries uncoded, entries coded, weights
    for name, values in package.tensors.items():
        if not isinstance(values, Codebook):
            continue
        symbols = values.index.reshape(values.index.shape[0], -1).numpy()
        data = values.code[1] if values.code else huffman.encode(symbols)
        facts = huffman.describe(data, symbols.shape)
        table = 4 * len(values.centroids)
        # Coded, fillers are dearer than long gaps; uncoded, short gaps are best, as in the paper.
        plain = min(
            (huffman.describe(huffman.encode(symbols, width=w), symbols.shape) for w in range(9)),
            key=lambda f: f["entries"] * (f["value_bits"] + f["gap_bits"]),
        )
        raw = plain["entries"] * (plain["value_bits"] + plain["gap_bits"]) / 8 + table
        rows[name.removesuffix(".weight")] = [
            round(x, 2)
            for x in (
                100 * facts["nonzeros"] / symbols.size,
                plain["value_bits"], facts["mean_value_bits"],
                plain["gap_bits"], facts["mean_gap_bits"],
                100 * raw / (4 * symbols.size), 100 * (len(data) + table) / (4 * symbols.size),
            )
        ]  # fmt: skip
        entries = facts["entries"]
        sums += torch.tensor(
            [
                facts["nonzeros"], plain["entries"] * plain["value_bits"], 8 * facts["value_bytes"],
                plain["entries"] * plain["gap_bits"], 8 * facts["gap_bytes"], raw,
                len(data) + table,
            ]
        )  # fmt: skip
        counts += torch.tensor([plain["entries"], entries, symbols.size])
    n, e, size = counts.tolist()
    by = torch.tensor([size / 100, n, e, n, e, size / 25, size / 25])
    rows["all"] = [round(float(x), 2) for x in sums / by]
    return rows


def show(name: str, row: dict[str, Any]) -> None:
    """Print one run: the table beside the paper's, then the bars."""
    print(f"\n{name}, seed {row['seed']}: ours / the paper's")
    print(f"{'layer':<7}" + "".join(f"{head:>16}" for head in HEADS))
    for layer, ours in row["layers"].items():
        theirs = PAPER[name][layer]
        cells = [f"{a:g} / {b:g}" for a, b in zip(ours, theirs, strict=True)]
        print(f"{layer:<7}" + "".join(f"{cell:>16}" for cell in cells))
    print(
        f"file {row['bytes']:,} bytes, {row['ratio']}x (bar {row['bar']['ratio']:g}x); test "
        f"{row['test_before']:.2f} -> {row['test_after']:.2f}, drop {row['drop']:.2f} "
        f"(bar {DROP}), "
        f"{'met' if row['met'] else 'NOT MET'}; our codecs {row['bytes_own_codecs']:,} bytes, "
        f"{row['ratio_own_codecs']}x; {row['seconds']} s",
        flush=True,
    )


def machine() -> dict[str, object]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("networks", nargs="*", default=list(BARS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = HERE / "result.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in args.networks:
        rows = []
        for seed in args.seeds.split(","):
            rows.append(run(name, int(seed)))
            show(name, rows[-1])
        results[name] = {
            "date": datetime.date.today().isoformat(),
            "versions": {"lamina": lamina.__version__, "torch": torch.__version__},
            "machine": machine(),
            "command": f"python benchmarks/deep-compression/run.py {name} --seeds {args.seeds}",
            "columns": HEADS,
            "paper": PAPER[name],
            "settings": asdict(SETTINGS[name]),
            "runs": rows,
        }
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
