"""How much of each layer a recipe keeps, and the masks that hold it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import nn

from lamina.data import Data
from lamina.errors import MethodError
from lamina.forms import Edit, Sparse, find_tensor
from lamina.methods.magnitude import prune
from lamina.network.sites import Site
from lamina.network.source import Network
from lamina.plan.allocate import allocate
from lamina.plan.apply import copy_module
from lamina.recipes.settings import Pruning
from lamina.report.compare import affordable, installed, take_reference

OPERATIONS = ("linear", "conv", "conv_transpose", "recurrent")  # embeddings are left as they are
SHARES = (
    1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.085, 0.06, 0.042, 0.03, 0.021, 0.015, 0.01, 0.007,
    0.005,
)  # fmt: skip
SAMPLES = 500  # that a layer's sensitivity is measured on
FEWEST_SAMPLES = 16


def covered(network: Network, sites: Sequence[Site], recipe: str) -> list[Site]:
    """Return the layers a recipe works on: all with floating weights, but for embeddings.

    Raises:
        MethodError: there is none.
    """
    found = []
    for site in sites:
        weight = find_tensor(network.module, site.weight)
        if site.op in OPERATIONS and weight.is_floating_point() and weight.numel():
            found.append(site)
    if not found:
        raise MethodError(f"the recipe {recipe} finds no layer to work on", network.name)
    return found


def setting_of(site: Site, rules: Mapping[str, Any]) -> Any:
    """Return what the first rule says that names a site, or its operation; None where none does.

    Args:
        site: the layer.
        rules: by pattern of the site's name (`"block*.fc1"`) or by operation (`"conv"`).

    Example:
        >>> setting_of(Site("fc1", op="linear"), {"conv": 8, "fc*": 6, "linear": 5})
        6
    """
    for pattern, value in rules.items():
        if pattern == site.op or fnmatchcase(site.name, pattern):
            return value
    return None


def check_rules(what: str, rules: Mapping[str, Any], sites: Sequence[Site]) -> None:
    """Refuse a rule that names nothing.

    Raises:
        MethodError: no layer has that name, and none that operation; names the rule.
    """
    for pattern in rules:
        if pattern not in OPERATIONS and not any(fnmatchcase(s.name, pattern) for s in sites):
            raise MethodError(
                f"a rule of {what} names no layer", repr(pattern), "",
                f"the layers are {', '.join(site.name for site in sites)}",
            )  # fmt: skip


def sensitivities(
    network: Network, sites: Sequence[Site], loader: Iterable[Any], macs: float
) -> dict[str, list[float]]:
    """Measure how the outputs change when one layer alone is pruned, at every share of `SHARES`.

    Args:
        network: the original, which is not changed.
        sites: the layers.
        loader: inputs; no labels are needed.
        macs: of the network per sample, so that the work is bounded.

    Returns:
        by site name, the divergence from the original [nats per sample], never falling.
    """
    samples = max(FEWEST_SAMPLES, min(SAMPLES, affordable(macs, len(sites) * len(SHARES))))
    reference = take_reference(network, loader, samples)
    trial = copy_module(network.module)
    found: dict[str, list[float]] = {}
    for site in sites:
        weight = find_tensor(network.module, site.weight).detach()
        errors = []
        for share in SHARES:
            edit = Edit(site.weight, "values", values=Sparse(prune(weight, weight.abs(), share)))
            with installed(trial, [edit]):
                errors.append(reference.error(trial))
        found[site.name] = np.maximum.accumulate(np.nan_to_num(errors, nan=1e30)).tolist()
    return found


def choose_shares(
    sizes: Mapping[str, int], errors: Mapping[str, Sequence[float]], density: float
) -> dict[str, float]:
    """Return the share each layer keeps: least summed error at that many weights in all.

    Args:
        sizes: weights by site name.
        errors: of every share of `SHARES`, by site name.
        density: share of all these weights that may stay.

    Example:
        >>> errors = {"easy": [0.0] * 16, "hard": [float(i) for i in range(16)]}
        >>> choose_shares({"easy": 100, "hard": 100}, errors, 0.2)
        {'easy': 0.005, 'hard': 0.35}
    """
    names = list(sizes)
    shares = np.array(SHARES)
    limit = density * sum(sizes.values())
    smallest = SHARES[-1] * sum(sizes.values())
    if limit <= smallest:
        return dict.fromkeys(names, density)
    costs = [(shares * sizes[name])[:, None] for name in names]
    chosen = allocate([np.array(errors[n]) for n in names], costs, np.array([limit]), "sum")
    return {name: SHARES[i] for name, i in zip(names, chosen.choice, strict=True)}


def pruned(module: nn.Module, sites: Sequence[Site], shares: Mapping[str, float]) -> list[Edit]:
    """Return each layer's weight with its smallest entries at zero; zeros stay zero."""
    edits = []
    for site in sites:
        weight = find_tensor(module, site.weight).detach()
        if not bool(torch.isfinite(weight).all()):
            raise MethodError(
                "the weights are not finite", site.name, "NaN or inf cannot be ranked", "mend them"
            )
        edits.append(
            Edit(
                site.weight, "values", values=Sparse(prune(weight, weight.abs(), shares[site.name]))
            )
        )
    return edits


def shares_of(
    network: Network, layers: Sequence[Site], data: Data, pruning: Pruning
) -> dict[str, float]:
    """Return the share of its weights that each layer keeps in the end.

    Args:
        network: the original.
        layers: from `covered`.
        data: inputs to measure sensitivities on; validation and test are not looked at.
        pruning: what the user said.

    Raises:
        MethodError: a rule names no layer.
    """
    check_rules("keep", pruning.keep, layers)
    said = {site.name: setting_of(site, pruning.keep) for site in layers}
    free = [site for site in layers if said[site.name] is None]
    loader = data.calibration if data.calibration is not None else data.train
    if not free or loader is None:
        return {name: share or pruning.density for name, share in said.items()}
    errors = sensitivities(network, free, loader, sum(site.macs for site in layers))
    sizes = {site.name: find_tensor(network.module, site.weight).numel() for site in free}
    found = choose_shares(sizes, errors, pruning.density)
    return {name: share or found[name] for name, share in said.items()}


def at_round(share: float, number: int, rounds: int) -> float:
    """Return the share kept after round `number` of `rounds`: equal factors from 1 down.

    Example:
        >>> at_round(0.01, 1, 2), at_round(0.01, 2, 2)
        (0.1, 0.01)
    """
    return share if number == rounds else float(share ** (number / rounds))
