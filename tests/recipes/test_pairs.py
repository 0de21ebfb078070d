"""Pairs: the candidates they are, and composing them to layers again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import lamina
from lamina.errors import MethodError
from lamina.measure.stats import Stats
from lamina.network.discover import discover
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.recipes.pairs import choose_pairs, pairs_plan, recomposed, served_sites


class Conv1D(nn.Module):
    """A linear layer whose weight is stored `[in, out]`, as that of GPT-2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 4)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


def make_square() -> Network:
    """Square layers of every kind: a transposed weight would not show by its shape."""
    torch.manual_seed(0)
    module = nn.Sequential(
        Conv1D(16, 16), nn.Unflatten(1, (4, 2, 2)), nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 16),
    )  # fmt: skip
    return Network(module.eval(), (torch.randn(2, 16),))


def found(network: Network) -> Sites:
    """The sites; the transposed layer, which discovery leaves alone, may be replaced too."""
    sites = discover(network)
    return replace(sites, layers=tuple(replace(site, rigid="") for site in sites.layers))


CHOSEN = {
    "0": {"folds": 2, "rank": 8},
    "2": {"folds": 2, "rank": 4},
    "5": {"folds": 4, "rank": 4},
}


@pytest.mark.parametrize("scheme", [0, 1, 2, 3])
def test_pairs_of_full_rank_compose_to_the_layers_they_were(scheme: int) -> None:
    network = make_square()
    sites = found(network)
    chosen = {**CHOSEN, "2": {"folds": 2, "rank": 6 if scheme in (1, 2) else 2, "scheme": scheme}}
    if scheme == 0:
        chosen["2"] = CHOSEN["2"]
    elif sites["2"].extent == ():
        pytest.skip("the input size is not known")
    plan = pairs_plan(network, sites, Stats(), chosen, 1.0)
    edited = lamina.apply(network, plan, sites, Stats())
    assert sum(isinstance(m, nn.Sequential) for m in edited.model.children()) == 3
    whole = recomposed(network, edited, sites)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        composed, pairs, dense = (m.eval()(x) for m in (whole.module, edited.model, network.module))
    assert torch.allclose(composed, pairs, atol=1e-4) and torch.allclose(composed, dense, atol=1e-4)
    ours, theirs = whole.module.state_dict(), network.module.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in ours)


def test_what_was_trained_comes_along() -> None:
    network = make_square()
    sites = found(network)
    chosen = {"0": {"folds": 1, "rank": 3}}
    plan = pairs_plan(network, sites, Stats(), chosen, 1.0)
    edited = lamina.apply(network, plan, sites, Stats())
    with torch.no_grad():
        for p in edited.model.parameters():
            p.add_(0.1)
        edited.model[3].running_mean.add_(1.0)
    whole = recomposed(network, edited, sites)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.allclose(whole.module(x), edited.model(x), atol=1e-4)
    assert torch.linalg.matrix_rank(whole.module[0].weight, rtol=1e-5) == 3
    assert discover(whole).layers[0].shape == (16, 16)


def test_a_plan_keeps_what_no_pair_was_chosen_for() -> None:
    network = make_square()
    sites = found(network)
    plan = pairs_plan(network, sites, Stats(), {"0": {"folds": 1, "rank": 3}}, 0.9)
    assert [d.describe() for d in plan.sites.values()] == [
        "alds(folds=1, rank=3) | keep() | keep()", "keep()", "keep()",
    ]  # fmt: skip
    assert plan.predicted.params == plan.original.params - 256 + 3 * 32
    assert plan.predicted.macs == plan.original.macs - 256 + 3 * 32


def test_the_predicted_size_is_that_of_the_file() -> None:
    network = make_square()
    sites = discover(network)
    chosen = choose_pairs(network, sites, Stats(), "svd", 0.7)
    plan = pairs_plan(network, sites, Stats(), chosen, 0.7)
    result = lamina.compress(network, plan=plan, recover=None)
    assert len(result.file) == pytest.approx(
        plan.predicted.bits / 8, rel=0.02, abs=96 * len(chosen)
    )


def test_only_floating_layers_that_can_be_a_pair_are_served() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    module[2].weight = module[1].weight  # tied
    network = Network(module, (torch.zeros(2, dtype=torch.long),))
    with pytest.raises(MethodError, match="finds no layer"):
        served_sites(network, discover(network))
    network = make_square()
    assert [s.name for s in served_sites(network, found(network), ["2"])] == ["0", "5"]


def test_what_is_not_finite_is_refused_by_name() -> None:
    network = make_square()
    with torch.no_grad():
        network.module[5].weight[0, 0] = float("nan")
    with pytest.raises(MethodError, match="not finite at 5"):
        choose_pairs(network, discover(network), Stats(), "svd", 0.7)


def test_a_layer_that_calibration_never_saw_stays_dense() -> None:
    network = make_square()
    sites = found(network)
    batches = [(torch.randn(64, 16),)]
    stats = lamina.measure(network, sites, batches)
    blind = replace(stats, layers={n: s for n, s in stats.layers.items() if n != "0"})
    for selector in ("data-aware", "pca"):
        assert "0" not in choose_pairs(network, sites, blind, selector, 0.8)
