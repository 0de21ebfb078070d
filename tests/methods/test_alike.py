"""Final methods on families of layers alike: as `propose`, but fewer points and few coded."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from tests.contract.checks import case_of

from lamina import codecs
from lamina.artifact import records
from lamina.forms import find_tensor
from lamina.methods.base import Alike, Choice, Leaf, get_method, registry, weights_of
from lamina.network.source import Network
from lamina.plan.fronts import pareto

NAMES = [name for name, method in registry().items() if isinstance(method, Alike)]
PLACES = [("residual", "conv2", "alds"), ("mlp", "fc2", "magnitude"), ("grouped", "fc", "alds")]


@cache
def family(model: str, name: str, first: str, data_free: bool) -> tuple[list[list[Leaf]], list]:
    """The layers that every point of a non-final method leaves, place by place, and the errors."""
    case, method = case_of(model), get_method(first)
    site, stats = case.sites[name], None if data_free else case.stats.of(name)
    weights = weights_of(case.network, site)
    offers = sorted(pareto(method.propose(site, weights, stats)), key=lambda c: c.cost.bits)
    left = [method.leave(site, weights, stats, o.steps[0].settings) for o in offers]
    return [list(leaves) for leaves in zip(*left, strict=True)], [o.error for o in offers]


class Holder(torch.nn.Module):
    """A module that holds the tensors of one leaf under the names its site gives them."""

    def __init__(self, leaf: Leaf) -> None:
        super().__init__()
        self.layer = torch.nn.Module()
        for key, tensor in leaf.weights.items():
            setattr(self.layer, key, torch.nn.Parameter(tensor.clone()))


def carried_out(name: str, leaf: Leaf, settings) -> tuple[float, float]:
    """The bytes of a leaf after a step, and the error of its very change."""
    bias = "layer.bias" if "bias" in leaf.weights else ""
    site = replace(leaf.site, module="layer", weight="layer.weight", bias=bias)
    network = Network(Holder(leaf))
    edits = get_method(name).apply(network, Choice(site, settings), leaf.stats)
    assert find_tensor(network.module, "layer.weight").shape == leaf.weights["weight"].shape
    return sum(len(records.encode(e.values)) for e in edits), len(edits)


def test_the_quantizers_offer_for_families() -> None:
    assert {"rdoq", "kmeans"} <= set(NAMES)


@pytest.mark.parametrize("data_free", [False, True])
@pytest.mark.parametrize(("model", "site", "first"), PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_errors_are_those_of_the_method(name, model, site, first, data_free) -> None:
    places, floors = family(model, site, first, data_free)
    for leaves in places:
        lines = get_method(name).propose_alike(leaves, floors)
        assert len(lines) == len(leaves)
        for leaf, line in list(zip(leaves, lines, strict=True))[:: max(1, len(leaves) // 5)]:
            assert line, leaf.site.name
            for offer in line[:: max(1, len(line) // 3)]:
                size, _ = carried_out(name, leaf, offer.steps[0].settings)
                claim = offer.cost.bits / 8
                assert abs(size - claim) <= 0.02 * size + 64, f"{offer}: really {size}"
                assert offer.site == offer.steps[0].at == leaf.site.name
                assert offer.cost.macs == leaf.site.macs
            ordered = sorted(line, key=lambda c: c.cost.bits)
            errors = [c.error for c in ordered]
            assert errors == sorted(set(errors), reverse=True), "dearer is better"


@pytest.mark.parametrize("name", NAMES)
def test_errors_are_those_of_a_whole_proposal(name) -> None:
    """Where both offer the same settings they predict the same."""
    places, floors = family("residual", "conv2", "alds", False)
    seen = 0
    for leaf, line in zip(
        places[0], get_method(name).propose_alike(places[0], floors), strict=True
    ):
        whole = get_method(name).propose(leaf.site, leaf.weights, leaf.stats)
        exact = {str(c.steps): c.error for c in whole}
        for offer in line:
            if str(offer.steps) in exact:
                assert offer.error == pytest.approx(exact[str(offer.steps)], rel=1e-9)
                seen += 1
    assert seen > len(places[0])


def test_nothing_much_finer_than_the_error_before_is_tried() -> None:
    places, floors = family("residual", "conv2", "alds", False)
    rdoq = get_method("rdoq")
    near, far = (
        rdoq.propose_alike(places[0], floors),
        rdoq.propose_alike(places[0], [0.0] * len(floors)),
    )
    assert sum(map(len, near)) < sum(map(len, far))
    for line, floor in zip(near, floors, strict=True):
        assert line[0].error <= 5e-3 * floor, "the finest step is fine enough"
        assert all(c.error > 5e-3 * floor for c in line[1:])


@pytest.mark.parametrize("name", NAMES)
def test_few_of_a_family_are_coded(name, monkeypatch) -> None:
    places, floors = family("residual", "conv2", "alds", False)
    coded = []
    length = codecs.length
    import lamina.methods.kmeans as kmeans
    import lamina.methods.rdoq as rdoq

    def counted(symbols):
        coded.append(symbols.shape)
        return length(symbols)

    for result in (rdoq.Result.size, kmeans.codebook_bits):
        monkeypatch.setattr(result, "__defaults__", (counted,))
    get_method(name).propose_alike(places[0], floors)
    assert 0 < len(set(coded)) <= 3 < len(places[0])


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_family_and_dead_layers(name) -> None:
    assert get_method(name).propose_alike([], []) == []
    places, floors = family("mlp", "fc2", "magnitude", False)
    leaf = places[0][0]
    dead = replace(leaf, weights={k: torch.zeros_like(t) for k, t in leaf.weights.items()})
    for line in get_method(name).propose_alike([dead, leaf], [0.0, floors[0]]):
        assert line
