"""Selectors: what each gives for layers of known matrices and statistics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lamina.errors import InfeasibleError
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.base import get_method
from lamina.network.sites import Site
from lamina.recipes.selectors import (
    MOST_RANKS,
    Work,
    by_loss,
    by_outputs,
    by_spectra,
    spread_ranks,
)


def work(name: str, f: int, n: int, seed: int, bias: str = "") -> Work:
    g = torch.Generator().manual_seed(seed)
    matrix = torch.randn(f, n, generator=g, dtype=torch.float64) @ torch.diag(
        torch.logspace(0, -2, n, dtype=torch.float64)
    )
    x = torch.randn(200, n, generator=g, dtype=torch.float64)
    d = torch.randn(200, f, generator=g, dtype=torch.float64)
    stats = LayerStats(H=(x.mT @ x / 200)[None], G=(d.mT @ d / 200)[None], samples=200,
                       mean=x.mean(0)[None])  # fmt: skip
    site = Site(name, module=name, weight=f"{name}.weight", bias=bias, shape=(f, n))
    return Work(site, matrix, stats)


LAYERS = [work("a", 6, 8, 0), work("b", 8, 6, 1, "b.bias")]
WHOLE = sum(w.matrix.numel() for w in LAYERS)


def predicted(w: Work, settings: dict[str, object]) -> float:
    """The loss of what the method makes of the settings."""
    assert w.stats is not None and not w.site.bias
    alds = get_method("alds")
    first, second = alds.leave(w.site, {"weight": w.matrix}, w.stats, settings)
    encode = first.weights["weight"].reshape(settings["folds"], settings["rank"], -1)
    product = second.weights["weight"] @ torch.block_diag(*encode)
    return predict_error(w.stats, w.matrix[None], (product - w.matrix)[None])


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_the_least_summed_loss_is_near_that_of_brute_force(share: float) -> None:
    layers = [work("a", 6, 8, 0), work("c", 8, 6, 1)]
    tables = []
    for w in layers:
        f, n = w.matrix.shape
        rows: list[tuple[int, float]] = [(f * n, 0.0)]
        for folds in (k for k in range(1, 9) if n % k == 0):
            for rank in range(1, min(f, n // folds) + 1):
                if (size := rank * (folds * f + n)) < f * n:
                    rows.append((size, predicted(w, {"folds": folds, "rank": rank})))
        tables.append(rows)
    ways = itertools.product(*tables)
    best = min(sum(e for _, e in way) for way in ways if sum(s for s, _ in way) <= share * WHOLE)
    found = by_loss(layers, share * WHOLE)
    ours = sum(predicted(w, found[w.site.name]) for w in layers if w.site.name in found)
    size = sum(
        s["rank"] * (s["folds"] * len(w.matrix) + w.matrix.shape[1]) if s else w.matrix.numel()
        for w in layers
        for s in [found.get(w.site.name)]
    )
    assert size <= share * WHOLE
    assert best * (1 - 1e-9) <= ours <= 1.5 * best  # prices find the hull, and a fill the rest


def test_outputs_are_kept_by_one_share_of_their_variance() -> None:
    found = by_outputs(LAYERS, 0.9 * WHOLE)
    assert found and all(s["metric"] == "outputs" and s["folds"] == 1 for s in found.values())
    assert found.get("a", {"bias": 1})["bias"] == 1 and "bias" not in found.get("b", {})


def test_a_bias_that_is_added_is_counted() -> None:
    least = (6 + 8 + 6) + (8 + 6)
    assert by_outputs(LAYERS, least)["a"] == {
        "folds": 1, "rank": 1, "metric": "outputs", "bias": 1,
    }  # fmt: skip
    with pytest.raises(InfeasibleError):
        by_outputs(LAYERS, least - 1)


def test_a_layer_that_varies_more_keeps_more() -> None:
    """Two layers of one weight; the inputs of one are all alike but for one direction."""
    plain = work("a", 16, 16, 0)
    assert plain.stats is not None
    H = torch.diag(torch.tensor([1.0] + [1e-4] * 15, dtype=torch.float64))[None]
    flat = LayerStats(H=H, G=plain.stats.G, samples=200)
    narrow = Work(Site("b", module="b", weight="b.weight", shape=(16, 16)), plain.matrix, flat)
    found = by_outputs([plain, narrow], 0.7 * 512)
    assert found["b"]["rank"] < found.get("a", {"rank": 16})["rank"]


@pytest.mark.parametrize("selector", ["alds", "alds-exact", "alds-repo", "svd", "l-rank"])
def test_selectors_of_weights_say_so(selector: str) -> None:
    found = by_spectra(selector, LAYERS, 0.6 * WHOLE, "exact", 0, (0,), 15)
    assert found and {s["metric"] for s in found.values()} == {"weights"}
    assert all("scheme" not in s for s in found.values())


def test_baselines_never_fold() -> None:
    for selector in ("svd", "svd-energy", "svd-error", "l-rank"):
        found = by_spectra(selector, LAYERS, 0.6 * WHOLE, "exact", 0, (0,), 15)
        assert {s["folds"] for s in found.values()} == {1}


def test_the_seed_decides_the_starts() -> None:
    layers = [work(str(i), 24, 24, i) for i in range(6)]
    budget = 0.5 * sum(w.matrix.numel() for w in layers)
    runs = [by_spectra("alds", layers, budget, "exact", s, (0,), 15) for s in (0, 0, 1)]
    assert runs[0] == runs[1]


def test_ranks_are_spread_over_their_logarithms() -> None:
    found = spread_ranks(1000)
    assert len(found) <= MOST_RANKS and (found[0], found[-1]) == (1, 1000)
    assert (np.diff(found) > 0).all() and found[:4] == [1, 2, 3, 4]
