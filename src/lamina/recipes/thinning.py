"""The plan that says what pruning channels did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from lamina.artifact import records
from lamina.forms import Plain, find_tensor
from lamina.measure.stats import Cost, Stats, predict_error
from lamina.methods.base import Candidate, Step, weights_of
from lamina.network.sites import Sites, as_matrix
from lamina.network.source import Network
from lamina.plan import Budget, Edited, Plan
from lamina.plan.costs import fixed_cost
from lamina.plan.decide import write_plan
from lamina.recipes.widths import Width


def thin_plan(
    network: Network,
    sites: Sites,
    stats: Stats,
    budget: Budget,
    found: Sequence[Width],
    kept: Mapping[str, torch.Tensor],
    edited: Edited,
) -> Plan:
    """Write down what a layer takes, runs and is predicted to lose when channels are gone.

    A decision is about one layer, and a channel belongs to several: so every decision is to keep
    the values of what is left, with the costs of what is left.

    Args:
        network, sites, stats, budget: as for any plan.
        found, kept: the widths, and the channels that stay.
        edited: the smaller network, before training.
    """
    lost = {w.consumer.name: (w, kept[w.name]) for w in found if len(kept[w.name]) < w.channels}
    taken = {}
    params = 0
    for site in sites.layers:
        before = weights_of(network, site)
        after = weights_of(edited.network, site)
        params += sum(t.numel() for t in after.values())
        size = 8.0 * sum(len(records.encode(Plain(t))) for t in after.values())
        error = 0.0
        if site.name in lost:
            width, stay = lost[site.name]
            gone = torch.ones(width.channels, dtype=torch.bool)
            gone[stay] = False
            change = torch.zeros_like(before["weight"], device="cpu")
            columns = width.inputs(gone.nonzero().flatten())
            change[:, columns] = -before["weight"].cpu()[:, columns]
            matrix = as_matrix(site, before["weight"].cpu())
            error = predict_error(stats.of(site.name), matrix, as_matrix(site, change))
        share = after["weight"].numel() / before["weight"].numel()
        cost = Cost(sum(t.numel() for t in after.values()), size, site.macs * share)
        taken[site.name] = Candidate(site.name, (Step("keep", site.name),), cost, error)
    fixed = fixed_cost(network, sites)
    for name in sites.rest:
        fewer = find_tensor(network.module, name).numel() - find_tensor(edited.model, name).numel()
        fixed = replace(fixed, bits=fixed.bits - 32.0 * fewer)
    whole = sum(p.numel() for p in edited.model.parameters())
    fixed = replace(fixed, params=whole - params)
    return write_plan(network, sites, stats, taken, budget, fixed)
