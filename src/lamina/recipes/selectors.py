"""Selectors: folds and ranks for all layers within a number of parameters, by name.

| name | chooses | data |
|---|---|---|
| `alds` | Algorithm 1: folds and ranks, least largest spectral error | none |
| `alds-exact` | the same problem, solved exactly | none |
| `alds-repo` | as the published code, its score and its off-by-one | none |
| `data-aware` | folds and ranks, least sum of predicted losses | calibration |
| `svd` | one share of the full rank for all layers | none |
| `svd-energy` | one share of the squared singular values for all layers | none |
| `svd-error` | one spectral error for all layers, one fold | none |
| `l-rank` | one price of a MAC for all layers, in squared singular values | none |
| `pca` | one share of the outputs' variance for all layers | calibration |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lamina.errors import InfeasibleError
from lamina.measure.low_rank import damp, fold_basis, losses_of_ranks
from lamina.measure.pca import output_energies
from lamina.measure.stats import LayerStats
from lamina.methods.alds.leaves import about_mean
from lamina.methods.layers import channels_of
from lamina.network.sites import Site
from lamina.plan.allocate import allocate
from lamina.plan.baselines import constant_energy, constant_ratio, l_rank, svd_error, tail_shares
from lamina.plan.ranks import Picks, algorithm_1, by_threshold, minimax
from lamina.plan.spectral import Spectral, divisors, measure_spectra

SELECTORS = (
    "alds", "alds-exact", "alds-repo", "data-aware",
    "svd", "svd-energy", "svd-error", "l-rank", "pca",
)  # fmt: skip
NEED_STATS = ("data-aware", "pca")
MOST_FOLDS = 8  # of the data-aware selector
MOST_RANKS = 64  # that it looks at, per number of folds

Chosen = dict[str, dict[str, Any]]  # by site name, the settings of its pair


@dataclass(frozen=True)
class Work:
    """One layer to be selected for.

    Args:
        site: of the layer.
        matrix: its weight `[f, c K]`, float64.
        stats: of the layer; None: data-free.
    """

    site: Site
    matrix: torch.Tensor
    stats: LayerStats | None

    @property
    def bias_added(self) -> int:
        """Parameters of the bias that PCA gives a layer which has none."""
        return 0 if self.site.bias else len(self.matrix)


def by_spectra(
    selector: str,
    layers: Sequence[Work],
    budget: float,
    score: str,
    seed: int,
    schemes: Sequence[int],
    seeds: int,
) -> Chosen:
    """Choose with a selector that looks at the weights alone.

    Raises:
        InfeasibleError: rank 1 in every layer takes more than the budget.
    """
    searches = selector.startswith("alds")
    spectral = [_spectral(w, schemes if searches else (0,), searches) for w in layers]
    if searches:
        repo = selector == "alds-repo"
        curves = [layer.layer("repo" if repo else score) for layer in spectral]
        if selector == "alds-exact":
            picks = minimax(curves, budget)
        else:
            picks = algorithm_1(curves, budget, seeds=seeds, seed=seed, repo=repo)
    else:
        rules: dict[str, Callable[..., Picks]] = {
            "svd": constant_ratio, "svd-energy": constant_energy,
            "svd-error": svd_error, "l-rank": l_rank,
        }  # fmt: skip
        picks = rules[selector](spectral, budget)
    return _settings(layers, picks, {"metric": "weights"})


def by_outputs(layers: Sequence[Work], budget: float) -> Chosen:
    """Choose by the variance of the outputs, as PCA does: one share of it for all layers.

    Raises:
        InfeasibleError: rank 1 in every layer takes more than the budget.
    """
    rules = []
    for w in layers:
        assert w.stats is not None
        energies = output_energies(w.matrix, w.stats).cpu()
        f, n = w.matrix.shape
        spectral = Spectral(w.site.name, f, n, {(0, 1): energies[None]}, {(0, 1): f + n})
        rules.append(spectral.with_values((0, 1), tail_shares(energies.numpy()), w.bias_added))
    found = _settings(layers, by_threshold(rules, budget), {"metric": "outputs"})
    added = {w.site.name: {"bias": 1} for w in layers if w.bias_added}
    return {name: {**settings, **added.get(name, {})} for name, settings in found.items()}


def by_loss(layers: Sequence[Work], budget: float) -> Chosen:
    """Choose folds and ranks of least summed predicted loss: the planner, on pairs alone.

    Raises:
        InfeasibleError: rank 1 in every layer takes more than the budget.
    """
    tables = [_loss_table(w) for w in layers]
    errors = [np.array([error for _, error, _ in table]) for table in tables]
    costs = [np.array([float(params) for params, _, _ in table]) for table in tables]
    try:
        taken = allocate(errors, costs, np.array([budget]), "sum")
    except InfeasibleError as error:
        least = error.nearest.get("0", float("nan"))
        raise InfeasibleError(
            "no ranks fit the budget", f"{budget:,.0f} parameters",
            f"rank 1 in every layer takes {least:,.0f}", f"allow {least:,.0f} parameters or more",
            {"params": least},
        ) from None  # fmt: skip
    return {
        w.site.name: dict(settings)
        for w, table, i in zip(layers, tables, taken.choice, strict=True)
        if (settings := table[i][2])
    }


def _spectral(work: Work, schemes: Sequence[int], all_folds: bool) -> Spectral:
    site = work.site
    kernel = site.kernel if site.op == "conv" else ()
    return measure_spectra(
        site.name, work.matrix, channels_of(site), kernel=kernel, positions=site.positions,
        folds=None if all_folds else (1,),
        schemes=schemes if len(kernel) == 2 else (0,),
    )  # fmt: skip


def _settings(layers: Sequence[Work], picks: Picks, more: Mapping[str, Any]) -> Chosen:
    found: Chosen = {}
    for w, pick in zip(layers, picks.layers, strict=True):
        if pick.rank:
            found[w.site.name] = {"folds": pick.folds, "rank": pick.rank, **more}
            if pick.scheme:
                found[w.site.name]["scheme"] = pick.scheme
    return found


def _loss_table(work: Work) -> list[tuple[int, float, Mapping[str, Any]]]:
    """Return (parameters, predicted loss, settings) of what a layer may become, dense first."""
    assert work.stats is not None
    f, n = work.matrix.shape
    stats = about_mean(work.stats)[0] if work.site.bias else work.stats
    H, G = damp(stats.H[0]), damp(stats.G[0])
    rows: list[tuple[int, float, Mapping[str, Any]]] = [(f * n, 0.0, {})]
    for folds in divisors(channels_of(work.site)):
        unit = folds * f + n
        ranks = spread_ranks((f * n - 1) // unit)
        if folds > MOST_FOLDS or not ranks:
            continue
        losses = losses_of_ranks(work.matrix, stats, H, fold_basis(work.matrix, H, G, folds), ranks)
        rows += [
            (j * unit, loss, {"folds": folds, "rank": j})
            for j, loss in zip(ranks, losses, strict=True)
        ]
    return rows


def spread_ranks(most: int) -> list[int]:
    """Return at most `MOST_RANKS` ranks from 1 to `most`, evenly over their logarithms.

    Example:
        >>> spread_ranks(3), spread_ranks(0), len(spread_ranks(500)) <= MOST_RANKS
        ([1, 2, 3], [], True)
    """
    if most <= MOST_RANKS:
        return list(range(1, most + 1))
    return sorted({round(most ** (i / (MOST_RANKS - 1))) for i in range(MOST_RANKS)})
