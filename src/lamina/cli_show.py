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
from typing import TYPE_CHECKING, Any

from lamina.errors import FileError, InfeasibleError, LaminaError

if TYPE_CHECKING:
    from torch import Tensor

    from lamina.artifact import Package
    from lamina.measure.stats import Stats
    from lamina.network.sites import Site, Sites
    from lamina.network.source import Network
    from lamina.plan import Candidates

SMALL_ERROR = 0.01  # [nats per sample] what `inspect --data` calls harmless for one site
WIDEST = 2048  # side of a matrix up to which `inspect` looks at singular values


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


def show_sites(
    network: Network,
    sites: Sites,
    stats: Stats | None = None,
    candidates: Candidates | None = None,
) -> None:
    """Print what can be compressed and how well, and what was refused and why."""
    from lamina.methods.base import registry, weights_of

    head = ["site", "op", "methods", "shape", "params", "macs", "zeros", "rank"]
    head += ["bytes", f"at {SMALL_ERROR} nats"] if candidates and stats and stats.samples else []
    rows = []
    for site in sites.layers:
        weight = weights_of(network, site)["weight"]
        serve = " ".join(name for name, m in registry().items() if not m.refuse(site))
        row = [site.name, site.op, serve, "x".join(map(str, site.shape)) or "scalar"]
        row += [f"{weight.numel():,}", f"{site.macs:,.0f}", *hints(site, weight)]
        if candidates and stats and stats.samples:
            offers = candidates[site.name]
            harmless = [c.cost.bits / 8 for c in offers if c.error <= SMALL_ERROR]
            row += [f"{weight.numel() * weight.element_size():,}", f"{min(harmless):,.0f}"]
        rows.append(row)
    print_table(head, rows, left=3)
    show_spans(sites, stats, candidates)
    families = f"{len(sites.families)} families, " if sites.families else ""
    say(f"\n{network.name}: {len(sites.layers)} layers, {len(sites.chains)} chains, "
        f"{families}{len(sites.rest)} other tensors (kept exactly)")  # fmt: skip
    if not sites.traced:
        say("its data flow could not be traced; layers are found by hooks, chains are not")
    say("rank: directions that hold 90 % of the weight's energy, of all it has")
    for refusal in sites.refusals:
        say(f"refused: {refusal.where}: {refusal.what}: {refusal.why}")
    for name, method, why in _refused_spans(sites):
        say(f"refused: {name}: {method}: {why}")


def show_spans(
    sites: Sites, stats: Stats | None = None, candidates: Candidates | None = None
) -> None:
    """Print the chains and families there are, and the parts of them that methods could take."""
    from lamina.plan.alternatives import held
    from lamina.plan.spans import find_spans

    taken = {span.site.name: span for span in find_spans(sites)}
    whole = {site.name: site for site in (*sites.chains, *sites.families)}
    order = {site.name: i for i, site in enumerate(sites.layers)}
    every = whole | {name: span.site for name, span in taken.items()}
    timed = bool(candidates and stats and stats.samples)
    rows = []
    for name, site in sorted(every.items(), key=lambda item: order[item[1].members[0]]):
        methods = " ".join(m.name for m in taken[name].methods) if name in taken else ""
        row = [name, site.kind, methods, held(site).partition(" of ")[2]]
        if timed and candidates:
            harmless = [c.cost.bits / 8 for c in candidates.get(name, ()) if c.error <= SMALL_ERROR]
            row += [f"{min(harmless):,.0f}" if harmless else ""]
        rows.append(row)
    if rows:
        say("")
        head = ["span", "kind", "methods", "holds"] + (["at " + f"{SMALL_ERROR} nats"] * timed)
        print_table(head, rows, left=4)


def _refused_spans(sites: Sites) -> list[tuple[str, str, str]]:
    from lamina.plan.spans import span_refusals

    return list(dict.fromkeys(span_refusals(sites)))


def hints(site: Site, weight: Tensor) -> tuple[str, str]:
    """Return the share of exact zeros, and how many singular values hold 90 % of the energy.

    Example:
        >>> import torch
        >>> from lamina.network.sites import Site
        >>> hints(Site("fc", shape=(4, 4)), torch.diag(torch.tensor([9.0, 1.0, 0.0, 0.0])))
        ('88%', '1/4')
    """
    import torch

    from lamina.network.sites import as_matrix

    if not weight.numel():
        return "", ""
    zeros = f"{100 * float((weight == 0).double().mean()):.0f}%"
    if weight.dim() < 2 or not weight.is_floating_point():
        return zeros, ""
    matrices = as_matrix(site, weight.detach()).float().cpu()
    if min(matrices.shape[-2:]) > WIDEST:
        return zeros, ""
    energy = torch.linalg.svdvals(matrices).square().cumsum(-1)
    ranks = (energy < 0.9 * energy[:, -1:]).sum(-1) + 1
    return zeros, f"{float(ranks.double().mean()):.0f}/{energy.shape[-1]}"


def show_package(path: str, package: Package) -> None:
    """Print what a `.lamina` file holds and what each part takes, without building its network."""
    rows = []
    for part, size in package.ledger.items():
        record = package.records.get(part)
        row = ["", "", "", f"{size:,}", "", f"{100 * size / package.size:.1f}%"]
        if record is not None:
            row[:3] = ["x".join(map(str, record.shape)) or "scalar", record.form, record.codec]
            row[4] = f"{8 * size / record.elements:.3f}" if record.elements else ""
        rows.append([part, *row])
    weights = sum(record.elements for record in package.records.values())
    bits = f"{8 * package.size / weights:.3f}" if weights else ""
    total = ["total", "", "", "", f"{package.size:,}", bits, "100.0%"]
    head = ["tensor", "shape", "form", "codec", "bytes", "bits/weight", "share"]
    print_table(head, [*rows, total], left=4)
    say(f"\n{path}: skeleton {package.skeleton}, written by lamina {package.by}")
    if package.box:
        say(f"equal to what it was made of for inputs in {package.box}")
    for edit in package.edits:
        inside = ", ".join(f"{k}={v}" for k, v in edit.settings.items())
        say(f"edit: {edit.path} -> {edit.form}({inside})")
    for site, chain in package.plan.items():
        say(f"plan: {site}: {chain}")


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

    if not model.endswith(".lamina"):
        return model
    kind, _, name = artifact.read(model).skeleton.partition(":")
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
