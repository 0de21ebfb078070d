"""What tokens weigh: counts that foretell other data, and gradients felt at them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lamina.measure.calibrate import calibrate
from lamina.measure.tokens import expected_counts, relative_power
from lamina.network.sites import Site, Sites
from lamina.network.source import Network


def test_expected_counts_foretell_other_data() -> None:
    """Of two samples of one source, discounted counts of the first foretell the second better."""
    chances = 1.0 / torch.arange(1, 5001).double()
    draws = torch.multinomial(chances, 8000, True, generator=torch.Generator().manual_seed(0))
    first, second = (torch.bincount(d, minlength=5000).double() for d in draws.chunk(2))
    seen = expected_counts(first)
    assert float(seen.sum()) == pytest.approx(4000)

    def likelihood(counts: Tensor) -> float:
        return float((second * (counts / counts.sum()).log()).sum())

    assert likelihood(seen) > max(likelihood(first + a) for a in (0.01, 0.3, 1.0, 3.0))
    once = torch.tensor([1.0, 1.0, 4.0])
    assert torch.equal(expected_counts(once), once)  # nothing tells how much to take


def test_power_of_tokens_is_shrunk_to_that_of_rare_ones() -> None:
    counts = torch.tensor([1000.0, 500.0, 1.0, 2.0, 0.0])
    powers = torch.tensor([100.0, 500.0, 3.0, 3.0, 0.0])
    found = relative_power(counts, powers)
    assert float((found * counts).sum()) == pytest.approx(float(counts.sum()))
    ratios = found / found[1]  # half a thousand uses of power 1 speak for themselves
    wanted = torch.tensor([0.1, 1.0, 2.2, 1.83, 2.0])
    torch.testing.assert_close(ratios, wanted, rtol=0.08, atol=0.01)
    assert torch.equal(relative_power(counts, 0 * powers), torch.ones(5))


class Scaled(nn.Module):
    """A table whose tokens are felt as strongly as a factor says."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.table, self.factors = nn.Embedding(len(factors), 3), factors

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) * self.factors[ids][..., None]


def test_tokens_that_are_felt_more_weigh_more() -> None:
    torch.manual_seed(0)
    factors = torch.tensor([1.0, 3.0, 1.0, 1.0])
    site = Site("table", module="table", op="embedding", weight="table.weight", shape=(4, 3))
    ids = torch.tensor([[0, 1], [1, 0], [0, 1]] * 40)
    network = Network(Scaled(factors), (ids[:1],), loss="features")
    stats = calibrate(network, Sites((site,)), [ids], samples=120, probe=False).of("table")
    assert stats is not None
    assert float(stats.H[0, 1] / stats.H[0, 0]) == pytest.approx(9.0, rel=0.3)
    assert float(stats.H.sum()) == pytest.approx(2.0)
