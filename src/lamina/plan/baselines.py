"""Ranks by one number for all layers: what the search over folds and errors is compared with.

Each rule has one argument, and its size only falls as the argument does. So each is taken exactly
to a budget, by a search of the argument over the values at which anything changes. Whatever would
take no fewer parameters than the dense layer stays dense, and no rank is below 1. Nothing is
filled: a rule that spent its rest by errors would be another rule; `Picks.params` is what it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from lamina.errors import PlanError
from lamina.plan.options import hull
from lamina.plan.ranks import Key, Picks, by_threshold, together
from lamina.plan.spectral import Array, Spectral

ENERGIES = {"frobenius": 2, "nuclear": 1}


def constant_ratio(layers: Sequence[Spectral], budget: float, folds: int = 1) -> Picks:
    """Return ranks that are one share of the full rank: `j = round(share r)` ("SVD").

    Args:
        layers: their spectra give r only.
        budget: parameters of all weights together.
        folds: k; a layer takes its nearest divisor (3 and 5: "ALDS-Simple").

    Raises:
        InfeasibleError: rank 1 in every layer takes more.

    Example:
        >>> import torch
        >>> from lamina.plan.spectral import measure_spectra
        >>> small, large = (measure_spectra(str(n), torch.randn(n, n), n) for n in (32, 64))
        >>> [pick.rank for pick in constant_ratio([small, large], 0.5 * (32**2 + 64**2)).layers]
        [8, 16]
    """

    def values(layer: Spectral, key: Key) -> Array:
        # the smallest j of at least `share r - 1/2` is what rounding gives
        most = layer.most(key)
        return np.maximum(0, 1 - (2 * np.arange(most + 1) + 1) / (2 * most))

    return _by_values(layers, budget, folds, values)


def constant_energy(
    layers: Sequence[Spectral], budget: float, norm: str = "frobenius", folds: int = 1
) -> Picks:
    """Return the smallest ranks whose tail holds at most one share of the energy ("SVD-energy").

    Args:
        layers, budget, folds: as in `constant_ratio`.
        norm: energy is the sum of squared singular values, or (`"nuclear"`) of themselves.

    Raises:
        InfeasibleError: rank 1 in every layer takes more.
        PlanError: there is no such norm.
    """
    if norm not in ENERGIES:
        raise PlanError("unknown norm", repr(norm), "", f"choose from {', '.join(ENERGIES)}")

    def values(layer: Spectral, key: Key) -> Array:
        return tail_shares((layer.spectra[key].numpy() ** ENERGIES[norm]).sum(0))

    return _by_values(layers, budget, folds, values)


def svd_error(
    layers: Sequence[Spectral], budget: float, folds: int = 1, score: str = "paper"
) -> Picks:
    """Return the smallest ranks below one relative spectral error: ALDS without its local step.

    Args:
        layers, budget: as in `constant_ratio`.
        folds: 1 is "SVD-error", 3 "ALDS-Error3".
        score: see `Spectral.layer`; with one fold they are all the same.

    Raises:
        InfeasibleError: rank 1 in every layer takes more.
    """
    return by_threshold([s.layer(score, [s.nearest(folds)]) for s in layers], budget)


def l_rank(layers: Sequence[Spectral], budget: float) -> Picks:
    """Return the ranks that minimise `price MACs(j) + sum_{i > j} s_i^2`, at one price for all.

    The dense layer is one of the options. With a falling price a layer moves along the lower convex
    hull of its options, so the price that fits is one of the hulls' slopes.

    Args:
        layers: one fold is used.
        budget: parameters of all weights together.

    Raises:
        InfeasibleError: rank 1 in every layer takes more.

    Reference: Idelbayev, Carreira-Perpinan, "Low-rank compression of neural nets: learning the rank
    of each layer", CVPR 2020.
    """
    return _by_values(layers, budget, 1, hull_slopes)


def tail_shares(energy: Array) -> Array:
    """Return the share of the energy beyond each rank 0..r, `[r + 1]`, of `[r]` falling energies.

    Example:
        >>> tail_shares(np.array([6.0, 3.0, 1.0])).tolist()
        [1.0, 0.4, 0.1, 0.0]
    """
    rest = np.append(np.cumsum(energy[::-1])[::-1], 0.0)  # from the end: small tails stay exact
    return rest / rest[0] if rest[0] > 0 else rest


def hull_slopes(layer: Spectral, key: Key = (0, 1)) -> Array:
    """Return for each rank 0..r the price of a MAC at and above which a layer stays at that rank.

    That is the slope of the hull's next segment, from rank 1 to the dense layer; what lies between
    two corners has the value of the first, so the first rank below a price is always a corner.

    Args:
        layer: the hull of its points (MACs, squared tail) is taken.
        key: scheme and folds.
    """
    squares = np.square(layer.spectra[key].numpy()).sum(0)
    rest = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    unit, most = layer.units[key], len(squares)
    last = min(most, (layer.dense - 1) // unit)
    ranks = np.arange(1, last + 1)
    macs = np.append(ranks * unit, layer.dense) * layer.positions
    errors = np.append(rest[ranks], 0.0)
    slopes = np.zeros(most + 1)
    corners = list(hull(errors, macs))
    for a, b in pairwise(corners):
        slopes[a + 1 : b + 1] = (errors[a] - errors[b]) / (macs[b] - macs[a])
    slopes[0] = np.inf
    return slopes


def _by_values(
    layers: Sequence[Spectral], budget: float, folds: int, values: Callable[[Spectral, Key], Array]
) -> Picks:
    """Take a rule to a budget; what is reported is the relative spectral error it leaves."""
    keys = [layer.nearest(folds) for layer in layers]
    rules = [s.with_values(key, values(s, key)) for s, key in zip(layers, keys, strict=True)]
    picks = []
    for s, pick in zip(layers, by_threshold(rules, budget).layers, strict=True):
        error = s.ask((pick.scheme, pick.folds), "exact")(pick.rank) if pick.rank else 0.0
        picks.append(replace(pick, error=error))
    return together(picks)
