"""Latency tables: real inputs, shared geometries, ratios that a slow spell does not touch."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from tests.clocks import Net, machine_for
from torch import nn

from lamina.errors import BudgetError
from lamina.forms import Edit
from lamina.measure.clock import Job, Like, _made, check_timed, clock, middle, outline, record_calls
from lamina.measure.latency import (
    LatencyTable,
    _afford,
    measure_ratio,
    measure_table,
    reshaped,
    structure_key,
)
from lamina.network.source import Network

X = torch.randn(16, 64)


def pair(path: str, rank: int) -> tuple[Edit, ...]:
    return (Edit(path, "low_rank", {"folds": 1, "rank": rank}),)


def table_of(timer: Any, **settings: Any) -> LatencyTable:
    torch.manual_seed(0)
    network = Network(Net().eval(), (X,))
    given = {n: (n, [pair(n, 4), pair(n, 16)]) for n in ("first", "second", "wide")}
    return measure_table(network, given, timer=timer, **settings)


def test_times_are_those_of_the_machine_however_slow_its_spells():
    quiet, loud = (table_of(machine_for(noise=noise)) for noise in (1.0, 7.0))
    layer, pairs = 1e-9 * 16 * 64 * 64 + 1e-6, {r: 1e-9 * 16 * 128 * r + 2e-6 for r in (4, 16)}
    for table in (quiet, loud):
        assert table.dense["first"] == pytest.approx(layer)
        for rank, took in pairs.items():
            ratio, noise = table.ratios["second"][structure_key("second", pair("second", rank))]
            assert ratio == pytest.approx(took / layer)
            assert noise == pytest.approx(0.02 * ratio)
    assert quiet == loud
    sums = [1e-9 * 16 * n + 1e-6 for n in (64 * 64, 64 * 64, 64 * 256, 256 * 8)]
    assert quiet.whole == pytest.approx(1.2 * sum(sums))
    assert quiet.fixed == pytest.approx(1.2 * sum(sums) - sum(sums[:3]))


def test_layers_of_one_geometry_are_measured_once():
    machine = machine_for()
    table_of(machine)
    assert machine.timed == (1 + 2) + 2 * (1 + 2)  # whole, two geometries; each dense and two pairs


def test_layers_that_add_up_to_more_than_the_whole_leave_nothing_negative():
    table = table_of(machine_for(whole=0.5))
    assert table.fixed == pytest.approx(0, abs=1e-12)
    assert sum(table.dense.values()) == pytest.approx(table.whole)


def test_little_time_thins_the_structures_and_says_so():
    network = Network(Net().eval(), (X,))
    given = {"wide": ("wide", [pair("wide", r) for r in range(1, 41)])}
    table = measure_table(network, given, timer=machine_for(), seconds=0.4)
    assert table.missed == 40 - len(table.ratios["wide"]) > 0
    ranks = {r for r in range(1, 41) if structure_key("wide", pair("wide", r)) in
             table.ratios["wide"]}  # fmt: skip
    assert {1, 40} <= ranks and len(ranks) >= 8
    assert measure_table(network, given, timer=machine_for(), seconds=60).missed == 0
    assert _afford([1.0], [40], 10.0) == [(8, 10.0)]


def test_a_table_comes_back_from_json():
    table = table_of(machine_for())
    assert LatencyTable.parse(table.dump()) == table


def test_layers_are_called_as_the_network_calls_them():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc, self.idle = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.fc(self.conv(x).mean((2, 3))))

    x = torch.randn(5, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    network = Network(Twice(), (x,))
    found = record_calls(network, ["conv", "fc", "idle"])
    (call,) = found["conv"]
    made = _made(call.args)[0]
    assert made.stride() == x.stride() and made.shape == x.shape
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert found["fc"][0].count == 2 and len(found["fc"]) == 1
    assert found["idle"] == ()
    assert network.module.training and not network.module.conv._forward_pre_hooks
    table = measure_table(network, {"idle": ("idle", [pair("idle", 1)])}, timer=machine_for(Twice))
    assert table.dense == {} and table.fixed == table.whole


def test_outlines_keep_indices_and_forget_values():
    ids, x = torch.tensor([1, 2]), torch.zeros(2, 1).expand(2, 3)
    seen = outline(((ids, None), {"x": x, "flag": True}))
    assert _made(seen)[0][0].equal(ids) and _made(seen)[1]["flag"] is True
    assert _made(seen)[1]["x"].shape == (2, 3) and _made(seen)[1]["x"].abs().sum() > 0
    assert repr(outline(ids)) == repr(outline(ids + 1)) != repr(outline(ids[:1]))
    assert isinstance(seen[1]["x"], Like)


def test_a_reshaped_network_runs_at_scale_and_leaves_the_original():
    network = Network(Net().eval(), (X,))
    before = network.digest()
    module = reshaped(network, pair("first", 3) + pair("wide", 2))
    with torch.no_grad():
        assert 1e-3 < float(module(X).abs().mean()) < 1e3
    assert module.first[0].weight.shape == (3, 64) and network.digest() == before
    ratio, noise, whole = measure_ratio(network, module, timer=machine_for())
    assert ratio == pytest.approx(
        (1e-9 * 16 * (3 * 128 + 64 * 64 + 2 * 320 + 2048) + 6e-6)
        / (1e-9 * 16 * (2 * 64 * 64 + 64 * 256 + 2048) + 4e-6)
    )
    assert noise == pytest.approx(0.02 * ratio) and whole > 0


def test_gathered_channels_are_spread_while_they_are_timed():
    network = Network(Net().eval(), (X,))
    edit = Edit("first", "gathered", {"channels": 3})
    assert reshaped(network, (edit,)).first[0].index.tolist() == [0, 32, 63]


def test_the_real_clock_times_every_job_in_every_round_and_puts_back_the_threads():
    threads = torch.get_num_threads()
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout()).train()
    job = Job(
        module, record_calls(Network(nn.Sequential(module), (torch.zeros(2, 8),)), ["0"])["0"]
    )
    rows = clock([job, job], 1, 0.0)
    assert len(rows) == 5 and all(len(row) == 2 and min(row) > 0 for row in rows)
    assert module.training and torch.get_num_threads() == threads
    assert len(clock([job], 2, 1e9)) == 21


def test_a_median_knows_its_noise():
    assert middle([2.0]) == (2.0, 0.04)
    center, noise = middle([1.0, 3.0] * 8)
    assert center == 2.0 and noise == pytest.approx(2 * 1.2533 * 1.4826 / 4)


def test_networks_that_cannot_be_run_are_refused():
    with pytest.raises(BudgetError, match="latency needs example inputs"):
        check_timed(Network(nn.Linear(3, 3)))
    with pytest.raises(BudgetError, match="fails on its example inputs"):
        record_calls(Network(nn.Linear(3, 3), (torch.zeros(2, 4),)), [""])
    assert time.get_clock_info("process_time").resolution > 0
