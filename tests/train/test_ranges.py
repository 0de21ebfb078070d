"""Where activation ranges begin, and who shares them."""

from __future__ import annotations

import pytest
import torch
from tests.train.quantizable import make_data, make_network
from torch import nn

from lamina.errors import DataError, MethodError
from lamina.train import ranges
from lamina.train.pact import grid_of
from lamina.train.ranges import Seen, make_quantizers, observe

PATHS = [f"layers.0.{n}" for n in ("query", "key", "value", "out", "fc1", "fc2")]


def test_layers_given_one_tensor_are_a_group() -> None:
    module = make_network().module.train()
    seen = observe(module, module, PATHS, make_data().calibration * 3, 2)
    assert [len(s.paths) for s in seen] == [3, 1, 1, 1]
    assert seen[0].paths == PATHS[:3]
    assert all(len(s.values) == 2 for s in seen)
    assert module.training
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_layers_that_differ_once_are_apart() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x if float(x.sum()) > 0 else 2 * x)

    net = Net()
    up, down = torch.ones(2, 4), -torch.ones(2, 4)
    assert [s.paths for s in observe(net, net, ["a", "b"], [up, up])] == [["a", "b"]]
    assert [s.paths for s in observe(net, net, ["a", "b"], [up, down])] == [["a"], ["b"]]


def test_percentiles_are_the_ends() -> None:
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    seen = [Seen(["a"], [values], [-4.0]), Seen(["b"], [values.relu()], [0.0]), Seen(["c"])]
    (_, two), (paths, one) = make_quantizers(seen, 4)
    assert two.kind == "asymmetric"
    assert float(two.high.detach()) == pytest.approx(3.09, abs=0.1)
    assert float(two.low.detach()) == pytest.approx(-3.09, abs=0.1)
    assert (paths, one.kind) == (["b"], "one-sided")
    ((_, wide),) = make_quantizers(seen[:1], 4, "symmetric", percentile=0.0)
    assert float(wide.high.detach()) == pytest.approx(float(values.abs().max()))


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
def test_the_search_costs_less_than_percentiles(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, generator=g) * (1 + 5 * (torch.rand(20_000, generator=g) < 0.01))
    seen = [Seen(["a"], [values], [float(values.min())])]
    errors = []
    for start in ("percentile", "mse"):
        ((_, q),) = make_quantizers(seen, 4, kind, start)
        step, zero, levels = grid_of(kind, 4, q.high, q.low)
        y = torch.round(values / step).clamp(zero, zero + levels - 1) * step
        errors.append(float((y - values).square().mean()))
    assert errors[1] < 0.95 * errors[0]


def test_the_sample_is_of_every_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every n-th value would be of one channel only, where n divides their number."""
    monkeypatch.setattr(ranges, "SAMPLED", 256)
    x = torch.zeros(1, 256, 8)
    x[..., 3] = 100.0
    layer = nn.Linear(8, 2)
    runs = [observe(nn.Sequential(layer), layer, ["0"], [x])[0].values[0] for _ in range(2)]
    assert torch.equal(*runs)
    assert len(runs[0]) == 256
    assert 0.05 < float((runs[0] == 100).double().mean()) < 0.25


def test_each_end_is_searched_for_itself() -> None:
    """Tails on one side only: as good as the best of all pairs of ends."""
    g = torch.Generator().manual_seed(0)
    draws = torch.rand(2, 20_000, generator=g)
    values = torch.where(draws[0] < 0.5, -draws[1], 0.3 * (1 / draws[1] - 1).clamp(max=20))

    def error(low: float, high: float) -> float:
        step, zero, levels = grid_of("asymmetric", 4, torch.tensor(high), torch.tensor(low))
        y = torch.round(values / step).clamp(zero, zero + levels - 1) * step
        return float((y - values).square().mean())

    pairs = [(-a / 20, b / 4) for a in range(1, 30) for b in range(1, 30)]
    best = min(error(low, high) for low, high in pairs)
    (_, wide), (_, found) = (
        make_quantizers([Seen(["a"], [values], [-1.0])], 4, start=start)[0]
        for start in ("percentile", "mse")
    )
    errors = [error(float(q.low.detach()), float(q.high.detach())) for q in (found, wide)]
    assert errors[0] < 1.01 * best
    assert errors[1] > 1.05 * best


def test_bad_input_is_named() -> None:
    module = make_network().module
    with pytest.raises(DataError, match=r"layers\.0\.query"):
        observe(nn.Sequential(nn.Linear(2, 2), module), lambda *_: None, ["1.layers.0.query"],
                [torch.zeros(1, 2)])  # fmt: skip
    with pytest.raises(MethodError, match="percentile, mse"):
        make_quantizers([], 4, start="max")
