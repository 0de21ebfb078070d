"""What Layer Fusion may drop, and the plan that says what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lamina.errors import SiteError
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Candidate, get_method, weights_of
from lamina.methods.layer_fusion import method, offer
from lamina.methods.layer_fusion.drop import undroppable
from lamina.methods.layer_fusion.fuse import Partition
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.network.trace import trace
from lamina.plan import Edited, Plan
from lamina.plan.costs import fixed_cost
from lamina.plan.decide import write_plan
from lamina.plan.spans import parts_of
from lamina.recipes.tying import Bundle
from lamina.stages import Way


def droppable(network: Network, bundles: Sequence[Bundle]) -> tuple[Bundle, ...]:
    """Return the bundles whose blocks may all vanish.

    Raises:
        SiteError: there is none; says why the first cannot.
    """
    flow = trace(network)
    found, reasons = [], []
    for bundle in bundles:
        if not bundle.blocks:
            reasons.append((bundle.name, "its layers are not one to a block"))
            continue
        why = ""
        for block in bundle.blocks:
            why = why or undroppable(network, block, None, flow)
        if why:
            reasons.append((bundle.name, why))
        else:
            found.append(bundle)
    if not found:
        where, why = reasons[0]
        raise SiteError("no block can be dropped", where, why, "tie instead: mode='tie'")
    return tuple(found)


def fusion_plan(
    way: Way,
    sites: Sites,
    stats: Stats,
    bundles: Sequence[Bundle],
    groups: Sequence[Partition],
    how: str,
    dropped: Edited | None = None,
) -> Plan:
    """Write down which layers share, with what that takes and is predicted to lose.

    Args:
        way: the original, and the budget that will be checked.
        sites, stats: as for any plan.
        bundles, groups: what shares.
        how: weights are combined.
        dropped: the network without the other blocks of each group, where they do not share but
            are gone. That is no decision about layers: there every value is kept.
    """
    network, keep = way.network, get_method("keep")
    taken: dict[str, Candidate] = {}
    claimed: set[str] = set()
    for bundle, partition in zip(bundles, groups, strict=True):
        for family in bundle.families:
            if dropped or len(set(partition)) == bundle.count:
                continue
            parts = parts_of(network, sites, stats, family)
            one = offer(family, parts, partition, how)
            steps = list(one.steps)
            for leaf in method.leave(family, parts, one.steps[0].settings):
                steps += next(iter(keep.propose(leaf.site, leaf.weights, leaf.stats))).steps
            taken[family.name] = Candidate(family.name, tuple(steps), one.cost, one.error)
            claimed |= set(family.members)
    left = dict((dropped.model if dropped else network.module).named_modules())
    for site in sites.layers:
        if site.name not in claimed:
            (one,) = keep.propose(site, weights_of(network, site), stats.of(site.name))
            taken[site.name] = one if site.module in left else replace(one, cost=Cost())
    fixed = fixed_cost(network, sites)
    if dropped:  # norms go with their blocks
        whole = sum(p.numel() for p in dropped.model.parameters())
        fixed = replace(fixed, params=whole - sum(c.cost.params for c in taken.values()))
    return write_plan(network, sites, stats, taken, way.budget, fixed)
