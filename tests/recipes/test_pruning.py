"""What a recipe keeps of each layer."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.train.small import make_batches, make_network
from torch import nn

from lamina.data import Data
from lamina.errors import MethodError
from lamina.forms import find_tensor
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.recipes.pruning import (
    SHARES,
    at_round,
    choose_shares,
    covered,
    pruned,
    sensitivities,
    setting_of,
    shares_of,
)
from lamina.recipes.settings import Pruning


def small() -> tuple[Network, list, Data]:  # type: ignore[type-arg]
    network = make_network()
    batches = make_batches()
    layers = covered(network, discover(network).layers, "test")
    return network, layers, Data(train=batches, calibration=batches[:4])


def test_sensitivities_rise_from_nothing() -> None:
    network, layers, data = small()
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    found = sensitivities(network, layers, data.calibration or (), 100.0)
    assert set(found) == {site.name for site in layers}
    for errors in found.values():
        assert len(errors) == len(SHARES) and errors[0] < 1e-9 and errors[-1] > 1e-3
        assert all(a <= b for a, b in itertools.pairwise(errors))
    after = network.module.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_shares_keep_to_the_density_and_favour_the_sensitive_layer() -> None:
    sizes = {"easy": 900, "hard": 100}
    errors = {"easy": [i * 0.01 for i in range(16)], "hard": [i * 10.0 for i in range(16)]}
    for density in (0.01, 0.05, 0.2, 0.6, 1.0):
        shares = choose_shares(sizes, errors, density)
        assert sum(shares[n] * sizes[n] for n in sizes) <= density * 1000 + 1e-6
        assert shares["hard"] >= shares["easy"]
    assert choose_shares(sizes, errors, 0.001) == {"easy": 0.001, "hard": 0.001}


def test_rules_come_before_the_measured_shares() -> None:
    network, layers, data = small()
    first, last = (site.name for site in layers)
    shares = shares_of(network, layers, data, Pruning(density=0.3, keep={first: 0.5}))
    assert shares[first] == 0.5 and 0 < shares[last] < 1
    both = shares_of(network, layers, data, Pruning(keep={"linear": 0.25}))
    assert both == {first: 0.25, last: 0.25}
    with pytest.raises(MethodError, match="convv"):
        shares_of(network, layers, data, Pruning(keep={"convv": 0.5}))


def test_without_calibration_data_sensitivities_come_from_the_training_data() -> None:
    network, layers, data = small()
    shares = shares_of(network, layers, Data(train=data.train), Pruning(density=0.3))
    assert all(share in SHARES for share in shares.values())


def test_pruning_keeps_the_largest_and_never_revives() -> None:
    network, layers, _ = small()
    name = layers[0].weight
    shares = {site.name: 0.2 for site in layers}
    (edit, _) = pruned(network.module, layers, shares)
    weight, kept = find_tensor(network.module, name).detach(), edit.values.dense()  # type: ignore[union-attr]
    assert edit.path == name and int((kept != 0).sum()) == round(0.2 * weight.numel())
    assert kept.abs()[kept != 0].min() >= weight.abs()[kept == 0].max()
    with torch.no_grad():
        find_tensor(network.module, name).copy_(kept)
    again = pruned(network.module, layers, {site.name: 0.9 for site in layers})[0].values.dense()  # type: ignore[union-attr]
    assert torch.equal(again, kept)


def test_rounds_fall_by_equal_factors_and_end_exactly() -> None:
    shares = [at_round(0.03, n, 5) for n in range(1, 6)]
    assert shares[-1] == 0.03
    ratios = [b / a for a, b in itertools.pairwise([1.0, *shares])]
    assert max(ratios) - min(ratios) < 1e-12


def test_embeddings_and_networks_without_layers() -> None:
    with pytest.raises(MethodError, match="no layer"):
        covered(Network(nn.ReLU()), (), "test")
    network = Network(
        nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), (torch.zeros(1, 3).long(),)
    )
    layers = covered(network, discover(network).layers, "test")
    assert [site.op for site in layers] == ["linear"]
    assert setting_of(layers[0], {"conv": 1}) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"density": 0}, {"density": 1.1}, {"density": float("nan")}, {"keep": {"fc": 0.0}},
        {"keep": {"fc": "5%"}}, {"rounds": 0}, {"rounds": 2.5}, {"epochs": -1}, {"last": -0.5},
        {"lr": 0}, {"decay": -1}, {"lr": float("inf")}, {"distill": 1.5}, {"density": True},
    ],
)  # fmt: skip
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(MethodError):
        Pruning(**wrong)  # type: ignore[arg-type]
