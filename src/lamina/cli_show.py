"""What the command line prints: tables, the progress bar, and errors as one line."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lamina.errors import FileError, InfeasibleError, LaminaError


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print rows under their headings; the first `left` columns are text, the others numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(head):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    # A pipe gets whole lines: a reader of a file can scroll, a program must not guess.
    console = Console(width=None if sys.stdout.isatty() else 10_000)
    with console.capture() as text:
        console.print(table)
    say("\n".join(line.rstrip() for line in text.get().splitlines()))


def say(text: str) -> None:
    """Print plain text."""
    print(text, flush=True)


def warn(text: str) -> None:
    """Print one line to stderr."""
    print(" ".join(f"lamina: {text}".split()), file=sys.stderr, flush=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int, str], None]]:
    """Yield a `watch` for `compress`: a bar with the time left per stage, in a log a line."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("{task.description:<9}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TextColumn("left"), TimeLeft(), TextColumn("{task.fields[text]}"),
    )  # fmt: skip
    bars: dict[str, Any] = {}
    totals: dict[str, int] = {}
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def watch(stage: str, done: int, total: int, text: str) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=None, text="")
            if not total:
                return
            if totals.setdefault(stage, total) != total:  # a stage's second half counts anew
                if done < total:
                    progress.reset(bars[stage], total=total)
                totals[stage] = total
            progress.update(bars[stage], total=total, completed=done, text=text)

        yield watch


def _lines() -> Callable[[str, int, int, str], None]:
    """Return a `watch` that prints a line as each stage ends, for logs."""
    begun: dict[str, float] = {}

    def watch(stage: str, done: int, total: int, text: str) -> None:
        if not total:
            begun[stage] = time.perf_counter()
        elif done == total == 1 and stage in begun and text in ("", "done before"):
            seconds = time.perf_counter() - begun.pop(stage)
            say(f"{stage:<9} {text or f'{seconds:.1f} s'}")

    return watch


def show_methods() -> None:
    """Print every method in a line."""
    from lamina.methods.base import registry, spanning

    rows = []
    every: dict[str, Any] = {**registry(), **spanning()}
    for name, method in every.items():
        card = card_of(method).splitlines()
        line = card[0].partition(": ")[2] or card[0]
        stage = f"{method.stage.value} {method.stage.name.lower()}"
        rows.append([name, stage, " ".join(method.kinds), line, method.reference])
    print_table(["method", "stage", "sites", "what it does", "reference"], rows, left=5)


def card_of(method: Any) -> str:
    """Return a method's card: the docstring of its file."""
    return (sys.modules[type(method).__module__].__doc__ or method.name).strip()


def origin_of(model: str) -> str:
    """Return what names the original of a MODEL: for a zoo network's file its zoo name."""
    from lamina import artifact
    from lamina.network.small_folders import small_file

    file = small_file(model)
    if file is None:
        return model
    kind, _, name = artifact.read(file).skeleton.partition(":")
    if kind != "zoo":
        raise FileError("the file's original is not known", model, "", "give --against MODEL")
    return name


def slug(model: str, budget: Mapping[str, Any]) -> str:
    """Return the run folder's name for a model and a budget.

    Example:
        >>> slug("nets/my.py:build", {"size": "1/400"}), slug("lenet-5", {"size": "2%"})
        ('my-1-400', 'lenet-5-2pct')
    """
    stem = re.sub(r"\.(py(:.*)?|lamina)$", "", model.replace("\\", "/").rstrip("/").split("/")[-1])
    limits = [str(v) if k == "size" else f"{k}-{v}" for k, v in budget.items()]
    name = "-".join([stem, *limits]).replace("%", "pct")
    return re.sub(r"[^\w.]+", "-", name).strip("-.") or "run"


def explain(error: BaseException) -> int:
    """Print an error as one line and return its exit code."""
    folder = getattr(error, "run_folder", None)
    if isinstance(error, InfeasibleError):
        warn(str(error))
        return 3
    if isinstance(error, LaminaError):
        warn(str(error))
        return 2
    if hasattr(error, "format_message"):  # the parser's own usage errors
        path = getattr(getattr(error, "ctx", None), "command_path", "lamina")
        warn(f"{error.format_message().rstrip('.')}. See '{path} --help'.")
        return 2
    if isinstance(error, KeyboardInterrupt):
        warn(
            "interrupted" + (f"; the same command continues the run in {folder}" if folder else "")
        )
        return 130
    if isinstance(error, BrokenPipeError):  # the reader has gone, as in `lamina methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    kind = f"{type(error).__name__}: {error}".strip(": ").split("\n")[0]
    warn(
        f"an unexpected error, a fault of Lamina's own: {kind}; the traceback is in "
        f"{write_traceback(error, folder)}; please report it with that file and the command"
    )
    return 1


def write_traceback(error: BaseException, folder: Path | None) -> str:
    """Write an unexpected error's traceback to a file, and return its path."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    for place in (folder, Path(tempfile.gettempdir())):
        try:
            if place is not None and place.is_dir():
                path = place / f"lamina-error-{time.strftime('%Y%m%d-%H%M%S')}.txt"
                path.write_text(text, encoding="utf-8")
                return str(path)
        except OSError:
            continue
    return "nowhere: no folder can be written"
