"""Speed and closeness of 8-bit integers: MiniLM and a network of BERT-base's shape, one thread.

    python benchmarks/int8/run.py --model FOLDER --texts FILE [--only minilm|bert] [--latency 0.4x]

FOLDER is a downloaded all-MiniLM-L6-v2 (config.json, model.safetensors, tokenizer), FILE has one
text per line (the last column of tab-separated lines is taken: movie snippets of the VADER data).
Batch 1 x 128 tokens. Every variant runs in every round, in turn; a variant's ratio is the median
over rounds of the original's time over its own in that round. The clock is that of the process, so
other programs disturb only through caches; `--clock wall` on a quiet machine.

Variants: `fp32`, the original in eager mode with its own (fused) attention; `int8`, Lamina's form
in every Linear, saved, loaded, and run; `plan`, what `compress(latency=...)` without data makes of
it; `ao-onednn` and `ao-x86`, `torch.ao.quantization.quantize_dynamic` with a scale per row on two
engines; `bf16`, the whole model cast; `ort-fp32` and `ort-int8`, onnxruntime, exported by torch and
quantized dynamically (scales per row).

Closeness: cosine of the mean-pooled embedding (BERT-base: random weights, random tokens) with the
original's, one text at a time, over `--count` texts, its mean and least.

Bars: int8 at least 2.3 times (MiniLM) and 3 times (BERT-base) as fast as fp32, cosine at least .99.
Writes `benchmarks/int8/result.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import lamina
from lamina.artifact import pack, restore, unpack
from lamina.forms import Edit, grid_of, install
from lamina.network.source import Network

HERE = Path(__file__).resolve().parent
TOKENS = 128
BARS = {"minilm": 2.3, "bert": 3.0}
COSINE = 0.99
Batch = Mapping[str, Tensor]
Run = Callable[[Batch], Tensor]  # inputs -> last hidden state


def last(module: nn.Module) -> Run:
    return lambda batch: module(**batch).last_hidden_state.float()


def in_int8(module: nn.Module, fresh: nn.Module) -> tuple[nn.Module, int]:
    """Return a module with every Linear in int8, from its file, and the file's bytes."""
    changed = copy.deepcopy(module)
    edits: list[Edit] = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            edits.append(Edit(name, "int8", {"bits": 8}))
            edits.append(Edit(f"{name}.weight", "values", values=grid_of(layer.weight)))
    install(changed, edits)
    file = pack(changed, tuple(edits), "module", {})
    return restore(unpack(file), fresh).eval(), len(file)


def planned(module: nn.Module, batch: Batch, latency: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return what a latency budget makes of a module without data, and what it says of it."""
    network = Network(module, name="network", example_kwargs=dict(batch), loss="features")
    started = time.perf_counter()
    result = lamina.compress(
        network, None, lamina.Budget(latency=latency), methods=["int8"], recover=None
    )
    steps = [step.method for d in result.plan.sites.values() for step in d.steps]
    facts = {"asked": latency, "int8_layers": steps.count("int8"), "layers": len(result.plan.sites),
             "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip
    return result.model.eval(), facts


def by_torch_ao(module: nn.Module, engine: str) -> nn.Module:
    ao = torch.ao.quantization
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        kinds = {nn.Linear: ao.per_channel_dynamic_qconfig}
        return ao.quantize_dynamic(copy.deepcopy(module), kinds, dtype=torch.qint8)
    finally:
        torch.backends.quantized.engine = before


def by_onnxruntime(module: nn.Module, batch: Batch, folder: Path) -> dict[str, Run]:
    """Return sessions of an exported module: in floats, and dynamically quantized."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, small = folder / "plain.onnx", folder / "small.onnx"
    names = list(batch)

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *args: Tensor) -> Tensor:
            return self.inner(**dict(zip(names, args, strict=True))).last_hidden_state

    dynamic = tuple({1: torch.export.Dim("tokens", min=2, max=512)} for _ in names)
    program = torch.onnx.export(
        Hidden().eval(), tuple(batch.values()), dynamo=True, input_names=names,
        dynamic_shapes=(dynamic,), verbose=False,
    )  # fmt: skip
    program.save(plain)
    quantize_dynamic(plain, small, weight_type=QuantType.QInt8, per_channel=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def run_of(path: Path) -> Run:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        wanted = [i.name for i in session.get_inputs()]
        return lambda b: torch.from_numpy(session.run(None, {n: b[n].numpy() for n in wanted})[0])

    return {"ort-fp32": run_of(plain), "ort-int8": run_of(small)}


def timed(runs: Mapping[str, Run], batch: Batch, rounds: int, clock: Callable[[], float]) -> Any:
    """Return by variant the median time [ms], and the ratio to fp32 with its quartiles."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(batch), run(batch)
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run(batch)
            took[name].append(clock() - start)
    found = {}
    for name, times in took.items():
        ratios = sorted(a / b for a, b in zip(took["fp32"], times, strict=True))
        found[name] = {
            "ms": round(1e3 * median(times), 3), "ratio": round(median(ratios), 3),
            "low": round(ratios[len(ratios) // 4], 3),
            "high": round(ratios[-1 - len(ratios) // 4], 3),
        }  # fmt: skip
    return found


def pooled(run: Run, batch: Batch) -> Tensor:
    mask = batch["attention_mask"][..., None].float()
    return ((run(batch) * mask).sum(1) / mask.sum(1))[0]


def closeness(runs: Mapping[str, Run], batches: list[Batch]) -> dict[str, Any]:
    """Return by variant the mean and the least cosine with fp32."""
    wanted = [pooled(runs["fp32"], batch) for batch in batches]
    found = {}
    for name, run in runs.items():
        values = [
            float(nn.functional.cosine_similarity(a, pooled(run, b), dim=0))
            for a, b in zip(wanted, batches, strict=True)
        ]
        found[name] = {"mean": round(sum(values) / len(values), 5), "least": round(min(values), 5)}
    return found


def minilm(folder: str, file: Path, count: int) -> tuple[nn.Module, nn.Module, Batch, list[Batch]]:
    """Return the model, an empty one, one text of 128 tokens, and texts one by one."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    fresh = AutoModel.from_config(AutoConfig.from_pretrained(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = file.read_bytes().decode("latin-1").splitlines()
    texts = [line.split("\t")[-1].strip() for line in lines]
    some = texts[:: max(1, len(texts) // count)][:count]
    long = tokenizer(" ".join(some), truncation=True, max_length=TOKENS, return_tensors="pt")
    each = [dict(tokenizer(t, truncation=True, max_length=TOKENS, return_tensors="pt"))
            for t in some]  # fmt: skip
    return model, fresh, dict(long), each


def bert(count: int) -> tuple[nn.Module, nn.Module, Batch, list[Batch]]:
    """Return a network of BERT-base's shape with random weights, and random tokens."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model, fresh = BertModel(BertConfig()).eval(), BertModel(BertConfig()).eval()
    batches = []
    for _ in range(count):
        ids = torch.randint(1000, 30_000, (1, TOKENS))
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return model, fresh, batches[0], batches


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    count = args.count if name == "minilm" else max(1, args.count // 8)
    given = minilm(args.model, args.texts, count) if name == "minilm" else bert(count)
    model, fresh, batch, batches = given
    runs: dict[str, Run] = {"fp32": last(model)}
    small, size = in_int8(model, fresh)
    runs["int8"] = last(small)
    facts: dict[str, Any] = {"file_bytes": size, "tokens": int(batch["input_ids"].shape[1])}
    if name == "minilm" and args.latency:
        made, facts["plan"] = planned(model, batch, args.latency)
        runs["plan"] = last(made)
    runs |= {f"ao-{engine}": last(by_torch_ao(model, engine)) for engine in ("onednn", "x86")}
    runs["bf16"] = last(copy.deepcopy(model).to(torch.bfloat16))
    with tempfile.TemporaryDirectory() as folder:
        if not args.no_ort:
            runs |= by_onnxruntime(model, batch, Path(folder))
        clock = time.process_time if args.clock == "process" else time.perf_counter
        facts["speed"] = timed(runs, batch, args.rounds, clock)
        facts["cosine"] = closeness(runs, batches)
    ratio, cosine = facts["speed"]["int8"]["ratio"], facts["cosine"]["int8"]["mean"]
    facts["bar"] = {"ratio": BARS[name], "cosine": COSINE,
                    "met": ratio >= BARS[name] and cosine >= COSINE}  # fmt: skip
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--texts", type=Path, help="one text per line")
    parser.add_argument("--only", choices=["minilm", "bert"])
    parser.add_argument("--latency", default="0.4x")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--count", type=int, default=64, help="texts of the cosine")
    parser.add_argument("--clock", choices=["process", "wall"], default="process")
    parser.add_argument("--no-ort", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in [args.only] if args.only else ["minilm", "bert"]:
        with torch.no_grad():
            found[name] = measure(name, args)
        found[name] |= {
            "date": str(date.today()), "torch": torch.__version__, "clock": args.clock,
            "threads": 1, "rounds": args.rounds, "cpu": cpu_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "vnni": torch.cpu._is_vnni_supported(), "amx": torch.cpu._is_amx_tile_supported(),
            "load": [round(v, 1) for v in os.getloadavg()],
        }  # fmt: skip
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found[name], indent=1), flush=True)


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    lines = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return lines[0] if lines else platform.processor()


if __name__ == "__main__":
    main()
