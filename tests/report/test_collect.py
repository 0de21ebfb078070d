"""Facts of real runs: every byte and whose it is, and what there is to say without data."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from lamina import artifact
from lamina.artifact import Package
from lamina.data import Data, TensorLoader
from lamina.forms import Edit
from lamina.measure.calibrate import calibrate
from lamina.measure.cost import measured_macs, measured_params
from lamina.measure.stats import Cost, Stats
from lamina.network.discover import discover
from lamina.network.sites import Refusal, Site, Sites
from lamina.network.source import Network
from lamina.plan import Budget, Candidates, Edited, Plan, apply, plan, propose
from lamina.plan.curves import POINTS
from lamina.report import Report, collect
from lamina.report.collect import ledger_of, owner, owners_of
from lamina.report.document import NEEDED, OPTIONAL, check
from lamina.report.owners import asked_for


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure latency in as few rounds as there may be."""
    monkeypatch.setattr(sys.modules["lamina.report.compare"], "ROUNDS", 3)


class Tiny(nn.Module):
    """A convolution, a norm whose tensors belong to no site, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(144, 24)
        self.out = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.out(torch.relu(self.fc(x.flatten(1))))


@dataclass(frozen=True)
class Run:
    network: Network
    data: Data | None
    sites: Sites
    plan: Plan
    edited: Edited
    file: bytes
    package: Package
    candidates: Candidates

    def facts(self, **more: Any) -> dict[str, Any]:
        return collect(
            self.network, self.data, self.sites, self.plan, self.edited, self.edited,
            self.package, len(self.file), **more,
        )  # fmt: skip


def make(budget: Budget, methods: list[str], data: bool = True) -> Run:
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 3
    network = Network(Tiny().eval(), (x[:2],), name="tiny<net>")
    loaders = None
    if data:
        split = TensorLoader(x, y, 32)
        loaders = Data(calibration=split, validation=split, test=split.head(16), name="noise")
    sites = discover(network)
    stats = calibrate(network, sites, loaders, samples=64) if loaders else Stats()
    offers = propose(network, sites, stats, methods)
    decided = plan(network, sites, stats, offers, budget)
    edited = apply(network, decided, sites, stats)
    file = artifact.pack(edited.network.module, edited.edits, network.source, {"*": "all"})
    return Run(network, loaders, sites, decided, edited, file, artifact.unpack(file), offers)


@pytest.fixture(scope="module")
def factored() -> Run:
    """A run whose budget of multiply-accumulates forces low rank pairs."""
    return make(Budget(macs="70%", size="60%"), ["alds", "rdoq"])


@pytest.fixture(scope="module")
def facts(factored: Run) -> dict[str, Any]:
    return factored.facts(metric="accuracy", samples=64, seed=5, limit=0.6 * 4 * 3_600)


def test_the_schema(facts: dict[str, Any]) -> None:
    check(Report(facts).dict(), NEEDED, "facts")
    assert list(facts) == [
        "lamina", "date", "seed", "machine", "network", "data", "budget", "size", "ledger", "sites",
        "refusals", "quality", "error", "latency", "curve", "rounds", "curves", "prices",
        "seconds", "recovery", "stages", "notes",
    ]  # fmt: skip
    json.dumps(facts, allow_nan=False)


def test_the_ledger_adds_up_to_the_file(factored: Run, facts: dict[str, Any]) -> None:
    assert sum(row["bytes"] for row in facts["ledger"]) == len(factored.file)
    assert facts["size"]["file"] == len(factored.file)
    inside = sum(site["bytes_file"] for site in facts["sites"])
    outside = sum(row["bytes"] for row in facts["ledger"] if row["site"] is None)
    assert inside + outside == len(factored.file)
    free = {row["part"] for row in facts["ledger"] if row["site"] is None}
    norm = {n for n in factored.network.module.state_dict() if n.startswith("norm.")}
    assert free == norm | {"header", "checksum"}


def test_a_ledger_that_does_not_add_up_is_refused(factored: Run) -> None:
    with pytest.raises(AssertionError, match="add up"):
        collect(
            factored.network, None, factored.sites, factored.plan, factored.edited,
            factored.edited, factored.package, len(factored.file) + 1,
        )  # fmt: skip


def test_factors_belong_to_the_layer_they_replace(factored: Run, facts: dict[str, Any]) -> None:
    replaced = [e.path for e in factored.edited.edits if e.form == "low_rank"]
    assert replaced
    for path in replaced:
        parts = {row["part"] for row in facts["ledger"] if row["site"] == path}
        assert {f"{path}.0.weight", f"{path}.1.weight"} <= parts
        assert f"{path}.weight" not in parts


def test_what_sites_cost_is_what_the_networks_cost(factored: Run, facts: dict[str, Any]) -> None:
    for what, module in (("before", factored.network.module), ("after", factored.edited.model)):
        norm = sum(p.numel() for p in module.norm.parameters())  # type: ignore[union-attr]
        params = sum(site[f"params_{what}"] for site in facts["sites"])
        macs = sum(site[f"macs_{what}"] for site in facts["sites"])
        assert params + norm == measured_params(module)
        assert macs == measured_macs(module, factored.network.example_inputs)
    assert facts["sites"][0]["bytes_before"] == 4 * (4 * 9 + 4)


def test_errors_are_measured_beside_the_predicted_ones(facts: dict[str, Any]) -> None:
    for site in facts["sites"]:
        assert site["error_measured"] >= 0
    largest = max(facts["sites"], key=lambda s: s["error_predicted"])
    assert 0.1 < largest["error_measured"] / largest["error_predicted"] < 10
    assert facts["error"]["measured"] == facts["error"]["measured_applied"] > 0
    assert facts["error"]["objective"] == "sum"


def test_quality_latency_and_budget(facts: dict[str, Any]) -> None:
    assert facts["quality"]["metric"] == "accuracy"
    assert facts["quality"]["validation"]["before"] >= 0
    assert facts["quality"]["test"] is not None
    assert facts["data"] == {"name": "noise", "samples": 64, "validation": 64}
    assert facts["latency"]["threads"] == 1
    assert facts["budget"]["limits"]["bytes"] == 0.6 * 4 * 3_600
    assert set(facts["budget"]["met"]) == {"bytes", "macs"}
    assert facts["budget"]["met"]["macs"] is True
    assert facts["budget"]["text"] == "size=60%, macs=70%"


def test_the_curve_holds_the_plan_and_the_file(factored: Run, facts: dict[str, Any]) -> None:
    curve = facts["curve"]
    assert curve["planned"] == [factored.plan.predicted.bits / 8, factored.plan.error]
    assert curve["final"] == [len(factored.file), facts["error"]["measured"]]
    assert 2 <= len(curve["points"]) <= 401


def test_the_report_of_a_real_run_shows(facts: dict[str, Any]) -> None:
    report = Report({**facts, "stages": [{"name": "plan", "seconds": 0.1, "cached": False}]})
    assert "tiny<net>" in report.table()
    assert "tiny&lt;net&gt;" in report.html() and "tiny<net>" not in report.html()
    assert "alds" in report.markdown()


def test_without_candidates_there_are_no_curves(facts: dict[str, Any]) -> None:
    assert facts["curves"] == facts["prices"] == {} and facts["seconds"] is None
    assert "could have been" not in Report(facts).table()


def test_curves_hold_the_plan_and_its_prices(factored: Run) -> None:
    found = factored.facts(metric="accuracy", candidates=factored.candidates)
    check(Report(found).dict(), OPTIONAL, "facts")
    assert list(found["curves"]) == ["conv", "fc", "out"]
    for site in found["sites"]:
        curve = found["curves"][site["site"]]
        assert len(curve) <= POINTS
        (taken,) = [p for p in curve if p["taken"]]
        assert taken["steps"] == site["chain"] and taken["bits"] / 8 == site["bytes_planned"]
        assert taken["macs"] == site["macs_after"] and taken["error"] == site["error_predicted"]
    assert set(found["prices"]) == {"bytes", "macs"} and found["prices"]["macs"] > 0
    assert "What each layer could have been" in Report(found).markdown()


def test_times_of_layers_add_up_to_the_plans(factored: Run) -> None:
    """Of a plan whose candidates were timed: every layer 2 ms, half of that where it has a pair."""

    def timed(steps: Any, cost: Cost) -> Cost:
        return replace(cost, seconds=1e-3 if len(steps) > 1 else 2e-3)

    offers = {
        name: tuple(replace(c, cost=timed(c.steps, c.cost)) for c in line)
        for name, line in factored.candidates.items()
    }
    sites = {n: replace(d, cost=timed(d.steps, d.cost)) for n, d in factored.plan.sites.items()}
    whole = sum(d.cost.seconds for d in sites.values())
    decided = replace(
        factored.plan,
        sites=sites,
        original=replace(factored.plan.original, seconds=7e-3),
        predicted=replace(factored.plan.predicted, seconds=1e-3 + whole),
    )
    found = replace(factored, plan=decided).facts(metric="accuracy", candidates=offers)["seconds"]
    assert found["original"] == 7e-3 and found["predicted"] == pytest.approx(1e-3 + whole)
    assert {n: s["before"] for n, s in found["sites"].items()} == dict.fromkeys(sites, 2e-3)
    pairs = {n for n, s in found["sites"].items() if s["after"] == 1e-3}
    assert pairs == {e.path for e in factored.edited.edits if e.form == "low_rank"} != set()


def test_training_shows_as_its_history(factored: Run) -> None:
    history = [{"step": 1.0, "loss": 0.5}, {"step": 2.0, "loss": float("nan")}]
    found = factored.facts(metric="accuracy", history=history, recovery={"epochs": None})
    assert found["recovery"] == {"steps": 2, "settings": {"epochs": None}, "history": history}
    assert Report(found).dict()["recovery"]["history"][1]["loss"] is None


def test_no_data() -> None:
    run = make(Budget(size="50%"), ["rdoq"], data=False)
    found = run.facts(metric="agreement", limit=run.plan.original.bits / 16)
    assert found["quality"]["fidelity"] is None and found["quality"]["validation"] is None
    assert found["error"]["measured"] is None and found["error"]["objective"] == "minimax"
    assert found["curve"]["final"] is None
    assert all(site["error_measured"] is None for site in found["sites"])
    assert found["data"] == {"name": None, "samples": 0, "validation": None}
    assert any("no data" in note for note in found["notes"])
    assert "largest relative error" in Report(found).table()


def test_no_example_inputs_no_latency(factored: Run) -> None:
    run = replace(factored, network=replace(factored.network, example_inputs=()))
    found = run.facts(metric="accuracy")
    assert found["latency"] is None
    assert "latency was not measured: no example inputs" in found["notes"]


def test_many_layers_are_not_measured_one_by_one(
    factored: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["lamina.report.measured"], "SITES", 2)
    found = factored.facts(metric="accuracy")
    assert all(site["error_measured"] is None for site in found["sites"])
    assert found["error"]["measured"] > 0
    assert "errors were not measured layer by layer: there are 3 layers" in found["notes"]


def test_refusals_and_drops(factored: Run) -> None:
    refused = replace(factored.sites, refusals=(Refusal("norm", "site", "no weight matrix"),))
    decided = replace(factored.plan, budget={"max_drop": 100.0})
    found = replace(factored, sites=refused, plan=decided).facts(metric="accuracy")
    assert found["refusals"] == [{"where": "norm", "what": "site", "why": "no weight matrix"}]
    assert found["budget"]["limits"] == {"max_drop": 100.0}
    assert found["budget"]["met"] == {"max_drop": True}


def test_owners_do_not_reach_into_other_modules() -> None:
    attention = Site("attn", module="attn", weight="attn.in_proj_weight")
    inner = Site("attn.out", module="attn.out", weight="attn.out.weight", bias="attn.out.bias",
                 aliases=("tied.weight",))  # fmt: skip
    owners = owners_of(Sites((attention, inner)), [Edit("attn.out", "low_rank")])
    assert owner("attn.in_proj_weight", owners) == "attn"
    assert owner("attn.out.1.weight", owners) == "attn.out"
    assert owner("attn.other", owners) is None
    assert owner("tied.weight", owners) == "attn.out"
    assert owner("attn.outer.weight", owners) is None


def test_a_tensor_named_like_a_part_of_the_file() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.header = nn.Parameter(torch.ones(5))

    file = artifact.pack(Odd(), (), "module", {})
    rows = ledger_of(artifact.unpack(file), {})
    assert sum(row["bytes"] for row in rows) == len(file)


def test_only_methods_that_were_asked_are_said_to_refuse(factored: Run) -> None:
    def said(**more: Any) -> set[str]:
        return {n.split()[0] for n in factored.facts(**more)["notes"] if "does not serve" in n}

    every = {"candidates": factored.candidates}
    assert said(**every, methods=["alds", "int8", "rdoq"]) >= {"int8"}  # it takes no convolution
    assert said(**every, methods=["alds", "rdoq"]) <= {"alds", "rdoq"}
    assert not said(**every) & {"int8", "bf16", "sawb", "two_four"}
    assert said() <= {"alds", "rdoq"}  # the plan was given, and takes these


def test_methods_that_save_time_are_asked_where_time_is_limited(factored: Run) -> None:
    timed = replace(factored.plan, budget=Budget(latency="50%").to_json())
    names = {m.name for m in asked_for(timed, None, True)[0]}
    assert {"int8", "keep"} <= names and not names & {"rdoq", "sawb"}
    assert [m.name for m in asked_for(timed, ["alds", "rdoq"], True)[0]] == ["keep", "alds"]
    assert asked_for(timed, ["alds"], True)[1] == []
