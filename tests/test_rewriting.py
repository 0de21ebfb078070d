"""A latency budget begins with what costs nothing: taken where it is measured to be faster."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.clocks import Machine
from tests.recipes.thin import settle
from torch import Tensor, nn

import lamina
from lamina.compress import compress
from lamina.data import as_data
from lamina.errors import PlanError
from lamina.forms import conv_weights, is_channels_last
from lamina.measure.clock import Job
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.plan import Budget, Plan
from lamina.rewriting import begin, describe, forms_of
from lamina.run import open_run
from lamina.stages import Way, measured, offered
from lamina.verify import planned, seconds_limit

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Three convolutions with BatchNorm, wide enough for pairs to pay."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 24, 24)
        self.features = nn.Sequential(*(
            layer for a, b in pairwise(widths)
            for layer in (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        ))  # fmt: skip
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class Slow(Machine):
    """Times BatchNorms too, and convolutions by the order of their weights.

    Args:
        norm: what one BatchNorm takes [s].
        plain: by this a convolution is slower where its weights are in the plain order.
    """

    def __init__(self, norm: float = 1e-3, plain: float = 1.5) -> None:
        super().__init__(start=0.0, whole=1.0, noise=1.0)
        self.norm, self.plain = norm, plain
        self.orders: list[set[bool]] = []

    def seconds(self, job: Job) -> float:
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in job.module.modules())
        orders = {is_channels_last(w) for w in conv_weights(job.module)}
        self.orders.append(orders)
        return super().seconds(job) * (self.plain if False in orders else 1.0) + self.norm * norms


def way_for(machine: Machine, budget: Budget, module: nn.Module | None = None, **more: Any) -> Way:
    torch.manual_seed(0)
    network = Network(module or settle(Net()), (X,), name="net")
    return Way(network, None, budget, timer=machine, **more)


@pytest.mark.parametrize(
    ("norm", "plain", "names"),
    [
        (1e-3, 1.5, ("fold", "channels_last")),
        (1e-3, 1.0, ("fold",)),
        (0.0, 1.5, ("channels_last",)),
        (0.0, 1.01, ()),  # within the noise
        (0.0, 0.5, ()),  # slower
        (1e-3, 0.01, ("fold",)),
    ],
)
def test_the_fastest_form_is_taken(norm: float, plain: float, names: tuple[str, ...]) -> None:
    way = way_for(Slow(norm, plain), Budget(latency="0.5x"))
    begin(way)
    assert way.rewriting == names
    (row,) = way.rounds
    assert row["why"] == "latency" and row["asked"] == "lossless rewriting"
    assert row["kept"] == bool(names) and row["predicted"] == {}
    if names:
        assert way.share == pytest.approx(row["measured"]["ratio"]) and way.share < 0.98
        assert "nothing lost" in way.notes[-1] and row["note"].startswith("of the original's time:")
        assert way.base is not way.network
    else:
        assert way.share == 1.0 and way.base is way.network and not way.notes


def test_nothing_is_rewritten_without_a_latency_or_without_what_could_be() -> None:
    machine = Slow()
    way = way_for(machine, Budget(size="50%"))
    begin(way)
    assert way.rewritten is None and not way.rounds and not machine.timed
    way = way_for(machine, Budget(latency="0.5x"), nn.Sequential(nn.Flatten(), nn.Linear(432, 3)))
    begin(way)
    assert way.rewritten is None and not way.rounds and not machine.timed


def test_a_form_that_computes_something_else_is_no_form() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.fc = nn.Linear(400, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.bn(self.conv(x)).view(len(x), -1))

    way = way_for(Slow(), Budget(latency="0.5x"), settle(Flat()))
    assert list(forms_of(way)) == ["fold"]
    assert describe(forms_of(way)["fold"]) == "BatchNorm folded into 1 layer"
    assert "Not rewritten (channels_last): the outputs would differ." in way.notes


@pytest.mark.parametrize("asked", ["0.9x", "0.5x", "0.35x"])
def test_the_budget_stays_relative_to_the_network_as_given(asked: str) -> None:
    machine = Slow()
    way = way_for(machine, Budget(latency=asked), methods=("alds",))
    begin(way)
    sites = discover(way.base)
    stats = measured(way, sites)
    candidates = offered(way, sites, stats)
    machine.orders.clear()
    made = planned(way, sites, stats, candidates)
    whole = machine.seconds(Job(way.network.module, (_call(X),)))
    limit = seconds_limit(way)
    assert limit == pytest.approx(float(asked[:-1]) * whole, rel=1e-6)
    assert made.original.seconds == pytest.approx(whole) and made.rewrite == way.rewriting
    assert made.network == way.network.digest()
    kept = [row for row in way.rounds if row["kept"]]
    assert len(kept) == 2 and kept[1]["measured"]["seconds"] <= limit
    assert {False} in machine.orders and {True} in machine.orders  # what is planned has its layout
    if asked == "0.9x":  # the rewriting alone is enough
        assert made.error == 0
    else:
        assert any("alds" in d.describe() for d in made.sites.values())


def _call(x: Tensor) -> Any:
    from lamina.measure.clock import Call

    return Call((x,), {})


def use(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a machine in the place of the clock."""
    latency = importlib.import_module("lamina.measure.latency")  # `measure` is a function, too
    monkeypatch.setattr(latency, "clock", machine)


def test_saved_loaded_planned_again_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Slow()
    use(machine, monkeypatch)
    network = Network(settle(Net()), (X,), name="net")
    asked: dict[str, Any] = {"methods": ["alds"], "recover": None}

    def go() -> Any:
        with open_run(tmp_path / "run") as run:
            return compress(network, [X], Budget(latency="0.4x"), run=run, **asked)

    result = go()
    facts = result.report.dict()
    assert result.plan.rewrite == ("fold", "channels_last")
    assert facts["rounds"][0]["asked"] == "lossless rewriting" and facts["budget"]["met"]["seconds"]
    assert facts["network"]["digest"] == network.digest()
    assert facts["error"]["measured"] == pytest.approx(facts["error"]["predicted"], rel=1.0)
    assert all(s["error_measured"] is not None for s in facts["sites"])
    assert sum(s["error_measured"] for s in facts["sites"]) < 3 * facts["error"]["measured"]
    result.save(tmp_path / "net.lamina")
    loaded = lamina.load(tmp_path / "net.lamina", Net())
    with torch.no_grad():
        assert torch.equal(loaded(X), result.model(X))
    assert all(map(is_channels_last, conv_weights(loaded)))
    result.plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    again = compress(network, [X], plan=plan, **asked)
    assert again.file == result.file
    timed = machine.timed
    resumed = go()
    assert resumed.file == result.file
    assert machine.timed == timed + 2  # but for the last, fresh look at the finished network
    other = Network(settle(Net(), 5), (X,))
    with pytest.raises(PlanError, match="made for another network"):
        compress(other, [X], plan=plan, **asked)


def test_training_goes_on_without_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    use(Slow(), monkeypatch)
    network = Network(settle(Net()), (X,), name="net")
    y = network.forward(X).argmax(1)
    data = as_data({"train": [(X, y)], "calibration": [(X, y)], "validation": [(X, y)]})
    result = compress(network, data, Budget(latency="0.4x"), methods=["alds"], recover=2)
    facts = result.report.dict()
    assert any("without the folded BatchNorms" in note for note in facts["notes"])
    assert facts["recovery"]["steps"] == 2
    blank = artifact_of(result, Net())
    with torch.no_grad():
        assert torch.equal(blank(X), result.model(X))
    assert all(map(is_channels_last, conv_weights(result.model)))


def artifact_of(result: Any, skeleton: nn.Module) -> nn.Module:
    from lamina import artifact

    return artifact.restore(artifact.unpack(result.file), skeleton).eval()
