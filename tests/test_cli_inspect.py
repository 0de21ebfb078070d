"""The verb `inspect`: it asks what it says, and of a large network only what is quick."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.own import write_net

from lamina import cli, cli_inspect
from lamina.cli_inspect import QUICK, hints
from lamina.measure.stats import Stats
from lamina.methods.base import registry
from lamina.network.sites import Site, Sites
from lamina.plan import Candidates, propose
from lamina.stages import Way

UNASKED = {name for name, method in registry().items() if not getattr(method, "asked", True)}


def inspected(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["inspect", "net.py:build", *words]) == 0
    return capsys.readouterr().out


def serving(shown: str) -> set[str]:
    """Return every word of the column `methods`, of the layers."""
    rows = [line.split(" linear ")[1].strip() for line in shown.splitlines() if " linear " in line]
    assert len(rows) == 2
    return {word for row in rows for word in row.split("  ")[0].split()}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_net(tmp_path)
    monkeypatch.chdir(tmp_path)


def test_only_methods_that_would_be_asked_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = serving(inspected(capsys))
    assert {"keep", "rdoq", "alds"} <= shown and UNASKED and not shown & UNASKED
    assert serving(inspected(capsys, "--methods", "int8,rdoq")) == {"keep", "int8", "rdoq"}


def test_refusals_are_those_of_the_methods_named(capsys: pytest.CaptureFixture[str]) -> None:
    refused = "refused: conv1..conv2: layer_collapse: "
    for words, there in ((), True), (("--methods", "rdoq"), False):
        assert cli.main(["inspect", "lenet-5", *words]) == 0
        assert (refused in capsys.readouterr().out) is there


def test_of_a_large_network_only_quick_methods_are_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...] | None] = []

    def offered(way: Way, sites: Sites, stats: Stats) -> Candidates:
        asked.append(way.methods)  # what all of them offer takes its time
        return propose(way.base, sites, stats, ["rdoq"] if way.methods else ["keep"])

    monkeypatch.setattr("lamina.stages.offered", offered)
    words = ("--data", "net.py:loaders", "--samples", "16")
    small = inspected(capsys, *words)
    assert "methods   all" in small and "only the quick methods" not in small
    monkeypatch.setattr(cli_inspect, "LARGE", 100)
    large = inspected(capsys, *words)
    assert f"methods   {', '.join(QUICK)}" in large and "Give --methods all" in large
    assert serving(large) == {"keep", *QUICK}
    named = inspected(capsys, *words, "--methods", "alds")
    assert serving(named) == {"keep", "alds"} and "only the quick" not in named
    every = inspected(capsys, *words, "--methods", "all")
    assert serving(every) == serving(small) and "only the quick" not in every
    assert asked == [None, QUICK, ("alds",), None]


def test_a_wrong_method_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "net.py:build", "--methods", "zip"]) == 2
    assert "unknown method at 'zip'" in capsys.readouterr().err


def test_ranks_are_those_of_the_singular_values() -> None:
    torch.manual_seed(0)
    for shape in ((40, 8), (8, 40), (12, 12)):
        weight = torch.randn(shape) @ torch.diag(torch.linspace(3, 0.1, shape[1]))
        energy = torch.linalg.svdvals(weight.double()).square().cumsum(0)
        rank = int((energy < 0.9 * energy[-1]).sum()) + 1
        assert hints(Site("fc", shape=shape), weight) == ("0%", f"{rank}/{min(shape)}")
    assert hints(Site("fc", shape=(3, 4)), torch.zeros(3, 4)) == ("100%", "1/3")
