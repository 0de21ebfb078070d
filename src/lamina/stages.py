"""The stages of the way, each from what the user gave and what the earlier stages made."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lamina import artifact
from lamina.data import Data, inputs_of, labels_of
from lamina.errors import BudgetError, DataError, InfeasibleError
from lamina.measure.calibrate import calibrate
from lamina.measure.quality import evaluate, metric_named
from lamina.measure.stats import Stats
from lamina.measure.store import dump_stats, parse_stats
from lamina.methods.base import Candidate
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.plan import Budget, Candidates, Edited, Plan, apply, plan, propose
from lamina.plan.chains import dump_candidates, parse_candidates
from lamina.run import RunFolder, key_of
from lamina.train import Recovered, Recovery, recalibrate, recover
from lamina.train.checkpoint import read_checkpoint, write_checkpoint

SLACK_ERROR = 5e-4  # [nats per sample] predicted error from which rate pressure starts walking
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
    stages: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
        return Stats(network=way.network.digest(), notes=("data-free",))
    with way.timed("measure") as note:
        key = key_of("stats", way.network.digest(), data_key(way.data), way.samples, way.seed)

        def make() -> bytes:
            return dump_stats(
                calibrate(
                    way.network, sites, way.data, samples=way.samples, seed=way.seed,
                    progress=way.say("measure"),
                )
            )  # fmt: skip

        return parse_stats(way.stored("stats", key, ".safetensors", make, note))


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
        key = key_of(
            "offers", stats.network, data_key(way.data), stats.samples, way.seed, way.methods
        )

        def make() -> bytes:
            return dump_candidates(
                propose(way.network, sites, stats, way.methods, way.say("propose"))
            )

        return parse_candidates(way.stored("candidates", key, ".json", make, note))


def planned(way: Way, sites: Sites, stats: Stats, candidates: Candidates) -> Plan:
    """Make the plan; where training will squeeze the file, one that still works is its start.

    A second-order prediction says nothing about a network that has lost 99 % of its bytes, and from
    such a plan training has no way back. So where rate pressure will follow, the plan is the
    smallest one that is predicted to work (`SLACK_ERROR`), and the pressure walks to the limit.
    Where bytes are all that is limited such a start holds grids only: what pruning and low rank
    would save there the pressure finds by itself, and each of them adds to the file's header.
    """
    if way.budget.max_drop is not None:
        return searched(way, sites, stats, candidates)
    if way.budget.size is None or not squeezable(way, candidates):
        return plan(way.network, sites, stats, candidates, way.budget)
    roomy = plan(way.network, sites, stats, candidates, replace(way.budget, size="100%"))
    limit = size_limit(way, roomy) or 0.0
    if limit >= smallest_working(roomy):
        return plan(way.network, sites, stats, candidates, way.budget)
    if way.budget.macs is None and way.budget.params is None:
        candidates = {name: tuple(filter(on_grid, offers)) for name, offers in candidates.items()}
        roomy = plan(way.network, sites, stats, candidates, replace(way.budget, size="100%"))
    size = max(limit, 1.02 * smallest_working(roomy))
    try:
        made = plan(way.network, sites, stats, candidates, replace(way.budget, size=size))
    except InfeasibleError:
        return plan(way.network, sites, stats, candidates, way.budget)
    return replace(made, budget=way.budget.to_json())


def smallest_working(roomy: Plan) -> float:
    """Return the smallest size on a plan's curve that is predicted to work [bytes]."""
    return min((size for size, error in roomy.curve if error <= SLACK_ERROR), default=0.0)


def on_grid(candidate: Candidate) -> bool:
    """Whether a candidate only puts a layer's values on a grid, which rate pressure can squeeze."""
    return len(candidate.steps) == 1 and candidate.steps[0].method == "rdoq"


def squeezable(way: Way, candidates: Candidates) -> bool:
    """Whether recovery with rate pressure will run, and every site can be held on a grid."""
    trains = way.recovery is not None and way.recovery.rate and way.data is not None
    if not trains or way.data is None or way.data.train is None:
        return False
    return all(any(map(on_grid, offers)) for offers in candidates.values())


def searched(way: Way, sites: Sites, stats: Stats, candidates: Candidates) -> Plan:
    """Find the smallest size whose validation metric drops by at most `max_drop` points.

    Raises:
        DataError: there is no validation data.
        InfeasibleError: the largest plan within the other limits drops by more already.
    """
    if way.data is None or way.data.validation is None:
        raise DataError("max_drop needs validation data", "data.validation", "", "give some")
    metric, validation = metric_named(metric_of(way)), way.data.validation
    before = evaluate(way.network.module, validation, metric, original=way.network)
    allowed = float(way.budget.max_drop or 0)
    size = way.budget.size if way.budget.size is not None else "100%"
    others = replace(way.budget, max_drop=None, size=size)

    def drop_of(trial: Plan) -> float:
        model = applied(way, trial, sites, stats).model
        return metric.drop(before, evaluate(model, validation, metric, original=way.network))

    best = plan(way.network, sites, stats, candidates, others)
    if (drop := drop_of(best)) > allowed:
        raise InfeasibleError(
            "no plan fits the budget", way.budget.describe(),
            f"the best within its other limits loses {drop:.2f} of {metric.name} before training",
            f"the nearest feasible budget is max_drop={drop:.2f}", {"max_drop": drop},
        )  # fmt: skip
    sizes = sorted(b for b, _ in best.curve if b <= best.predicted.bits / 8)
    low, high = 0, len(sizes) - 1
    while low < high:  # the metric falls with the size, near enough
        middle = (low + high) // 2
        smaller = replace(others, size=sizes[middle] * 1.0001)
        trial = plan(way.network, sites, stats, candidates, smaller)
        if drop_of(trial) <= allowed:
            high, best = middle, trial
        else:
            low = middle + 1
    return replace(best, budget=way.budget.to_json())


def metric_of(way: Way) -> Any:
    """Return the user's metric, or the natural one: accuracy with labels, else agreement."""
    if way.metric != "auto":
        return way.metric
    loader = (way.data.validation or way.data.calibration) if way.data else None
    for batch in loader or ():
        labels = labels_of(batch)
        if labels is not None and not labels.is_floating_point() and way.network.loss != "features":
            return "accuracy"
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
    """Apply a plan, and re-estimate BatchNorm moments where the data allows it."""
    edited = apply(way.network, chosen, sites, stats, progress=way.say("apply"))
    if way.data and way.data.calibration is not None and edited.edits:
        recalibrate(edited.network.module, way.data.calibration)
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
    source = edited.network.source
    return artifact.pack(edited.network.module, edited.edits, source, chains_of(chosen))


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


def refit(
    way: Way, sites: Sites, stats: Stats, candidates: Candidates,
    chosen: Plan, edited: Edited, file: bytes, limit: float,
) -> tuple[Plan, Edited, bytes]:  # fmt: skip
    """Plan again, a little smaller, while the measured file is over the limit (three rounds)."""
    wanted = limit
    for _ in range(3):
        if len(file) <= limit:
            break
        wanted -= len(file) - limit + 8
        try:
            tighter = plan(way.network, sites, stats, candidates, replace(way.budget, size=wanted))
        except (InfeasibleError, BudgetError):
            break
        chosen = replace(tighter, budget=way.budget.to_json())
        edited = applied(way, chosen, sites, stats)
        file = packed(edited, chosen)
    return chosen, edited, file
