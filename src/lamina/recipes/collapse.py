"""layer-collapse: MLP blocks are trained until they are linear, and become one layer each.

**What.** In some blocks of the network, say the last, the activation between two layers is made
a blend of itself and a line that starts as the function it was, and is pulled to the line while the
network is trained, block after block. Then every block is one layer: exactly, where its blend
reached the line; by least squares on calibration data, which absorbs what still bends, where not.

**Where it departs from the paper.** There a PReLU takes the place of any activation, which for GELU
changes the network at once; ours starts exactly. There it goes to the identity; ours to what each
unit does on average, which is much nearer where units are mostly off (`line=False`: the identity).
What is not linear in the end is not multiplied out as if it were. Blocks are counted as blocks. A
block that has reached its line is trained on before it is collapsed, in its wide form, and
afterwards, where there are epochs for it.

**Reference.** LayerCollapse, see `methods/layer_collapse` and `train/slope.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from torch import nn

from lamina.data import Data
from lamina.errors import InfeasibleError, MethodError
from lamina.measure.quality import evaluate, metric_named
from lamina.measure.stats import Stats
from lamina.methods.base import Candidate, get_method, spanning, weights_of
from lamina.methods.layer_collapse import FITS
from lamina.methods.layer_collapse.places import activations_of
from lamina.network.sites import Site, Sites
from lamina.plan import Plan
from lamina.plan.apply import copy_module
from lamina.plan.decide import write_plan
from lamina.plan.spans import Span, propose_spans
from lamina.recipes.blocks import (
    ORDERS,
    collapse_runs,
    find_blocks,
    join_blocks,
    lines_of,
    order_blocks,
    saved,
)
from lamina.recipes.followed import Followed
from lamina.recipes.retraining import add_phase, check_data, later
from lamina.recipes.settings import check_training, check_whole, is_number
from lamina.stages import Way, metric_of
from lamina.train import Recovery, recover
from lamina.train.slope import Line, Pull, put_blends
from lamina.train.straighten import Straightening, straighten


@dataclass(frozen=True)
class LayerCollapse:
    """Settings of the recipe.

    Args:
        blocks: how many blocks collapse: their number, or a share of them; a budget on `params`
            goes before it.
        order: which: `"last"`: from the last (the paper's), `"loss"`: those whose collapse alone is
            predicted to cost least.
        steps: trainings, in each of which more blocks are pulled; 0: one for every block.
        epochs: of each [passes over the training data]; 0: nothing is trained.
        last: of training after the collapse; 0: none.
        lr: peak learning rate of all trainings.
        decay: of weights that are matrices, while blocks are pulled.
        pull: how hard, see `Pull.strength`.
        line: blends are drawn to what each unit does on average, by least squares on calibration
            data, in the place of the identity (the paper's).
        how: `"decoupled"` or `"penalty"`, see `Pull`.
        tau: a blend nearer than this to the identity is snapped to it.
        reached: share of each training after which all that were pulled in it are snapped; 1: only
            what has come near, and least squares absorbs what bends at the end.
        distill: weight of the original's outputs against the labels in training, 0..1.
        fit: of blocks that still bend: `"full"`, `"units"` or `"slope"`.
        half: compute in bfloat16 where that is safe.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> LayerCollapse(blocks=2, epochs=3).fit
        'full'
    """

    name: ClassVar[str] = "layer-collapse"
    blocks: float = 1 / 3
    order: str = "last"
    steps: int = 0
    epochs: float = 2.0
    last: float = 0.0
    lr: float = 1e-3
    decay: float = 0.0
    pull: float = 5.0
    line: bool = True
    how: str = "decoupled"
    tau: float = 0.05
    reached: float = 0.6
    distill: float = 0.7
    fit: str = "full"
    half: bool = False

    def __post_init__(self) -> None:
        check_training(self.epochs, self.lr)
        check_training(self.last, self.lr)
        check_whole("steps", self.steps, 0)
        whole = isinstance(self.blocks, int) and not isinstance(self.blocks, bool)
        if not is_number(self.blocks) or self.blocks <= 0 or not (whole or self.blocks <= 1):
            why = "it is a number of blocks, or a share of them over 0 and at most 1"
            raise MethodError("cannot collapse so many blocks", f"blocks={self.blocks!r}", why)
        if not is_number(self.decay) or self.decay < 0:
            raise MethodError("decay is 0 or more", f"decay={self.decay!r}")
        for name, word, known in (("fit", self.fit, FITS), ("order", self.order, ORDERS)):
            if word not in known:
                why = f"choose from {', '.join(known)}"
                raise MethodError(f"unknown {name}", repr(word), "", why)
        self.training(0)

    @property
    def trains(self) -> bool:
        """Whether the recipe needs training data."""
        return self.epochs > 0 or self.last > 0

    def training(self, seed: int) -> Straightening:
        """Return the settings of one training."""
        return Straightening(
            epochs=self.epochs, lr=self.lr, decay=self.decay, distill=self.distill, seed=seed,
            pull=Pull(self.how, self.pull, self.tau), reached=self.reached, half=self.half,
        )  # fmt: skip

    def follow(self, way: Way, sites: Sites, stats: Stats) -> Followed:
        """Carry out the recipe.

        Args:
            way: the network, its data and the seed.
            sites: of the network.
            stats: for the predictions in the plan; moments of blocks that bend are measured anew.

        Raises:
            DataError: there is no training data.
            MethodError: there is no block that collapses.
            InfeasibleError: all blocks together do not save enough parameters.
        """
        data = check_data(way.data, self.name) if self.trains else way.data
        blocks = find_blocks(way.network, sites)
        blocks = order_blocks(way.network, sites, stats, blocks, self.order)
        chosen = blocks[: self._count(way, sites, blocks)]
        quality = _Quality(way)
        quality.note("before", way.network.module)
        if self.epochs:
            swapped = copy_module(way.network.module)
            put_blends(swapped, [path for block in chosen for path in activations_of(block)])
            quality.note("swapped", swapped)
        module, history, bent = way.network.module, list[dict[str, float]](), dict[str, float]()
        if self.epochs and data is not None:
            with way.timed("straighten"):
                lines = lines_of(way.network, sites, stats, chosen) if self.line else {}
                module, bent = self._train(way, data, chosen, history, lines)
            quality.note("trained", module)
        with way.timed("collapse"):
            runs = join_blocks(sites, chosen)
            edited = collapse_runs(way.network, module, sites, runs, way.data, self.fit,
                                   way.samples, way.seed)  # fmt: skip
            plan = collapse_plan(way, sites, stats, runs)
        quality.note("collapsed", edited.model)
        if self.last and data is not None:
            with way.timed("recover"):
                result = recover(
                    way.network, edited, later(data, 2 * way.seed + 1),
                    Recovery(epochs=self.last, lr=self.lr, decay=self.decay, rate=False,
                             distill=self.distill, half=self.half, seed=way.seed + 1),
                    macs=plan.original.macs, progress=way.say("recover"),
                )  # fmt: skip
            edited = result.edited
            add_phase(history, result.history, 0.0)
            quality.note("final", edited.model)
        settings = {"recipe": self.name, **asdict(self), "blocks": len(chosen)}
        settings |= {"quality": quality.values, "metric": quality.metric}
        notes = _notes(blocks, chosen, bent, quality)
        return Followed(plan, edited, tuple(history), settings, tuple(notes))

    def _count(self, way: Way, sites: Sites, blocks: Sequence[Site]) -> int:
        """Return how many blocks collapse."""
        if way.budget.params is None:
            whole = isinstance(self.blocks, int)
            return min(len(blocks), max(1, round(self.blocks * (1 if whole else len(blocks)))))
        size = float(sum(p.numel() for p in way.network.module.parameters()))
        limit = way.budget.resolve(
            {"params": size, "macs": 1.0, "bytes": 1.0, "seconds": 1.0}
        )["params"]  # fmt: skip
        for count in range(1, len(blocks) + 1):
            left = size - saved(sites, join_blocks(sites, blocks[:count]))
            if left <= limit:
                return count
        raise InfeasibleError(
            "no plan fits the budget", f"params={limit:.0f}",
            f"with every block collapsed {left:.0f} parameters are left",
            f"the nearest feasible budget is params={left:.0f}", {"params": left},
        )  # fmt: skip

    def _train(
        self, way: Way, data: Data, chosen: Sequence[Site],
        history: list[dict[str, float]], lines: Mapping[str, Line],
    ) -> tuple[nn.Module, dict[str, float]]:  # fmt: skip
        """Pull the chosen blocks to the identity, more of them in each training."""
        module, bent = way.network.module, dict[str, float]()
        count = min(self.steps or len(chosen), len(chosen))
        for step in range(1, count + 1):
            now = chosen[: round(len(chosen) * step / count)]
            seed = way.seed * 1000 + step
            result = straighten(
                way.network, module, [p for block in now for p in activations_of(block)],
                later(data, seed), self.training(seed), way.say("straighten"), lines,
            )  # fmt: skip
            module = result.module
            bent |= {path: bend for path, bend in result.bends.items() if path not in bent}
            add_phase(history, result.history, float(step))
        return module, bent


# --- the plan ----------------------------------------------------------------------------------


def collapse_plan(way: Way, sites: Sites, stats: Stats, runs: Sequence[Site]) -> Plan:
    """Write down which parts collapse, with what that does to the original without training.

    Raises:
        MethodError: nothing is known of what lies between two layers.
    """
    taken: dict[str, Candidate] = {}
    claimed = {name for run in runs for name in run.members}
    keep, collapse = get_method("keep"), spanning()["layer_collapse"]
    for run in runs:
        offers = propose_spans(
            way.network, sites, stats, [keep], [Span(run, (collapse,))]
        ).get(run.name, ())  # fmt: skip
        dense = [c for c in offers if "rank" not in c.steps[0].settings]
        if not dense:
            raise MethodError(
                "the recipe layer-collapse cannot predict a block", run.name,
                "nothing is known of what its activation does", "give calibration data",
            )  # fmt: skip
        taken[run.name] = dense[0]
    for site in sites.layers:
        if site.name not in claimed:
            weights = weights_of(way.network, site)
            taken[site.name] = next(iter(keep.propose(site, weights, None)))
    return write_plan(way.network, sites, stats, taken, way.budget)


# --- what is reported ---------------------------------------------------------------------------


class _Quality:
    """The metric at every point of the recipe, on validation data, else on calibration data."""

    def __init__(self, way: Way) -> None:
        self.network, self.values = way.network, dict[str, float]()
        data = way.data
        self.loader = (data.validation or data.calibration) if data is not None else None
        self.measure = metric_of(way)
        self.metric = metric_named(self.measure).name

    def note(self, when: str, module: nn.Module) -> None:
        if self.loader is not None:
            value = evaluate(module, self.loader, self.measure, original=self.network)
            self.values[when] = round(float(value), 4)


def _notes(
    blocks: Sequence[Site], chosen: Sequence[Site], bent: Mapping[str, float], quality: _Quality
) -> list[str]:
    names = ", ".join(block.name for block in chosen)
    notes = [f"Blocks that became one layer: {len(chosen)} of {len(blocks)} ({names})."]
    if bent:
        rows = ", ".join(f"{path} {bend:.3g}" for path, bend in bent.items())
        notes.append(f"How far from linear the pull left each activation (1 - t): {rows}.")
    if quality.values:
        rows = ", ".join(f"{when} {value:g}" for when, value in quality.values.items())
        notes.append(f"Quality ({quality.metric}): {rows}.")
    return notes
