"""bf16: its prediction against the rounded layer, and its refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lamina.artifact.records import encode
from lamina.errors import MethodError, SiteError
from lamina.forms import install
from lamina.measure.stats import LayerStats
from lamina.methods.base import Choice, Method, weights_of
from lamina.methods.bf16 import RELATIVE, method
from lamina.network.sites import Site
from lamina.network.source import Network


def linear() -> tuple[Network, Site]:
    torch.manual_seed(0)
    root = nn.Module()
    root.fc = nn.Linear(200, 40)
    return Network(root), Site(
        "fc", module="fc", weight="fc.weight", bias="fc.bias", shape=(40, 200)
    )


def test_it_follows_the_protocol():
    assert isinstance(method, Method) and not method.final and method.saves_time


def test_the_relative_error_of_rounding():
    x = torch.rand(200_000, dtype=torch.float64) + 1
    lost = x.to(torch.bfloat16).double() - x
    assert float(lost.square().mean() / x.square().mean()) == pytest.approx(RELATIVE, rel=0.03)


@pytest.mark.parametrize("kind", ["equal", "skewed"])
def test_the_error_is_that_of_the_rounded_layer(kind):
    network, site = linear()
    x = torch.randn(4000, 200, generator=torch.Generator().manual_seed(1))
    x = x * torch.logspace(-1, 1, 200) if kind == "skewed" else x
    eye = torch.eye(40, dtype=torch.float64)[None]
    stats = LayerStats((x.double().T @ x.double() / 4000)[None], eye)
    (offer,) = method.propose(site, weights_of(network, site), stats)
    with torch.no_grad():
        before = network.module.fc(x).double()
        install(network.module, method.apply(network, Choice(site, {"bits": 16}), stats))
        fc = network.module.fc.eval()
        # Without the rounding of the output, which no other layer's prediction counts either.
        short = x.to(torch.bfloat16).double(), fc.weight.double()
        after = short[0] @ short[1].T + fc.bias.double()
    measured = float((after - before).square().sum() / 8000)
    assert 0.6 * measured < offer.error < 1.6 * measured


def test_its_size_is_that_of_the_rounded_weight():
    network, site = linear()
    (offer,) = method.propose(site, weights_of(network, site), None)
    edits = method.apply(network, Choice(site, {"bits": 16}), None)
    size = len(encode(edits[1].values)) + 160
    assert offer.cost.bits / 8 == pytest.approx(size, rel=0.02, abs=64)
    assert offer.cost.bits < 0.6 * 32 * 8040


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"op": "conv"}, "operation conv"),
        ({"groups": 2}, "blocks"),
        ({"rigid": "tied with x"}, "tied"),
        ({"kind": "family"}, "not one layer"),
        ({"module": ""}, "whole network"),
    ],
)
def test_refusals(change, why):
    network, site = linear()
    bad = replace(site, **change)
    assert why in method.refuse(bad)
    with pytest.raises(SiteError, match="fc"):
        method.apply(network, Choice(bad, {"bits": 16}), None)
    assert not method.refuse(replace(site, transposed=True, rigid="no form replaces a Conv1D"))


def test_settings_that_do_not_fit():
    network, site = linear()
    for settings in ({}, {"bits": 8}, {"bits": 16, "rank": 1}):
        with pytest.raises(MethodError, match="bits=16"):
            method.apply(network, Choice(site, settings), None)
