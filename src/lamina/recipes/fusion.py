"""layer-fusion: layers of one role and shape are tied to one weight, step by step, in training.

**What.** In every step the nearest layers of each family (equal role and shape: the queries of all
blocks, the convolutions of a stage) are grouped further, and each group holds one Parameter from
then on, until the network has the unique parameters asked for. Between steps it is trained. Biases
and norms stay each layer's own; BatchNorm moments are estimated anew after each step; the optimizer
is built anew, for its state would be of other tensors. Dropout falls with the root of the share of
parameters that is left (Han et al. 2015, arXiv:1506.02626, eq. 2).

**Where it departs from the paper.** Groups come from agglomerative clustering, and one exact choice
over all families says which come together first; every measure is a distance that is 0 for equal
layers. Hidden neurons are put in one order before layers are averaged, where that changes nothing.
Whole blocks can be grouped alike (`unit="block"`), in a row or in cycles. Training is taught by the
original, and half of it follows the last step. `mode="drop"` runs a group's first block only.

**Reference.** O'Neill, Ver Steeg, Galstyan 2020, "Compressing Deep Neural Networks via Layer
Fusion", arXiv:2007.14917; ACML 2021, PMLR 157.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from torch import nn

from lamina.data import Data
from lamina.errors import MethodError
from lamina.measure.quality import evaluate
from lamina.measure.stats import Stats
from lamina.methods.layer_fusion.align import Hidden
from lamina.methods.layer_fusion.fuse import Partition, members_of
from lamina.network.sites import Sites
from lamina.plan import Edited
from lamina.plan.apply import copy_module
from lamina.recipes.followed import Followed
from lamina.recipes.fusing import droppable, fusion_plan
from lamina.recipes.retraining import DROPOUTS, add_phase, check_data, later, scaled_dropout
from lamina.recipes.settings import check_training, check_whole, is_number
from lamina.recipes.tying import (
    MEASURES,
    PATTERNS,
    UNITS,
    Bundle,
    choose_groups,
    find_bundles,
    fuse_groups,
    mix_groups,
    structure_of,
)
from lamina.recipes.widths import find_widths
from lamina.stages import Way
from lamina.train import Recovery, recalibrate, recover

WAYS = ("auto", "mean", "freeze", "first", "mix", "max", "solve")
TRIED = ("mean", "first", "freeze")  # by `auto`; and `solve` where there are statistics
LOOKED_AT = 4  # batches of the calibration data, by which `auto` judges


@dataclass(frozen=True)
class LayerFusion:
    """Settings of the recipe.

    Args:
        keep: share of the network's unique parameters that may stay, all of them counted; a budget
            on `params` goes before it.
        steps: in which they go, by equal numbers.
        distance: see `methods/layer_fusion/distances.py`; or `"loss"`: what sharing is predicted to
            cost, from calibration data.
        unit: `"layer"`: every family is grouped by itself; `"block"`: whole blocks are.
        pattern: `"nearest"` (the paper's), `"neighbours"` (layers in a row) or `"cycle"` (every
            n-th layer).
        combine: `"mean"`; `"freeze"`: the most central layer as it is; `"first"`; `"max"`;
            `"solve"`: least predicted loss; `"mix"`: every step swaps half of the entries within a
            group, and the last one takes the mean; `"auto"`: in each step that of mean, first,
            freeze and solve which leaves outputs nearest to the original's on calibration data
            (without any, the mean).
        rescale: give a shared weight the mean of its members' norms.
        align: put hidden neurons in one order first.
        mode: `"tie"`, or `"drop"`: the other blocks of a group do not run (`unit="block"`).
        exclude: patterns of names of layers that share nothing.
        epochs: of training in all [passes over the training data]; 0: none is needed.
        last: share of them that follows the last step; the rest is between the steps.
        lr: peak learning rate of each part.
        optimizer: `"adam"` or `"sgd"`.
        decay: of weights, see `Recovery`.
        distill: weight of the original's outputs against the labels in training, 0..1.
        half: train in bfloat16 where that is safe.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> LayerFusion(keep=0.3, distance="w2").steps
        4
    """

    name: ClassVar[str] = "layer-fusion"
    keep: float = 0.5
    steps: int = 4
    distance: str = "euclidean"
    unit: str = "layer"
    pattern: str = "nearest"
    combine: str = "auto"
    rescale: bool = True
    align: bool = True
    mode: str = "tie"
    exclude: tuple[str, ...] = ()
    epochs: float = 0.0
    last: float = 0.5
    lr: float = 2e-3
    optimizer: str = "adam"
    decay: float = 0.0
    distill: float = 0.7
    half: bool = False

    def __post_init__(self) -> None:
        if not is_number(self.keep) or not 0 < self.keep <= 1:
            raise MethodError("a share is over 0 and at most 1", f"keep={self.keep!r}")
        check_whole("steps", self.steps, 1)
        check_training(self.epochs, self.lr)
        for name, share in {"last": self.last, "distill": self.distill}.items():
            if not is_number(share) or not 0 <= share <= 1:
                raise MethodError(f"{name} is between 0 and 1", f"{name}={share!r}")
        if not is_number(self.decay) or self.decay < 0:
            raise MethodError("decay is 0 or more", f"decay={self.decay!r}")
        for name, word, known in (
            ("distance", self.distance, MEASURES), ("unit", self.unit, UNITS),
            ("pattern", self.pattern, PATTERNS), ("combine", self.combine, WAYS),
            ("mode", self.mode, ("tie", "drop")), ("optimizer", self.optimizer, ("adam", "sgd")),
        ):  # fmt: skip
            if word not in known:
                raise MethodError(f"unknown {name}", repr(word), "",
                                  f"choose from {', '.join(known)}")  # fmt: skip
        if self.mode == "drop" and (self.unit != "block" or self.combine == "mix"):
            raise MethodError("only whole blocks are dropped, and not mixed", "",
                              f"unit={self.unit!r}, combine={self.combine!r}")  # fmt: skip

    @property
    def trains(self) -> bool:
        """Whether the recipe needs training data."""
        return self.epochs > 0

    def follow(self, way: Way, sites: Sites, stats: Stats) -> Followed:
        """Carry out the recipe.

        Args:
            way: the network, its data and the seed.
            sites: of the network.
            stats: for `distance="loss"`, `combine="solve"`, and the predictions in the plan.

        Raises:
            DataError: there is no data for what was asked.
            MethodError: there is nothing to share.
            InfeasibleError: with one weight for each family there still are more parameters.
            SiteError: a block cannot be dropped.
        """
        data = check_data(way.data, self.name) if self.trains else way.data
        bundles = find_bundles(sites, self.exclude, self.unit)
        if self.mode == "drop":
            bundles = droppable(way.network, bundles)
        whole = sum(p.numel() for p in way.network.module.parameters())
        keep = self._share(way, whole)
        run = _Fusing(self, way, sites, stats, data, bundles)
        run.check(keep * whole)  # before any training
        for number in range(1, self.steps + 1):
            with way.timed("fuse"):
                run.fuse(whole * (1 - (1 - keep) * number / self.steps), number)
            with way.timed("recover"):
                run.train(self._epochs(number))
        plan = fusion_plan(
            way, sites, stats, bundles, run.groups, run.ways[-1], run.edited() if run.drop else None
        )
        described: dict[str, Any] = {"recipe": self.name, **asdict(self), "keep": keep}
        return Followed(plan, run.edited(), tuple(run.history), described, tuple(run.notes()),
                        run.applied if self.mode == "drop" else None)  # fmt: skip

    def _epochs(self, number: int) -> float:
        if number == self.steps:
            return self.epochs * (self.last if self.steps > 1 else 1.0)
        return self.epochs * (1 - self.last) / (self.steps - 1)

    def _share(self, way: Way, whole: float) -> float:
        if way.budget.params is None:
            return self.keep
        limits = way.budget.resolve(
            {"params": float(whole), "macs": 1.0, "bytes": 1.0, "seconds": 1.0}
        )
        return min(1.0, limits["params"] / whole)


class _Fusing:
    """One run of the recipe: the network as it is, and which of its layers share."""

    def __init__(
        self,
        settings: LayerFusion,
        way: Way,
        sites: Sites,
        stats: Stats,
        data: Data | None,
        bundles: tuple[Bundle, ...],
    ) -> None:
        self.settings, self.way, self.stats, self.data = settings, way, stats, data
        self.bundles = bundles
        self.network = replace(way.network, module=copy_module(way.network.module))
        self.groups: list[Partition] = [tuple(range(bundle.count)) for bundle in bundles]
        self.aims = list(self.groups)  # what shares in the end; `mix` ties only then
        self.history: list[dict[str, float]] = []
        self.moved: set[str] = set()
        self.ways: list[str] = []  # to combine weights, step by step
        self.seen, self.phase = 0, 0
        self.applied: Edited | None = None
        self.hidden: dict[str, Hidden] = {}
        if settings.align:
            widths, _ = find_widths(way.network, sites)
            self.hidden = {
                w.producer.name: Hidden(w.producer, w.consumer, w.norms, w.repeat) for w in widths
            }
        self.drop = settings.mode == "drop"
        self.whole = sum(p.numel() for p in way.network.module.parameters())
        self.saved = [
            sum(p.numel() for p in self.network.module.get_submodule(b.blocks[0]).parameters())
            if self.drop else b.saved for b in bundles
        ]  # fmt: skip

    @property
    def params(self) -> int:
        """Unique parameters, with what `mix` will share counted as shared."""
        count = sum(p.numel() for p in self.network.module.parameters())
        for size, now, aim in zip(self.saved, self.groups, self.aims, strict=True):
            count -= size * (len(set(now)) - len(set(aim)))
        return count

    def choose(self, limit: float) -> list[Partition]:
        """Return the groups that keep to a number of parameters, coarser than those now."""
        return choose_groups(
            self.network.module, self.bundles, self.aims, limit, self.stats,
            distance=self.settings.distance, pattern=self.settings.pattern,
            spent=float(self.params), saved=self.saved,
        )  # fmt: skip

    def check(self, limit: float) -> None:
        """Refuse a limit that cannot be met."""
        self.choose(limit)

    def fuse(self, limit: float, number: int) -> None:
        """Group further, and let the groups share."""
        chosen, how = self.choose(limit), self.settings.combine
        if how == "mix" and number < self.settings.steps:
            self.aims = chosen
            seed = 1_000 * (self.way.seed * 1_000 + number)
            mix_groups(self.network.module, self.bundles, chosen, seed)
        else:
            self._share(chosen, "mean" if how == "mix" else how)
            self.groups = self.aims = chosen
        self._recalibrate(self.network.module)
        self.applied = self.edited(copy=True)

    def _share(self, chosen: list[Partition], how: str) -> None:
        ways: tuple[str, ...] = (how,)
        if how == "auto":
            looked = self.data.calibration if self.data else None
            ways = TRIED[: len(TRIED) if looked is not None else 1]
            ways += ("solve",) * (looked is not None and bool(self.stats.samples))
        best, module = float("inf"), self.network.module
        found: tuple[str, nn.Module, set[str]] | None = None
        for way in ways:
            trial = copy_module(module)
            moved = fuse_groups(
                trial, self.bundles, self.groups, chosen, how=way, hidden=self.hidden,
                rescale=self.settings.rescale, stats=self.stats, drop=self.drop,
            )  # fmt: skip
            off = self._off(trial) if len(ways) > 1 else 0.0
            if off < best:
                best, found = off, (way, trial, set(moved))
        assert found is not None
        self.network = replace(self.network, module=found[1])
        self.moved |= found[2]
        self.ways.append(found[0])

    def _off(self, module: nn.Module) -> float:
        """Return how far outputs are from the original's."""
        assert self.data is not None and self.data.calibration is not None
        self._recalibrate(module)
        batches = list(itertools.islice(self.data.calibration, LOOKED_AT))
        off = evaluate(module, batches, "kl", original=self.way.network)
        return off if math.isfinite(off) else 1e300

    def _recalibrate(self, module: nn.Module) -> None:
        if self.data is not None and self.data.calibration is not None:
            recalibrate(module, self.data.calibration)

    def train(self, epochs: float) -> None:
        """Train the network as it is; what is tied stays tied."""
        if not epochs or self.data is None:
            return
        self.phase += 1
        one = self.settings
        recovery = Recovery(
            epochs=epochs, optimizer=one.optimizer, lr=one.lr, distill=one.distill, rate=False,
            decay=one.decay, half=one.half, seed=self.way.seed + self.phase - 1,
        )  # fmt: skip
        data = later(self.data, self.way.seed, self.seen)
        edited = self.edited()
        rates = {name: m.p for name, m in edited.model.named_modules() if isinstance(m, DROPOUTS)}
        for name, rate in rates.items():  # fewer parameters need less regularisation
            _dropout(edited.model, name).p = scaled_dropout(rate, self.params, self.whole)
        result = recover(self.way.network, edited, data, recovery, progress=self.way.say("recover"))
        for name, rate in rates.items():
            _dropout(result.edited.model, name).p = rate
        self.seen += math.ceil(epochs)
        add_phase(self.history, result.history, float(self.phase))
        self.network = result.edited.network

    def edited(self, copy: bool = False) -> Edited:
        """Return the network with the edits that make it from the original, values aside."""
        none = [tuple(range(bundle.count)) for bundle in self.bundles]
        edits = structure_of(
            self.way.network.module, self.bundles, self.groups, none if self.drop else None
        )
        module = copy_module(self.network.module) if copy else self.network.module
        return Edited(replace(self.network, module=module), tuple(edits))

    def notes(self) -> list[str]:
        """Return what a reader should know."""
        share = self.params / self.whole
        notes = [f"Unique parameters: {self.params:,} of {self.whole:,} ({share:.2%})."]
        for bundle, groups in zip(self.bundles, self.groups, strict=True):
            shown = [
                " = ".join(bundle.layers[0][i].name for i in group)
                for group in members_of(groups)
                if len(group) > 1
            ]
            if shown:
                notes.append(f"Shared, {bundle.name}: {'; '.join(shown)}.")
        if self.settings.combine == "auto":
            notes.append(f"Weights were combined, step by step: {', '.join(self.ways)}.")
        if self.moved:
            notes.append(f"Neurons were put in one order first: {', '.join(sorted(self.moved))}.")
        if self.drop:
            notes.append(
                "The plan keeps every value: which blocks are gone is in the file, and is not "
                "carried out again by applying the plan."
            )
        return notes


def _dropout(module: nn.Module, name: str) -> nn.Dropout:
    found = module.get_submodule(name)
    assert isinstance(found, DROPOUTS)
    return found  # type: ignore[return-value]
