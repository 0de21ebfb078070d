"""The tables of LayerMerge: what may become of every span, what that takes, and what it costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lamina.data import Data
from lamina.forms import install
from lamina.forms.merged import LEARNED, build_merged, made_of
from lamina.measure.clock import Job, Timer, clock, record_calls, whole_call
from lamina.measure.forward import at_rest, batches, call
from lamina.methods.layer_merge import form_of
from lamina.methods.layer_merge.merging import Conv
from lamina.methods.layer_merge.search import Layer, best_subsets
from lamina.network.source import Network
from lamina.plan.apply import Edited
from lamina.plan.rewrite import LAYOUT
from lamina.recipes.fitting import fit_all, fits
from lamina.recipes.runs import Run
from lamina.recipes.unmerged import Change, link_conv, unmerge
from lamina.train import Recovery, recover
from lamina.train.distill import distillation_loss

CHUNK = 8  # jobs that share a round with the whole network, so that they are near it in time


@dataclass(frozen=True)
class Option:
    """What may become of links first..last - 1 of one run.

    Args:
        run: position of the run.
        first, last: the span.
        change: what it becomes; None: it stays.
        seconds: what it takes then [s].
        error: predicted increase of the loss, alone [nats per sample].
    """

    run: int
    first: int
    last: int
    change: Change | None = None
    seconds: float = 0.0
    error: float = 0.0


def options_of(
    network: Network, runs: Sequence[Run], ends: str = "same", middles: bool = False
) -> list[Option]:
    """Return every option of every span: of each kernel size the subset of largest L1 norm.

    A span is offered where what lies inside it can be taken out: activations that are modules of
    their own, or all of a run whose block can be replaced as a whole.

    Args:
        network: the original.
        runs: from `find_runs`.
        ends: with what a span of several layers ends where the network had no activation there:
            `"none"`, `"same"`: that of the last one inside, or `"learned"`.
        middles: offer the middle of each merged kernel too, which only a fit can begin with.
    """
    found: list[Option] = []
    for number, run in enumerate(runs):
        layers = [
            Layer(
                link.site.kernel, link.site.stride, link.site.groups,
                float(link_conv(network.module, link).weight.abs().sum()), link.reducible,
            )
            for link in run.links
        ]  # fmt: skip
        for first in range(len(run.links)):
            for last in range(first + 1, len(run.links) + 1):
                if last == first + 1:
                    found.append(Option(number, first, last))
                found += [
                    Option(number, first, last, change)
                    for change in _changes(run, first, last, layers, ends, middles)
                ]
    return found


def _changes(
    run: Run, first: int, last: int, layers: Sequence[Layer], ends: str, middles: bool
) -> Iterator[Change]:
    links = run.links[first:last]
    all_of_it = first == 0 and last == len(run.links)
    apart = all(link.through or not link.act for link in links[:-1])
    whole = all_of_it and bool(run.block) and (run.skip or not apart)
    if not apart and not whole:
        return
    if all_of_it and run.skip and run.idle:
        yield Change(run, first, last, (), 0, True)
    seen: set[tuple[int, ...]] = set()
    for subset in best_subsets(layers[first:last]):
        kept = tuple(first + i for i in subset.kept)
        if len(kept) == last - first == 1 and not whole:
            continue  # it stays
        if not kept and whole:
            continue  # a skip round nothing would double the input
        change = Change(run, first, last, kept, _ending(run, first, last, whole, ends), whole)
        seen.add(change.kernel)
        yield change
        if not middles or not fits(change):
            continue
        for taps in range(max(change.kernel) - 2, 0, -2):
            small = replace(change, middle=taps)
            if small.kernel not in seen and min(small.outline.padding) >= 0:
                seen.add(small.kernel)
                yield small


def _ending(run: Run, first: int, last: int, whole: bool, ends: str) -> int:
    """Return the activation that a merged convolution brings along."""
    if whole and run.ends:
        return run.ends
    links = run.links[first:last]
    follows = links[-1].act or (run.after if last == len(run.links) else 0)
    inner = [link.act for link in links[:-1] if link.act]
    if not inner or follows or ends == "none":
        return 0
    return LEARNED if ends == "learned" else inner[-1]


# --- time ----------------------------------------------------------------------------------------


def timed(
    base: Network,
    runs: Sequence[Run],
    options: Sequence[Option],
    *,
    threads: int = 1,
    seconds: float = 30.0,
    timer: Timer | None = None,
) -> tuple[list[Option], float]:
    """Measure what every option takes at the inputs that the layers really see.

    Options of equal geometry are measured once, all in turn with the whole network.

    Args:
        base: the network in the form that it will run in (see `plan.rewrite`), whose example
            inputs say the batch.
        runs, options: of the original.
        threads, seconds, timer: as for a latency table.

    Returns:
        the options with their seconds, and the time of `base` [s].
    """
    paths = sorted({link.site.module for run in runs for link in run.links})
    calls = record_calls(base, paths)
    ordered = any(
        p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)
        and not p.is_contiguous()
        for p in base.module.parameters()
    )  # fmt: skip
    jobs: dict[str, Job] = {}
    keys: list[str] = []
    for option in options:
        run = runs[option.run]
        made = piece(base, run, option)
        if ordered:
            install(made, (LAYOUT,))
        called = tuple(calls[run.links[option.first].site.module])
        key = repr((made, called))
        jobs.setdefault(key, Job(made, called))
        keys.append(key)
    whole = Job(base.module, (whole_call(base),))
    found: dict[str, float] = {}
    wholes: list[float] = []
    names = [key for key, job in jobs.items() if job.calls]
    for start in range(0, len(names), CHUNK):
        part = names[start : start + CHUNK]
        share = seconds * len(part) / len(names)
        rows = (timer or clock)([whole, *(jobs[key] for key in part)], threads, share)
        wholes += [row[0] for row in rows]
        for i, key in enumerate(part):
            found[key] = median(row[i + 1] / row[0] for row in rows)
    took = median(wholes) if wholes else 0.0
    return [
        replace(option, seconds=took * found.get(key, 0.0))
        for option, key in zip(options, keys, strict=True)
    ], took


class _Add(nn.Module):
    """Stands for the addition of a skip."""

    def __init__(self, act: int) -> None:
        super().__init__()
        self.act = made_of(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + x)


def piece(base: Network, run: Run, option: Option) -> nn.Module:
    """Return what an option runs as, with values of no use: what one layer's share of it takes."""
    parts: list[nn.Module] = []
    change = option.change
    links = run.links[option.first : option.last]
    if change is None:
        layer = base.module.get_submodule(links[0].site.module)
        parts.append(_like(layer))
        if links[0].norm:
            parts.append(_like(base.module.get_submodule(links[0].norm)))
        parts.append(made_of(links[0].act))
    elif change.kept:
        sites = [run.links[i].site for i in change.kept]
        form = form_of(change.outline)
        inner: Any = base.module.get_submodule(sites[0].module)
        holder = nn.Sequential(*(base.module.get_submodule(s.module) for s in sites))
        parts.append(_like(build_merged(holder, form)).to(inner.weight.dtype))
        code = change.act or (0 if change.whole else links[-1].act)
        parts.append(made_of(code, change.outline.outputs))
    else:
        parts.append(made_of(0 if change.whole else links[-1].act))
    if run.skip and option.last == len(run.links) and not (change and change.whole):
        parts.append(_Add(run.ends))
    return nn.Sequential(*(p for p in parts if not isinstance(p, nn.Identity))).eval()


def _like(layer: nn.Module) -> nn.Module:
    """Return a copy whose weights are neither zero nor tiny, as those of a real layer."""
    made = copy.deepcopy(layer)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=source) / math.sqrt(p[0].numel()))
    return made


def worth(runs: Sequence[Run], options: Sequence[Option]) -> list[Option]:
    """Return the options that are faster than the layers they replace, and those that keep them."""
    keep: dict[tuple[int, int], float] = {
        (o.run, o.first): o.seconds for o in options if o.change is None
    }
    found = []
    for option in options:
        stays = math.fsum(keep[option.run, i] for i in range(option.first, option.last))
        if option.change is None or option.seconds < stays:
            found.append(option)
    return found


# --- error ---------------------------------------------------------------------------------------

Score = Callable[[Network], float]


def judged(
    network: Network,
    options: Sequence[Option],
    score: Score,
    loader: Iterable[Any] | None,
    samples: int,
    *,
    fitted: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Option]:
    """Put into every option what the network loses when this span alone is changed.

    Args:
        network: the original.
        options: those that keep their layer lose nothing.
        score: gives the error of a changed network [nats per sample].
        loader, samples: calibration data for the fits.
        fitted: begin from least squares fits where there can be one.
    """
    starts: dict[int, tuple[Conv, Tensor, Tensor]] = {}
    if fitted and loader is not None:
        by_run: dict[int, dict[int, Change]] = {}
        for i, option in enumerate(options):
            if option.change is not None and fits(option.change):
                by_run.setdefault(option.run, {})[i] = option.change
        for changes in by_run.values():
            starts |= fit_all(network, changes, loader, samples)
    found = []
    for i, option in enumerate(options):
        if progress:
            progress(i, len(options), str(option.change or ""))
        if option.change is not None:
            given = {0: starts[i]} if i in starts else None
            error = score(unmerge(network, [option.change], given))
            option = replace(option, error=max(0.0, error))
        found.append(option)
    return found


def distance(network: Network, loader: Iterable[Any], samples: int) -> Callable[[Network], float]:
    """Return what measures how far a network's outputs are from the original's.

    For logits the Kullback-Leibler divergence [nats per sample], else the relative squared
    difference.
    """
    with at_rest(network.module), torch.no_grad():
        seen = [
            (batch, call(network.module, batch))
            for batch in batches(network.module, loader, samples)
        ]

    def score(given: Network) -> float:
        total, count = 0.0, 0
        with at_rest(given.module), torch.no_grad():
            for batch, taught in seen:
                loss = distillation_loss(
                    call(given.module, batch), taught, None, network.loss, weight=1.0,
                    temperature=1.0, mask=batch.mask,
                )  # fmt: skip
                total, count = total + batch.size * float(loss), count + batch.size
        return total / max(1, count)

    return score


def trained_distance(
    network: Network, data: Data, recovery: Recovery, score: Score
) -> Callable[[Network], float]:
    """Return what trains a changed network for a short while, and measures its distance then.

    What the same training does to the original itself is taken off, so that all entries carry the
    same bias; an entry that gains by it counts as nothing lost.
    """
    start = score(recover(network, Edited(network, ()), data, recovery).edited.network)

    def trained(given: Network) -> float:
        made = recover(network, Edited(given, ()), data, recovery).edited.network
        return max(0.0, score(made) - start)

    return trained
