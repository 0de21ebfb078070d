"""The plan that says what merging layers did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lamina.artifact import records
from lamina.forms import Plain
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Candidate, Step
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.plan import Budget, Edited, Plan
from lamina.plan.costs import fixed_cost
from lamina.plan.decide import write_plan
from lamina.recipes.merge_tables import Option


def merge_plan(
    network: Network,
    sites: Sites,
    stats: Stats,
    budget: Budget,
    options: Sequence[Option],
    edited: Edited,
) -> Plan:
    """Write down what every layer takes and is predicted to lose when some are merged.

    A decision is about one layer: so every decision is to keep the values of what is left at its
    place. The merged layer is written where the first of its span was, with the error of the span.

    Args:
        network, sites, stats, budget: as for any plan.
        options: what was chosen, for every layer that could be merged.
        edited: the merged network, before training.
    """
    changed = [o for o in options if o.change is not None]
    held = dict(edited.model.named_modules())
    owner, gone, errors = {}, set(), {}
    for option in changed:
        change = option.change
        assert change is not None
        names = [link.site.name for link in change.links]
        gone |= set(names[1:])
        errors[names[0]] = option.error
        owner[names[0]] = change.path
        if not change.kept:
            gone.add(names[0])
    taken = {}
    params = 0
    for site in sites.layers:
        module = held.get(owner.get(site.name, site.module))
        left = [] if site.name in gone or module is None else list(module.parameters())
        count = sum(p.numel() for p in left)
        params += count
        size = 8.0 * sum(len(records.encode(Plain(p.detach()))) for p in left)
        # A merged layer runs where its output is: at the positions of the last of its span.
        where = site
        for option in changed:
            links = option.change.links if option.change else ()
            if links and links[0].site.name == site.name:
                where = links[-1].site
        macs = where.positions * max((p.numel() for p in left if p.dim() > 1), default=0)
        cost = Cost(count, size, macs)
        taken[site.name] = Candidate(
            site.name, (Step("keep", site.name),), cost, errors.get(site.name, 0.0)
        )
    fixed = fixed_cost(network, sites)
    whole = sum(p.numel() for p in edited.model.parameters())
    fixed = replace(fixed, params=whole - params)
    return write_plan(network, sites, stats, taken, budget, fixed)
