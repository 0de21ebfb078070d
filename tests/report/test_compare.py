"""What a report measures, against the same measured by hand; and no trace of the measuring."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lamina.data import Data
from lamina.forms import Edit, Plain
from lamina.measure.loss import Loss
from lamina.network.source import Network, digest
from lamina.report.compare import (
    SAMPLES,
    affordable,
    installed,
    measure_latency,
    measure_quality,
    site_errors,
    take_reference,
)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure latency in as few rounds as there may be."""
    monkeypatch.setattr(sys.modules["lamina.report.compare"], "ROUNDS", 3)


X = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(40) % 3
LABELLED = [(X[:24], Y[:24]), (X[24:], Y[24:])]


def network(loss: str = "auto") -> Network:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    return Network(module.eval(), (X[:2],), loss=loss)


def edits(net: Network) -> dict[str, tuple[Edit, ...]]:
    """Rank 2 for the first layer; a rounded weight for the second."""
    first = net.module[0]
    u, s, v = torch.linalg.svd(first.weight.detach(), full_matrices=False)
    low = (
        Edit("0", "low_rank", {"folds": 1, "rank": 2}),
        Edit("0.0.weight", "values", values=Plain(v[:2])),
        Edit("0.1.weight", "values", values=Plain(u[:, :2] * s[:2])),
        Edit("0.1.bias", "values", values=Plain(first.bias.detach().clone())),
    )
    rounded = (net.module[2].weight.detach() * 4).round() / 4
    return {"0": low, "2": (Edit("2.weight", "values", values=Plain(rounded)),)}


def by_hand(net: Network, name: str) -> nn.Module:
    module = copy.deepcopy(net.module)
    with torch.no_grad():
        if name == "0":
            u, s, v = torch.linalg.svd(module[0].weight, full_matrices=False)
            module[0].weight.copy_((u[:, :2] * s[:2]) @ v[:2])
        else:
            module[2].weight.copy_((module[2].weight * 4).round() / 4)
    return module


def kl(net: Network, other: nn.Module) -> float:
    with torch.no_grad():
        p = F.log_softmax(net.module(X).double(), 1)
        q = F.log_softmax(other(X).double(), 1)
    return float(F.kl_div(q, p, reduction="sum", log_target=True)) / len(X)


@pytest.mark.parametrize("name", ["0", "2"])
def test_the_error_of_a_site_is_the_divergence_with_it_alone(name: str) -> None:
    net = network()
    reference = take_reference(net, LABELLED, SAMPLES)
    assert reference.loss.kind == "logits" and reference.samples == len(X)
    found = site_errors(net, edits(net), reference)
    wanted = kl(net, by_hand(net, name))
    assert wanted > 1e-4
    assert found[name] == pytest.approx(wanted, rel=1e-5)


def test_features_are_half_the_squared_distance() -> None:
    net = network("features")
    reference = take_reference(net, [X], SAMPLES)
    other = by_hand(net, "2")
    with torch.no_grad():
        wanted = 0.5 * float((other(X) - net.module(X)).double().square().sum()) / len(X)
    assert reference.error(other) == pytest.approx(wanted, rel=1e-5)
    assert reference.error(net.module) == 0


def test_only_so_many_samples_are_taken() -> None:
    assert take_reference(network(), LABELLED, 30).samples == 30
    assert affordable(1.0, 10) == SAMPLES
    assert affordable(1e12, 10) == 0


def test_measuring_leaves_no_trace() -> None:
    net = network()
    net.module.train()
    before, kinds = net.digest(), [type(m) for m in net.module]
    reference = take_reference(net, LABELLED, SAMPLES)
    site_errors(net, edits(net), reference)
    measure_latency(net, by_hand(net, "2"))
    assert net.digest() == before
    assert [type(m) for m in net.module] == kinds
    assert all(m.training for m in net.module.modules())


@pytest.mark.parametrize("fails", [False, True])
def test_edits_go_in_and_out_again(fails: bool) -> None:
    net = network()
    module, before = net.module, net.digest()
    kept = [p.data_ptr() for p in module.parameters()]
    every = [e for own in edits(net).values() for e in own]
    try:
        with installed(module, every):
            assert digest(module) != before
            assert isinstance(module[0], nn.Sequential)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert digest(module) == before
    assert [p.data_ptr() for p in module.parameters()] == kept


def test_edits_that_do_not_fit_leave_nothing_behind() -> None:
    from lamina.errors import FileError

    net = network()
    before = net.digest()
    bad = (*edits(net)["2"], Edit("0.weight", "values", values=Plain(torch.zeros(1))))
    with pytest.raises(FileError), installed(net.module, bad):
        pass
    assert net.digest() == before


def test_quality_of_every_split() -> None:
    net = network()
    other, worse = by_hand(net, "2"), by_hand(net, "0")
    data = Data(calibration=[X], validation=LABELLED, test=[(X, (Y + 1) % 3)])
    found = measure_quality(net, data, "accuracy", worse, other)

    def right(module: nn.Module, labels: torch.Tensor) -> float:
        return 100 * float((module(X).argmax(1) == labels).double().mean())

    held, test = found["validation"], found["test"]
    assert held["before"] == pytest.approx(right(net.module, Y))
    assert held["applied"] == pytest.approx(right(worse, Y))
    assert held["after"] == pytest.approx(right(other, Y))
    assert held["drop"] == pytest.approx(held["before"] - held["after"])
    assert held["applied_drop"] == pytest.approx(held["before"] - held["applied"])
    assert test["after"] == pytest.approx(right(other, (Y + 1) % 3))
    assert found["fidelity"]["after"]["kl"] == pytest.approx(kl(net, other), rel=1e-5)
    assert found["fidelity"]["applied"]["kl"] == pytest.approx(kl(net, worse), rel=1e-5)
    assert found["unit"] == "points"


def test_without_validation_there_is_fidelity_alone() -> None:
    net = network()
    found = measure_quality(net, Data(calibration=[X]), "agreement", net.module, net.module)
    assert found["validation"] is None and found["test"] is None
    assert found["fidelity"]["after"]["agreement"] == 100
    assert measure_quality(net, None, "agreement", net.module, net.module)["fidelity"] is None


def test_latency_is_of_one_sample() -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: set[int] = set()

        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
            self.sizes.add(len(x))
            return x if scale is None else x * scale

    first, second = Seen(), Seen()
    net = Network(first, (X,), {"scale": torch.ones(len(X), 1)})
    found, why = measure_latency(net, second)
    assert why == "" and found is not None
    assert first.sizes == second.sizes == {1}
    assert found["ratio"] == pytest.approx(found["before_s"] / found["after_s"])
    assert found["before_s"] > 0 and math.isfinite(found["ratio"])


def test_latency_that_cannot_be_measured_says_why() -> None:
    found, why = measure_latency(Network(nn.Linear(3, 2)), nn.Linear(3, 2))
    assert found is None and why == "no example inputs"
    found, why = measure_latency(Network(nn.Linear(3, 2), (X,)), nn.Linear(3, 2))
    assert found is None and "the network does not take this batch" in why


def test_a_reference_keeps_the_loss() -> None:
    assert take_reference(network("logits"), [X], 4).loss == Loss("logits", 1)
