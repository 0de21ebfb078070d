"""weightless: Bloomier filters, and layers that learn to live with their errors (Reagen 2018).

**What.** Prune hard, share a few values, and store the map from places to values in a Bloomier
filter: a table of t-bit cells that holds no places at all. What was stored comes back exactly; of
the zeros a share of k / 2^t comes back as one of the k values. So the layers are coded one after
the other, earlier first: each is coded with the fewest bits that validation data allows, DECODED,
frozen as it comes back, and the layers after it are retrained around its errors.

**Where it departs from the paper.** The bias of a layer belongs to what is retrained right after
its weight was coded (it takes up the mean of the errors), and is frozen from then on. A layer that
a lossless code makes smaller than any filter that validation data allows is coded so, and the
report says it.

**Reference.** Reagen, Gupta, Adolf, Mitzenmacher, Rush, Wei, Brooks, "Weightless: Lossy weight
encoding for deep neural network compression", ICML 2018, arXiv:1711.04686.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch

from lamina import codecs
from lamina.artifact.records import matrix_view
from lamina.errors import MethodError
from lamina.forms import Codebook, Edit, find_tensor
from lamina.measure.quality import evaluate, metric_named
from lamina.measure.stats import Stats
from lamina.network.sites import Site, Sites
from lamina.recipes.coding import coded
from lamina.recipes.followed import Followed, left_alone, plan_of, sparse_chain
from lamina.recipes.pruning import covered, shares_of
from lamina.recipes.retraining import Session, check_data
from lamina.recipes.settings import Pruning, check_training, check_whole, is_number
from lamina.recipes.sharing import share
from lamina.stages import Way, metric_of

BLIND = 5  # bits above those of a value where there is no validation data: one zero in 32 is wrong


@dataclass(frozen=True)
class Weightless:
    """Settings of the recipe.

    Args:
        pruning: how much, in how many rounds, and the retraining.
        clusters: values that the survivors of a layer share, at most.
        cells: bits of a cell to choose from, above those of a value: `t = ceil(log2 k) + cells`.
        drop: what coding one layer may cost on validation data [points of the metric].
        centroid_epochs: training of a layer's shared values before it is coded.
        epochs: of retraining of the later layers after each layer was coded.
        lr: peak learning rate of both.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> Weightless(Pruning(density=0.02), clusters=4).cells
        (1, 2, 3, 4, 5, 6, 7, 8)
    """

    name: ClassVar[str] = "weightless"
    trains: ClassVar[bool] = True  # needs training data
    pruning: Pruning = field(default_factory=lambda: Pruning(density=0.03))
    clusters: int = 8
    cells: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    drop: float = 0.1
    centroid_epochs: float = 5.0
    epochs: float = 5.0
    lr: float = 5e-4

    def __post_init__(self) -> None:
        check_training(self.epochs, self.lr)
        check_training(self.centroid_epochs, self.lr)
        check_whole("clusters", self.clusters, 1, 128)
        if not self.cells:
            raise MethodError("there is nothing to choose from", "cells=()")
        for bits in self.cells:
            check_whole("cells", bits, 0, 24)
        if not is_number(self.drop) or self.drop < 0:
            raise MethodError("a drop is 0 or more", f"drop={self.drop!r}")

    def follow(self, way: Way, sites: Sites, stats: Stats) -> Followed:
        """Carry out the recipe.

        Args:
            way: the network, its data and the seed.
            sites: of the network.
            stats: for the predictions in the plan only.

        Raises:
            DataError: there is no training data.
            MethodError: there is no layer to work on, or a rule names none.
        """
        data = check_data(way.data, self.name)
        layers = covered(way.network, sites.layers, self.name)
        with way.timed("prune"):
            shares = shares_of(way.network, layers, data, self.pruning)
            work = Session(way.network, data, way.seed, self.pruning, way.say("prune"))
            work.prune(layers, shares)
        notes = left_alone(sites, layers)
        with way.timed("encode"):
            work.say = way.say("encode")
            for i, site in enumerate(layers):
                work, note = self._code(way, work, layers, i)
                notes.append(f"{site.name}: {note}.")
            chains = {
                site.name: sparse_chain(way.network, site, shares[site.name], self.clusters)
                for site in layers
            }
            plan = plan_of(way.network, sites, stats, way.budget, chains)
        settings = {"recipe": self.name, **asdict(self)}
        return Followed(plan, work.edited, tuple(work.history), settings, tuple(notes))

    def _code(
        self, way: Way, work: Session, layers: Sequence[Site], place: int
    ) -> tuple[Session, str]:
        """Share a layer's values, code it, and retrain what comes after; say how it went."""
        site, done = layers[place], frozen_by(layers[:place])
        weight = find_tensor(work.module, site.weight)
        work.hold([Edit(site.weight, "values", values=share(weight, self.clusters))])
        work.train(self.centroid_epochs, self.lr, layers, frozen=done)
        values = work.values(site.weight)
        name, data = lossless(values)
        exact = replace(values, code=(name, data) if name == "huffman" else None)
        work.hold([Edit(site.weight, "values", values=exact)])
        before = _quality(way, work)
        cells = sorted(self.cells) if before is not None else [BLIND]
        forms = [filtered(values, b, way.seed) for b in cells]
        smaller = [form for form in forms if form.code and len(form.code[1]) < len(data)]
        found: tuple[Session, Codebook] | None = None
        low, high = 0, len(smaller)
        while low < high:  # quality rises with the bits, near enough
            middle = (low + high) // 2
            trial = work.fork()
            trial.hold([Edit(site.weight, "values", values=smaller[middle])])
            trial.train(self.epochs, self.lr, layers, frozen=(*done, site.weight))
            after = _quality(way, trial)
            if before is None or after is None or _drop(way, before, after) <= self.drop:
                found, high = (trial, smaller[middle]), middle
            else:
                low = middle + 1
        if found is None:
            return work, f"{len(data):,} bytes by {name}, smaller than any filter that serves"
        trial, form = found
        assert form.code is not None
        wrong = int((form.index != 0).sum() - (values.index != 0).sum())
        return trial, (
            f"{len(form.code[1]):,} bytes as a filter ({name} {len(data):,}); "
            f"{wrong:,} of {int((values.index == 0).sum()):,} zeros come back as values"
        )


def frozen_by(layers: Sequence[Site]) -> tuple[str, ...]:
    """Return the names of the tensors of layers that are done."""
    return tuple(name for site in layers for name in (site.weight, site.bias) if name)


def lossless(values: Codebook) -> tuple[str, bytes]:
    """Return the name and the bytes of the shortest code that gives back just these values."""
    symbols = matrix_view(values.index)
    found = [codecs.best(symbols), ("huffman", codecs.get("huffman").encode(symbols))]
    return min(found, key=lambda code: len(code[1]))


def filtered(values: Codebook, cells: int, seed: int) -> Codebook:
    """Return what a Bloomier filter gives back for a layer, with the filter as its code.

    Args:
        values: a pruned layer of shared values, zero first.
        cells: bits of a cell above those of a value.
        seed: of the hashes.
    """
    count = len(values.centroids) - 1
    bits = max(1, math.ceil(math.log2(max(1, count)))) + cells
    form = coded(values, "bloomier", bits=bits, seed=seed)
    assert form.code is not None
    symbols = codecs.get("bloomier").decode(form.code[1], matrix_view(values.index).shape)
    index = torch.from_numpy(np.array(symbols, dtype=np.int32)).reshape(values.index.shape)
    return replace(form, index=index)


def _quality(way: Way, work: Session) -> float | None:
    """Return the metric on validation data, or None where there is none."""
    if way.data is None or way.data.validation is None:
        return None
    return evaluate(work.module, way.data.validation, metric_of(way), original=way.network)


def _drop(way: Way, before: float, after: float) -> float:
    return metric_named(metric_of(way)).drop(before, after)
