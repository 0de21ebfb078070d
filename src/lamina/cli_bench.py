"""The verb `bench`: how much faster a network has become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from lamina import cli_show as show
from lamina.cli_run import open_both, timed_at

if TYPE_CHECKING:
    from lamina.measure.bench import Bench


def compare(
    model: str, compressed: str | None, against: str | None, data: str | None,
    skeleton: str | None, *, batch: int, tokens: int, threads: int, seconds: float,
    layers: bool, out: Path | None,
) -> None:  # fmt: skip
    """Time two networks in turn, print what came out, and write it where asked.

    Args:
        model: the original, or alone the compressed one.
        compressed: the compressed one, or None.
        against: the original, where `model` is the compressed one; default: the file's own.
        data, skeleton: as the user named them.
        batch, tokens: shape of the inputs; 0: that of a sample of the data, without any 128 tokens.
        threads, seconds: see `measure.bench`.
        layers: time each layer too.
        out: a JSON file.

    Raises:
        DataError: there is nothing to time the networks on.
    """
    from lamina.measure.bench import bench
    from lamina.network.discover import discover
    from lamina.run import write_atomic

    first, second = (model, compressed) if compressed is not None else (against, model)
    final, _ = open_both(second, data, skeleton)
    original, loaders = open_both(first or skeleton or show.origin_of(second), data, None)
    original = timed_at(original, loaders)
    named = [site.module for site in discover(original).layers] if layers else []
    found = bench(
        original, final.module, batch=batch, tokens=tokens, threads=threads, seconds=seconds,
        layers=list(dict.fromkeys(named)),
    )  # fmt: skip
    print_bench(found)
    if out is not None:
        names = {"original": first or original.name, "compressed": second}
        write_atomic(out, (json.dumps(names | found.to_json(), indent=1) + "\n").encode())
        show.say(f"figures: {out}")


def print_bench(found: Bench) -> None:
    """Print times, their ratio with its spread, and a table of layers where there is one."""
    times = (("before", found.before_s), ("after", found.after_s))
    show.print_table(["network", "median"], [[n, f"{1000 * t:.3f} ms"] for n, t in times])
    shape = f"batch {found.batch}" + (f" x {found.tokens} tokens" if found.tokens else "")
    threads = f"{found.threads} thread" + ("" if found.threads == 1 else "s")
    show.say(
        f"{found.ratio:.2f}x the speed (half of the rounds {found.low:.2f} to {found.high:.2f}), "
        f"{found.rounds} interleaved rounds, {shape}, {threads}, {found.clock} time"
    )
    if found.layers:
        rows = [
            [t.name, t.before, t.after, f"{1e3 * t.before_s:.3f}", f"{1e3 * t.after_s:.3f}",
             f"{t.ratio:.2f}x +-{t.noise:.2f}"]
            for t in found.layers
        ]  # fmt: skip
        head = ["layer", "before", "after", "before [ms]", "after [ms]", "speed"]
        show.print_table(head, rows, left=3)
