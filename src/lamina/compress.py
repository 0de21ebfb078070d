"""The way: network, sites, stats, candidates, plan, edits, recovery, file, report, in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from lamina import artifact
from lamina.data import as_data
from lamina.data import load as load_data
from lamina.errors import BudgetError, DataError, InfeasibleError
from lamina.measure.clock import check_timed
from lamina.measure.quality import metric_named
from lamina.measure.stats import Stats
from lamina.network.discover import discover
from lamina.network.load import check_network
from lamina.network.sites import Sites
from lamina.opening import load, open_model, save, with_example, with_timed_example
from lamina.plan import Budget, Plan
from lamina.plan.apply import check_fits, check_made_for
from lamina.plan.chains import choose_methods
from lamina.plan.lossless import keep_all
from lamina.plan.stable import Box
from lamina.recipes import Followed, check_data, recipe_named
from lamina.report import Report, collect
from lamina.rewriting import begin
from lamina.run import RunFolder, write_atomic
from lamina.stages import (
    Watch,
    Way,
    applied,
    check_metric,
    keeps_applied,
    measured,
    metric_of,
    offered,
    packed,
    recovered_or_none,
    size_limit,
)
from lamina.streaming import compress_folder, refuse_beside, why_stream
from lamina.structure import of_whole, refuse_with
from lamina.train import Recovery
from lamina.train.crew import led
from lamina.verify import judged, planned, refit

__all__ = [
    "Result",
    "Way",
    "compress",
    "load",
    "measured",
    "offered",
    "open_model",
    "planned",
    "save",
]


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


@led
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
    recipe: Any = None,
    lossless: bool = False,
    lossless_structure: Any = None,
    stream: bool | None = None,
    run: RunFolder | None = None,
    watch: Watch | None = None,
) -> Result:
    """Return the best network that fits the budget, with its file and its report.

    Where it is called on several processes (`torchrun`, `accelerate launch`), the first one does
    the work and owns the run folder, all of them train, and each returns the same result.

    Args:
        model: an `nn.Module`, a `Network`, a zoo name, `"file.py:function"` or a `.lamina` file.
        data: None (data-free), an iterable of batches, an object with `train`, `calibration` and
            `validation` loaders, or the name of a data set.
        budget: a `Budget`, or a size such as `"2%"`, `"4MB"` or `"12x"`.
        example_inputs: inputs of one forward pass, a tuple or a mapping by name; may be left out
            where data gives a batch. A latency is that of one forward pass on them; of a pretrained
            model without data it is that of one sample (of 128 tokens).
        methods: names of the methods to choose from; default: all.
        recover: `"auto"`, None (never train), a number of epochs, a `Recovery`, or its settings as
            text, `"epochs=2,parts=scales"`.
        metric: a callable `(module, loader) -> points`, or a name; default: accuracy where there
            are labels, else agreement with the original.
        samples: of the calibration data.
        seed: of everything random.
        plan: a plan to carry out instead of making one.
        recipe: a published way to follow as a whole instead: `"deep-compression"`, `"weightless"`,
            `"low-rank"`, `"filters"`, or its settings (`lamina.recipes`). The first two train; a
            budget is only checked at the end, but for one on `params` of the last two.
        lossless: keep every tensor bit for bit; the file is only coded smaller. Needs no budget; a
            size is checked at the end, and nothing else can be asked for.
        lossless_structure: remove first what provably changes nothing, of a feed-forward ReLU
            network, for inputs in a box: `"LOW,HIGH"`, a pair of numbers (or of one sequence per
            channel), or True: the range of the data. Alone, it writes a smaller lossless file; with
            a budget, planning begins with the smaller network. Outside the box outputs may differ.
        stream: read a Hugging Face folder layer by layer, and never hold it as a whole
            (`lamina.streaming`); default: where it is larger than half of the free memory. The
            result's `model` and `file` are then read from disk when they are asked for.
        run: an open run folder to keep stage outputs in, and to continue from.
        watch: called with (stage, done, total, text).

    Raises:
        LaminaError: a subclass says what was wrong with what was given.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> result = compress(net, [torch.randn(64, 32)], "60%", recover=None)
        >>> len(result.file) <= 0.6 * 4 * sum(p.numel() for p in net.parameters())
        True
    """
    shapes = lossless_structure is not None and lossless_structure is not False
    why = why_stream(model, stream)
    if why:
        refuse_beside(
            recipe=recipe, lossless=lossless, recover=recover, metric=metric,
            lossless_structure=lossless_structure, example_inputs=example_inputs,
        )  # fmt: skip
        streamed = compress_folder(
            model, data, budget, methods=methods, samples=samples, seed=seed, decided=plan,
            run=run, watch=watch, notes=[why],
        )  # fmt: skip
        return cast("Result", streamed)  # it has all that a Result has; file and model are on disk
    if shapes:
        refuse_with(recipe=recipe, plan=plan, lossless=lossless)
        if lossless_structure is not True:
            Box.parse(lossless_structure)
    if lossless or (shapes and budget is None):
        _check_lossless(budget, methods=methods, recover=recover, plan=plan, recipe=recipe)
        given = "100%" if budget is None else budget
        way = _begin(model, data, given, example_inputs, None, None, metric, samples, seed, None)
        way.folder, way.watch = run, watch
        return _kept(way, budget is not None, lossless_structure if shapes else None)
    follows = recipe_named(recipe, recover=recover, methods=methods, plan=plan)
    given = "100%" if follows and budget is None else budget
    way = _begin(model, data, given, example_inputs, methods, recover, metric, samples, seed, plan)
    way.folder, way.watch = run, watch
    with way.timed("discover"):
        check_network(way.network)
        if plan is not None:
            check_made_for(plan, way.network)
    if plan is not None or not follows:
        begin(way, plan.rewrite if plan is not None else None, lossless_structure)
    with way.timed("discover"):
        sites = discover(way.base)
        if plan is not None:
            check_fits(plan, way.network, sites)
        check_metric(way)
        if follows and follows.trains:
            check_data(way.data, follows.name)
    stats = measured(way, sites)
    if follows:
        followed = follows.follow(way, sites, stats)
        return _settled(way, sites, stats, followed, budget is not None)
    candidates = offered(way, sites, stats) if plan is None else {}
    with way.timed("plan"):
        chosen = plan or planned(way, sites, stats, candidates)
        if way.folder:
            chosen.save(way.folder.path / "plan.json")
    with way.timed("apply"):
        edited = applied(way, chosen, sites, stats)
    limit = size_limit(way, chosen)
    if way.recovery is not None and way.recovery.parts == "scales" and plan is None and limit:
        # What is tuned only cannot be made to fit afterwards.
        asked = way, sites, stats, candidates, chosen, edited, packed(edited, chosen), limit
        chosen, edited, _ = refit(*asked)
    recovered = recovered_or_none(way, chosen, edited, limit)
    with way.timed("pack"):
        final = recovered.edited if recovered else edited
        if recovered and keeps_applied(way, chosen, edited, recovered, limit):
            final = edited
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
            candidates=candidates, base=way.base, methods=way.methods,
        )  # fmt: skip
        facts = judged(way, facts, final.model)
    made = Report({**facts, "notes": [*facts["notes"], *way.notes], "stages": way.stages})
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


def _settled(way: Way, sites: Sites, stats: Stats, followed: Followed, limited: bool) -> Result:
    """Pack and report what came of a recipe, and check it against the budget, if one was given."""
    chosen, final = followed.plan, followed.final
    limit = size_limit(way, chosen) if limited else None
    with way.timed("pack"):
        file = packed(final, chosen)
        package = artifact.unpack(file)
    with way.timed("report"):
        edited = followed.applied or applied(way, chosen, sites, stats)
        facts = collect(
            way.network, way.data, sites, chosen, edited, final,
            package, len(file), metric=metric_of(way), samples=stats.samples, seed=way.seed,
            limit=limit, history=followed.history, recovery=followed.settings,
        )  # fmt: skip
    budget: Any = (
        facts["budget"] if limited else {"text": "none: a recipe", "limits": {}, "met": {}}
    )
    notes = [*facts["notes"], *followed.notes, *way.notes]
    made = Report({**facts, "budget": budget, "notes": notes, "stages": way.stages})
    if way.folder:
        chosen.save(way.folder.path / "plan.json")
        made.save(way.folder.path)
    missed = [name for name, met in budget["met"].items() if met is False]
    if missed:
        raise InfeasibleError(
            "the recipe ends beyond the budget", way.budget.describe(),
            f"the file takes {len(file)} bytes, and the limits on {', '.join(missed)} are not met",
            "give a roomier budget, or the recipe's settings", {"bytes": float(len(file))},
        )  # fmt: skip
    if way.folder:
        way.folder.write(way.folder.path / "net.lamina", file)
    return Result(final.model, chosen, made, file)


def _check_lossless(budget: Any, **others: Any) -> None:
    """Refuse what would change the network, or could not be kept to without changing it."""
    for name, said in others.items():
        if said and said not in ("auto", "none"):
            raise BudgetError(
                f"{name} does not go with lossless", "", "nothing is changed", f"leave {name} out"
            )
    for name in Budget.parse(budget).to_json() if budget is not None else ():
        if name != "size":
            why = "the network stays as it is; only the size of its file can be checked"
            raise BudgetError(f"{name} does not go with lossless", "", why, f"leave {name} out")


def _kept(way: Way, limited: bool, structure: Any = None) -> Result:
    """Store a network bit for bit, report it, and check the file's size, if one was given."""
    with way.timed("discover"):
        check_network(way.network)
    begin(way, (), structure)
    with way.timed("discover"):
        sites = discover(way.base)
        check_metric(way)
    with way.timed("pack"):
        chosen, final, file = keep_all(way.base, sites, way.budget)
        if way.rewritten is not None:
            chosen = of_whole(chosen, way)
        package = artifact.unpack(file)
    limit = size_limit(way, chosen) if limited else None
    with way.timed("report"):
        facts = collect(
            way.network, way.data, sites, chosen, final, final, package, len(file),
            metric=metric_of(way), seed=way.seed, limit=limit, base=way.base,
        )  # fmt: skip
    budget = facts["budget"] if limited else {"text": "none: lossless", "limits": {}, "met": {}}
    notes = ["Lossless: every tensor comes back bit for bit."] if structure is None else []
    notes += [*facts["notes"], *way.notes]
    made = Report({**facts, "budget": budget, "notes": notes, "stages": way.stages})
    if way.folder:
        chosen.save(way.folder.path / "plan.json")
        made.save(way.folder.path)
    if limit is not None and len(file) > limit:
        raise InfeasibleError(
            "the lossless file is beyond the budget", way.budget.describe(),
            f"the file takes {len(file)} bytes", f"give size={len(file)}, or leave lossless out",
            {"bytes": float(len(file))},
        )  # fmt: skip
    if way.folder:
        way.folder.write(way.folder.path / "net.lamina", file)
    return Result(final.model, chosen, made, file)


def _begin(
    model: Any, data: Any, budget: Any, example_inputs: Any, methods: Any, recover: Any,
    metric: Any, samples: int, seed: int, plan: Plan | None,
) -> Way:  # fmt: skip
    """Check everything the user gave, before any work."""
    if budget is None and plan is None:
        raise BudgetError("no budget", "", "something must be met", "give budget='2%', say")
    given: Any = budget if budget is not None or plan is None else plan.budget or "100%"
    limits = Budget.parse(given)
    choose_methods(methods)
    if metric is not None:
        metric_named(metric)
    recovery, auto = _recovery(recover, seed)
    network = open_model(model, example_inputs)
    if isinstance(data, str):
        data = load_data(data, network=network)
    loaders = as_data(data)
    if limits.max_drop is not None and (loaders is None or loaders.validation is None):
        raise DataError("max_drop needs validation data", "data.validation", "", "give some")
    if example_inputs is None and loaders is not None:
        network = with_example(network, loaders)
    if limits.latency is not None and example_inputs is None and loaders is None:
        network = with_timed_example(network)
    if limits.latency is not None and plan is None:
        check_timed(network)
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
    if isinstance(recover, str) and "=" in recover:
        return Recovery.parse(recover, seed), False
    if isinstance(recover, Recovery):
        return recover, False
    if isinstance(recover, (int, float)) and not isinstance(recover, bool) and 0 <= recover < 1e6:
        return (Recovery(epochs=float(recover), seed=seed), False) if recover else (None, False)
    raise BudgetError("cannot read recover", repr(recover), "", "give 'auto', None or epochs")
