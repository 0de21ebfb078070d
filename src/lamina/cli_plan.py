"""The verb `plan`: decide, and say why."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina import cli_show as show
from lamina.cli_run import open_both, run_folder, timed_at

if TYPE_CHECKING:
    from lamina.plan import Budget

ALL = "all"  # instead of a layer: every layer in a line


def decide(
    model: str, data: str | None, skeleton: str | None, budget: Budget | None, *,
    explain: str | None, reuse: Path | None, out: Path, methods: Sequence[str] | None,
    metric: Any, samples: int, seed: int, shape: tuple[int, int] = (0, 0),
) -> None:  # fmt: skip
    """Make a plan and write it, or explain it, or both.

    Args:
        model, data, skeleton: as the user named them.
        budget: None: take the plan of the run folder, and write none.
        explain: name of a layer or a span, `"all"` for a line per layer, or None for no more than
            the plan.
        reuse: run folder whose measurements are used, and to which new ones are added; a new one
            is made.
        out: where the plan is written.
        methods, metric, samples, seed: as of `compress`.
        shape: samples and tokens that a latency is of, see `timed_at`.

    Raises:
        SiteError: there is no such layer.
        PlanError: no budget is given, and the folder has no plan, or one of another network.
        RunError: the folder is no run.
    """
    from lamina.network.discover import discover
    from lamina.network.load import check_network
    from lamina.plan import Budget, Plan
    from lamina.plan.apply import check_fits
    from lamina.plan.chains import choose_methods
    from lamina.plan.explain import explain as why
    from lamina.plan.explain import layer_of, summarise
    from lamina.rewriting import begin
    from lamina.stages import Way, measured, offered
    from lamina.verify import planned

    before = None if budget or reuse is None else Plan.load(reuse / "plan.json")
    choose_methods(methods)
    network, loaders = open_both(model, data, skeleton)
    if any(shape) or (budget is not None and budget.latency is not None):
        network = timed_at(network, loaders, *shape)
    check_network(network)
    sites = discover(network)
    whole = explain == ALL and all(site.name != ALL for site in sites.layers)
    if explain is not None and not whole:
        layer_of(sites, explain)
    if before is not None:
        check_fits(before, network, sites)
    if before is not None and explain is None:
        return show.say(before.show(sites))
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder(reuse)) if reuse is not None else None
        way = Way(
            network, loaders, budget or Budget(size="100%"), folder=folder,
            watch=stack.enter_context(show.progress_bar()), metric=metric or "auto",
            methods=tuple(methods) if methods else None, samples=samples, seed=seed,
        )  # fmt: skip
        begin(way, None if before is None else before.rewrite)
        if way.rewritten is not None:  # the same layers, and what they have taken over
            sites = discover(way.base)
        stats = measured(way, sites)
        candidates = offered(way, sites, stats)
        made = before or planned(way, sites, stats, candidates)
        text = made.show(sites)
        if explain is not None and not whole:
            with way.timed("explain"):
                found = why(way.base, sites, stats, candidates, made, explain, methods)
            text = found.text()
        elif whole:
            text = summarise(candidates, made, sites)
    show.say(text)
    if before is None:
        made.save(out)
        show.say(f"plan: {out}")
