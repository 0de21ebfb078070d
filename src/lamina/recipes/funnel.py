"""funnel: the Tucker ranks of all convolutions at once, found by training with gates.

**What.** Every convolution with a kernel is rewritten, exactly, as a 1x1, its kernel and a 1x1 of
full ranks (`tucker`), with a gate on each channel in between. The network is trained with a
funnel-type penalty on the gates (`train/funnel.py`), whose price is raised until the operations
come down to a share of the original's. Closed gates are dropped and the others multiplied into the
weights; a layer whose ranks save nothing becomes dense again. Then the network is trained on.

**Where it departs from the paper.** The formula of the penalty is our reading, `|g| / (|g| + c)`,
for the paper's was not to be had. Gates close by a proximal step, so that they are exactly zero;
the outer factors are fixed while there are gates, and what the core gains or loses in scale counts
as its gates', or rescaling would undo the penalty. Channels are sorted by the predicted loss where
there are statistics. If training leaves more operations than it should, the narrowest gates close.

**Reference.** Chu, Lee 2021 (funnel regularisation); Kim et al. 2016, arXiv:1511.06530 (Tucker-2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import torch

from lamina.errors import MethodError
from lamina.forms import Edit, Plain, find_tensor, install
from lamina.measure.stats import Cost, Stats, predict_error
from lamina.measure.tucker import compose, decompose
from lamina.methods.base import Candidate, Step, Weights, get_method, weights_of
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan import Edited, Plan
from lamina.plan.apply import copy_module
from lamina.plan.costs import original_cost
from lamina.plan.decide import write_plan
from lamina.recipes.followed import Followed
from lamina.recipes.retraining import add_phase, check_data, later
from lamina.recipes.settings import check_training, is_number
from lamina.stages import Way
from lamina.train import Recovery, recover
from lamina.train.funnel import Cut
from lamina.train.gating import Gating, Learned, train_gates


@dataclass(frozen=True)
class Funnel:
    """Settings of the recipe.

    Args:
        macs: share of the network's multiply-accumulates that may stay; a budget on `macs` goes
            before it.
        epochs: of training with gates [passes over the training data].
        last: of training after the gates are gone; 0: none.
        lr: peak learning rate of both.
        decay: of weights that are matrices, in both; never of gates.
        distill: weight of the original's outputs against the labels, 0..1.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> Funnel(macs=0.4).last
        10.0
    """

    name: ClassVar[str] = "funnel"
    trains: ClassVar[bool] = True  # needs training data
    macs: float = 0.5
    epochs: float = 10.0
    last: float = 10.0
    lr: float = 1e-3
    decay: float = 1e-3
    distill: float = 0.7

    def __post_init__(self) -> None:
        check_training(self.epochs, self.lr)
        check_training(self.last, self.lr)
        if not is_number(self.macs) or not 0 < self.macs <= 1:
            raise MethodError("a share is over 0 and at most 1", f"macs={self.macs!r}")
        if not is_number(self.decay) or self.decay < 0:
            raise MethodError("decay is 0 or more", f"decay={self.decay!r}")
        if not is_number(self.distill) or not 0 <= self.distill <= 1:
            raise MethodError("distill is between 0 and 1", f"distill={self.distill!r}")

    def follow(self, way: Way, sites: Sites, stats: Stats) -> Followed:
        """Carry out the recipe.

        Args:
            way: the network, its data and the seed.
            sites: of the network.
            stats: sort the channels, and make the predictions in the plan.

        Raises:
            DataError: there is no training data.
            MethodError: there is no convolution to work on.
        """
        data = check_data(way.data, self.name)
        layers = gateable(way.network, sites)
        whole = original_cost(way.network, sites).macs
        share = self._share(way, whole)
        gated = sum(site.macs for site in layers)
        with way.timed("gate"):
            gating = Gating(
                share * whole - (whole - gated), self.epochs, self.lr, self.decay,
                distill=self.distill, seed=way.seed,
            )  # fmt: skip
            learned = train_gates(
                way.network, layers, stats, later(data, 2 * way.seed), gating, way.say("gate")
            )
            edited = absorbed(way.network, layers, learned)
        history = [{**row, "phase": 1.0} for row in learned.history]
        if self.last:
            with way.timed("recover"):
                result = recover(
                    way.network, edited, later(data, 2 * way.seed + 1),
                    Recovery(epochs=self.last, lr=self.lr, decay=self.decay, distill=self.distill,
                             rate=False, seed=way.seed + 1),
                    progress=way.say("recover"),
                )  # fmt: skip
            edited = result.edited
            add_phase(history, result.history, 2.0)
        plan = funnel_plan(way, sites, stats, learned.cuts)
        settings = {"recipe": self.name, **asdict(self), "macs": share}
        notes = _notes(learned, layers, gating.limit, whole)
        return Followed(plan, edited, tuple(history), settings, tuple(notes))

    def _share(self, way: Way, whole: float) -> float:
        if way.budget.macs is None:
            return self.macs
        sizes = {"macs": whole, "params": 1.0, "bytes": 1.0, "seconds": 1.0}
        return min(1.0, way.budget.resolve(sizes)["macs"] / whole)


def gateable(network: Network, sites: Sites) -> list[Site]:
    """Return the convolutions that gates can be put on.

    Raises:
        MethodError: there is none.
    """
    tucker, found = get_method("tucker"), []
    for site in sites.layers:
        weight = find_tensor(network.module, site.weight)
        if tucker.refuse(site) or not weight.numel() or not weight.requires_grad:
            continue
        if not bool(torch.isfinite(weight).all()):
            raise MethodError("the weights are not finite", site.name, "NaN or inf has no spectrum")
        found.append(site)
    if not found:
        raise MethodError(
            "the recipe funnel finds no layer to work on", network.name,
            "it needs convolutions with a kernel, trainable and in one group",
        )  # fmt: skip
    return found


def absorbed(network: Network, sites: Sequence[Site], learned: Learned) -> Edited:
    """Return a copy of the network with the trained tensors, in the forms that training chose.

    Args:
        network: the original; sites: the layers that had gates; learned: from `train_gates`.
    """
    module = copy_module(network.module)
    forms: list[Edit] = []
    values: dict[str, torch.Tensor] = {}
    names = dict(module.named_parameters())
    for site in sites:
        cut = learned.cuts[site.name]
        like = find_tensor(module, site.weight)
        if cut.ranks is None:
            values[site.weight] = cut.weight.reshape(like.shape).to(like.dtype)
        else:
            r1, r2 = cut.ranks
            settings = {"outputs": r1, "inputs": r2}
            forms += get_method("tucker").structure(site, settings)
            decode, core, encode = decompose(cut.weight, None, r1, r2)
            shapes = [(r2, -1, *(1 for _ in site.kernel)), (r1, r2, *site.kernel)]
            shapes.append((-1, r1, *(1 for _ in site.kernel)))
            for i, (part, shape) in enumerate(zip((encode, core, decode), shapes, strict=True)):
                values[f"{site.module}.{i}.weight"] = part.reshape(shape).to(like.dtype)
    moved = {site.bias: f"{site.module}.2.bias" for site in sites
             if site.bias and learned.cuts[site.name].ranks is not None}  # fmt: skip
    buffers = dict(module.named_buffers())
    for name, tensor in learned.tensors.items():
        if name in names:
            values[moved.get(name, name)] = tensor
        elif name in buffers:
            with torch.no_grad():
                buffers[name].copy_(tensor)
    edits = [*forms, *(Edit(n, "values", values=Plain(t)) for n, t in values.items())]
    install(module, edits)
    return Edited(replace(network, module=module), tuple(edits))


def funnel_plan(way: Way, sites: Sites, stats: Stats, cuts: Mapping[str, Cut]) -> Plan:
    """Write down the ranks that training chose, with what they do to the original by themselves."""
    taken = {}
    for site in sites.layers:
        weights = weights_of(way.network, site)
        cut = cuts.get(site.name)
        if cut is None or cut.ranks is None:
            taken[site.name] = next(iter(get_method("keep").propose(site, weights, None)))
        else:
            taken[site.name] = _tucker(site, weights, stats, cut.ranks)
    return write_plan(way.network, sites, stats, taken, way.budget)


def _tucker(site: Site, weights: Weights, stats: Stats, ranks: tuple[int, int]) -> Candidate:
    """Return a layer's chain of `tucker` and `keep`, and what it costs and loses untrained."""
    settings = {"outputs": ranks[0], "inputs": ranks[1]}
    seen = stats.of(site.name)
    leaves = get_method("tucker").leave(site, weights, seen, settings)
    kept = [
        next(iter(get_method("keep").propose(leaf.site, leaf.weights, None))) for leaf in leaves
    ]
    encode, core, decode = (leaf.weights["weight"].double().flatten(2) for leaf in leaves)
    whole = weights["weight"].double().flatten(1)
    change = compose(decode.squeeze(2), core, encode.squeeze(2)).flatten(1) - whole
    cost = Cost()
    for candidate in kept:
        cost = cost + candidate.cost
    steps = (Step("tucker", site.name, settings), *(step for c in kept for step in c.steps))
    error = predict_error(seen, whole[None].cpu(), change[None].cpu())
    return Candidate(site.name, steps, cost, error)


def _notes(learned: Learned, sites: Sequence[Site], limit: float, whole: float) -> list[str]:
    ranks = [
        f"{site.name} {cut.ranks[0]}x{cut.ranks[1]}"
        for site in sites
        if (cut := learned.cuts[site.name]).ranks is not None
    ]
    notes = [f"Ranks that training chose (outputs x inputs): {', '.join(ranks) or 'none'}."]
    dense = [site.name for site in sites if learned.cuts[site.name].ranks is None]
    if dense:
        notes.append(f"Dense, for their ranks save nothing: {', '.join(dense)}.")
    if learned.macs > limit:
        over = (learned.macs - limit) / max(whole, 1.0)
        notes.append(
            f"The operations are {over:.1%} of the network's over the limit: "
            "every gate that could close is closed."
        )
    return notes
