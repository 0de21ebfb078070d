"""two_four: two zeros in every four, the right ones, and a correction that helps."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lamina.errors import MethodError, SiteError
from lamina.forms import Sparse, install
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.base import Choice, Method
from lamina.methods.two_four import (
    from_fours,
    in_fours,
    keep_mask,
    mask_of,
    method,
    prune,
    prune_in_order,
)
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network

SITES = {
    "linear": Site("n.c", op="linear", weight="c.weight", shape=(12, 20)),
    "conv": Site("n.c", op="conv", weight="c.weight", shape=(6, 8, 3, 3)),
    "grouped": Site("n.c", op="conv", weight="c.weight", shape=(8, 4, 3), groups=2),
    "transposed": Site("n.c", op="linear", weight="c.weight", shape=(20, 12), transposed=True),
    "conv_transpose": Site("n.c", op="conv_transpose", weight="c.weight", shape=(8, 3, 2, 2)),
    "recurrent": Site("n.c", op="recurrent", weight="c.weight", shape=(12, 8)),
}


def stats_for(site: Site, seed: int = 0) -> LayerStats:
    generator = torch.Generator().manual_seed(seed)
    g, f, n = site.matrix_shape
    x = torch.randn(g, 4 * n, n, generator=generator).double() * torch.logspace(-1, 1, n).double()
    x = x @ torch.randn(n, n, generator=generator).double() * torch.logspace(0, 1, n).double()
    y = torch.randn(g, 4 * f, f, generator=generator).double()
    return LayerStats(H=x.mT @ x / (4 * n), G=y.mT @ y / (4 * f), samples=10)


def weight_of(site: Site, seed: int = 0) -> torch.Tensor:
    return torch.randn(site.shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99), st.integers(0, 4))
def test_the_most_important_of_every_four_stay(rows: int, m: int, seed: int, keep: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(0, 4, (rows, 4 * m), generator=generator).float()  # many ties
    mask = keep_mask(size, keep)
    four, kept = size.reshape(-1, 4), mask.reshape(-1, 4)
    assert bool((kept.sum(1) == keep).all())
    energy = (four.square() * kept).sum(1)
    for chosen in combinations(range(4), keep):  # no other mask keeps more
        assert bool((energy >= four[:, list(chosen)].square().sum(1)).all())
    assert torch.equal(keep_mask(size, keep), mask)
    if keep == 2:
        assert torch.equal(keep_mask(torch.ones(1, 4)), torch.tensor([[True, True, False, False]]))


@pytest.mark.parametrize("name", SITES)
def test_fours_lie_along_the_input(name: str) -> None:
    site = SITES[name]
    weight = weight_of(site)
    assert torch.equal(from_fours(site, in_fours(site, weight)), weight)
    mask = mask_of(site, weight.abs())
    assert float(mask.double().mean()) == 0.5
    # The definition, without reshaping tricks: four neighbours along the input axis.
    axis = 0 if name in ("transposed", "conv_transpose") else 1
    moved = mask.movedim(axis, -1)
    sizes = weight.abs().movedim(axis, -1)
    for start in range(0, moved.shape[-1], 4):
        part, size = moved[..., start : start + 4], sizes[..., start : start + 4]
        assert bool((part.sum(-1) == 2).all())
        assert bool((size.masked_fill(~part, 9).amin(-1) >= (size * ~part).amax(-1)).all())


@pytest.mark.parametrize("score", ["magnitude", "obd", "obs"])
@pytest.mark.parametrize("name", SITES)
def test_every_score_leaves_two_of_four(name: str, score: str) -> None:
    site = SITES[name]
    left = prune(site, weight_of(site), stats_for(site), score)
    assert left.shape == site.shape
    assert left.dtype == torch.float32
    fours = in_fours(site, left).reshape(-1, 4)
    assert bool(((fours == 0).sum(1) == 2).all())
    assert not bool(torch.signbit(left[left == 0]).any())
    if score != "obs":  # what stays is untouched
        assert bool(((left == weight_of(site)) | (left == 0)).all())


@pytest.mark.parametrize("name", ["linear", "conv", "transposed"])
def test_better_scores_predict_less(name: str) -> None:
    site = SITES[name]
    stats, weight = stats_for(site), weight_of(site)

    def error(score: str) -> float:
        change = as_matrix(site, prune(site, weight, stats, score) - weight)
        return predict_error(stats, as_matrix(site, weight), change)

    assert error("obs") < 0.8 * error("obd")
    assert error("obd") < 0.8 * error("magnitude")


def test_the_correction_is_the_exact_one() -> None:
    """Of its own mask: no change of later inputs, given the earlier ones, does better."""
    site = SITES["linear"]
    stats, weight = stats_for(site), weight_of(site).double()
    damped = stats.H[0] + 0.01 * stats.H[0].diagonal().mean() * torch.eye(20).double()
    left = prune_in_order(weight, stats.H[0])
    # Without H between inputs there is nothing to correct, and the mask is that of w^2 H_jj.
    alone = prune_in_order(weight, torch.diag(stats.H[0].diagonal()))
    size = weight.square() * damped.diagonal()
    assert torch.allclose(alone, weight * keep_mask(size), atol=1e-12)
    # Step by step: eliminating an input by least squares over all that follow.
    row = weight[0].clone()
    for start in range(0, 20, 4):
        inverse = torch.linalg.inv(damped[start:, start:])
        scores = []
        for j in range(4):  # the conditional variance of input j given those after it
            tail = torch.linalg.inv(damped[start + j :, start + j :])
            scores.append(row[start + j] ** 2 / tail[0, 0])
        keep = keep_mask(torch.stack(scores)[None])[0]
        for j in range(4):
            at = start + j
            if not keep[j]:
                tail = torch.linalg.inv(damped[at:, at:])
                row[at:] -= row[at] / tail[0, 0] * tail[:, 0]
                row[at] = 0
        assert inverse.shape[0] == 20 - start
    assert torch.allclose(left[0], row, atol=1e-9)


def test_offers_are_what_is_applied() -> None:
    site = SITES["linear"]
    stats, weight = stats_for(site), weight_of(site)
    weights = {"weight": weight, "bias": torch.randn(12)}
    offers = method.propose(site, weights, stats)
    errors = [c.error for c in offers]
    assert errors == sorted(set(errors), reverse=True)
    assert offers[-1].steps[0].settings == {"score": "obs"}
    assert [c.steps[0].settings["score"] for c in method.propose(site, weights, None)] == [
        "magnitude"
    ]
    for offer in offers:
        root = nn.Module()
        root.c = nn.Linear(20, 12)
        root.c.weight.data.copy_(weight)
        (edit,) = method.apply(Network(root), Choice(site, offer.steps[0].settings), stats)
        assert isinstance(edit.values, Sparse)
        install(root, [edit])
        (leaf,) = method.leave(site, weights, stats, offer.steps[0].settings)
        assert torch.equal(root.c.weight, leaf.weights["weight"])
        change = (root.c.weight.detach() - weight)[None]
        assert offer.error == predict_error(stats, weight[None], change)


def test_what_has_no_fours_is_refused() -> None:
    refused = {
        Site("a", op="embedding", shape=(8, 4)): "embedding",
        Site("a", op="linear", shape=(8, 6)): "6 inputs are not divisible by 4",
        Site("a", op="conv", shape=(8, 3, 2, 2)): "3 inputs are not divisible by 4",
        Site("a", kind="chain"): "not one layer",
    }
    for site, why in refused.items():
        assert why in method.refuse(site)
        with pytest.raises(SiteError, match="a"):
            method.apply(Network(nn.Module()), Choice(site, {"score": "magnitude"}), None)
    assert all(not method.refuse(site) for site in SITES.values())


def test_bad_settings_are_named() -> None:
    site = SITES["linear"]
    root = nn.Module()
    root.c = nn.Linear(20, 12)
    for settings in ({}, {"score": "random"}):
        with pytest.raises(MethodError, match="give score of"):
            method.apply(Network(root), Choice(site, settings), None)
    with pytest.raises(MethodError, match=r"n\.c.*calibration"):
        method.apply(Network(root), Choice(site, {"score": "obs"}), None)
    root.c.weight.data[0, 0] = torch.inf
    with pytest.raises(SiteError, match="not finite"):
        method.apply(Network(root), Choice(site, {"score": "magnitude"}), None)


def test_it_is_a_method_that_is_asked_by_name_only() -> None:
    from lamina.plan.chains import choose_methods

    assert isinstance(method, Method)
    assert not method.final
    assert "two_four" not in [m.name for m in choose_methods(None)]
