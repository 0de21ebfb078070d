"""In which metric a pair is made."""

from __future__ import annotations

import pytest
import torch

from lamina.errors import MethodError
from lamina.forms import Edit
from lamina.measure.stats import LayerStats
from lamina.methods.base import Leaf, get_method
from lamina.network.sites import Site

F, N = 8, 12
ALDS = get_method("alds")


def case(bias: bool) -> tuple[Site, dict[str, torch.Tensor], torch.Tensor, LayerStats]:
    g = torch.Generator().manual_seed(0)
    W, b = torch.randn(F, N, generator=g), torch.randn(F, generator=g)
    x = torch.randn(300, N, generator=g).double() * torch.linspace(0.1, 3, N) + 1
    d = torch.randn(300, F, generator=g).double() * torch.linspace(3, 0.1, F)
    stats = LayerStats(H=(x.mT @ x / 300)[None], G=(d.mT @ d / 300)[None], mean=x.mean(0)[None],
                       samples=300)  # fmt: skip
    site = Site("fc", module="fc", weight="fc.weight", bias="fc.bias" if bias else "", shape=(F, N))
    return site, {"weight": W, **({"bias": b} if bias else {})}, x, stats


def computed(leaves: tuple[Leaf, ...], x: torch.Tensor) -> torch.Tensor:
    """What the two layers give."""
    first, second = (leaf.weights for leaf in leaves)
    inside = first["weight"].double()
    folds = leaves[0].site.groups
    hidden = x @ torch.block_diag(*inside.reshape(folds, -1, inside.shape[1])).mT
    return hidden @ second["weight"].double().mT + second.get("bias", torch.zeros(F)).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("folds", [1, 3])
def test_the_weights_metric_is_the_one_without_data(bias: bool, folds: int) -> None:
    site, weights, _, stats = case(bias)
    settings = {"folds": folds, "rank": 2}
    plain = ALDS.leave(site, weights, None, settings)
    blind = ALDS.leave(site, weights, stats, {**settings, "metric": "weights"})
    seen = ALDS.leave(site, weights, stats, settings)
    for a, b, c in zip(plain, blind, seen, strict=True):
        assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
        assert not torch.allclose(a.weights["weight"], c.weights["weight"])
        assert b.stats is not None  # later steps still know what the layers see


@pytest.mark.parametrize("bias", [True, False])
def test_the_outputs_metric_is_pca_and_keeps_the_mean(bias: bool) -> None:
    site, weights, x, stats = case(bias)
    settings = {"folds": 1, "rank": 3, "metric": "outputs", **({} if bias else {"bias": 1})}
    leaves = ALDS.leave(site, weights, stats, settings)
    y = x @ weights["weight"].double().mT + weights.get("bias", torch.zeros(F)).double()
    ours = computed(leaves, x)
    assert torch.allclose(ours.mean(0), y.mean(0), atol=1e-5)
    s = torch.linalg.svdvals(y - y.mean(0))
    assert float((ours - y).square().sum()) == pytest.approx(float(s[3:].square().sum()), rel=1e-4)
    other = computed(ALDS.leave(site, weights, stats, {"folds": 1, "rank": 3}), x)
    assert float((other - y).square().sum()) > float((ours - y).square().sum())


def test_a_bias_is_added_only_where_there_is_none() -> None:
    for bias in (True, False):
        site, weights, _, stats = case(bias)
        settings = {"folds": 1, "rank": 3, "metric": "outputs", "bias": 1}
        numbers = {"folds": 1, "rank": 3} | ({} if bias else {"bias": 1})
        assert ALDS.structure(site, settings) == (Edit("fc", "low_rank", numbers),)
        second = ALDS.leave(site, weights, stats, settings)[1]
        assert second.site.bias == "fc.1.bias" and "bias" in second.weights
        bare = ALDS.leave(site, weights, stats, {**settings, "bias": 0})[1]
        assert ("bias" in bare.weights) == bias == bool(bare.site.bias)


def test_factors_have_the_dtype_of_the_weight() -> None:
    site, weights, _, stats = case(False)
    halves = {k: v.to(torch.bfloat16) for k, v in weights.items()}
    settings = {"folds": 1, "rank": 3, "metric": "outputs", "bias": 1}
    for leaf in ALDS.leave(site, halves, stats, settings):
        assert {t.dtype for t in leaf.weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "wrong",
    [
        {"metric": "best"}, {"metric": "outputs", "folds": 2}, {"bias": 1}, {"bias": True},
        {"metric": "weights", "bias": 1}, {"metric": "outputs", "bias": 2},
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(wrong: dict[str, object]) -> None:
    site, weights, _, stats = case(False)
    with pytest.raises(MethodError, match="fc"):
        ALDS.leave(site, weights, stats, {"folds": 1, "rank": 2, **wrong})


def test_the_outputs_metric_needs_statistics() -> None:
    site, weights, _, _ = case(True)
    with pytest.raises(MethodError, match="needs statistics"):
        ALDS.leave(site, weights, None, {"folds": 1, "rank": 2, "metric": "outputs"})
