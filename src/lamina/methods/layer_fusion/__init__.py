"""layer_fusion: layers of one role and shape share one weight.

**What.** The layers of a family are grouped, and every group holds one Parameter, stored once:
`mean` of the members' weights, the weight of least predicted loss (`solve`, by conjugate
gradients), the most central one as it is (`freeze`), the `first`, or of every entry the one of
largest magnitude (`max`). Groups are those of agglomerative clustering, all apart to all tied: by
what sharing a weight is predicted to cost, without data by `euclidean` distance (`distances.py` has
eleven more for the recipe). Biases and norms stay each layer's own: they are small, and take up
what differs in scale. In mode `drop` the other members do not run at all: their blocks become
nothing.

**Where.** Families of linear layers and convolutions: one role in the blocks of a transformer or a
mixer, one shape in the stage of a convolutional network. Tied, rigid and recurrent layers and
embeddings are in no family. `drop` is for plans written by hand, or the recipe: a block must be a
residual one, hold no other layer of the network, and give what it is given in shape. A step of
stage SHARE: methods of VALUES shape the shared tensor afterwards.

**Costs and predicts.** Parameters: one weight for each group, and all biases. MACs stay (`drop`:
fall by what no longer runs). The error is the sum of the members' predicted losses; that of a
shared weight for later steps is the nearest Kronecker product to that sum. Data-free it is the
largest relative spectral error of a member.

**Does not help** without training: layers that were trained apart are unlike, and their mean is
poor at the work of any of them. The predicted loss is then far outside of where it holds, and only
the order of offers means something. The recipe `layer-fusion` is the way to use it.

**Reference.** O'Neill, Ver Steeg, Galstyan 2020, arXiv:2007.14917; ACML 2021, PMLR 157.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lamina.artifact.records import values_bytes
from lamina.errors import MethodError, SiteError
from lamina.forms import Edit, Plain
from lamina.forms.tied import index_of
from lamina.measure.stats import Cost, LayerStats
from lamina.methods.base import Candidate, Choice, Leaf, Parts, Settings, Stage, Step
from lamina.methods.layer_fusion.distances import distances
from lamina.methods.layer_fusion.drop import block_of, check_droppable
from lamina.methods.layer_fusion.fuse import (
    COMBINES,
    Partition,
    combine,
    members_of,
    merge_order,
    numbered,
    shared_error,
    shared_stats,
    solve,
)
from lamina.methods.layers import check_parts, check_served
from lamina.methods.offers import falling
from lamina.network.sites import Site, Sites
from lamina.network.source import Network

MODES = ("tie", "drop")
WORK = 2e10  # multiply-accumulates that `propose` may spend on solving for one partition


@dataclass(frozen=True)
class LayerFusion:
    """The method; see the card above."""

    name: str = "layer_fusion"
    stage: Stage = Stage.SHARE
    kinds: tuple[str, ...] = ("family",)
    needs: frozenset[str] = frozenset({"input_gram", "output_gram"})
    reference: str = "O'Neill, Ver Steeg, Galstyan 2020, arXiv:2007.14917"
    final: bool = False

    def places(self, sites: Sites) -> Iterable[Site]:
        """Return all families."""
        return sites.families

    def refuse(self, site: Site) -> str:
        """Return why layers cannot share a weight, or `""`."""
        if site.kind not in self.kinds:
            return f"it is a {site.kind}, not a family of layers that are alike"
        if len(site.members) < 2:
            return "one layer has nobody to share with"
        if site.op not in ("linear", "conv", "conv_transpose"):
            return f"layers of the operation {site.op} do not share weights"
        return ""

    def propose(self, site: Site, parts: Parts) -> tuple[Candidate, ...]:
        """Offer partitions, all tied to one pair tied, cheapest first; no better one is cheaper.

        Raises:
            SiteError: the weights are not finite.
        """
        if self.refuse(site):
            return ()
        check_parts(site, parts)
        how = _way(site, parts)
        order = reversed(merge_order(pair_costs(parts))[1:])
        return tuple(falling(offer(site, parts, partition, how) for partition, _ in order))

    def leave(self, site: Site, parts: Parts, settings: Settings) -> tuple[Leaf, ...]:
        """Return one layer for each group, with the statistics of all its uses together.

        Raises:
            MethodError: the settings do not fit the family.
        """
        partition, how, mode = read_settings(site, settings)
        leaves = []
        for group in members_of(partition):
            first, others = parts.members[group[0]], [parts.members[i] for i in group[1:]]
            weights = dict(first.weights)
            weights["weight"] = _shared(site, parts, group, how)
            if mode == "drop" or not others:
                leaves.append(Leaf(first.site, weights, first.stats))
                continue
            stats = [parts.members[i].stats for i in group]
            known = [s for s in stats if s is not None]
            used = replace(
                first.site,
                aliases=tuple(o.site.weight for o in others),
                positions=sum(parts.members[i].site.positions for i in group),
            )
            both = shared_stats(known) if len(known) == len(stats) else None
            leaves.append(Leaf(used, weights, both, sum(_own_bits(o) for o in others)))
        return tuple(leaves)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return what no longer runs; a tie changes nothing of what runs.

        Raises:
            MethodError: the settings do not fit the family.
        """
        partition, _, mode = read_settings(site, settings)
        if mode == "tie":
            return ()
        gone = [i for group in members_of(partition) for i in group[1:]]
        return tuple(Edit(block_of(site, i), "identity") for i in gone)

    def apply(self, network: Network, choice: Choice, parts: Parts) -> list[Edit]:
        """Return the ties, or what becomes nothing, and then the values of shared weights.

        Raises:
            SiteError: the site cannot be served, or a block cannot be dropped.
            MethodError: the settings do not fit the family.
        """
        site = choice.site
        check_served(self, site)
        check_parts(site, parts)
        partition, how, mode = read_settings(site, choice.settings)
        groups = members_of(partition)
        if mode == "drop":
            for i in (i for group in groups for i in group[1:]):
                layer = parts.members[i].site
                check_droppable(network, block_of(site, i), (layer.weight, layer.bias))
            edits = list(self.structure(site, choice.settings))
        else:
            edits = [
                tie_edit(network, parts.members[i].site.module, parts.members[group[0]].site.module)
                for group in groups
                for i in group[1:]
            ]
        for group in groups:
            if len(group) > 1:
                one = _shared(site, parts, group, how)
                edits.append(Edit(parts.members[group[0]].site.weight, "values", values=Plain(one)))
        return edits


def tie_edit(network: Network, follower: str, leader: str) -> Edit:
    """Return the edit that lets one layer use another one's weight.

    Args:
        network: as it is when the edit will be installed.
        follower, leader: module paths.
    """
    return Edit(follower, "tie", {"with": index_of(network.module, leader)})


def read_settings(site: Site, settings: Settings) -> tuple[Partition, str, str]:
    """Return the group of each member, how weights are combined, and the mode.

    Args:
        site: the family.
        settings: `groups`: a number for each member, equal for those that share; `combine`, see
            `fuse.COMBINES` (default `"mean"`); `mode`: `"tie"` (default) or `"drop"`.

    Raises:
        MethodError: they do not fit the family.

    Example:
        >>> read_settings(Site("f", "family", members=("a", "b", "c")), {"groups": [3, 1, 3]})
        ((0, 1, 0), 'mean', 'tie')
    """
    labels = settings.get("groups")
    how, mode = settings.get("combine", "mean"), settings.get("mode", "tie")
    fits = (
        isinstance(labels, Sequence)
        and len(labels) == len(site.members)
        and all(isinstance(label, int) and not isinstance(label, bool) for label in labels)
    )
    if not fits or how not in COMBINES or mode not in MODES:
        raise MethodError(
            "layer_fusion does not have these settings for this family",
            site.name,
            repr(dict(settings)),
            f"groups are {len(site.members)} whole numbers, combine one of {', '.join(COMBINES)}, "
            f"mode one of {', '.join(MODES)}",
        )
    return numbered(labels), how, mode  # type: ignore[arg-type]


# --- groups --------------------------------------------------------------------------------------


def offer(site: Site, parts: Parts, partition: Partition, how: str) -> Candidate:
    """Return what a partition of a family costs, and is predicted to lose.

    Args:
        site, parts: the family.
        partition: the group of each member.
        how: weights are combined, see `fuse.COMBINES`.

    Raises:
        SiteError: a weight cannot be solved for without statistics.
    """
    errors = [
        shared_error(
            parts.members[group[0]].site,
            [parts.members[i].weights["weight"] for i in group],
            [parts.members[i].stats for i in group],
            _shared(site, parts, group, how),
        )
        for group in members_of(partition)
        if len(group) > 1
    ]
    free = any(m.stats is None for m in parts.members)
    error = max(errors, default=0.0) if free else sum(errors)
    step = Step(method.name, site.name, {"groups": list(partition), "combine": how})
    return Candidate(site.name, (step,), _cost(site, parts, partition), error)


def pair_costs(parts: Parts) -> Tensor:
    """Return what it is predicted to cost any two members to share a weight `[n, n]`.

    Data-free: their distances.
    """
    members = parts.members
    if any(m.stats is None for m in members):
        return distances([m.weights["weight"].flatten(1) for m in members])
    found = torch.zeros(len(members), len(members), dtype=torch.float64)
    for i, one in enumerate(members):
        for j, two in enumerate(members[:i]):
            pair = [one.weights["weight"], two.weights["weight"]]
            cost = shared_error(one.site, pair, [one.stats, two.stats], combine(pair))
            found[i, j] = found[j, i] = cost
    return found


def _way(site: Site, parts: Parts) -> str:
    """Return `"solve"` where there are statistics and it does not take too long, else `"mean"`."""
    if any(m.stats is None for m in parts.members):
        return "mean"
    _, rows, columns = parts.members[0].site.matrix_shape
    work = 50.0 * len(parts.members) * rows * columns * (rows + columns)
    return "solve" if work <= WORK else "mean"


def _shared(site: Site, parts: Parts, group: Sequence[int], how: str) -> Tensor:
    """Return the weight of a group.

    Raises:
        SiteError: it cannot be solved without statistics.
    """
    weights = [parts.members[i].weights["weight"] for i in group]
    if len(group) == 1:
        return weights[0]
    if how != "solve":
        return combine(weights, how)
    stats = [parts.members[i].stats for i in group]
    known: list[LayerStats] = [s for s in stats if s is not None]
    if len(known) < len(stats):
        raise SiteError(
            "a shared weight cannot be solved for", site.name, "there are no statistics of it",
            "give calibration data, or combine='mean'",
        )  # fmt: skip
    return solve(parts.members[group[0]].site, weights, known).to(weights[0].device)


# --- costs ---------------------------------------------------------------------------------------


def _cost(site: Site, parts: Parts, partition: Partition) -> Cost:
    groups = members_of(partition)
    total = Cost(macs=sum(m.site.macs for m in parts.members))
    for group in groups:
        first = parts.members[group[0]]
        bits = sum(8.0 * values_bytes(t) for t in first.weights.values())
        total = total + Cost(sum(t.numel() for t in first.weights.values()), bits)
        for i in group[1:]:
            bias = parts.members[i].weights.get("bias")
            own = 0 if bias is None else bias.numel()
            total = total + Cost(own, _own_bits(parts.members[i]))
    return total


def _own_bits(follower: Leaf) -> float:
    """Return what a layer without a weight of its own takes: its bias, and the word of its tie."""
    bias = follower.weights.get("bias")
    word = 8.0 * len(json.dumps([follower.site.module, "tie", {"with": 100}]))
    return word + (0.0 if bias is None else 8.0 * values_bytes(bias))


method = LayerFusion()
