"""filters: prune whole channels between layers, by the norms of their filters or by their loss.

**What.** Where a layer's output goes to one other layer only, through a BatchNorm, activations and
pooling, its channels can be fewer. The channels with the smallest filters go, until the network
keeps to a number of parameters; a row of the first layer, an entry of the BatchNorm and the columns
of the next layer go with each. What is left is an ordinary, smaller network. Then, where there are
epochs, it is trained.

**Where it departs from the paper.** What a channel gave on average is put into the next layer's
bias, or into the running mean of the BatchNorm behind it. How much each layer loses can follow from
the predicted loss instead of from a ratio. Channels that a residual connection reads stay: that is
a matter of the couplings between layers, not of one pair.

**Reference.** Li, Kadav, Durdanovic, Samet, Graf, "Pruning filters for efficient ConvNets", ICLR
2017, arXiv:1608.08710.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from lamina.errors import InfeasibleError, MethodError
from lamina.forms import install
from lamina.measure.stats import Stats
from lamina.network.sites import Refusal, Sites
from lamina.network.source import Network
from lamina.plan import Edited
from lamina.plan.apply import copy_module
from lamina.recipes.compensation import FILLS, compensated
from lamina.recipes.followed import Followed
from lamina.recipes.retraining import check_data
from lamina.recipes.saliency import NORMS, SCOPES, count_params, order_removals
from lamina.recipes.settings import check_training, is_number
from lamina.recipes.thinning import thin_plan
from lamina.recipes.widths import Width, find_widths, narrow_edits
from lamina.stages import Way
from lamina.train import Recovery, recalibrate, recover

LEAST = 0.1  # of a width's channels stay, whatever they look like: a layer must not close


@dataclass(frozen=True)
class Filters:
    """Settings of the recipe.

    Args:
        keep: share of the network's parameters that may stay; a budget on `params` goes before it.
        norm: of a filter: `"l1"` (the paper's) or `"l2"`.
        scope: how much each layer loses, see `order_removals`.
        compensate: what stands in for a channel that went: `"none"` (the paper's); `"constant"`:
            what weights and BatchNorm alone say it gives, which is exact where its filter is zero,
            but for the border of a layer that pads with zeros; `"mean"`: what it gave on average in
            calibration; `"regress"`: its least squares estimate from the channels that stay;
            `"auto"`: that estimate, without data the constant.
        least: share of its channels that every width keeps.
        epochs: of training afterwards [passes over the training data]; 0: none is needed.
        lr: its peak learning rate.
        distill: weight of the original's outputs against the labels in training, 0..1.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> Filters(keep=0.3, scope="global").norm
        'l2'
    """

    name: ClassVar[str] = "filters"
    keep: float = 0.5
    norm: str = "l2"
    scope: str = "uniform"
    compensate: str = "auto"
    least: float = LEAST
    epochs: float = 0.0
    lr: float = 2e-3
    distill: float = 0.7

    def __post_init__(self) -> None:
        check_choice(self.keep, self.norm, self.scope, self.compensate, self.least)
        check_training(self.epochs, self.lr)
        if not is_number(self.distill) or not 0 <= self.distill <= 1:
            raise MethodError("distill is between 0 and 1", f"distill={self.distill!r}")

    @property
    def trains(self) -> bool:
        """Whether the recipe needs training data."""
        return self.epochs > 0

    def follow(self, way: Way, sites: Sites, stats: Stats) -> Followed:
        """Carry out the recipe.

        Args:
            way: the network, its data and the seed.
            sites: of the network.
            stats: for the scope `"currency"`, for means, and for the predictions in the plan.

        Raises:
            DataError: there is no data for what was asked.
            MethodError: no channel can go.
            InfeasibleError: not enough channels can go.
        """
        data = check_data(way.data, self.name) if self.trains else way.data
        keep = self._share(way)
        with way.timed("prune"):
            done = thin(
                way.network, sites, stats, keep, self.norm, self.scope,
                compensate=self.compensate, least=self.least,
            )  # fmt: skip
            edited = done.edited
            if data is not None and data.calibration is not None:
                recalibrate(edited.model, data.calibration)
            plan = thin_plan(way.network, sites, stats, way.budget, done.widths, done.kept, edited)
        final = edited
        history: tuple[Mapping[str, float], ...] = ()
        if self.trains and data is not None:
            with way.timed("recover"):
                recovery = Recovery(
                    epochs=self.epochs, lr=self.lr, distill=self.distill, rate=False, seed=way.seed
                )
                result = recover(
                    way.network, edited, data, recovery, macs=plan.original.macs,
                    progress=way.say("recover"),
                )  # fmt: skip
            final, history = result.edited, result.history
        settings = {"recipe": self.name, **asdict(self), "keep": keep}
        return Followed(plan, final, history, settings, tuple(_notes(done)), edited)

    def _share(self, way: Way) -> float:
        if way.budget.params is None:
            return self.keep
        whole = sum(p.numel() for p in way.network.module.parameters())
        limit = way.budget.resolve({"params": float(whole), "macs": 1.0, "bytes": 1.0,
                                    "seconds": 1.0})["params"]  # fmt: skip
        return min(1.0, limit / whole)


@dataclass(frozen=True)
class Thinned:
    """What pruning gave.

    Args:
        edited: the smaller network, and the edits that make it from the original.
        widths: all that could be pruned.
        kept: channels that stay, by name of the width.
        refusals: what could not be pruned, and why.
        alone: names of the widths whose lost means could be put nowhere.
    """

    edited: Edited
    widths: tuple[Width, ...]
    kept: Mapping[str, torch.Tensor]
    refusals: tuple[Refusal, ...] = ()
    alone: tuple[str, ...] = ()


def prune(
    network: Network,
    sites: Sites,
    stats: Stats,
    keep: float = 0.5,
    norm: str = "l2",
    scope: str = "uniform",
    **others: Any,
) -> Edited:
    """Return a network whose inner channels are fewer, without any training.

    Args:
        network: the original, which is not changed.
        sites: from `discover`.
        stats: from calibration; `Stats()` where there is none.
        keep: share of its parameters that may stay; the network has at most so many.
        norm, scope: see `Filters`.
        others: `compensate`, `least`, see `Filters`.

    Raises:
        MethodError: a setting that cannot be used, or no channel can go.
        InfeasibleError: not enough channels can go; `nearest` says how many parameters remain.
        DataError: what was asked needs statistics.

    Example:
        >>> from torch import nn
        >>> from lamina.network.discover import discover
        >>> net = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 3))
        >>> network = Network(net, (torch.zeros(2, 4),))
        >>> prune(network, discover(network), Stats(), keep=0.5).model[0]
        Linear(in_features=4, out_features=49, bias=True)
    """
    return thin(network, sites, stats, keep, norm, scope, **others).edited


def thin(
    network: Network,
    sites: Sites,
    stats: Stats,
    keep: float,
    norm: str = "l2",
    scope: str = "uniform",
    *,
    compensate: str = "auto",
    least: float = LEAST,
) -> Thinned:
    """Prune as `prune` does, and say what was pruned and what could not be."""
    check_choice(keep, norm, scope, compensate, least)
    found, refusals = find_widths(network, sites)
    if not found:
        given_up = [
            r.why for r in (*refusals, *sites.refusals) if r in refusals or r.what == "chain sites"
        ]
        why = given_up[0] if given_up else "no layer is followed by one other layer only"
        raise MethodError("the recipe filters finds no channel to prune", network.name, why)
    regressed = compensate in ("auto", "regress")
    kept = choose_channels(network, found, stats, keep, norm, scope, least, regressed)
    changed, alone = compensated(network, found, kept, stats, compensate)
    edits, buffers = narrow_edits(network.module, found, kept, changed)
    module = copy_module(network.module)
    install(module, (*edits, *buffers))
    # Moments of BatchNorms are no edits: they are stored as the network has them in the end.
    edited = Edited(Network(**{**vars(network), "module": module}), tuple(edits))
    return Thinned(edited, found, kept, refusals, alone)


def choose_channels(
    network: Network,
    found: Sequence[Width],
    stats: Stats,
    keep: float,
    norm: str,
    scope: str,
    least: float = LEAST,
    regressed: bool = False,
) -> dict[str, torch.Tensor]:
    """Return the channels that stay, by name of the width: as many as the parameters allow.

    Raises:
        InfeasibleError: with the fewest channels the network still has more parameters.
        DataError: the scope needs statistics.
    """
    room = [w.channels - max(1, math.ceil(least * w.channels)) for w in found]
    removals: list[tuple[int, int]] = []
    for _, number, channel in order_removals(network, found, stats, norm, scope, regressed):
        if room[number] > 0:
            room[number] -= 1
            removals.append((number, channel))
    limit = math.floor(keep * sum(p.numel() for p in network.module.parameters()) + 1e-6)

    def params(count: int) -> int:
        left = {w.name: w.channels for w in found}
        for number, _ in removals[:count]:
            left[found[number].name] -= 1
        return count_params(network, found, left)

    if params(len(removals)) > limit:
        fewest = params(len(removals))
        raise InfeasibleError(
            "no plan fits the budget", f"params={limit}",
            f"with the fewest channels {fewest} parameters are left",
            f"the nearest feasible budget is params={fewest}", {"params": float(fewest)},
        )  # fmt: skip
    low, high = 0, len(removals)  # parameters fall with every channel
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if params(middle) <= limit else (middle + 1, high)
    gone: dict[int, set[int]] = {}
    for number, channel in removals[:low]:
        gone.setdefault(number, set()).add(channel)
    return {
        w.name: torch.tensor([c for c in range(w.channels) if c not in gone.get(i, ())])
        for i, w in enumerate(found)
    }


def check_choice(keep: float, norm: str, scope: str, compensate: str, least: float) -> None:
    """Refuse settings that cannot be used.

    Raises:
        MethodError: names the setting.
    """
    for name, share in {"keep": keep, "least": least}.items():
        if not is_number(share) or not 0 <= share <= 1 or (name == "keep" and not share):
            raise MethodError("a share is over 0 and at most 1", f"{name}={share!r}")
    for name, word, known in (
        ("norm", norm, NORMS), ("scope", scope, SCOPES), ("compensate", compensate, FILLS)
    ):  # fmt: skip
        if word not in known:
            raise MethodError(f"unknown {name}", repr(word), "", f"choose from {', '.join(known)}")


def _notes(done: Thinned) -> list[str]:
    rows = [
        f"{w.producer.name} {w.channels} to {len(done.kept[w.name])}"
        for w in done.widths
        if len(done.kept[w.name]) < w.channels
    ]
    notes = [f"Channels that were pruned: {', '.join(rows) or 'none'}."]
    notes.append(
        "The plan keeps every value: which channels went is in the file, and is not carried out "
        "again by applying the plan."
    )
    if done.alone:
        notes.append(f"Nothing holds the mean of what went: {', '.join(done.alone)}.")
    notes += [f"Not pruned, {r.where}: {r.why}." for r in done.refusals]
    return notes
