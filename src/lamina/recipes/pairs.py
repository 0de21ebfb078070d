"""Pairs of layers: which are chosen for a network, the plan that says so, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from lamina.errors import DataError, InfeasibleError, MethodError
from lamina.forms import find_tensor
from lamina.measure.schemes import Scheme, expand, recompose
from lamina.measure.stats import Cost, LayerStats, Stats, predict_error
from lamina.methods.alds.leaves import about_mean
from lamina.methods.base import Candidate, Method, Step, get_method, weights_of
from lamina.network.sites import Site, Sites, as_matrix
from lamina.network.source import Network
from lamina.plan import Budget, Edited, Plan
from lamina.plan.apply import copy_module
from lamina.plan.costs import original_cost
from lamina.plan.decide import write_plan
from lamina.recipes.selectors import NEED_STATS, Chosen, Work, by_loss, by_outputs, by_spectra


def choose_pairs(
    network: Network,
    sites: Sites,
    stats: Stats,
    selector: str,
    keep: float,
    score: str = "exact",
    seed: int = 0,
    *,
    schemes: Sequence[int] = (0,),
    seeds: int = 15,
    exclude: Sequence[str] = (),
) -> Chosen:
    """Return the settings of the pair of each layer that becomes one, by site name.

    Args:
        network, sites: what is compressed.
        stats: only looked at by selectors that need them.
        selector, keep, score, seed, schemes, seeds, exclude: see `LowRank`.

    Raises:
        DataError: the selector needs statistics.
        MethodError: there is no layer to work on, or a pattern names none.
        InfeasibleError: rank 1 in every layer takes more; `nearest` says what the network takes.
    """
    if selector in NEED_STATS and not stats.samples:
        raise DataError(
            f"the selector {selector} needs calibration data", "data.calibration", "",
            "give some, or choose one that needs none",
        )  # fmt: skip
    served = served_sites(network, sites, exclude)
    layers = []
    for site in served:
        seen = stats.of(site.name) if selector in NEED_STATS else None
        if selector in NEED_STATS and seen is None:
            continue  # calibration never saw it: nothing is known of its loss
        weight = find_tensor(network.module, site.weight).detach()
        if not bool(torch.isfinite(weight).all()):
            raise MethodError("the weights are not finite", site.name, "NaN or inf has no spectrum")
        layers.append(Work(site, as_matrix(site, weight)[0].to("cpu", torch.float64), seen))
    whole = sum(p.numel() for p in network.module.parameters())
    fixed = whole - sum(w.matrix.numel() for w in layers)
    budget = keep * whole - fixed
    try:
        if selector == "data-aware":
            return by_loss(layers, budget)
        if selector == "pca":
            return by_outputs(layers, budget)
        return by_spectra(selector, layers, budget, score, seed, schemes, seeds)
    except InfeasibleError as error:
        least = error.nearest["params"] + fixed
        raise InfeasibleError(
            "no plan fits the budget", f"keep={keep:g}, {keep * whole:,.0f} parameters",
            f"rank 1 in every layer and what no layer holds take {least:,.0f}",
            f"the nearest feasible budget is params={least:.0f}",
            {"params": least, "keep": least / max(1, whole)},
        ) from None  # fmt: skip


def served_sites(network: Network, sites: Sites, exclude: Sequence[str] = ()) -> list[Site]:
    """Return the layers that may become a pair.

    Raises:
        MethodError: there is none, or a pattern of `exclude` names no layer.
    """
    for pattern in exclude:
        if not any(fnmatchcase(site.name, pattern) for site in sites.layers):
            names = ", ".join(site.name for site in sites.layers)
            raise MethodError(
                "exclude names no layer", repr(pattern), "", f"the layers are {names}"
            )
    alds, found = get_method("alds"), []
    for site in sites.layers:
        weight = find_tensor(network.module, site.weight)
        if alds.refuse(site) or not weight.is_floating_point() or not weight.numel():
            continue
        if not any(fnmatchcase(site.name, pattern) for pattern in exclude):
            found.append(site)
    if not found:
        raise MethodError("the recipe low-rank finds no layer to work on", network.name)
    return found


def pairs_plan(network: Network, sites: Sites, stats: Stats, chosen: Chosen, keep: float) -> Plan:
    """Return the plan of chosen pairs, with what they cost and are predicted to lose.

    Args:
        network, sites, stats: as for any plan.
        chosen: from `choose_pairs`; a site that is not there is kept.
        keep: share of the parameters, for the plan's budget.
    """
    alds, kept = get_method("alds"), get_method("keep")
    taken = {}
    for site in sites.layers:
        seen = stats.of(site.name)
        if site.name in chosen:
            taken[site.name] = pair_candidate(network, site, seen, chosen[site.name], alds, kept)
        else:
            (taken[site.name],) = kept.propose(site, weights_of(network, site), seen)
    budget = Budget(params=max(1.0, keep * original_cost(network, sites).params))
    return write_plan(network, sites, stats, taken, budget)


def pair_candidate(
    network: Network,
    site: Site,
    stats: LayerStats | None,
    settings: Mapping[str, Any],
    alds: Method,
    kept: Method,
) -> Candidate:
    """Return the candidate of one pair, both of its layers kept as they are."""
    weights = weights_of(network, site)
    first, second = alds.leave(site, weights, stats, settings)
    steps, cost = [Step(alds.name, site.name, dict(settings))], Cost()
    for leaf in (first, second):
        (offer,) = kept.propose(leaf.site, leaf.weights, leaf.stats)
        steps += offer.steps
        cost = cost + offer.cost
    kernel = site.kernel if site.op == "conv" else ()
    folds, scheme = settings["folds"], Scheme(settings.get("scheme", 0), kernel)
    encode = as_matrix(first.site, first.weights["weight"].double())
    decode = second.weights["weight"].double().flatten(1)
    matrix = as_matrix(site, weights["weight"].double())[0]
    product = decode @ torch.block_diag(*expand(encode, scheme))
    assert len(encode) == folds
    moved = "bias" in second.weights and settings.get("metric") != "weights"
    seen = about_mean(stats)[0] if stats is not None and moved else stats
    return Candidate(
        site.name, tuple(steps), cost, predict_error(seen, matrix[None], (product - matrix)[None])
    )


def recomposed(original: Network, edited: Edited, sites: Sites) -> Network:
    """Return the network with every pair composed to one layer again, in the original's shape.

    Args:
        original: the network that was edited; only its structure counts.
        edited: with pairs that have no bias which the original does not have.
        sites: of the original.
    """
    module = copy_module(original.module)
    pairs = {e.path: e.settings for e in edited.edits if e.form == "low_rank"}
    turned = {site.module for site in sites.layers if site.transposed}
    state = edited.model.state_dict()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            path, _, leaf = name.rpartition(".")
            if path not in pairs:
                tensor.copy_(state[name])
            elif leaf == "weight":
                encode, decode = (state[f"{path}.{i}.weight"] for i in (0, 1))
                whole = recompose(encode.double(), decode.double(), pairs[path]["folds"])
                tensor.copy_(whole.mT if path in turned else whole)
            else:
                tensor.copy_(state[f"{path}.1.{leaf}"])
    return replace(original, module=module)
