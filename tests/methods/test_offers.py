"""What methods offer: fronts, and bytes that are those of the file."""

from __future__ import annotations

import pytest
import torch

from lamina import codecs
from lamina.artifact.records import encode
from lamina.forms import Grid, Sparse
from lamina.forms.integer import grid_of
from lamina.measure.stats import Cost
from lamina.methods.base import Candidate
from lamina.methods.offers import falling, front, grid_bytes, offer_values, sparse_bytes
from lamina.network.sites import Site

FC = Site("net.fc", module="net.fc", weight="net.fc.weight", bias="net.fc.bias", shape=(4, 6))
WEIGHTS = {"weight": torch.ones(4, 6), "bias": torch.ones(4)}


def offer(bits: float, error: float) -> Candidate:
    return Candidate("fc", (), Cost(bits=bits), error)


def test_a_front_is_what_no_smaller_offer_beats() -> None:
    offers = [offer(3, 0.1), offer(1, 0.5), offer(2, 0.5), offer(2, 0.4), offer(4, 0.2)]
    assert [c.cost.bits for c in front(offers)] == [1, 2, 3]
    assert [c.error for c in front(offers)] == [0.5, 0.4, 0.1]
    assert [c.error for c in falling(offers)] == [0.1], "their order is the caller's"
    assert front([]) == ()


def test_an_offer_of_values_keeps_parameters_and_macs() -> None:
    found = offer_values("keep", FC, WEIGHTS, {"k": 1}, 12.5, 0.25)
    assert found.cost == Cost(params=28, bits=100, macs=24) and found.error == 0.25
    assert str(found.steps[0]) == "keep(k=1)" and found.steps[0].at == found.site == "net.fc"


@pytest.mark.parametrize("rows", [False, True])
def test_a_grid_takes_what_its_record_takes(rows) -> None:
    source = torch.Generator().manual_seed(0)
    grid = grid_of(torch.randn(64, 200, generator=source))
    grid = grid if rows else Grid(grid.symbols, 0.5)
    assert grid_bytes(grid) == pytest.approx(len(encode(grid)), rel=0.01, abs=16)
    counted = []
    assert grid_bytes(grid, lambda symbols: counted.append(symbols.shape) or 1) == 5 + rows
    assert counted == [(64, 200), (1, 64)][: 1 + rows]


def test_a_sparse_tensor_takes_what_its_record_takes() -> None:
    source = torch.Generator().manual_seed(0)
    tensor = torch.randn(64, 200, generator=source)
    tensor = tensor.masked_fill(torch.rand(64, 200, generator=source) < 0.9, 0)
    size = len(encode(Sparse(tensor)))
    assert sparse_bytes(tensor) == pytest.approx(size, rel=0.01, abs=16)
    assert sparse_bytes(tensor, codecs.estimate) == pytest.approx(size, rel=0.05)
    assert sparse_bytes(torch.tensor(1.0)) < 16, "a scalar has a pattern too"
