"""low-rank: every layer a pair of thinner ones, by one of the selectors of folds and ranks.

**What.** A selector shares out a number of parameters over the layers of the network: ALDS's search
(Algorithm 1), the same problem solved exactly, what both are compared with (one ratio, one share of
energy, one error, one price for all), or the planner on the currency of error. Then, where there
are epochs, the network is trained; with rounds it is compressed part of the way, trained, composed
again, and compressed further.

**Where it departs from the papers.** Training is the same short recovery for all selectors, taught
by the original. Everything that is a parameter is counted, and a budget is kept strictly.

**Reference.** ALDS: Liebenwein et al. 2021, arXiv:2107.11442. The others: `plan/baselines.py`,
`measure/pca.py`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from lamina.errors import MethodError
from lamina.measure.calibrate import calibrate
from lamina.measure.stats import Stats
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.plan import Plan
from lamina.plan.spectral import SCORES
from lamina.recipes.followed import Followed
from lamina.recipes.pairs import choose_pairs, pairs_plan, recomposed
from lamina.recipes.pruning import at_round
from lamina.recipes.retraining import add_phase, check_data
from lamina.recipes.selectors import SELECTORS
from lamina.recipes.settings import check_training, check_whole, is_number
from lamina.stages import Way, applied
from lamina.train import Recovery, recover


@dataclass(frozen=True)
class LowRank:
    """Settings of the recipe.

    Args:
        selector: see `recipes/selectors.py`.
        keep: share of the network's parameters that may stay, biases and norms counted; a budget
            on `params` goes before it.
        score: of `"alds"` and `"alds-exact"`: `"exact"`, or a certificate `"rss"` or `"paper"`.
        schemes: ways to share a kernel out between two layers, 0 to 3; `"alds"` and `"alds-exact"`.
        seeds: starts of Algorithm 1.
        exclude: patterns of names of layers that stay dense.
        rounds: of compression, each followed by training; shares fall by equal factors.
        epochs: of training after each round [passes over the training data]; 0: none is needed.
        lr: its peak learning rate.
        distill: weight of the original's outputs against the labels in training, 0..1.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> LowRank("svd-energy", keep=0.3).seeds
        15
    """

    name: ClassVar[str] = "low-rank"
    selector: str = "alds"
    keep: float = 0.5
    score: str = "exact"
    schemes: tuple[int, ...] = (0,)
    seeds: int = 15
    exclude: tuple[str, ...] = ()
    rounds: int = 1
    epochs: float = 0.0
    lr: float = 2e-3
    distill: float = 0.7

    def __post_init__(self) -> None:
        check_selection(self.selector, self.keep, self.score, self.schemes, self.seeds)
        check_training(self.epochs, self.lr)
        check_whole("rounds", self.rounds, 1)
        if not is_number(self.distill) or not 0 <= self.distill <= 1:
            raise MethodError("distill is between 0 and 1", f"distill={self.distill!r}")
        if self.rounds > 1 and not self.epochs:
            raise MethodError("rounds without training are one round", f"rounds={self.rounds}")
        if self.rounds > 1 and self.selector == "pca":
            raise MethodError(
                "pca has one round", f"rounds={self.rounds}", "a dense layer cannot hold its biases"
            )

    @property
    def trains(self) -> bool:
        """Whether the recipe needs training data."""
        return self.epochs > 0

    def follow(self, way: Way, sites: Sites, stats: Stats) -> Followed:
        """Carry out the recipe.

        Args:
            way: the network, its data and the seed.
            sites: of the network.
            stats: for selectors that need them, and for the predictions in the plan.

        Raises:
            DataError: there is no data for what was asked.
            MethodError: there is no layer to work on.
            InfeasibleError: rank 1 in every layer takes more parameters; `nearest` says how many.
        """
        data = check_data(way.data, self.name) if self.trains else way.data
        keep = self._share(way)
        network, seen = way.network, stats
        history: list[dict[str, float]] = []
        for number in range(1, self.rounds + 1):
            with way.timed("select"):
                if number > 1 and stats.samples:
                    seen = calibrate(
                        network, sites, way.data, samples=way.samples, seed=way.seed,
                        progress=way.say("select"),
                    )  # fmt: skip
                share = at_round(keep, number, self.rounds)
                chosen = self._choose(network, sites, seen, share, way.seed)
            with way.timed("apply"):
                plan = pairs_plan(network, sites, seen, chosen, share)
                edited = applied(replace(way, network=network), plan, sites, seen)
            if data is not None and self.trains:
                with way.timed("recover"):
                    settings = Recovery(
                        epochs=self.epochs, lr=self.lr, distill=self.distill, rate=False,
                        seed=way.seed + number - 1,
                    )  # fmt: skip
                    result = recover(
                        way.network, edited, data, settings, macs=plan.original.macs,
                        progress=way.say("recover"),
                    )  # fmt: skip
                edited = result.edited
                add_phase(history, result.history, float(number))
            if number < self.rounds:
                network = recomposed(way.network, edited, sites)
        if self.rounds > 1:  # they choose on composed layers; the plan is for the original
            plan = pairs_plan(way.network, sites, stats, chosen, keep)
        plan = replace(plan, budget=way.budget.to_json())
        described = {"recipe": self.name, **asdict(self), "keep": keep}
        return Followed(plan, edited, tuple(history), described, tuple(self._notes(plan)))

    def _choose(
        self, network: Network, sites: Sites, stats: Stats, keep: float, seed: int
    ) -> dict[str, dict[str, Any]]:
        return choose_pairs(
            network, sites, stats, self.selector, keep, self.score, seed,
            schemes=self.schemes, seeds=self.seeds, exclude=self.exclude,
        )  # fmt: skip

    def _share(self, way: Way) -> float:
        if way.budget.params is None:
            return self.keep
        whole = sum(p.numel() for p in way.network.module.parameters())
        limits = way.budget.resolve(
            {"params": float(whole), "macs": 1.0, "bytes": 1.0, "seconds": 1.0}
        )
        return min(1.0, limits["params"] / whole)

    def _notes(self, plan: Plan) -> list[str]:
        dense = [name for name, d in plan.sites.items() if d.steps[0].method == "keep"]
        share = plan.predicted.params / max(1.0, plan.original.params)
        notes = [f"The selector {self.selector} leaves {share:.2%} of the parameters."]
        if dense:
            notes.append(f"Layers that stay dense: {', '.join(dense)}.")
        return notes


def select(
    network: Network,
    sites: Sites,
    stats: Stats,
    selector: str = "alds",
    keep: float = 0.5,
    score: str = "exact",
    seed: int = 0,
    **others: Any,
) -> Plan:
    """Return the plan of one selector: a pair or `keep` for every site.

    Args:
        network, sites: what is compressed.
        stats: from calibration. Selectors that need no data choose and decompose without them; they
            then serve for the predicted error only.
        selector, keep, score: see `LowRank`.
        seed: of the starts of Algorithm 1.
        others: `schemes`, `seeds`, `exclude`, see `LowRank`.

    Raises:
        MethodError: a setting that cannot be used, or there is no layer to work on.
        DataError: the selector needs statistics.
        InfeasibleError: rank 1 in every layer takes more parameters; `nearest` says how many.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lamina.network.discover import discover
        >>> module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> net = Network(module, (torch.zeros(2, 32),))
        >>> plan = select(net, discover(net), Stats(), "svd", keep=0.4)
        >>> plan.predicted.params <= 0.4 * plan.original.params
        True
    """
    check_selection(selector, keep, score, others.get("schemes", (0,)), others.get("seeds", 15))
    chosen = choose_pairs(network, sites, stats, selector, keep, score, seed, **others)
    return pairs_plan(network, sites, stats, chosen, keep)


def check_selection(
    selector: str, keep: float, score: str, schemes: tuple[int, ...], seeds: int
) -> None:
    """Refuse settings that cannot be used.

    Raises:
        MethodError: names the setting.
    """
    for name, word, known in (("selector", selector, SELECTORS), ("score", score, SCORES)):
        if word not in known:
            raise MethodError(f"unknown {name}", repr(word), "", f"choose from {', '.join(known)}")
    if not is_number(keep) or not 0 < keep <= 1:
        raise MethodError("a share is over 0 and at most 1", f"keep={keep!r}")
    if not schemes or not set(schemes) <= {0, 1, 2, 3}:
        raise MethodError("unknown scheme", repr(schemes), "", "there are 0 to 3")
    check_whole("seeds", seeds, 1)
