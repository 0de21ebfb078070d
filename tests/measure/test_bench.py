"""Benchmarks of two networks: on a machine whose times are known, and once on this one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from tests.clocks import Net, machine_for
from torch import nn

from lamina.errors import BudgetError, DataError
from lamina.forms import Edit, install
from lamina.measure.bench import Bench, bench, shaped
from lamina.network.source import Network


def networks() -> tuple[Network, nn.Module]:
    torch.manual_seed(0)
    net = Net().eval()
    final = copy.deepcopy(net)
    install(final, [Edit("first", "low_rank", {"folds": 1, "rank": 4})])
    return Network(net, (torch.randn(2, 64),)), final


LAYERS = ("first", "second", "wide", "head")


def test_ratios_are_those_of_the_machine_however_slow_its_spells():
    network, final = networks()
    found = [bench(network, final, batch=16, timer=machine_for(noise=n)) for n in (1.0, 5.0)]
    macs = [64 * 64, 64 * 64, 64 * 256, 256 * 8]
    before = 1.2 * sum(1e-9 * 16 * m + 1e-6 for m in macs)
    saved = 1e-9 * 16 * (64 * 64 - 4 * 128) - 1e-6
    for each in found:
        assert each.ratio == pytest.approx(before / (before - 1.2 * saved))
        assert each.low == pytest.approx(each.high) == pytest.approx(each.ratio)
        assert (each.batch, each.tokens, each.threads, each.clock) == (16, 0, 1, "process")
    assert found[0].before_s == pytest.approx(before)
    assert bench(network, network.module, batch=16, timer=machine_for()).ratio == pytest.approx(1)


def test_layers_are_timed_in_their_places():
    network, final = networks()
    machine = machine_for()
    names = [name for name, m in network.module.named_children() if isinstance(m, nn.Linear)]
    found = bench(network, final, batch=16, layers=[*names, "gone"], timer=machine)
    assert [layer.name for layer in found.layers] == names
    first, second = found.layers[:2]
    assert (first.before, first.after) == ("Linear", "Sequential")
    assert first.ratio == pytest.approx((1e-9 * 16 * 4096 + 1e-6) / (1e-9 * 16 * 512 + 2e-6))
    assert second.ratio == pytest.approx(1)
    told = json.loads(json.dumps(found.to_json()))
    assert told["layers"][0]["ratio"] == first.ratio and told["batch"] == 16


def test_on_this_machine():
    network, final = networks()
    found = bench(network, final, seconds=0.01, layers=["first"])
    assert isinstance(found, Bench) and found.rounds >= 5
    assert found.before_s > 0 and found.after_s > 0 and found.low <= found.ratio <= found.high
    assert len(found.layers) == 1


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(30, 8), nn.Linear(8, 30)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        assert attention_mask.shape == input_ids.shape == position_ids.shape
        return self.out(self.table(input_ids) * attention_mask[..., None])


def words() -> Network:
    ids = torch.arange(20).reshape(2, 10)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
             "position_ids": torch.arange(10).expand(2, 10)}  # fmt: skip
    return Network(Words().eval(), example_kwargs=given)


def test_keyword_inputs_take_another_shape():
    made = shaped(words(), 3, 25).example_kwargs
    assert {tuple(v.shape) for v in made.values()} == {(3, 25)}
    assert made["input_ids"][2].tolist() == [*range(10), *range(10), *range(5)]
    assert made["position_ids"].tolist() == [list(range(25))] * 3
    assert shaped(words()).example_kwargs["input_ids"].shape == (2, 10)
    found = bench(words(), words().module, batch=1, tokens=4, seconds=0.01)
    assert (found.batch, found.tokens) == (1, 4)


def test_bad_input_is_refused_by_name():
    network, final = networks()
    with pytest.raises(DataError, match="tokens of what"):
        bench(network, final, tokens=5)
    with pytest.raises(DataError, match="no such shape"):
        bench(network, final, batch=-1)
    with pytest.raises(DataError, match="nothing to measure"):
        bench(network, final, threads=0)
    with pytest.raises(BudgetError, match="example inputs"):
        bench(replace(network, example_inputs=()), final)
    with pytest.raises(BudgetError, match="fails on its example inputs"):
        bench(network, nn.Linear(3, 3), seconds=0.01)
