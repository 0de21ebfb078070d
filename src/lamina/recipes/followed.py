"""What a recipe gives, and the plan that says what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamina.artifact import records
from lamina.artifact.exact import exact
from lamina.forms import Codebook, Values, find_tensor
from lamina.measure.stats import Cost, Stats, predict_error
from lamina.methods.base import Candidate, Step, weights_of
from lamina.methods.magnitude import prune
from lamina.network.sites import Site, Sites, as_matrix
from lamina.network.source import Network
from lamina.plan import Budget, Edited, Plan
from lamina.plan.decide import write_plan
from lamina.recipes.sharing import share


@dataclass(frozen=True)
class Followed:
    """What came of a recipe.

    Args:
        plan: the decisions, as chains that can be applied again without training.
        final: the network after training, and the edits that make it from the original.
        history: of all trainings, one after the other.
        settings: of the recipe, as JSON values.
        notes: what a reader should know, one sentence each.
        applied: the network before any training, where that is not what the plan alone makes.
    """

    plan: Plan
    final: Edited
    history: tuple[Mapping[str, float], ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())
    applied: Edited | None = None


def plan_of(
    network: Network,
    sites: Sites,
    stats: Stats,
    budget: Budget,
    chains: Mapping[str, tuple[tuple[Step, ...], Values]],
) -> Plan:
    """Write down what a recipe decides, with what that takes and does before any training.

    Args:
        network, sites, stats: as for any plan.
        budget: what will be checked.
        chains: by site name, its steps and the values they make of the original weight; a site that
            is not there is kept.
    """
    taken = {}
    for site in sites.layers:
        weights = weights_of(network, site)
        steps, values = chains.get(
            site.name, ((Step("keep", site.name),), exact(weights["weight"]))
        )
        bits = 8.0 * len(records.encode(values))
        bits += 8.0 * sum(t.numel() * t.element_size() for k, t in weights.items() if k == "bias")
        params = sum(t.numel() for t in weights.values())
        matrix = as_matrix(site, weights["weight"])
        change = as_matrix(site, values.dense() - weights["weight"].cpu())
        error = predict_error(stats.of(site.name), matrix.cpu(), change)
        taken[site.name] = Candidate(site.name, steps, Cost(params, bits, site.macs), error)
    return write_plan(network, sites, stats, taken, budget)


def left_alone(sites: Sites, done: Sequence[Site]) -> list[str]:
    """Return one sentence on the layers and tensors a recipe does not touch, if there are any."""
    names = [site.name for site in sites.layers if site not in done]
    others = len(sites.rest)
    found = []
    if names:
        found.append(f"Stored losslessly, for the recipe does not cover them: {', '.join(names)}.")
    if others:
        found.append(f"Stored losslessly, for they belong to no layer: {others} tensors.")
    return found


def sparse_chain(
    network: Network, site: Site, keep: float, most: int
) -> tuple[tuple[Step, ...], Codebook]:
    """Return the chain that prunes and shares without training, and what it makes of a layer.

    Args:
        network: the original.
        site: the layer.
        keep: share of its weights.
        most: values it may share.
    """
    weight = find_tensor(network.module, site.weight).detach()
    small = prune(weight, weight.abs(), keep)
    shared = share(small, most, "exact")
    steps = (
        Step("magnitude", site.name, {"keep": keep, "score": "magnitude"}),
        Step("kmeans", site.name, {"k": max(2, len(shared.centroids)), "weighted": False}),
    )
    return steps, shared
