"""The way: network -> sites -> stats -> candidates -> plan -> edits -> recovery -> file -> report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina import artifact
from lamina.data import Data, as_data
from lamina.data import load as load_data
from lamina.errors import BudgetError, DataError, InfeasibleError, NetworkError
from lamina.forms import Edit
from lamina.measure.calibrate import calibrate
from lamina.measure.quality import evaluate, metric_named
from lamina.measure.stats import Stats
from lamina.measure.store import dump_stats, parse_stats
from lamina.network.discover import discover
from lamina.network.load import check_network, open_network
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.plan import Budget, Candidates, Edited, Plan, apply, plan, propose
from lamina.plan.apply import check_fits
from lamina.plan.chains import dump_candidates, parse_candidates
from lamina.plan.decide import check_limits
from lamina.report import Report, collect
from lamina.run import RunFolder, key_of, write_atomic
from lamina.train import Recovered, Recovery, recalibrate, recover

SLACK_ERROR = 0.05  # [nats per sample] predicted error from which rate pressure starts walking
SMALL_ERROR = 1e-3  # [nats per sample] below this "auto" does not train
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


@dataclass(frozen=True)
class Result:
    """What compression gives.

    Args:
        model: a plain `nn.Module`, identical to what `load` gives for the saved file.
        plan: the decisions.
        report: what came of them.
        file: the bytes of the `.lamina` file.
    """

    model: nn.Module
    plan: Plan
    report: Report
    file: bytes = field(repr=False)

    def save(self, path: str | Path) -> None:
        """Write the `.lamina` file, whole or not at all."""
        write_atomic(Path(path), self.file)


def compress(
    model: Any,
    data: Any = None,
    budget: Any = None,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    methods: Sequence[str] | None = None,
    recover: Any = "auto",
    metric: Any = None,
    samples: int = 1000,
    seed: int = 0,
    plan: Plan | None = None,
    run: RunFolder | None = None,
    watch: Watch | None = None,
) -> Result:
    """Return the best network that fits the budget, with its file and its report.

    Args:
        model: an `nn.Module`, a `Network`, a zoo name, `"file.py:function"` or a `.lamina` file.
        data: None (data-free), an iterable of batches, an object with `train`, `calibration` and
            `validation` loaders, or the name of a data set.
        budget: a `Budget`, or a size such as `"2%"`, `"4MB"` or `"12x"`.
        example_inputs: inputs of one forward pass; may be left out where data gives a batch.
        methods: names of the methods to choose from; default: all.
        recover: `"auto"`, None (never train), a number of epochs, or a `Recovery`.
        metric: a callable `(module, loader) -> points`, or a name; default: accuracy where there are
            labels, else agreement with the original.
        samples: of the calibration data.
        seed: of everything random.
        plan: a plan to carry out instead of making one.
        run: an open run folder to keep stage outputs in, and to continue from.
        watch: called with (stage, done, total, text).

    Raises:
        LaminaError: a subclass says what was wrong with what was given.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> result = compress(net, [torch.randn(64, 8)], "60%", recover=None)
        >>> len(result.file) <= 0.6 * 4 * sum(p.numel() for p in net.parameters())
        True
    """
    way = _begin(model, data, budget, example_inputs, methods, recover, metric, samples, seed, plan)
    way.folder, way.watch = run, watch
    with way.timed("discover"):
        check_network(way.network)
        sites = discover(way.network)
        if plan is not None:
            check_fits(plan, way.network, sites)
        check_metric(way)
    stats = measured(way, sites)
    candidates = offered(way, sites, stats) if plan is None else {}
    with way.timed("plan"):
        chosen = plan or planned(way, sites, stats, candidates)
        if way.folder:
            chosen.save(way.folder.path / "plan.json")
    with way.timed("apply"):
        edited = applied(way, chosen, sites, stats)
    limit = size_limit(way, chosen)
    recovered = recovered_or_none(way, chosen, edited, limit)
    final = recovered.edited if recovered else edited
    with way.timed("pack"):
        file = packed(final, chosen)
        if recovered is None and plan is None and limit is not None:
            chosen, edited, file = refit(way, sites, stats, candidates, chosen, edited, file, limit)
            final = edited
            if way.folder:  # the plan that made the file
                chosen.save(way.folder.path / "plan.json")
        package = artifact.unpack(file)
    with way.timed("report"):
        facts = collect(
            way.network, way.data, sites, chosen, edited, final, package, len(file),
            metric=metric_of(way), samples=stats.samples, seed=way.seed, limit=limit,
            history=recovered.history if recovered else None,
            recovery=vars(way.recovery) if recovered and way.recovery else None,
        )  # fmt: skip
    made = Report({**facts, "stages": way.stages})
    if way.folder:
        made.save(way.folder.path)
    if limit is not None and len(file) > limit and (plan is None or recovered):
        nearest = {"bytes": float(len(file))}
        raise InfeasibleError(
            "no plan fits the budget", way.budget.describe(), f"the file takes {len(file)} bytes",
            f"the nearest feasible budget is size={len(file)}", nearest,
        )  # fmt: skip
    if way.folder:  # last, and only where it keeps to the budget
        way.folder.write(way.folder.path / "net.lamina", file)
    return Result(final.model, chosen, made, file)


def _begin(
    model: Any, data: Any, budget: Any, example_inputs: Any, methods: Any, recover: Any,
    metric: Any, samples: int, seed: int, plan: Plan | None,
) -> Way:  # fmt: skip
    """Check everything the user gave, before any work."""
    from lamina.plan.chains import choose_methods

    if budget is None and plan is None:
        raise BudgetError("no budget", "", "something must be met", "give budget='2%', say")
    given: Any = budget if budget is not None or plan is None else plan.budget or "100%"
    limits = Budget.parse(given)
    check_limits(limits)
    choose_methods(methods)
    if metric is not None:
        metric_named(metric)
    recovery, auto = _recovery(recover, seed)
    if isinstance(data, str):
        data = load_data(data)
    loaders = as_data(data)
    if limits.max_drop is not None and (loaders is None or loaders.validation is None):
        raise DataError("max_drop needs validation data", "data.validation", "", "give some")
    network = open_model(model, example_inputs, loaders)
    return Way(
        network=network,
        data=loaders,
        budget=limits,
        methods=tuple(methods) if methods is not None else None,
        recovery=recovery,
        auto=auto,
        metric=metric or "auto",
        samples=samples,
        seed=seed,
    )


def _recovery(recover: Any, seed: int) -> tuple[Recovery | None, bool]:
    if recover is None or recover == "none":
        return None, False
    if recover == "auto":
        return Recovery(seed=seed), True
    if isinstance(recover, Recovery):
        return recover, False
    if isinstance(recover, (int, float)) and not isinstance(recover, bool) and 0 <= recover < 1e6:
        return (Recovery(epochs=float(recover), seed=seed), False) if recover else (None, False)
    raise BudgetError("cannot read recover", repr(recover), "", "give 'auto', None or epochs")


def open_model(
    model: Any, example_inputs: Any = None, data: Data | None = None, skeleton: Any = None
) -> Network:
    """Return a Network for anything that `compress` takes as a model.

    Args:
        model: see `compress`.
        example_inputs: inputs of one forward pass; wins over what the model brings along.
        data: gives example inputs where there are none.
        skeleton: what a `.lamina` file of a network of one's own is put into: a module, a Network or
            `"file.py:function"`.

    Raises:
        NetworkError: it cannot be opened.
        FileError: a `.lamina` file is damaged, or needs a skeleton.
    """
    from lamina.zoo import names, zoo

    if isinstance(model, str) and model in names():
        network = zoo(model)
    elif isinstance(model, (str, Path)) and str(model).endswith(".lamina"):
        package = artifact.read(model)
        made = open_network(skeleton) if skeleton is not None else None
        network = replace(made or _skeleton(package.skeleton, str(model)), source="module")
        network = replace(network, module=artifact.restore(package, network.module))
    elif isinstance(model, str) and ".py" not in model:
        raise NetworkError(
            "unknown network", repr(model), f"the zoo has {', '.join(names())}",
            "give a zoo name, file.py:function or a .lamina file",
        )  # fmt: skip
    else:
        network = open_network(model, example_inputs)
    if example_inputs is not None:
        network = replace(network, example_inputs=tuple(example_inputs))
    if not network.example_inputs and not network.example_kwargs and data is not None:
        network = replace(network, **_example(data))
    return network


def _example(data: Data) -> dict[str, Any]:
    """Return the inputs of one sample of the data, as an example."""
    from lamina.data import inputs_of

    for batch in data.calibration or data.train or ():
        args, kwargs = inputs_of(batch)
        first = tuple(a[:1] if isinstance(a, torch.Tensor) and a.dim() else a for a in args)
        named = {
            k: v[:1] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in kwargs.items()
        }
        return {"example_inputs": first, "example_kwargs": named}
    return {}


def _skeleton(source: str, where: str, trust: Sequence[str] = ()) -> Network:
    """Rebuild a network's skeleton from what a file says of it.

    Raises:
        FileError: it cannot be rebuilt without the caller's help.
    """
    from lamina.errors import FileError
    from lamina.zoo import build, zoo

    kind, _, name = source.partition(":")
    if kind == "zoo":
        return replace(zoo(name), module=build(name))
    if kind == "python" and source in trust:
        return open_network(name)
    raise FileError(
        "the file does not say how to rebuild its network", where, f"its skeleton is {source!r}",
        "give skeleton=YourNet(), or on the command line --skeleton file.py:function",
    )  # fmt: skip


def load(
    path: str | Path, skeleton: nn.Module | None = None, trust: Sequence[str] = ()
) -> nn.Module:
    """Open a `.lamina` file as a plain `nn.Module` in evaluation mode.

    Args:
        path: the file.
        skeleton: a module of the class the file was made from; edited in place and returned. Zoo
            networks rebuild themselves.
        trust: factories named in files that may be imported, e.g. `("python:net.py:build",)`.

    Raises:
        FileError: the file is damaged, or the skeleton is missing or does not fit.
    """
    package = artifact.read(path)
    module = skeleton if skeleton is not None else None
    if module is None:
        module = _skeleton(package.skeleton, str(path), trust).module
    return artifact.restore(package, module).eval()


def save(result: Any, path: str | Path) -> None:
    """Write a `Result`, or a plain module (losslessly), as a `.lamina` file."""
    if isinstance(result, nn.Module):
        write_atomic(Path(path), artifact.pack(result, (), "module", {}))
    else:
        result.save(path)


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
    import hashlib

    from lamina.data import inputs_of

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
    """
    if way.budget.max_drop is not None:
        return searched(way, sites, stats, candidates)
    if way.budget.size is None or not squeezable(way, candidates):
        return plan(way.network, sites, stats, candidates, way.budget)
    roomy = plan(way.network, sites, stats, candidates, replace(way.budget, size="100%"))
    working = [b for b, e in roomy.curve if e <= SLACK_ERROR]
    limit = way.budget.resolve(
        {"bytes": roomy.original.bits / 8, "macs": roomy.original.macs,
         "params": roomy.original.params, "seconds": 0.0}
    )["bytes"]  # fmt: skip
    size = max(limit, min(working, default=limit) * 1.02)
    try:
        made = plan(way.network, sites, stats, candidates, replace(way.budget, size=size))
    except InfeasibleError:
        made = plan(way.network, sites, stats, candidates, way.budget)
    return replace(made, budget=way.budget.to_json())


def squeezable(way: Way, candidates: Candidates) -> bool:
    """Whether recovery with rate pressure will run, and every site can be held on a grid."""
    trains = way.recovery is not None and way.recovery.rate and way.data is not None
    if not trains or way.data is None or way.data.train is None:
        return False
    return all(any(c.steps[-1].method == "rdoq" for c in offers) for offers in candidates.values())


def searched(way: Way, sites: Sites, stats: Stats, candidates: Candidates) -> Plan:
    """Find the smallest size whose validation metric drops by at most `max_drop` points."""
    if way.data is None or way.data.validation is None:
        raise DataError("max_drop needs validation data", "data.validation", "", "give some")
    metric = metric_of(way)
    before = evaluate(way.network.module, way.data.validation, metric)
    size = way.budget.size if way.budget.size is not None else "100%"
    others = replace(way.budget, max_drop=None, size=size)
    best = plan(way.network, sites, stats, candidates, others)
    sizes = sorted(b for b, _ in best.curve if b <= best.predicted.bits / 8)
    low, high = 0, len(sizes) - 1
    while low < high:  # the metric falls with the size, near enough
        middle = (low + high) // 2
        trial = plan(
            way.network, sites, stats, candidates, replace(others, size=sizes[middle] * 1.0001)
        )
        edited = applied(way, trial, sites, stats)
        drop = before - evaluate(edited.model, way.data.validation, metric)
        if drop <= float(way.budget.max_drop or 0):
            high, best = middle, trial
        else:
            low = middle + 1
    return replace(best, budget=way.budget.to_json())


def metric_of(way: Way) -> Any:
    """Return the user's metric, or the natural one: accuracy with labels, else agreement."""
    from lamina.data import labels_of

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
        from lamina.train.checkpoint import read_checkpoint, write_checkpoint

        resumed = read_checkpoint(done) if done else None
        note["cached"] = resumed is not None
        result = recover(
            way.network, edited, way.data, way.recovery, limit=limit, macs=chosen.original.macs,
            checkpoint=done if resumed else checkpoint, progress=way.say("recover"),
        )  # fmt: skip
        if done and not resumed:
            write_checkpoint(done, result.state)
        return result


def packed(edited: Edited, chosen: Plan) -> bytes:
    """Return the file of an edited network."""
    chains = {n: " ".join(dict.fromkeys(s.method for s in d.steps)) for n, d in chosen.sites.items()}
    return artifact.pack(edited.network.module, edited.edits, edited.network.source, chains)


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


__all__ = ["Edit", "Result", "compress", "load", "open_model", "save"]
