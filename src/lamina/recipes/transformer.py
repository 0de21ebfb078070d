"""int4-2:4: weights and activations of 4 bits and two of every four weights zero, by fine-tuning.

**What.** The linear layers inside the blocks of a transformer are masked 2:4 along the input and
put on zero-preserving 4-bit grids whose range follows from the statistics of the dense weights
(SAWB); what they are given is rounded to 4 bits in learned ranges with integer zero points (PACT+),
which query, key and value share. The network is fine-tuned while this is so: with labels, or
without, taught by what it was. Embedding tables are quantized once, before the last phases; heads,
norms, biases and positions stay as they are.

**Phases** are the order of the training: `"dense"`, `"sparse"`, `"quantized"`, `"both"`, each with
its epochs. `start` says where the phase after `"dense"` begins: at what dense training gave, or at
the pretrained weights.

**What stays in high precision.** The products inside attention (scores, and the sum of values),
softmax, norms, and everything outside the blocks. Nothing here is faster on a CPU.

**Where it departs from the paper**, of which the abstract and the authors' library could be read:
the order of phases, schedules of masks and of dropout are options, and defaults are our own.

**Reference.** "Deep compression of pre-trained transformer models", NeurIPS 2022, 35:14140-14154.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn

from lamina.data import Data
from lamina.errors import MethodError
from lamina.forms import Edit, Grid, Values, find_tensor, install
from lamina.measure.quality import evaluate, metric_named
from lamina.measure.stats import Stats, diagonal_of
from lamina.methods.base import Choice, Step, get_method, weights_of
from lamina.methods.keep import hold
from lamina.methods.sawb import CLIPS, CONSTANTS, clip_by_statistics, grid_of
from lamina.methods.two_four import method as two_four
from lamina.methods.two_four import prune
from lamina.network.sites import Site, Sites, as_matrix, from_matrix
from lamina.network.source import Network
from lamina.plan.apply import Edited, copy_module
from lamina.recipes.followed import Followed, left_alone, plan_of
from lamina.recipes.ratios import ratios
from lamina.recipes.retraining import check_data
from lamina.recipes.settings import check_training, is_number
from lamina.stages import Way, metric_of, packed
from lamina.train.pact import KINDS
from lamina.train.quantized import QuantizedNetwork, roundable
from lamina.train.quantizing import Tuning, tune
from lamina.train.ranges import STARTS, make_quantizers, observe
from lamina.train.refit import refit

PHASES = ("dense", "sparse", "quantized", "both")
BEGINNINGS = ("finetuned", "pretrained")
SCORES = ("magnitude", "obd", "obs")
BATCHES = 10  # that ranges and weights are begun from


@dataclass(frozen=True)
class IntTwoFour:
    """Settings of the recipe.

    Args:
        phases: names and epochs, in order; see above. Where none is `"quantized"` or `"both"`,
            nothing is quantized; where none is `"sparse"` or `"both"`, nothing is pruned.
        start: `"finetuned"` or `"pretrained"`; see above.
        bits: of a weight: 2, 3, 4 or 8.
        activations: bits of what layers are given, 2 to 8; 0: they are not rounded.
        score: of masks: `"magnitude"`; `"obd"`: times the root mean square of the input; or
            `"obs"`: columns are pruned and rounded in order, each making up for those before, so
            that training begins near the network it is to be (`train/refit.py`); masks are static.
        clip: range of a weight's grid: `"statistics"` of the dense weight, or `"mse"`.
        rows: let ranges differ by output.
        kind: of ranges of activations on both sides of 0: `"asymmetric"` or `"symmetric"`.
        begin: of those ranges: `"percentile"` (99.9 and .1), or `"mse"`: least squared error.
        plus: gradients of ranges through the rounding inside too, and of weights beyond their range
            (PACT+, SAWB+).
        tuning: of every phase; its epochs are not looked at.
        dense_lr: peak learning rate of the `"dense"` phase.
        tables: step of embedding tables, in root mean squares of each; 0: they stay as they are.
        exclude: patterns of names of layers that are left as they are.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> IntTwoFour(phases=(("sparse", 1.0), ("both", 2.0))).bits
        4
    """

    name: ClassVar[str] = "int4-2:4"
    trains: ClassVar[bool] = True
    phases: tuple[tuple[str, float], ...] = (("sparse", 1.0), ("both", 2.0))
    start: str = "finetuned"
    bits: int = 4
    activations: int = 4
    score: str = "magnitude"
    clip: str = "statistics"
    rows: bool = False
    kind: str = "asymmetric"
    begin: str = "mse"
    plus: bool = True
    tuning: Tuning = field(default_factory=Tuning)
    dense_lr: float = 5e-5
    tables: float = 0.5
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(isinstance(p, (tuple, list)) and len(p) == 2 for p in self.phases):
            raise MethodError("a phase is a name and epochs", repr(self.phases))
        names = [name for name, _ in self.phases]
        for value, known in (
            *((name, PHASES) for name in names), (self.start, BEGINNINGS), (self.score, SCORES),
            (self.clip, CLIPS), (self.kind, KINDS[1:]), (self.begin, STARTS),
        ):  # fmt: skip
            if value not in known:
                raise MethodError("unknown setting", repr(value), "", f"choose {', '.join(known)}")
        if not set(names) - {"dense"} or "dense" in names[1:]:
            why = "dense training comes first, and something after it"
            raise MethodError("these phases do not compress", repr(self.phases), why)
        for _, epochs in self.phases:
            check_training(epochs, self.dense_lr)
        if self.bits not in CONSTANTS or self.activations not in (0, *range(2, 9)):
            why = f"weights have {', '.join(map(str, CONSTANTS))}, activations 0 or 2 to 8"
            raise MethodError("no such width", f"{self.bits!r}, {self.activations!r}", why)
        if self.score == "obs" and self.tuning.masks != "static":
            raise MethodError(
                "masks that change go by magnitude", f"tuning.masks={self.tuning.masks!r}",
                "score 'obs' chooses them once", "use score='magnitude'",
            )  # fmt: skip
        if not is_number(self.tables) or self.tables < 0:
            raise MethodError("a step is 0 or more", f"tables={self.tables!r}")

    @property
    def prunes(self) -> bool:
        """Whether weights are masked."""
        return any(name in ("sparse", "both") for name, _ in self.phases)

    @property
    def quantizes(self) -> bool:
        """Whether weights are put on grids."""
        return any(name in ("quantized", "both") for name, _ in self.phases)

    def follow(self, way: Way, sites: Sites, stats: Stats) -> Followed:
        """Carry out the recipe.

        Args:
            way: the network, its data and the seed.
            sites: of the network.
            stats: for `"obd"`, and for the predictions in the plan.

        Raises:
            DataError: there is no training data.
            MethodError: the network has no blocks with linear layers.
        """
        data = check_data(way.data, self.name)
        layers = backbone(sites, self.exclude)
        if not layers:
            raise MethodError(
                f"the recipe {self.name} finds no layer to work on", way.network.name,
                "it serves linear layers inside numbered blocks",
            )  # fmt: skip
        work = _Work(self, way, data, sites, layers, stats)
        work.note("before", work.net)
        for number, (phase, epochs) in enumerate(self.phases):
            with way.timed(phase):
                work.run(phase, epochs, number)
        edits = work.release()
        module = copy_module(way.network.module)
        install(module, edits)
        final = Edited(replace(way.network, module=module), tuple(edits))
        work.note("final", module)
        plan = plan_of(way.network, sites, stats, way.budget, self._chains(way, layers, sites))
        settings = {"recipe": self.name, **asdict(self), "quality": work.quality}
        notes = [*work.notes(), *ratios(way.network, layers, edits, len(packed(final, plan)))]
        notes += left_alone(sites, [*layers, *work.tables])
        return Followed(plan, final, tuple(work.history), settings, tuple(notes))

    def _chains(
        self, way: Way, layers: Sequence[Site], sites: Sites
    ) -> dict[str, tuple[tuple[Step, ...], Values]]:
        """Return what the plan says of each layer, and what that makes without training."""
        chains: dict[str, tuple[tuple[Step, ...], Values]] = {}
        for site in layers:
            weight = find_tensor(way.network.module, site.weight).detach()
            left, steps = weight, list[Step]()
            if self.prunes and not two_four.refuse(site):
                left = prune(site, weight, None)
                steps.append(Step("two_four", site.name, {"score": "magnitude"}))
            if self.quantizes:
                clip: str | float = "mse"
                if self.clip == "statistics" and not self.rows:
                    clip = float(clip_by_statistics(weight, self.bits))
                settings = {"bits": self.bits, "clip": clip, "rows": self.rows}
                steps.append(Step("sawb", site.name, settings))
                chains[site.name] = tuple(steps), grid_of(left, self.bits, clip, self.rows)
            else:
                steps.append(Step("keep", site.name))
                chains[site.name] = tuple(steps), hold(left)[0]
        for site in tables_of(sites) if self.tables else ():
            edit = table_edit(way.network, site, self.tables)
            if isinstance(edit.values, Grid):
                settings = {"step": edit.values.step, "rate": 0.0, "scale": "none"}
                chains[site.name] = (Step("rdoq", site.name, settings),), edit.values
        return chains


class _Work:
    """The network on its way through the phases."""

    def __init__(
        self, recipe: IntTwoFour, way: Way, data: Data, sites: Sites, layers: Sequence[Site],
        stats: Stats,
    ) -> None:  # fmt: skip
        self.recipe, self.way, self.data = recipe, way, data
        self.sites, self.layers = sites, layers
        self.importance = importance_of(layers, stats) if recipe.score == "obd" else {}
        self.teacher = copy_module(way.network.module).eval().requires_grad_(False)
        self.net = self._fresh()
        self.tables: list[Site] = []
        self.fixed: list[Edit] = []
        self.history: list[Mapping[str, float]] = []
        self.quality: dict[str, float] = {}
        self.pruned = self.quantized = False

    def _fresh(self) -> QuantizedNetwork:
        module = copy_module(self.way.network.module)
        return QuantizedNetwork(module, self.layers, self.importance)

    def run(self, phase: str, epochs: float, number: int) -> None:
        """Go through one phase."""
        r = self.recipe
        tuning = replace(
            r.tuning, epochs=max(epochs, 1e-9), seed=r.tuning.seed + 100 * self.way.seed + number
        )
        if phase == "dense":
            tuning = replace(tuning, lr=r.dense_lr, dropout=None, distill=0.0, hidden=0.0)
        else:
            self._hold_tables()
        sparse = phase in ("sparse", "both") and not self.pruned
        quantized = phase in ("quantized", "both") and not self.quantized
        fits = r.score == "obs" and not self.pruned and (sparse or quantized)
        if sparse and not fits and (tuning.masks == "static" or not epochs):
            self.net.prune()
        if quantized:
            self._quantize()
        if fits:
            refit(self.net, self._loader(), BATCHES, sparse)
        if epochs:
            rows = tune(
                self.net, self.teacher, self.data, tuning, self.way.network.loss,
                sparse=sparse, progress=self.way.say(phase),
            )  # fmt: skip
            start = self.history[-1]["step"] if self.history else 0.0
            self.history += [
                {**row, "step": start + row["step"], "phase": float(number)} for row in rows
            ]
        self.pruned = self.pruned or sparse
        if phase == "dense":
            self.teacher = copy.deepcopy(self.net.body).eval().requires_grad_(False)
            tensors = {s.weight: w() for s, w in zip(self.layers, self.net.weights, strict=True)}
            with torch.no_grad():
                for name, tensor in tensors.items():
                    find_tensor(self.teacher, name).copy_(tensor)
            if r.start == "pretrained":
                self.net = self._fresh()
        self.note(phase, self.net)

    def _quantize(self) -> None:
        r = self.recipe
        paths = roundable(self.net.body, self.layers)
        seen = []
        if r.activations and paths:
            seen = observe(self.net.body, self.net, paths, self._loader(), BATCHES)
        self.net.quantize(r.bits, r.clip, r.rows, r.plus)
        self.net.round_inputs(make_quantizers(seen, r.activations, r.kind, r.begin, plus=r.plus))
        self.quantized = True

    def _loader(self) -> Iterable[Any]:
        loader = self.data.calibration if self.data.calibration is not None else self.data.train
        assert loader is not None  # the recipe asks for training data
        return loader

    def _hold_tables(self) -> None:
        """Quantize embedding tables, for good: what follows is trained around them."""
        if self.tables or not self.recipe.tables:
            return
        network = replace(self.way.network, module=self.net.body)
        self.tables = tables_of(self.sites)
        for site in self.tables:
            edit = table_edit(network, site, self.recipe.tables)
            self.fixed.append(edit)
            find_tensor(self.net.body, site.weight).requires_grad_(False)
        install(self.net.body, self.fixed)

    def release(self) -> list[Edit]:
        """Return the edits of the trained network."""
        fixed = {edit.path for edit in self.fixed}
        aliases = {n for site in self.tables for n in site.aliases}
        rest = [e for e in self.net.release() if e.path not in fixed | aliases]
        return [*rest, *self.fixed]

    def note(self, when: str, module: nn.Module) -> None:
        """Measure the metric on validation data."""
        if self.data.validation is not None:
            value = evaluate(
                module, self.data.validation, metric_of(self.way), original=self.way.network
            )
            self.quality[when] = round(float(value), 4)

    def notes(self) -> list[str]:
        """Return what a reader should know."""
        rounded = len(self.net.inputs)
        notes = []
        if self.quality:
            rows = ", ".join(f"{when} {value:g}" for when, value in self.quality.items())
            name = metric_named(metric_of(self.way)).name
            notes.append(f"Quality on validation data ({name}): {rows}.")
        if self.quantized and self.recipe.activations:
            notes.append(
                f"Inputs of {rounded} of {len(self.layers)} layers are rounded to "
                f"{self.recipe.activations} bits, in {len(self.net.quantizers)} ranges; the "
                "products inside attention stay in high precision."
            )
        dense = [s.name for s in self.layers if two_four.refuse(s)]
        if self.recipe.prunes and dense:
            notes.append(f"Not pruned, for their inputs do not divide by 4: {', '.join(dense)}.")
        return notes


# --- which layers -------------------------------------------------------------------------------


def backbone(sites: Sites, exclude: Sequence[str] = ()) -> list[Site]:
    """Return the linear layers inside blocks: those with a number within their path.

    Tied layers are not among them (a head that is an embedding), nor are layers of another kind.

    Example:
        >>> inside = Site("layer.0.query", module="layer.0.query", weight="layer.0.query.weight")
        >>> [s.name for s in backbone(Sites((inside, Site("head", weight="head.weight"))))]
        ['layer.0.query']
    """
    return [
        site
        for site in sites.layers
        if site.op == "linear"
        and not site.aliases
        and any(part.isdecimal() for part in site.name.split(".")[:-1])
        and not any(fnmatchcase(site.name, pattern) for pattern in exclude)
    ]


def tables_of(sites: Sites) -> list[Site]:
    """Return the embedding tables."""
    return [site for site in sites.layers if site.op == "embedding"]


def table_edit(network: Network, site: Site, step: float) -> Edit:
    """Return an embedding table on a grid.

    Args:
        network: which holds it.
        site: the table.
        step: in root mean squares of its values.
    """
    weight = weights_of(network, site)["weight"].to(torch.float32)
    rms = float(weight.square().mean().sqrt()) or 1.0
    settings = {"step": step * rms, "rate": 0.0, "scale": "none"}
    return get_method("rdoq").apply(network, Choice(site, settings), None)[0]


def importance_of(layers: Sequence[Site], stats: Stats) -> dict[str, torch.Tensor]:
    """Return the root mean square of each weight's input, in the weight's shape.

    Raises:
        MethodError: a layer has no statistics.
    """
    found = {}
    for site in layers:
        known = stats.of(site.name)
        if known is None:
            raise MethodError(
                "the score 'obd' needs statistics", site.name, "this run has none",
                "give calibration data, or use score='magnitude'",
            )  # fmt: skip
        rows = as_matrix(site, torch.empty(site.shape)).shape[1]
        root = diagonal_of(known.H).clamp_min(0).sqrt()[:, None, :].expand(-1, rows, -1)
        found[site.name] = from_matrix(site, root).to(torch.float32)
    return found
