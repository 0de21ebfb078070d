"""Coverage: tiny random networks of over a hundred `transformers` families, there and back.

    python benchmarks/coverage/run.py --room DIR [--only bert,gpt2] [--size 30%]

Every family of `families.py` is saved with `save_pretrained`, opened from that folder alone,
compressed without data, and saved. Then a fresh process that has never seen the folders opens the
files with `lamina.load` and runs them on the same inputs. A row says whether every output tensor is
the in-memory network's bit for bit, what was refused and why, and in one line why a family could
not be compressed. All networks run on the CPU with one thread; sizes are whole files.

Most choose steps and codes of `rdoq` alone, for which 3 s of CPU time are enough; four also choose
among low ranks (`alds`), which are structural edits. What is done lies in `--room`, and is not done
again.

Bar: at least 40 families are compressed, all of them load and match, and the others say why.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES

HERE = Path(__file__).parent
BAR = 40
METHODS = ("rdoq",)  # of most: what a method chooses is not the question here
EVERY = dict.fromkeys(("bert", "llama-bf16-tied", "t5", "vit"), ("alds", "rdoq"))


def make(name: str, folder: Path) -> None:
    """Save a tiny network of a family, of random weights, as a Hugging Face folder."""
    import transformers

    kind_name, settings = FAMILIES[name]
    kind = getattr(transformers, kind_name)
    torch.manual_seed(0)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        module = kind(kind.config_class.from_dict(json.loads(json.dumps(settings))))
        module = module.to(getattr(torch, settings.get("dtype", "float32")))
        module.eval().save_pretrained(folder)


def outputs_of(module: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Return every tensor of a network's output, in order."""
    torch.manual_seed(0)  # some draw noise
    with torch.no_grad():
        return list(_tensors(module(**inputs)))


def _tensors(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def compress_one(name: str, size: str, room: Path) -> dict[str, Any]:
    """Compress a family's network; leave file, inputs and outputs, and return its row."""
    import lamina
    from lamina.errors import LaminaError
    from lamina.opening import open_model

    row: dict[str, Any] = {"class": FAMILIES[name][0]}
    start = time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder:
            make(name, Path(folder))
            network = open_model(folder)
            methods = EVERY.get(name, METHODS)
            result = lamina.compress(network, None, size, recover=None, methods=methods)
        facts = result.report.facts
        row |= {
            "task": network.task,
            "parameters": sum(p.numel() for p in network.module.parameters()),
            "disk_bytes": network.disk_bytes,
            "file_bytes": len(result.file),
            "share": round(len(result.file) / network.disk_bytes, 4),
            "layers": len(facts["sites"]),
            "methods": list(methods),
            "refused": [f"{r['where']}: {r['what']}: {r['why']}" for r in facts["refusals"]],
        }
        result.save(room / f"{name}.lamina")
        inputs = dict(network.example_kwargs)
        torch.save({"inputs": inputs, "outputs": outputs_of(result.model, inputs)},
                   room / f"{name}.pt")  # fmt: skip
        return {**row, "compressed": True, "seconds": round(time.process_time() - start, 2)}
    except LaminaError as error:
        return {**row, "compressed": False, "why": str(error), "refused": refused_by(name)}
    except Exception as error:  # a crash is what this looks for
        return {**row, "compressed": False, "crash": f"{type(error).__name__}: {error}"}


def refused_by(name: str) -> list[str]:
    """Return what discovery refuses of a family's network; `[]` where it cannot be opened."""
    from lamina.errors import LaminaError
    from lamina.network.discover import discover
    from lamina.opening import open_model

    try:
        with tempfile.TemporaryDirectory() as folder:
            make(name, Path(folder))
            found = discover(open_model(folder)).refusals
    except LaminaError:
        return []
    return [f"{r.where}: {r.what}: {r.why}" for r in found]


def open_all(room: Path) -> None:
    """Open what lies in a folder, and print a JSON line [name, matches, why not] for each."""
    import lamina

    for path in sorted(room.glob("*.lamina")):
        kept = torch.load(path.with_suffix(".pt"))
        try:
            module: Any = lamina.load(path)
            module.config.use_cache = False  # as while compressing; what it holds is no output
            found = outputs_of(module, kept["inputs"])
            same = len(found) == len(kept["outputs"]) and len(found) > 0
            pairs = zip(found, kept["outputs"], strict=False)
            same = same and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
            why = "" if same else "outputs differ"
        except Exception as error:
            same, why = False, f"{type(error).__name__}: {error}"
        print(json.dumps([path.stem, same, why]), flush=True)


def meets(rows: dict[str, dict[str, Any]]) -> bool:
    """Whether all that was compressed loads and matches, the rest says why, and none crashed."""
    done = [row for row in rows.values() if row["compressed"]]
    told = all(row.get("why") for row in rows.values() if not row["compressed"])
    return told and len(done) >= BAR and all(row["loads_and_matches"] for row in done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--size", default="30%")
    parser.add_argument("--room", type=Path, required=True, help="a folder for files and rows")
    parser.add_argument("--open", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if given.open:
        open_all(given.room)
        return
    import transformers

    transformers.logging.set_verbosity_error()
    names = [n for n in given.only.split(",") if n] or list(FAMILIES)
    rows: dict[str, dict[str, Any]] = {}
    given.room.mkdir(parents=True, exist_ok=True)
    for name in names:
        kept = given.room / f"{name}.json"
        if not kept.exists():
            kept.write_text(json.dumps(compress_one(name, given.size, given.room)))
        rows[name] = json.loads(kept.read_text())
        said = rows[name].get("why") or rows[name].get("crash") or f"{rows[name]['share']:.1%}"
        print(f"{name}: {said}", flush=True)
    words = [sys.executable, __file__, "--open", "--room", str(given.room)]
    fresh = subprocess.run(words, capture_output=True, text=True, check=False)
    for line in fresh.stdout.splitlines():
        name, same, why = json.loads(line) if line.startswith("[") else ("", False, "")
        if name in rows:
            rows[name] |= {"loads_and_matches": same, **({"why": why} if why else {})}
    for row in rows.values():
        if row["compressed"] and "loads_and_matches" not in row:
            row |= {"loads_and_matches": False, "why": fresh.stderr[-300:]}
    matching = [n for n, row in rows.items() if row.get("loads_and_matches")]
    result = {
        "what": "tiny random networks, data-free, whole file against the folder's safetensors",
        "size": given.size, "families": len(rows), "compressed": sum(r["compressed"] for r in
        rows.values()), "load_and_match": len(matching),
        "not": {n: row.get("why") or row.get("crash") for n, row in rows.items()
                if n not in matching},
        "crashes": sum("crash" in row for row in rows.values()),
        "bar": {"families": BAR, "met": meets(rows)},
        "date": str(datetime.date.today()), "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
        "rows": rows,
    }  # fmt: skip
    if not given.only:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1))


if __name__ == "__main__":
    main()
