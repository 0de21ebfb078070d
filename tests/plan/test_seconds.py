"""Seconds of candidates: what runs under a chain, where it may be measured, and the speed gate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.clocks import machine_for
from torch import nn

from lamina import discover
from lamina.errors import BudgetError, InfeasibleError, MethodError
from lamina.forms import Edit
from lamina.measure.latency import LatencyTable, measure_table, reshaped, structure_key
from lamina.measure.span_latency import measure_spans
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Candidate, Step
from lamina.network.source import Network
from lamina.plan import Budget, plan
from lamina.plan.seconds import (
    count_structures,
    inside,
    outline,
    reshape_edits,
    span_structures,
    structure_of,
    structures_of,
    with_seconds,
)

NETWORK = Network(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
SITES = discover(NETWORK)


def pair(at: str, rank: int, *rest: Step) -> tuple[Step, ...]:
    return (Step("alds", at, {"folds": 1, "rank": rank}), *rest)


def candidate(at: str, error: float, *steps: Step) -> Candidate:
    return Candidate(at, steps, Cost(1, 8, 1), error)


def key(at: str, rank: int) -> str:
    return structure_key(at, structure_of(NETWORK, SITES[at], pair(at, rank)))


def test_values_alone_leave_the_structure():
    chain = (Step("magnitude", "0", {"keep": 0.5}), Step("rdoq", "0", {"step": 0.1}))
    assert structure_of(NETWORK, SITES["0"], chain) == ()
    assert structure_of(NETWORK, SITES["0"], ()) == ()


def test_a_chain_has_the_structure_of_its_steps():
    values = (Step("magnitude", "0.0", {"keep": 0.5}), Step("rdoq", "0.0", {"step": 0.1}))
    (edit,) = structure_of(NETWORK, SITES["0"], pair("0", 2, *values))
    assert (edit.path, edit.form, edit.settings["rank"]) == ("0", "low_rank", 2)
    edits = reshape_edits(NETWORK, SITES, {"0": pair("0", 2), "2": (Step("keep", "2"),)})
    assert [e.path for e in edits] == ["0"]


def test_structures_are_told_once_per_site_and_only_inside_it():
    offers = {
        "0": (
            candidate("0", 0, Step("keep", "0")),
            candidate("0", 1, *pair("0", 2, Step("keep", "0.0"))),
            candidate("0", 1, *pair("0", 2, Step("rdoq", "0.0", {"step": 0.1}))),
            candidate("0", 2, *pair("0", 1)),
        ),
        "2": (candidate("2", 0, Step("keep", "2")),),
    }
    found = structures_of(NETWORK, SITES, offers)
    assert set(found) == {"0"} and found["0"][0] == "0" and count_structures(found) == 2
    assert inside(SITES["2"], (Edit("2", "low_rank"), Edit("2.0", "low_rank")))
    assert not inside(SITES["2"], (Edit("20", "low_rank"),))


def test_the_gate_drops_what_is_slow_within_noise_or_unmeasured():
    offers = {
        "0": (
            candidate("0", 0, Step("keep", "0")),
            *(candidate("0", rank, *pair("0", rank)) for rank in (1, 2, 3, 4)),
        ),
        "2": (candidate("2", 0, Step("keep", "2")),),
    }
    ratios = {key("0", 1): (0.5, 0.1), key("0", 2): (0.95, 0.06), key("0", 3): (1.4, 0.02)}
    table = LatencyTable(3.0, {"0": 2.0}, {"0": ratios})
    kept, dropped = with_seconds(NETWORK, SITES, offers, table)
    assert dropped == 3 and table.fixed == 1.0
    assert [(c.error, c.cost.seconds) for c in kept["0"]] == [(0, 2.0), (1, 1.0)]
    assert kept["2"][0].cost.seconds == 0.0  # it is in the fixed time


def test_seconds_are_planned_like_any_other_cost():
    offers = {
        "0": (
            Candidate("0", (Step("keep", "0"),), Cost(1, 80, 1, 2.0), 0.0),
            Candidate("0", pair("0", 2), Cost(1, 800, 1, 1.0), 1.0),
            Candidate("0", pair("0", 1), Cost(1, 80, 1, 0.5), 4.0),
        ),
        "2": (Candidate("2", (Step("keep", "2"),), Cost(1, 80, 1), 0.0),),
    }
    costs = {"original": Cost(2, 1600, 2, 4.0), "fixed": Cost(0, 0, 0, 2.0)}

    def error(**limits: object) -> float:
        budget = Budget(**limits)  # type: ignore[arg-type]
        return plan(NETWORK, SITES, Stats(samples=9), offers, budget, **costs).error

    assert error(latency="100%") == 0
    assert error(latency="0.75x") == error(latency=3.0) == 1
    assert error(latency="0.75x", size="20%") == 4
    with pytest.raises(InfeasibleError, match=r"latency=2500\.000") as caught:
        error(latency="0.5x")
    nearest = caught.value.nearest["seconds"]
    assert nearest == pytest.approx(2.5) and error(latency=nearest) == 4
    with pytest.raises(BudgetError, match="latency budgets need measured candidates"):
        plan(NETWORK, SITES, Stats(samples=9), offers, Budget(latency="0.5x"))


# --- spans ----------------------------------------------------------------------------------------


DEEP = Network(
    nn.Sequential(
        *[
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Softplus())
            for _ in range(3)
        ]
    ),
    (torch.zeros(4, 8),),
)


def glue_at(i: int, *rest: Step) -> tuple[Step, ...]:
    name = f"{i}.0..{i}.2"
    return (Step("glue", name, {"inputs": 8}), *rest)


def test_the_structure_of_a_span_is_that_of_all_its_steps(glue):
    sites = discover(DEEP)
    span = sites["1.0..1.2"]
    values = (Step("magnitude", "1.2", {"keep": 0.5}), Step("rdoq", "1.2", {"step": 0.1}))
    edits = structure_of(DEEP, span, glue_at(1, *values))
    assert [(e.path, e.form, dict(e.settings)) for e in edits] == [
        ("1.0", "identity", {}),
        ("1.1", "identity", {}),
        ("1.2", "resized", {"inputs": 8}),
    ]
    later = Step("alds", "1.2", {"folds": 1, "rank": 2})
    more = structure_of(DEEP, span, glue_at(1, later, Step("keep", "1.2.0")))
    assert more[:3] == edits and (more[3].path, more[3].form) == ("1.2", "low_rank")
    assert reshape_edits(DEEP, sites, {span.name: glue_at(1, later)}) == more
    assert reshaped(DEEP, more)[1][2][0].weight.shape == (2, 8)
    assert structure_of(DEEP, span, (Step("keep", "1.2"),)) == ()
    with pytest.raises(MethodError, match=r"no layer to work on at alds at 1\.7"):
        structure_of(DEEP, span, glue_at(1, Step("alds", "1.7", {"folds": 1, "rank": 2})))


def test_the_structure_of_a_chain_takes_no_values():
    """An outline is enough: nothing is decomposed to know what will run."""
    made = outline(DEEP.module)
    assert all(t.is_meta for t in made.state_dict().values())
    assert all(not t.is_meta for t in DEEP.module.state_dict().values())
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    copied = outline(tied)
    assert copied[1].weight is copied[0].weight


def test_like_spans_share_a_key_and_others_do_not(glue):
    sites = discover(DEEP)
    offers = {
        f"{i}.0..{i}.2": (candidate(f"{i}.0..{i}.2", 1.0, *glue_at(i)),) for i in range(3)
    } | {"0.0": (candidate("0.0", 0, Step("keep", "0.0")),)}
    found = span_structures(DEEP, sites, offers)
    assert set(found) == {f"{i}.0..{i}.2" for i in range(3)}
    assert len({like for like, _ in found.values()}) == 1
    assert len({key for _, given in found.values() for key in given}) == 1
    assert structures_of(DEEP, sites, offers) == {}


@pytest.mark.parametrize("many", [1, 3])
def test_a_span_takes_what_its_layers_do_less_what_the_network_saves(glue, many):
    """On a machine whose times are known: each of like spans saves its share, exactly."""
    sites = discover(DEEP)
    names = [f"{i}.0..{i}.2" for i in range(many)]
    offers = {
        **{site.name: (candidate(site.name, 0, Step("keep", site.name)),) for site in sites.layers},
        **{n: (candidate(n, 1.0, *glue_at(int(n[0]))),) for n in names},
    }
    machine = machine_for(nn.Sequential, whole=1.0)
    spans = span_structures(DEEP, sites, offers)
    members = {name: sites[name].members for name in names}
    alone = {site.name: (site.module, ()) for site in sites.layers}
    table = measure_table(DEEP, alone, timer=machine)
    before = machine.timed
    found, missed = measure_spans(DEEP, spans, members, whole=table.whole, timer=machine)
    assert missed == 0 and machine.timed - before == 2, "one structure, and the original"
    table = replace(table, spans=found)
    assert LatencyTable.parse(table.dump()) == table
    kept, dropped = with_seconds(DEEP, sites, offers, table)
    assert dropped == 0
    rate, start, batch = machine.rate, machine.start, 4
    glued = rate * batch * 64 + start  # one layer of 8 x 8
    dense = 2 * (rate * batch * 128 + start)
    assert table.whole == pytest.approx(3 * dense)
    for name in names:
        (only,) = kept[name]
        share = only.cost.seconds / sum(kept[m][0].cost.seconds for m in members[name])
        assert share == pytest.approx(glued / dense, rel=1e-6)


def test_spans_that_overlap_are_not_changed_together(glue):
    net = nn.Sequential(*[m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())][:-1])
    network = Network(net, (torch.zeros(2, 8),))
    sites = discover(network)
    names = ["0..2", "2..4", "4..6"]
    offers = {n: (candidate(n, 1.0, Step("glue", n, {"inputs": 8})),) for n in names}
    spans = span_structures(network, sites, offers)
    members = {n: sites[n].members for n in names}
    seen: list[int] = []

    def timer(jobs, threads, seconds):
        seen.append(sum(isinstance(m, nn.Identity) for m in jobs[1].module.modules()))
        return [[1.0, 0.8]] * 5

    found, _ = measure_spans(network, spans, members, whole=1.0, timer=timer)
    assert seen == [4], "0..2 and 4..6; 2..4 overlaps both"
    ratios = {round(ratio, 6) for rows in found.values() for ratio, _ in rows.values()}
    assert ratios == {0.9}


def test_the_gate_holds_for_spans_and_time_is_kept_to(glue):
    sites = discover(DEEP)
    name = "0.0..0.2"
    ranks = [glue_at(0, Step("alds", "0.2", {"folds": 1, "rank": r})) for r in (1, 2, 3)]
    rows = (candidate(name, 1.0, *glue_at(0)), *(candidate(name, 2.0, *steps) for steps in ranks))
    offers = {"0.0": (candidate("0.0", 0, Step("keep", "0.0")),), name: rows}
    spans = span_structures(DEEP, sites, offers)
    keys = list(spans[name][1])
    assert len(keys) == 4
    ratios = {keys[0]: (0.9, 0.02), keys[1]: (0.99, 0.02), keys[2]: (1.2, 0.02)}
    table = LatencyTable(10.0, {"0.0": 2.0, "0.2": 1.0}, {}, spans={name: ratios})
    kept, dropped = with_seconds(DEEP, sites, offers, table)
    assert dropped == 3
    assert [c.cost.seconds for c in kept[name]] == [pytest.approx(3.0 - 1.0)]
    assert kept["0.0"][0].cost.seconds == 2.0
    counted: list[int] = []

    def timer(jobs, threads, seconds):
        counted.append(len(jobs) - 1)
        return [[1.0] + [0.5] * (len(jobs) - 1)] * 5

    members = {name: sites[name].members}
    found, missed = measure_spans(
        DEEP, spans, members, whole=10.0, seconds=1.0, timer=timer
    )  # fmt: skip
    assert sum(counted) == len(found[name]) == 3 and missed == 1


def test_a_span_whose_structure_stays_takes_what_its_layers_take(glue):
    """A shared weight saves no time, and is no structure."""
    sites = discover(DEEP)
    offers = {"0.0..0.2": (candidate("0.0..0.2", 0.5, Step("keep", "0.2")),)}
    assert span_structures(DEEP, sites, offers) == {}
    table = LatencyTable(10.0, {"0.0": 2.0, "0.2": 1.0})
    kept, dropped = with_seconds(DEEP, sites, offers, table)
    assert dropped == 0 and kept["0.0..0.2"][0].cost.seconds == 3.0
