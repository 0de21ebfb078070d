"""Report: strict JSON, four faces, and a plain refusal of what is no report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.report.sample import sample

from lamina.errors import RunError
from lamina.report import Report, load_report
from lamina.report.document import NEEDED, OPTIONAL, check, plain

NAN, INF = math.nan, math.inf


def reject(name: str) -> Any:
    raise ValueError(name)


def bare() -> dict[str, Any]:
    """Facts of a run without data, training, latency, refusals, notes or limits."""
    facts = sample()
    facts["data"] = {"name": None, "samples": 0, "validation": None}
    facts["budget"] |= {"limits": {}, "met": {}}
    facts["size"]["limit"] = None
    facts["quality"] |= {"validation": None, "test": None, "fidelity": None}
    facts["error"] |= {"measured_applied": None, "measured": None, "objective": "minimax"}
    for site in facts["sites"]:
        site["error_measured"] = None
    facts["curve"] = {"points": [], "planned": [0, 0.0], "final": None}
    facts |= {"latency": None, "recovery": None, "refusals": [], "stages": [], "notes": []}
    facts |= {"rounds": [], "curves": {}, "prices": {}, "seconds": None}
    return facts


def test_facts_become_plain_json_values() -> None:
    given = {
        "a": (1, NAN, -INF),
        "b": torch.tensor(2.5),
        "c": np.float32(0.5),
        "d": np.int64(3),
        "e": Path("x"),
        5: {"f": torch.tensor(NAN)},
        "g": True,
    }
    found = plain(given)
    assert found == {"a": [1, None, None], "b": 2.5, "c": 0.5, "d": 3, "e": "x",
                     "5": {"f": None}, "g": True}  # fmt: skip
    assert found["g"] is True


def test_json_is_strict() -> None:
    facts = sample()
    facts["error"]["measured"] = NAN
    facts["curve"]["points"][0][1] = INF
    facts["recovery"]["history"][3]["loss"] = NAN
    report = Report(facts)
    read = json.loads(report.json(), parse_constant=reject)
    assert read["error"]["measured"] is None
    assert read == report.dict()
    with pytest.raises(ValueError, match="NaN"):  # the check does see a NaN
        json.loads(json.dumps(facts), parse_constant=reject)


def test_dict_is_the_callers_own_copy() -> None:
    report = Report(sample())
    report.dict()["size"]["file"] = 0
    assert report.dict()["size"]["file"] == sample()["size"]["file"]


def test_save_and_load(tmp_path: Path) -> None:
    report = Report(sample())
    report.save(tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["report.html", "report.json", "report.md"]
    assert load_report(tmp_path / "run").dict() == report.dict()
    again = load_report(tmp_path / "run" / "report.json")
    assert again.html() == (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert again.markdown() == (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("face", ["table", "markdown", "html", "json"])
def test_a_bare_report_renders(face: str) -> None:
    text = getattr(Report(bare()), face)()
    assert "lenet-5" in text
    assert "None" not in text
    assert "nan" not in text.lower().split()


def test_every_number_may_be_missing() -> None:
    facts = sample()
    facts["quality"]["test"] = {"before": NAN, "after": NAN, "drop": NAN}
    facts["quality"]["fidelity"]["after"]["agreement"] = NAN
    facts["latency"] |= {"before_s": NAN, "after_s": NAN, "ratio": NAN}
    facts["error"] |= {"predicted": INF, "measured_applied": NAN, "measured": NAN}
    facts["curve"]["planned"] = [NAN, NAN]
    facts["recovery"]["history"] = [{"step": 1.0, "loss": NAN}]
    facts["rounds"][0]["measured"]["seconds"] = NAN
    for curve in facts["curves"].values():
        for p in curve:
            p["error"] = NAN
    facts["prices"] = {"bytes": NAN}
    report = Report(facts)
    for text in (report.table(), report.markdown(), report.html()):
        assert "None" not in text
    assert "nan" not in report.table().split()


def test_a_surrogate_in_a_name_does_not_stop_saving(tmp_path: Path) -> None:
    facts = sample()
    facts["network"]["name"] = "net\udcff"
    Report(facts).save(tmp_path)
    assert load_report(tmp_path).dict()["network"]["name"] == "net\udcff"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a report"),
        ("{}", "it has no 'lamina'"),
    ],
)
def test_a_file_that_is_no_report(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(RunError, match=says) as caught:
        load_report(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_report(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot read the report"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunError, match="not JSON"):
        load_report(tmp_path)


def test_what_is_missing_is_named() -> None:
    check(sample(), NEEDED, "r")
    check(bare(), NEEDED, "r")
    broken = sample()
    del broken["sites"][1]["chain"]
    with pytest.raises(RunError, match=r"r: sites\[1\]: it has no 'chain'"):
        check(broken, NEEDED, "r")
    broken = sample()
    broken["quality"]["test"]["before"] = "98"
    with pytest.raises(RunError, match="quality: test: before"):
        check(broken, NEEDED, "r")


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        ("rounds", {}, "rounds: a dict"),
        ("rounds", [{"round": 1}], r"rounds\[0\]: it has no 'why'"),
        ("curves", {"fc": [{"chain": "rdoq"}]}, r"curves: fc\[0\]: it has no 'steps'"),
        ("curves", {"fc": 3}, "curves: fc: a int"),
        ("prices", {"bytes": "high"}, "prices: bytes: a str"),
        ("seconds", {"original": 1.0}, "seconds: it has no 'predicted'"),
        ("seconds", {"original": 1.0, "predicted": math.inf, "sites": {}}, "seconds: predicted"),
    ],
)
def test_what_may_be_missing_must_be_right(
    place: str, value: Any, says: str, tmp_path: Path
) -> None:
    check(sample(), OPTIONAL, "r")
    facts = sample() | {place: value}
    (tmp_path / "report.json").write_text(json.dumps(facts))
    with pytest.raises(RunError, match=says):
        load_report(tmp_path)
    del facts[place]
    (tmp_path / "report.json").write_text(json.dumps(facts))
    assert "lenet-5" in load_report(tmp_path).html()
