"""Curves of long layers: what lies between knots, and what some columns tell of an embedding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lamina import codecs
from lamina.measure.stats import LayerStats
from lamina.methods.rdoq import curves as module
from lamina.methods.rdoq import method, quantize
from lamina.methods.rdoq.curves import Point, best_scale, between, curve_of
from lamina.methods.rdoq.problem import pose
from lamina.methods.rdoq.rounding import scales_for
from lamina.network.sites import Site


def moment(size: int, seed: int, low: float = -1.5) -> torch.Tensor:
    """Some directions count far more than others, and they are mixed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 3 * size, size, generator=generator, dtype=torch.float64)
    y = x * torch.logspace(0, low, size, dtype=torch.float64)
    y = y + 0.3 * y.roll(1, 2)
    return y.transpose(1, 2) @ y / (3 * size)


def long_layer() -> tuple[Site, dict[str, torch.Tensor], LayerStats]:
    site = Site("w", weight="weight", bias="bias", shape=(260, 256))
    generator = torch.Generator().manual_seed(0)
    weights = {
        "weight": 0.05 * torch.randn(260, 256, generator=generator),
        "bias": 0.1 * torch.randn(260, generator=generator),
    }
    mean = torch.zeros(1, 256, dtype=torch.float64)
    return site, weights, LayerStats(moment(256, 1), moment(260, 2, -0.7), mean, 1.0, 1.0, 500)


def table() -> tuple[Site, dict[str, torch.Tensor], LayerStats]:
    site = Site("e", op="embedding", weight="weight", shape=(2500, 40))
    rng = np.random.default_rng(0)
    weights = {"weight": torch.from_numpy(0.05 * rng.standard_normal((2500, 40))).float()}
    counts = torch.from_numpy(rng.zipf(1.3, 2500).clip(max=2000).astype(float))[None] / 500
    counts[0, rng.permutation(2500)[:800]] = 0.0
    return site, weights, LayerStats(counts, moment(40, 3), None, 20.0, 1.0, 500)


@pytest.mark.parametrize("case", [long_layer, table])
def test_offers_between_knots_cost_what_they_say(case, monkeypatch) -> None:
    site, weights, stats = case()
    problem = pose(site, weights, stats)
    offers = method.propose(site, weights, stats)
    assert len(offers) > 40
    bits, errors = [o.cost.bits for o in offers], [o.error for o in offers]
    assert bits == sorted(bits, reverse=True) and errors == sorted(errors)
    for offer in offers[8:-8:9]:
        settings = offer.steps[0].settings
        result = quantize(problem, weights, **settings)
        size = result.size()
        assert abs(offer.cost.bits / 8 - size) <= 0.02 * size + 64, offer
        assert offer.error == pytest.approx(result.error, rel=0.08), offer


def head() -> tuple[Site, dict[str, torch.Tensor], LayerStats]:
    """A head so wide that only the diagonal of its `G` is known."""
    _, weights, stats = table()
    linear = Site("h", weight="weight", shape=(2500, 40))
    return linear, weights, LayerStats(stats.G, stats.H + 0.02, None, 5.0, 1.0, 500)


@pytest.mark.parametrize("case", [table, head])
def test_some_tokens_are_rounded_instead_of_all(case, monkeypatch) -> None:
    monkeypatch.setattr(module, "MANY", 1 << 16)
    monkeypatch.setattr(module, "HUGE", 1 << 16)
    monkeypatch.setattr(module, "TOKENS", 1200)
    site, weights, stats = case()
    rate, scale = (1.0, "columns") if case is table else (0.0, "both")
    problem = pose(site, weights, stats)
    few = curve_of(problem, weights, rate, scale)
    seen = []
    original = module.quantize
    monkeypatch.setattr(
        module,
        "quantize",
        lambda p, *a, **k: seen.append(max(p.matrix.shape)) or original(p, *a, **k),
    )
    assert curve_of(problem, weights, rate, scale) == few
    assert seen.count(2500) == 2 and max(n for n in seen if n != 2500) <= 1200
    for point in few[5:-3:7]:
        whole = original(problem, weights, point.step, rate, scale)
        # The codec's tables weigh twice here: there are two samples, and both are small.
        assert point.size == pytest.approx(whole.size(codecs.blocks.length), rel=0.03, abs=64)
        assert point.error == pytest.approx(whole.error, rel=0.1)


def test_the_better_scale_is_found() -> None:
    """Where a few inputs count for nearly everything, steps should follow the inputs."""
    site, weights, stats = long_layer()
    H = torch.diag_embed(torch.logspace(3, -3, 256, dtype=torch.float64))[None]
    identity = torch.eye(260, dtype=torch.float64)[None]
    problem = pose(site, weights, LayerStats(H, identity, stats.mean, 1.0, 1.0, 500))
    assert scales_for(problem) == ("none", "rows", "columns", "both")
    assert best_scale(problem, weights, 0.0, scales_for(problem)) in ("columns", "both")
    level = LayerStats(torch.eye(256, dtype=torch.float64)[None], identity, None, 1.0, 1.0, 500)
    assert best_scale(pose(site, weights, level), weights, 0.0, scales_for(problem)) == "none"


def test_curves_with_free_points_have_nothing_between() -> None:
    line = [Point(0.5, 0.0, 100.0), Point(1.0, 0.0, 50.0), Point(2.0, 3.0, 25.0)]
    assert between(line, 1.0) == line
