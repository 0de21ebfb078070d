"""The stages of the way, each from what the user gave and what the earlier stages made."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lamina import artifact
from lamina.data import Data, inputs_of, labels_of
from lamina.measure.calibrate import calibrate
from lamina.measure.clock import Timer, check_timed, inputs_key, machine_key
from lamina.measure.latency import LatencyTable, measure_table, structure_key
from lamina.measure.memory import give_back
from lamina.measure.quality import evaluate, metric_named
from lamina.measure.span_latency import measure_spans
from lamina.measure.spectra import cached
from lamina.measure.stats import Cost, Stats
from lamina.measure.store import load_stats, save_stats
from lamina.methods.base import spanning
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.plan import Budget, Candidates, Edited, Plan, apply, plan, propose
from lamina.plan.chains import dump_candidates, parse_candidates
from lamina.plan.costs import fixed_cost, original_cost
from lamina.plan.rewrite import Rewritten
from lamina.plan.seconds import span_structures, structures_of, with_seconds
from lamina.run import RunFolder, key_of
from lamina.train import Recovered, Recovery, recalibrate_if_closer, recover
from lamina.train.checkpoint import read_checkpoint, write_checkpoint

SMALL_ERROR = 1e-4  # [nats per sample] below this "auto" does not train
Watch = Callable[[str, int, int, str], None]  # stage, done, total, text


@dataclass
class Way:
    """One run: what was given, and what each stage has made so far."""

    network: Network
    data: Data | None
    budget: Budget
    methods: tuple[str, ...] | None = None
    recovery: Recovery | None = None
    auto: bool = True
    metric: Any = "accuracy"
    samples: int = 1000
    seed: int = 0
    folder: RunFolder | None = None
    watch: Watch | None = None
    threads: int = 1  # of torch while latency is measured
    timer: Timer | None = None
    rewritten: Rewritten | None = None  # what the plan begins with, where that is another network
    structure: Any = None  # the proof log of a lossless structure, where one was looked for
    share: float = 1.0  # of the time of the network as given that the rewritten one takes
    table: LatencyTable | None = None  # of `base`, where a latency is asked for
    costs: tuple[Cost, Cost] | None = None  # of the original, and of what no choice can change
    seconds: float | None = None  # what a plan may be predicted to take, so that it really fits
    rounds: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def base(self) -> Network:
        """The network that sites, statistics, candidates and decisions are of."""
        return self.rewritten.network if self.rewritten else self.network

    @property
    def rewriting(self) -> tuple[str, ...]:
        """How `base` is rewritten; empty where it is the network as given."""
        return self.rewritten.names if self.rewritten else ()

    @property
    def whole(self) -> float:
        """What one forward pass of the network as given takes [s]; 0 where it was not timed."""
        return self.table.whole / self.share if self.table else 0.0

    def say(self, stage: str) -> Callable[..., None]:
        """Return a progress callback for a stage; the last argument may be left out."""

        def tell(*parts: Any) -> None:
            if self.watch:
                numbers = [p for p in parts if isinstance(p, int)]
                words = [p for p in parts if isinstance(p, str)]
                self.watch(stage, numbers[0], numbers[1], words[-1] if words else "")

        return tell

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, Any]]:
        """Time a stage, tell the watcher of its beginning and end, and note if it was cached."""
        note: dict[str, Any] = {"name": stage, "cached": False}
        if self.watch:
            self.watch(stage, 0, 0, "")
        start = time.perf_counter()
        yield note
        give_back()
        note["seconds"] = round(time.perf_counter() - start, 3)
        self.stages.append(note)
        if self.watch:
            self.watch(stage, 1, 1, "done before" if note["cached"] else "")

    def stored(
        self, name: str, key: str, suffix: str, make: Callable[[], bytes], note: dict[str, Any]
    ) -> bytes:
        """Return a stage's bytes from the run folder, or make and write them."""
        if self.folder is None:
            return make()
        path = self.folder.stage(name, key, suffix)
        found = self.folder.read(path)
        if found is not None:
            note["cached"] = True
            return found
        made = make()
        self.folder.write(path, made)
        return made


def measured(way: Way, sites: Sites) -> Stats:
    """Return the statistics, from the run folder where they are there."""
    loader = way.data.calibration if way.data else None
    if loader is None:
        return Stats(network=way.base.digest(), notes=("data-free",))
    with way.timed("measure") as note:
        cross = way.methods is None or any(name in spanning() for name in way.methods)
        asked = way.base.digest(), data_key(way.data), way.samples, way.seed, way.base.loss
        key = key_of("stats", *asked, *(() if cross else ("no cross",)))

        path = way.folder.stage("stats", key, ".safetensors") if way.folder else None
        if path is not None and path.exists():
            note["cached"] = True
            return load_stats(path)
        stats = calibrate(
            way.base, sites, way.data, samples=way.samples, seed=way.seed, cross=cross,
            progress=way.say("measure"),
        )  # fmt: skip
        if way.folder is not None and path is not None:
            way.folder.write(path, partial(save_stats, stats))
        return stats


def data_key(data: Data | None) -> str:
    """Return a hash of what calibration sees."""
    sha = hashlib.sha256()
    for batch in (data.calibration if data else None) or ():
        args, kwargs = inputs_of(batch)
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, torch.Tensor):
                flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                sha.update(f"{tuple(tensor.shape)}".encode() + flat.numpy().tobytes())
    return sha.hexdigest()[:16]


def offered(way: Way, sites: Sites, stats: Stats) -> Candidates:
    """Return the candidates, from the run folder where they are there."""
    with way.timed("propose") as note:
        # Where bytes are not limited, what only changes how values are stored has nothing to offer.
        count = way.budget.size is not None or way.budget.max_drop is not None
        asked = stats.network, data_key(way.data), stats.samples, way.seed, way.methods, count
        seconds = way.budget.latency is not None
        key = key_of("offers", *asked, *(("seconds",) if seconds else ()))

        def make() -> bytes:
            tell = way.say("propose")
            with cached(way.folder.path / "spectra" if way.folder else None):
                offers = propose(
                    way.base, sites, stats, way.methods, tell, bytes_count=count,
                    seconds_count=seconds,
                )  # fmt: skip
                return dump_candidates(offers)

        found = parse_candidates(way.stored("candidates", key, ".json", make, note))
    return found if way.budget.latency is None else clocked(way, sites, found)


def clocked(way: Way, sites: Sites, candidates: Candidates) -> Candidates:
    """Measure what the candidates' structures take, and return those that save time, or keep it.

    Raises:
        BudgetError: there are no example inputs, or the network does not take them.
    """
    check_timed(way.network)
    with way.timed("time") as note:
        given = structures_of(way.base, sites, candidates)
        spans = span_structures(way.base, sites, candidates)
        keys = {n: [path, [structure_key(path, s) for s in g]] for n, (path, g) in given.items()}
        over = {name: [like, list(g)] for name, (like, g) in spans.items()}
        key = key_of("latency", *clock_key(way), keys, *([over] if over else []))

        def make() -> bytes:
            options: dict[str, Any] = {
                "threads": way.threads, "timer": way.timer, "progress": way.say("time"),
                "last": way.rewritten.last if way.rewritten else (),
            }  # fmt: skip
            members = {name: sites[name].members for name in spans}
            inside = [sites[m] for m in dict.fromkeys(m for ms in members.values() for m in ms)]
            alone = {site.name: (site.module, ()) for site in inside}
            table = measure_table(way.base, {**alone, **given}, **options)
            if spans:
                found, missed = measure_spans(
                    way.base, spans, members, whole=table.whole, **options
                )
                table = replace(table, spans=found, missed=table.missed + missed)
            return table.dump()

        way.table = LatencyTable.parse(way.stored("latency", key, ".json", make, note))
        way.costs = None
        kept, dropped = with_seconds(way.base, sites, candidates, way.table)
        count = sum(len(g) for _, g in (*given.values(), *spans.values()))
        places = f"{len(given)} layers" + (f" and {len(spans)} spans of layers" if spans else "")
        way.notes.append(
            f"Latency: {count} structures for {places} were timed at the example inputs "
            f"({way.threads} thread{'s' * (way.threads > 1)}); {dropped} are not faster than the "
            f"layer they replace and were dropped, {way.table.missed} of them untimed."
        )
    return kept


def clock_key(way: Way) -> list[Any]:
    """Return what a measured time depends on, whatever is measured."""
    network = way.network
    shape = key_of(repr(network.module), inputs_key(network))
    return [network.digest(), shape, *machine_key(way.threads), *way.rewriting]


def solved(
    way: Way, sites: Sites, stats: Stats, candidates: Candidates, budget: Budget
) -> Plan:  # fmt: skip
    """Make the plan of least predicted error for one budget; what cannot change is counted once."""
    if way.costs is None:
        edits = (*way.rewritten.edits, *way.rewritten.last) if way.rewritten else ()
        original, fixed = original_cost(way.network, sites), fixed_cost(way.base, sites, edits)
        if way.table is not None:
            original = replace(original, seconds=way.whole)
            fixed = replace(fixed, seconds=way.table.fixed)
        way.costs = original, fixed
    original, fixed = way.costs
    found = plan(way.network, sites, stats, candidates, budget, original=original, fixed=fixed)
    return replace(found, rewrite=way.rewriting)


def noted(
    way: Way, why: str, asked: str, made: Plan, found: dict[str, float]
) -> dict[str, Any]:  # fmt: skip
    """Add a round of a loop to the report, and return its row; `kept` is false until it is set."""
    predicted = {"bytes": made.predicted.bits / 8, "error": made.error}
    if way.table is not None:
        predicted["seconds"] = made.predicted.seconds
    row: dict[str, Any] = {
        "round": len(way.rounds) + 1, "why": why, "asked": asked, "predicted": predicted,
        "measured": found, "kept": False, "note": "",
    }  # fmt: skip
    way.rounds.append(row)
    return row


def metric_of(way: Way) -> Any:
    """Return the user's metric, or the natural one: accuracy with labels, else agreement.

    Language models are judged by their perplexity, embeddings by their cosine with the original's.
    """
    if way.metric != "auto":
        return way.metric
    if way.network.loss == "embedding":
        return "embedding"
    loader = (way.data.validation or way.data.calibration) if way.data else None
    for batch in loader or ():
        labels = labels_of(batch)
        if labels is not None and not labels.is_floating_point() and way.network.loss != "features":
            return "perplexity" if way.network.task == "causal" else "accuracy"
        break
    return "agreement"


def check_metric(way: Way) -> None:
    """Measure a metric the user asked for once, before the work whose result it will judge.

    Raises:
        DataError: it is not a number, or does not fit the data.
    """
    if way.metric != "auto" and way.data is not None and way.data.validation is not None:
        original = way.network
        evaluate(original.module, way.data.validation, way.metric, original=original)


def applied(way: Way, chosen: Plan, sites: Sites, stats: Stats) -> Edited:
    """Apply a plan, and re-estimate BatchNorm moments where that brings outputs nearer."""
    edited = apply(
        way.network, chosen, sites, stats, progress=way.say("apply"), rewritten=way.rewritten
    )
    if way.data and way.data.calibration is not None and edited.edits:
        recalibrate_if_closer(way.network, edited.network.module, way.data.calibration)
    return edited


def size_limit(way: Way, chosen: Plan) -> float | None:
    """Return the budget's limit on the file [bytes], or None."""
    if way.budget.size is None:
        return None
    whole = {"bytes": chosen.original.bits / 8, "macs": chosen.original.macs,
             "params": chosen.original.params, "seconds": 1.0}  # fmt: skip
    return way.budget.resolve(whole)["bytes"]


def recovered_or_none(
    way: Way, chosen: Plan, edited: Edited, limit: float | None
) -> Recovered | None:
    """Train, unless there is no need, no data, or no wish to."""
    if way.recovery is None or way.data is None or way.data.train is None:
        return None
    fits = limit is None or chosen.predicted.bits / 8 <= limit
    if way.auto and fits and chosen.error < SMALL_ERROR and chosen.objective == "sum":
        return None
    with way.timed("recover") as note:
        key = key_of("recover", chosen.dict(), vars(way.recovery), data_key(way.data), way.seed)
        checkpoint = way.folder.stage("recover", key, ".pt") if way.folder else None
        done = way.folder.stage("recovered", key, ".pt") if way.folder else None
        resumed = read_checkpoint(done) if done else None
        note["cached"] = resumed is not None
        result = recover(
            way.network, edited, way.data, way.recovery, limit=limit, macs=chosen.original.macs,
            chains=chains_of(chosen),
            checkpoint=done if resumed else checkpoint, progress=way.say("recover"),
        )  # fmt: skip
        if done and not resumed:
            write_checkpoint(done, result.state)
        return result


def chains_of(chosen: Plan) -> dict[str, str]:
    """Return what the file says of the plan: the methods of each site, in order."""
    return {
        name: " ".join(dict.fromkeys(step.method for step in decision.steps))
        for name, decision in chosen.sites.items()
    }


def packed(edited: Edited, chosen: Plan) -> bytes:
    """Return the file of an edited network."""
    network = edited.network
    edits = (*network.edits, *edited.edits)
    return artifact.pack(network.module, edits, network.source, chains_of(chosen), network.box)


def keeps_applied(
    way: Way, chosen: Plan, edited: Edited, recovered: Recovered, limit: float | None
) -> bool:
    """Whether the network before training keeps to the budget and is better on validation data."""
    if way.data is None or way.data.validation is None:
        return False
    if limit is not None and len(packed(edited, chosen)) > limit:
        return False
    metric = metric_named(metric_of(way))
    before, after = (
        evaluate(e.model, way.data.validation, metric, original=way.network)
        for e in (edited, recovered.edited)
    )
    if metric.drop(before, after) <= 0:
        return False
    way.notes.append(
        f"Training was thrown away: on validation data it gave {after:.2f}, "
        f"and the plan as applied, which fits as well, {before:.2f} ({metric.name})."
    )
    return True
