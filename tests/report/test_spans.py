"""Spans in a report: rows, bytes and errors are counted once, and a tied tensor is one."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import nn

from lamina import artifact
from lamina.data import Data, TensorLoader
from lamina.forms import Edit, Plain, install
from lamina.forms.tied import index_of
from lamina.measure.cost import measured_params
from lamina.measure.stats import Cost
from lamina.methods.base import Step, spanning
from lamina.network.discover import discover
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan import Decision, Edited, Plan
from lamina.report import Report, collect
from lamina.report.compare import installed
from lamina.report.document import NEEDED, OPTIONAL, check
from lamina.report.measured import own_edits
from lamina.report.owners import asked_for, owners_of, refused_by, spans_of
from lamina.report.section import own_rows
from lamina.report.sections import sections


def build() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


GONE, FAMILY = "0..2", "*"
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Run:
    network: Network
    sites: Sites
    plan: Plan
    edited: Edited
    file: bytes
    facts: dict[str, Any]


@pytest.fixture(scope="module")
def run() -> Run:
    """A chain that became one layer, a low rank pair before a tie, and two tied layers."""
    network = Network(build(), (X[:2],), loss="logits")
    sites = discover(network)
    assert sites.families[0].name == FAMILY and sites.families[0].members == ("4", "6")
    model = build()
    merged = model[2].weight.detach() @ model[0].weight.detach()
    edits = [
        Edit("0", "identity"),
        Edit("1", "identity"),
        Edit("2", "resized", {"inputs": 6}),
        Edit("2.weight", "values", values=Plain(merged)),
        Edit("2.bias", "values", values=Plain(model[2].bias.detach())),
        Edit("8", "low_rank", {"folds": 1, "rank": 2}),
    ]
    install(model, edits)
    edits.append(Edit("6", "tie", {"with": index_of(model, "4")}))
    install(model, edits[-1:])
    shared = (build()[4].weight.detach() + build()[6].weight.detach()) / 2
    edits.append(Edit("4.weight", "values", values=Plain(shared)))
    install(model, edits[-1:])
    edited = Edited(Network(model, (X[:2],), loss="logits"), tuple(edits))
    plan = Plan(
        network.digest(),
        {
            GONE: Decision((Step("layer_collapse", GONE),), Cost(56, 8 * 224, 48), 0.5),
            "8": Decision((Step("alds", "8", {"folds": 1, "rank": 2}),), Cost(25, 800, 22), 0.1),
            FAMILY: Decision((Step("layer_fusion", FAMILY),), Cost(80, 8 * 320, 128), 0.2),
        },
        original=Cost(measured_params(network.module), 8 * 4 * 300, 300),
        predicted=Cost(161, 8 * 700, 198),
    )
    split = TensorLoader(X, torch.arange(64) % 3, 32)
    file = artifact.pack(model, tuple(edits), "module", {})
    package = artifact.unpack(file)
    patch = pytest.MonkeyPatch()
    patch.setattr(sys.modules["lamina.report.compare"], "ROUNDS", 3)
    data = Data(calibration=split, validation=split)
    facts = collect(network, data, sites, plan, edited, edited, package, len(file))
    patch.undo()
    return Run(network, sites, plan, edited, file, facts)


def row(run: Run, name: str) -> dict[str, Any]:
    return next(site for site in run.facts["sites"] if site["site"] == name)


def test_a_span_stands_before_its_layers_and_they_say_so(run: Run) -> None:
    assert [s["site"] for s in run.facts["sites"]] == [GONE, "0", "2", FAMILY, "4", "6", "8"]
    assert {s["site"]: s.get("span") for s in run.facts["sites"]} == {
        GONE: None, "0": GONE, "2": GONE, FAMILY: None, "4": FAMILY, "6": FAMILY, "8": None,
    }  # fmt: skip
    assert row(run, "0")["chain"] == f"in {GONE}" and row(run, GONE)["holds"] == "chain of 0, 1, 2"
    assert row(run, FAMILY)["holds"] == "family of 4, 6, each 8 x 8"
    check(Report(run.facts).dict(), NEEDED | OPTIONAL, "facts")


def test_everything_is_counted_once(run: Run) -> None:
    rows = own_rows(run.facts)
    assert [r["site"] for r in rows] == [GONE, FAMILY, "8"]
    assert sum(r["params_before"] for r in rows) == measured_params(run.network.module)
    assert sum(r["params_after"] for r in rows) == 161
    assert run.facts["network"]["params_after"] == measured_params(run.edited.model) == 56 + 80 + 25
    assert sum(r["bytes_before"] for r in rows) == 4 * measured_params(run.network.module)
    assert sum(r["macs_before"] for r in rows) == sum(s.macs for s in run.sites.layers)


def test_the_bytes_of_a_span_are_those_of_what_it_left(run: Run) -> None:
    ledger = {r["part"]: r for r in run.facts["ledger"]}
    assert ledger["2.weight"]["site"] == GONE and ledger["8.0.weight"]["site"] == "8"
    tied = [name for name in ledger if name in ("4.weight", "6.weight")]
    assert len(tied) == 1 and ledger[tied[0]]["site"] == FAMILY
    assert ledger["6.bias"]["site"] == FAMILY
    assert row(run, GONE)["bytes_file"] == sum(ledger[n]["bytes"] for n in ("2.weight", "2.bias"))
    inside = sum(s["bytes_file"] for s in run.facts["sites"])
    outside = sum(r["bytes"] for r in run.facts["ledger"] if r["site"] is None)
    assert inside + outside == len(run.file) == run.facts["size"]["file"]


def divergence(run: Run, module: nn.Module) -> float:
    with torch.no_grad():
        p, q = (m(X).double().log_softmax(1) for m in (run.network.module, module))
    return float((p.exp() * (p - q)).sum()) / len(X)


def test_the_error_of_a_span_is_that_of_it_alone(run: Run) -> None:
    """The tie names a module by its number, which the pair before it has moved."""
    glued, tied = build(), build()
    install(glued, run.edited.edits[:5])
    tied[6].weight = tied[4].weight
    with torch.no_grad():
        tied[4].weight.copy_((build()[4].weight + build()[6].weight) / 2)
    for name, model in ((GONE, glued), (FAMILY, tied)):
        wanted = divergence(run, model)
        assert wanted > 1e-5
        assert row(run, name)["error_measured"] == pytest.approx(wanted, rel=1e-4)
    assert run.facts["error"]["measured"] == pytest.approx(
        divergence(run, run.edited.model), rel=1e-4
    )


def test_edits_alone_are_taken_out_again(run: Run) -> None:
    owners = owners_of(run.sites, run.edited.edits, spans_of(run.plan, run.sites))
    own = own_edits(run.network, run.edited.edits, owners, run.sites, run.plan)
    assert [e.form for e in own[GONE]] == ["identity", "identity", "resized", "values", "values"]
    assert [e.form for e in own[FAMILY]] == ["tie", "values"]
    model = build()
    before, ids = Network(model).digest(), {n: id(p) for n, p in model.named_parameters()}
    for edits in own.values():
        with installed(model, edits):
            assert Network(model).digest() != before
        assert Network(model).digest() == before
        assert {n: id(p) for n, p in model.named_parameters()} == ids, "a tie stayed"


def test_a_dropped_block_belongs_to_its_span() -> None:
    layers = tuple(Site(f"{i}.fc", module=f"{i}.fc", weight=f"{i}.fc.weight") for i in range(2))
    span = Site("*.fc", "family", members=("0.fc", "1.fc"))
    owners = owners_of(Sites(layers, families=(span,)), [Edit("1", "identity")], [span])
    assert owners["1."] == "*.fc" and owners["0.fc.weight"] == "*.fc"


def test_every_page_shows_it(run: Run) -> None:
    report = Report(run.facts)
    layers = next(s for s in sections(run.facts) if s.name == "layers")
    shown = [(r[0], r[5]) for r in layers.rows]
    assert shown[1:3] == [("  0", f"in {GONE}"), ("  2", f"in {GONE}")]
    assert layers.total[2] == layers.total[2].strip() and len(layers.total) == len(layers.columns)
    got = next(s for s in sections(run.facts) if s.name == "got")
    (params,) = [r for r in got.rows if r[0] == "parameters"]
    assert params[2] == "161"
    for text in (report.table(), report.markdown(), report.html()):
        assert GONE in text


class Picky:
    """A method that looks at every chain and family, and takes none."""

    name = "picky"

    def places(self, sites: Sites) -> list[Site]:
        return [*sites.chains, *sites.families]

    def refuse(self, site: Site) -> str:
        return f"a {site.kind} is not to its taste"


def test_refusals_of_spanning_methods_that_were_asked_are_notes(run: Run) -> None:
    count = len(run.sites.chains) + len(run.sites.families)
    (note,) = refused_by(run.sites, [], [cast(Any, Picky())])
    assert note.startswith(f"picky does not serve {count} of {count} spans (first ")
    assert "is not to its taste" in note and refused_by(run.sites, [], []) == []
    asked = asked_for(run.plan, None, True)[1]
    assert asked == list(spanning().values()) and asked_for(run.plan, ["alds"], True)[1] == []
    taken = [method.name for method in asked_for(run.plan, None, False)[1]]
    assert taken == ["layer_collapse", "layer_fusion"]
