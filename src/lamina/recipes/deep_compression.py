"""deep-compression: prune, share, Huffman (Han, Mao, Dally 2016), from the first step to the last.

**What.** Rounds of magnitude pruning, each followed by retraining of the survivors (masked weights
and masked updates, dropout scaled down by what is left); then one-dimensional k-means over each
layer's survivors, beside a reserved zero; then training of the shared values, whose gradient is the
sum over their members, with fixed assignments; then Huffman codes of indices and of gaps.

**Where it departs from the paper.** The share each layer keeps is not found by hand but follows
from its measured sensitivity. Training is Adam with one cycle instead of momentum with steps. Small
layers get fewer bits, so that a table serves what it costs. And everything is counted: tables,
biases, header.

**Reference.** arXiv:1510.00149 (the whole), arXiv:1506.02626 (pruning, dropout).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch

from lamina.errors import MethodError
from lamina.forms import Codebook, Edit, find_tensor
from lamina.measure.stats import Stats
from lamina.network.sites import Site, Sites
from lamina.recipes.coding import coded
from lamina.recipes.followed import Followed, left_alone, plan_of, sparse_chain
from lamina.recipes.pruning import check_rules, covered, setting_of, shares_of
from lamina.recipes.retraining import Session, check_data
from lamina.recipes.settings import Pruning, check_training, check_whole
from lamina.recipes.sharing import STARTS, share
from lamina.stages import Way

BITS = {"conv": 8, "conv_transpose": 8, "linear": 5, "recurrent": 5}
CODES = ("huffman", "best")


@dataclass(frozen=True)
class DeepCompression:
    """Settings of the recipe.

    Args:
        pruning: how much, in how many rounds, and the retraining.
        bits: of an index, by name pattern or operation; over the survivors, `2^bits - 1` values.
        start: of k-means: `"linear"` (the paper's) or `"exact"` (least squared distance).
        epochs: of training of the shared values [passes over the training data].
        lr: its peak learning rate.
        code: `"huffman"`, or `"best"`: the shortest of our own lossless codes of the same values.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> DeepCompression(Pruning(density=0.08), bits={"conv": 8, "linear": 6}).start
        'linear'
    """

    name: ClassVar[str] = "deep-compression"
    trains: ClassVar[bool] = True  # needs training data
    pruning: Pruning = field(default_factory=Pruning)
    bits: Mapping[str, int] = field(default_factory=lambda: dict(BITS))
    start: str = "linear"
    epochs: float = 15.0
    lr: float = 2e-4
    code: str = "huffman"

    def __post_init__(self) -> None:
        check_training(self.epochs, self.lr)
        for bits in self.bits.values():
            check_whole("bits", bits, 1, 8)
        if self.start not in STARTS or self.code not in CODES:
            why = f"start is of {', '.join(STARTS)}, code of {', '.join(CODES)}"
            raise MethodError("unknown start or code", f"{self.start!r}, {self.code!r}", why)

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
        check_rules("bits", self.bits, layers)
        with way.timed("prune"):
            shares = shares_of(way.network, layers, data, self.pruning)
            work = Session(way.network, data, way.seed, self.pruning, way.say("prune"))
            work.prune(layers, shares)
        with way.timed("share"):
            work.say = way.say("share")
            work.hold([self._share(site, find_tensor(work.module, site.weight)) for site in layers])
            work.train(self.epochs, self.lr, layers)
        with way.timed("encode"):
            chains = {}
            for site in layers:
                values = self._coded(work.values(site.weight))
                work.hold([Edit(site.weight, "values", values=values)])
                kept = shares[site.name]
                steps, untrained = sparse_chain(way.network, site, kept, self._most(site))
                chains[site.name] = steps, self._coded(untrained)
            plan = plan_of(way.network, sites, stats, way.budget, chains)
        settings = {"recipe": self.name, **asdict(self)}
        notes = left_alone(sites, layers)
        return Followed(plan, work.edited, tuple(work.history), settings, tuple(notes))

    def _most(self, site: Site) -> int:
        """Return how many values a layer may share."""
        return int(2 ** (setting_of(site, self.bits) or BITS[site.op]) - 1)

    def _share(self, site: Site, weight: torch.Tensor) -> Edit:
        return Edit(site.weight, "values", values=share(weight, self._most(site), self.start))

    def _coded(self, values: Codebook) -> Codebook:
        return coded(values, "huffman") if self.code == "huffman" else values
