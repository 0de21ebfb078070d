"""The currency: predicted error against its definition, whole or in pieces."""

from __future__ import annotations

import itertools

import pytest
import torch

from lamina.measure import stats as module
from lamina.measure.stats import LayerStats, predict_error


def moment(groups: int, size: int, diagonal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A second moment as statistics hold it, and in full."""
    if diagonal:
        powers = torch.rand(groups, size, dtype=torch.float64)
        return powers, torch.diag_embed(powers)
    x = torch.randn(groups, 2 * size, size, dtype=torch.float64)
    return (whole := x.transpose(1, 2) @ x), whole


@pytest.mark.parametrize("piece", [1, 300, 1 << 22])
@pytest.mark.parametrize("diagonals", list(itertools.product([False, True], repeat=2)))
def test_predicted_error_is_its_definition(diagonals, piece, monkeypatch) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    torch.manual_seed(0)
    (H, inputs), (G, outputs) = (moment(2, n, d) for n, d in zip((17, 11), diagonals, strict=True))
    delta = torch.randn(2, 11, 17, dtype=torch.float64)
    wanted = 0.5 * 3 * torch.einsum("gij,gjk,gkl,gil->", outputs, delta, inputs, delta)
    found = predict_error(LayerStats(H, G, scale=3.0), delta, delta)
    assert found == pytest.approx(float(wanted), rel=1e-10)


def test_no_change_costs_nothing() -> None:
    H = torch.rand(1, 0, dtype=torch.float64)
    nothing = torch.zeros(1, 3, 0, dtype=torch.float64)
    assert predict_error(LayerStats(H, torch.ones(1, 3)), nothing, nothing) == 0
