"""One weight as head and table: both uses are in its statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.measure.calibrate import calibrate
from lamina.measure.loss import Loss, divergence
from lamina.measure.stats import LayerStats, predict_error
from lamina.measure.tied import combine_uses
from lamina.network.discover import discover
from lamina.network.source import Network

WIDTH, TOKENS = 6, 9


class Tied(nn.Module):
    """A table, a layer, and the table again as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.table(ids))))


def moment(size: int, seed: int) -> torch.Tensor:
    x = torch.randn(
        1, 3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return x.transpose(1, 2) @ x


def uses(wide: bool) -> tuple[LayerStats, LayerStats]:
    G = moment(TOKENS, 1)
    if wide:
        G = G.diagonal(dim1=1, dim2=2).clone()
    counts = torch.arange(TOKENS, dtype=torch.float64)[None]
    return LayerStats(moment(WIDTH, 0), G), LayerStats(counts, moment(WIDTH, 2))


@pytest.mark.parametrize("wide", [False, True])
def test_noise_without_direction_costs_what_both_uses_cost(wide: bool) -> None:
    head, table = uses(wide)
    both = combine_uses(head, table)
    for row in range(TOKENS):
        # The mean over an orthonormal basis is what noise without direction costs.
        together = apart = 0.0
        for column in range(WIDTH):
            d = torch.zeros(1, TOKENS, WIDTH, dtype=torch.float64)
            d[0, row, column] = 1.0
            together += predict_error(both, d, d)
            apart += predict_error(head, d, d) + predict_error(table, d, d.transpose(1, 2))
        assert together == pytest.approx(apart, rel=1e-9)


def test_one_use_alone_is_that_use() -> None:
    head, table = uses(False)
    unused = LayerStats(0 * table.H, 0 * table.G)
    d = torch.randn(
        1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    found = predict_error(combine_uses(head, unused), d, d)
    assert found == pytest.approx(predict_error(head, d, d), rel=1e-9)
    silent = LayerStats(head.H, 0 * head.G)
    found = predict_error(combine_uses(silent, table), d, d)
    assert found == pytest.approx(predict_error(table, d, d.transpose(1, 2)), rel=1e-9)


def errors(spare: bool) -> tuple[list[float], list[float]]:
    """Predicted and measured losses of noise in one row after the other."""
    torch.manual_seed(0)
    module = Tied()
    ids = torch.randint(0, TOKENS - 3, (400, 5))  # the last three are never looked up
    network = Network(module, (ids[:2],), loss="logits")
    sites = discover(network)
    (site,) = (s for s in sites.layers if s.aliases)
    stats = calibrate(network, sites, [ids], samples=400, probe=False).of(site.name)
    assert stats is not None
    before = module(ids).detach()
    predicted, measured = [], []
    weight = module.head.weight
    for row in range(TOKENS):
        total = guess = 0.0
        for k in range(6):
            d = torch.zeros(1, TOKENS, WIDTH, dtype=torch.float64)
            noise = torch.Generator().manual_seed(k)
            d[0, row] = 0.05 * torch.randn(WIDTH, generator=noise, dtype=torch.float64)
            own = stats
            if spare:  # the control: what the head alone would say
                own = LayerStats(stats.H, stats.G - _added(stats))
            guess += predict_error(own, d, d)
            kept = weight.detach().clone()
            with torch.no_grad():
                weight += d[0].float()
                total += float(divergence(Loss("logits", 2), before, module(ids)).mean())
                weight.copy_(kept)
        predicted.append(guess)
        measured.append(total)
    return predicted, measured


def _added(stats: LayerStats) -> torch.Tensor:
    """Most of what lookups added, as the rows that are never looked up do not have it."""
    diagonal = stats.G[0].diagonal()
    return torch.diag_embed((diagonal - diagonal[-3:].mean()).clamp_min(0))[None]


def rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_predictions_know_which_rows_are_looked_up() -> None:
    predicted, measured = errors(False)
    assert rank_correlation(predicted, measured) > 0.7
    assert sum(predicted) == pytest.approx(sum(measured), rel=0.5)
    assert max(predicted[-3:]) < min(predicted[:-3]), "rows never looked up matter less here"
    assert max(measured[-3:]) < min(measured[:-3])
    blind, _ = errors(True)
    assert rank_correlation(blind, measured) < rank_correlation(predicted, measured)


def test_a_tied_gpt_is_one_site_with_two_uses() -> None:
    transformers = pytest.importorskip("transformers")

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    module = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 30, (16, 8))
    network = Network(module, example_kwargs={"input_ids": ids[:2]}, loss="logits")
    sites = discover(network)
    tied = [s for s in sites.layers if s.shape == (40, 16)]
    assert len(tied) == 1 and tied[0].op == "linear"
    stats = calibrate(network, sites, [{"input_ids": ids}], samples=16, probe=False)
    found = stats.of(tied[0].name)
    assert found is not None and found.H.shape == (1, 16, 16) and found.G.shape == (1, 40, 40)
    assert set(stats.layers) == {s.name for s in sites.layers}
    rows = found.G[0].diagonal()
    assert float(rows[:30].min()) > 1.1 * float(rows[30:].max()), "looked up, and not"
