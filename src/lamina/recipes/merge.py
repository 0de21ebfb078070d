"""layer-merge: fewer and larger convolutions, chosen by measured time, trained apart, then merged.

**What.** Convolutions that follow each other become one where the activations between them go, and
some of them are dropped so that the merged kernel stays small. Tables say what every span takes on
this machine as one convolution of each kernel size, and what it costs; dynamic programming picks
the spans of least cost within a time. The network is trained with the layers still apart, taught by
the original, and merged at the end. Where a module is a whole residual block, its skip goes into
the kernel and the block becomes one convolution.

**Where it departs from the paper.** A span starts from the least squares fit of its one kernel to
what the span did on calibration data (`start="fit"`), not from the product of its kernels
(`"product"`): the network is then nearly what it was before any training, and smaller kernels can
be had than those that dropping layers leads to. What a span costs is the divergence of the outputs
with this span alone changed (`importance="proxy"`), or that after a short training (`"trained"`);
costs are nats that are added up, where the paper multiplies exp(accuracy). Times are rounded, not
truncated, the whole network is timed, and the choice made again until it is as fast as was asked.
The network is compared with itself after what makes it faster for nothing (BatchNorm folded,
weights in the order of the hardware). Where a span ends without an activation, it gets one that
begins as the identity and is learned (`ends="same"`: the paper's rule).

**Reference.** Kim, El Halabi, Ji, Song, "LayerMerge: Neural Network Depth Compression through Layer
Pruning and Merging", ICML 2024, arXiv:2406.12837.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from lamina.errors import DataError, InfeasibleError, MethodError
from lamina.forms import Edit, Plain
from lamina.measure.clock import check_timed
from lamina.measure.latency import measure_ratio
from lamina.measure.stats import Stats
from lamina.methods.layer_merge.merging import Conv
from lamina.methods.layer_merge.search import Entry, solve
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.plan.apply import Edited
from lamina.plan.rewrite import Rewritten, find_folds, orders, rewrite
from lamina.recipes.fitting import fit, fits
from lamina.recipes.followed import Followed
from lamina.recipes.merge_plan import merge_plan
from lamina.recipes.merge_tables import (
    Option,
    Score,
    distance,
    judged,
    options_of,
    timed,
    trained_distance,
    worth,
)
from lamina.recipes.retraining import check_data
from lamina.recipes.runs import Run, find_runs
from lamina.recipes.settings import check_training, is_number
from lamina.recipes.unmerged import Change, blank, merge_network, unmerge
from lamina.stages import Way
from lamina.train import Recovery, recover

IMPORTANCE, STARTS, OPTIMIZERS = ("proxy", "trained"), ("fit", "product"), ("adam", "sgd")
ENDS = ("learned", "same", "none")
ROUNDS = 4  # of timing the whole network, and choosing again
SLOW = 1.01  # of a time: what is a hair slower than asked is asked again, unless rounds are over
FAST = 0.97  # of a time: what is faster than this is faster than was asked
TOLERANCE = 1.03  # of a time that counts as met
SECONDS = 8.0  # that timing the whole network may take, about


@dataclass(frozen=True)
class LayerMerge:
    """Settings of the recipe.

    Args:
        speedup: how much faster the network shall be, one forward pass on its example inputs; over
            the network as `rewrite` leaves it. A budget on `latency` goes before it, and is of the
            network as given.
        importance: `"proxy"` or `"trained"`, see above.
        start: `"fit"` or `"product"`, see above.
        ends: with what a merged span ends where the network had no activation: `"learned"`: a slope
            below zero for every channel, which begins at 1, as nothing; `"same"`: the last
            activation inside it, as in the paper; `"none"`.
        rewrite: fold BatchNorms and order weights, before the comparison and in the result.
        samples: of calibration data that fits and proxies see.
        trial: of every entry of the table, where importance is `"trained"` [passes over the data].
        precision: one step of time in the choice [s]; None: a thousandth of what there is.
        epochs: of training [passes over the training data]; 0: none.
        lr: its peak learning rate; None: as `Recovery` has it.
        optimizer: `"adam"` or `"sgd"`.
        distill: weight of the original's outputs against the labels, 0..1.
        half: compute in bfloat16 where that is safe.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> LayerMerge(speedup=2.0, epochs=0).start
        'fit'
    """

    name: ClassVar[str] = "layer-merge"
    speedup: float = 1.5
    importance: str = "proxy"
    start: str = "fit"
    ends: str = "learned"
    rewrite: bool = True
    samples: int = 512
    trial: float = 1.0
    precision: float | None = None
    epochs: float = 8.0
    lr: float | None = None
    optimizer: str = "adam"
    distill: float = 0.9
    half: bool = False

    def __post_init__(self) -> None:
        if not is_number(self.speedup) or self.speedup < 1:
            raise MethodError("a speed-up is 1 or more", f"speedup={self.speedup!r}")
        for name, word, known in (
            ("importance", self.importance, IMPORTANCE),
            ("start", self.start, STARTS),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("ends", self.ends, ENDS),
        ):
            if word not in known:
                raise MethodError(
                    f"unknown {name}", repr(word), "", f"choose from {', '.join(known)}"
                )
        check_training(self.epochs, 1.0 if self.lr is None else self.lr)
        check_training(self.trial, 1.0)
        if self.precision is not None and not (is_number(self.precision) and self.precision > 0):
            raise MethodError("a precision is over 0", f"precision={self.precision!r}")
        if not is_number(self.distill) or not 0 <= self.distill <= 1:
            raise MethodError("distill is between 0 and 1", f"distill={self.distill!r}")
        if self.importance == "trained" and not self.trial:
            raise MethodError("importances are trained for a while", f"trial={self.trial!r}")

    @property
    def trains(self) -> bool:
        """Whether the recipe needs training data."""
        return self.epochs > 0 or self.importance == "trained"

    def follow(self, way: Way, sites: Sites, stats: Stats) -> Followed:
        """Carry out the recipe.

        Args:
            way: the network, its data and the seed.
            sites: of the network.
            stats: not needed; the plan says whether there are any.

        Raises:
            DataError: there is no data for what was asked.
            BudgetError: there are no example inputs to time.
            MethodError: there is nothing to merge.
            InfeasibleError: no choice is fast enough; `nearest` holds the fastest [s].
        """
        check_timed(way.network)
        data = check_data(way.data, self.name) if self.trains else way.data
        if data is None or data.calibration is None:
            why = "it measures what merging does to the outputs"
            raise DataError("the recipe layer-merge needs calibration data", way.network.name, why)
        runs, refused = find_runs(way.network, sites)
        options = options_of(way.network, runs, self.ends, self.start == "fit")
        if all(o.change is None for o in options):
            why = refused[0].why if refused else "no two convolutions follow each other"
            raise MethodError("layer-merge finds nothing to merge", way.network.name, why)
        with way.timed("time"):
            base = self._base(way.network)
            options, whole = timed(
                base.network, runs, options, threads=way.threads, timer=way.timer
            )
            options = worth(runs, options)
            limit = self._limit(way, base, whole)
        with way.timed("judge"):
            options = judged(
                way.network, options, self._score(way, data), data.calibration, self.samples,
                fitted=self.start == "fit", progress=way.say("judge"),
            )  # fmt: skip
        with way.timed("choose"):
            chosen = self._choose(way, base, runs, options, whole, limit)
            changes = [o.change for o in chosen.options if o.change is not None]
            starts = self._starts(way, changes, data.calibration)
            apart = unmerge(way.network, changes, starts)
            applied = self._merged(way.network, apart, changes)
        plan = merge_plan(way.network, sites, stats, way.budget, chosen.options, applied)
        final, history = applied, ()
        if self.epochs:
            with way.timed("recover"):
                result = recover(
                    way.network, Edited(apart, ()), data, self.recovery(way.seed),
                    macs=plan.original.macs, progress=way.say("recover"),
                )  # fmt: skip
            history = result.history  # type: ignore[assignment]
            final = self._merged(way.network, result.edited.network, changes)
        settings = {"recipe": self.name, **asdict(self)}
        return Followed(plan, final, history, settings, tuple(chosen.notes(changes)), applied)

    def recovery(self, seed: int, epochs: float | None = None) -> Recovery:
        """Return the settings of the training."""
        return Recovery(
            epochs=epochs or self.epochs, optimizer=self.optimizer, lr=self.lr,
            distill=self.distill, rate=False, half=self.half, seed=seed,
        )  # fmt: skip

    def _base(self, network: Network) -> Rewritten:
        return rewritten(network) if self.rewrite else Rewritten(network)

    def _limit(self, way: Way, base: Rewritten, whole: float) -> float:
        """Return what the merged network may take [s]."""
        if way.budget.latency is None:
            return whole / self.speedup
        ratio = measure_ratio(
            way.network, base.network.module, threads=way.threads, seconds=SECONDS, timer=way.timer
        )[0]
        only = replace(way.budget, size=None, macs=None, params=None, max_drop=None)
        return only.resolve({"seconds": whole / ratio})["seconds"]

    def _score(self, way: Way, data: Any) -> Score:
        score = distance(way.network, data.calibration, self.samples)
        if self.importance == "proxy":
            return score
        return trained_distance(way.network, data, self.recovery(way.seed, self.trial), score)

    def _choose(
        self, way: Way, base: Rewritten, runs: Sequence[Run], options: Sequence[Option],
        whole: float, limit: float,
    ) -> Chosen:  # fmt: skip
        """Choose within a time, time the whole network, and choose again where it is not met."""
        keep = math.fsum(o.seconds for o in options if o.change is None)
        # Layers timed apart may add up to more than the whole, in which they overlap.
        scale = min(1.0, whole / max(keep, 1e-12))
        options = [replace(o, seconds=scale * o.seconds) for o in options]
        fixed = whole - scale * keep
        starts, layers = [], 0
        for run in runs:
            starts.append(layers)
            layers += len(run.links)
        entries = [
            Entry(starts[o.run] + o.first, starts[o.run] + o.last, o.seconds, o.error, o)
            for o in options
        ]
        wanted = limit
        tried: list[Chosen] = []
        for _ in range(ROUNDS):
            try:
                found = solve(layers, entries, wanted - fixed, self.precision)
            except InfeasibleError as error:
                fastest = error.nearest["seconds"] + fixed
                if tried:
                    break
                raise _too_slow(fastest, limit, whole) from None
            picked = tuple(e.what for e in found.entries)
            if any(t.options == picked for t in tried):
                break
            seconds = self._measured(way, base, picked, whole)
            tried.append(Chosen(picked, found.seconds + fixed, seconds, whole, found.error))
            if FAST * limit <= seconds <= SLOW * limit:
                break
            if seconds <= limit and not found.error:
                break  # nothing was asked of it
            # What was saved over what was to be saved, by the tables.
            share = (whole - seconds) / max(whole - tried[-1].predicted, 1e-12)
            wanted = whole - (whole - 0.995 * limit) / max(share, 0.1)
        fit_in = [t for t in tried if t.seconds <= SLOW * limit]
        fit_in = fit_in or [t for t in tried if t.seconds <= TOLERANCE * limit]
        if not fit_in:
            raise _too_slow(min(t.seconds for t in tried), limit, whole)
        return min(fit_in, key=lambda t: (t.error, t.seconds))

    def _measured(self, way: Way, base: Rewritten, picked: Sequence[Option], whole: float) -> float:
        """Return what the whole network takes with some options, in turn with the original [s]."""
        changes = [o.change for o in picked if o.change is not None]
        if not changes:
            return whole
        values = {i: blank(change) for i, change in enumerate(changes) if change.kept}
        made = self._merged(way.network, unmerge(way.network, changes, values), changes)
        ratio = measure_ratio(
            base.network, made.model, threads=way.threads, seconds=SECONDS, timer=way.timer
        )[0]
        return ratio * whole

    def _starts(
        self, way: Way, changes: Sequence[Change], loader: Any
    ) -> dict[int, tuple[Conv, Any, Any]]:
        """Fit one change after the other, each behind those before it."""
        found: dict[int, tuple[Conv, Any, Any]] = {}
        if self.start != "fit":
            return found
        for i, change in enumerate(changes):
            if fits(change):
                given = unmerge(way.network, changes[:i], found)
                found[i] = fit(way.network, given, change, loader, self.samples)
        return found

    def _merged(self, network: Network, apart: Network, changes: Sequence[Change]) -> Edited:
        """Return the merged network and the edits that make it from the original."""
        merged, edits = merge_network(network, apart, changes)
        structure = [e for e in edits if e.form != "values"]
        last: tuple[Edit, ...] = ()
        if self.rewrite:
            made = rewritten(merged)
            merged, last = made.network, made.last
            structure += made.edits
        values = [
            Edit(name, "values", values=Plain(p.detach().cpu().clone()))
            for name, p in merged.module.named_parameters()
        ]
        return Edited(merged, (*structure, *values, *last))


@dataclass(frozen=True)
class Chosen:
    """A choice of options, with its predicted and measured time [s], and its predicted error."""

    options: tuple[Option, ...]
    predicted: float
    seconds: float
    whole: float
    error: float

    def notes(self, changes: Sequence[Change]) -> list[str]:
        """Return what a reader should know."""
        return [
            f"Measured before training: {self.whole / self.seconds:.2f}x as fast "
            f"({1000 * self.seconds:.3g} ms; {1000 * self.predicted:.3g} ms by the tables).",
            f"Merged: {'; '.join(map(str, changes)) or 'nothing'}.",
            "The plan keeps every value: what was merged is in the file, and is not carried out "
            "again by applying the plan.",
        ]


def rewritten(network: Network) -> Rewritten:
    """Return a network with BatchNorms folded and weights ordered, as far as it has any."""
    folds = find_folds(network)
    names = [n for n, can in (("fold", folds), ("channels_last", orders(network.module))) if can]
    return rewrite(network, names, folds) if names else Rewritten(network)


def _too_slow(fastest: float, limit: float, whole: float) -> InfeasibleError:
    return InfeasibleError(
        "no plan fits the budget", f"{1000 * limit:.4g} ms",
        f"the fastest choice takes {1000 * fastest:.4g} ms of {1000 * whole:.4g} ms",
        f"ask for a speed-up of {math.floor(100 * whole / fastest) / 100:.2f} at most",
        {"seconds": fastest},
    )  # fmt: skip
