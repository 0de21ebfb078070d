"""Moments of a block's layers, against what they are by definition."""

from __future__ import annotations

import torch
from torch import nn

from lamina.network.sites import Site
from lamina.streaming.watching import Watch, blind_stats


class Block(nn.Module):
    """y = x + B relu(A x)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


SITES = (
    Site("a", module="a", weight="a.weight", bias="a.bias", shape=(48, 32)),
    Site("b", module="b", weight="b.weight", bias="b.bias", shape=(32, 48)),
)


def test_moments_predict_how_far_the_output_moves() -> None:
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    batches = [torch.randn(8, 50, 32) for _ in range(40)]
    watch = Watch(block, SITES, samples=320, seed=0, gradients=True)
    for x in batches:
        with watch.looking(None, 8):
            watch.send_back(block(x))
    for site in SITES:
        stats = watch.stats_of(site)
        assert stats is not None and stats.positions == 50 and stats.samples == 320
        weight = block.get_parameter(site.weight)
        before, change = weight.clone(), 1e-3 * torch.randn_like(weight)
        measured, seen = 0.0, torch.zeros_like(stats.H[0])
        for x in batches:
            given = x if site.name == "a" else torch.relu(block.a(x))
            flat = given.reshape(-1, given.shape[-1]).double()
            seen += flat.T @ flat / 320
            y = block(x)
            weight.copy_(before + change)
            moved = (block(x) - y).square().sum(-1) / y.square().sum(-1)
            weight.copy_(before)
            measured += 0.5 * float(moved.mean()) / len(batches)
        assert torch.allclose(stats.H[0], seen, rtol=1e-5)
        delta = change.double()
        predicted = 0.5 * float((stats.G[0][:, None] * (delta @ stats.H[0]) * delta).sum())
        # G and H are taken apart (Kronecker), and |y| goes with x: some is lost by that.
        assert 0.8 < predicted / measured < 1.25


def test_padding_is_not_looked_at() -> None:
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    x, mask = torch.randn(4, 10, 32), torch.ones(4, 10)
    mask[:, 6:] = 0
    found = []
    for given, seen in ((x, mask), (x[:, :6], None)):
        watch = Watch(block, SITES[:1], samples=4, seed=0, gradients=False)
        with watch.looking(seen, 4):
            block(given)
        found.append(watch.stats_of(SITES[0], torch.ones(1, 48, dtype=torch.float64)))
    assert found[0] is not None and found[1] is not None
    assert torch.allclose(found[0].H, found[1].H) and found[0].positions == 6


def test_a_layer_nothing_was_seen_of_is_judged_by_itself() -> None:
    watch = Watch(Block(), SITES[:1], samples=4, seed=0, gradients=True)
    assert watch.stats_of(SITES[0]) is None
    weight = torch.randn(48, 32)
    stats = blind_stats(SITES[0], weight)
    delta = 0.1 * weight.double()
    error = 0.5 * float((stats.G[0][:, None] * delta * stats.H[0] * delta).sum())
    assert abs(error - 0.005) < 1e-6
