"""Sections: the right order, every layer and byte in them, and words that fit the facts."""

from __future__ import annotations

from typing import Any

import pytest
from tests.report.sample import sample

from lamina.report.sections import sections, speed, verdict


def cells(facts: dict[str, Any], name: str) -> list[tuple[str, ...]]:
    return list(next(s.rows for s in sections(facts) if s.name == name))


def test_the_order_is_the_order_of_questions() -> None:
    names = [s.name for s in sections(sample())]
    assert names == [
        "asked", "got", "rounds", "layers", "choices", "latency", "ledger", "refused", "notes",
        "made",
    ]  # fmt: skip


def test_what_was_not_done_has_no_section() -> None:
    """Reports of the first version have none of these; plans that are given have no curves."""
    facts = sample()
    for name in ("rounds", "curves", "prices", "seconds"):
        del facts[name]
    assert [s.name for s in sections(facts)] == [
        "asked", "got", "layers", "ledger", "refused", "notes", "made",
    ]  # fmt: skip


def test_latency_says_its_batch() -> None:
    facts = sample()
    assert any(row[0] == "latency, one sample" for row in cells(facts, "got"))
    facts["latency"]["batch"] = 64
    assert any(row[0] == "latency, batch of 64" for row in cells(facts, "got"))


def test_every_row_is_as_wide_as_its_table() -> None:
    for section in sections(sample()):
        width = len(section.columns) or len(section.rows[0])
        assert {len(row) for row in section.rows} == {width}, section.name
        assert len(section.total) in (0, width), section.name
        assert all(i < width for i in section.right)


def test_the_ledger_shows_every_part_and_adds_up() -> None:
    facts = sample()
    rows = cells(facts, "ledger")
    assert len(rows) == len(facts["ledger"])
    assert sum(int(row[3].replace(",", "")) for row in rows) == facts["size"]["file"]
    total = next(s.total for s in sections(facts) if s.name == "ledger")
    assert total[3] == f"{facts['size']['file']:,}"


def test_a_missed_and_an_unknown_limit_are_said() -> None:
    facts = sample()
    assert verdict(facts) == "budget met"
    facts["budget"]["met"] = {"bytes": True, "max_drop": None}
    assert verdict(facts) == "budget not measured: metric"
    facts["budget"]["met"] = {"bytes": False, "max_drop": None}
    assert verdict(facts) == "over budget: size"
    facts["budget"]["met"] = {}
    assert verdict(facts) == "no limit on the size"


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(2.0, "2.00x faster"), (0.5, "2.00x slower"), (1.02, "as fast as before"), (None, "")],
)
def test_latency_in_words(ratio: float | None, words: str) -> None:
    assert speed(ratio) == words


def test_without_training_nothing_is_said_of_it() -> None:
    facts = sample()
    assert any("before training" in row[0] for row in cells(facts, "got"))
    facts["recovery"] = None
    assert not any("training" in cell for row in cells(facts, "got") for cell in row)
    assert not any(row[0] == "training" for row in cells(facts, "made"))


def test_data_free_errors_are_called_relative() -> None:
    facts = sample()
    facts["error"] = {"predicted": 0.2, "measured_applied": None, "measured": None,
                      "objective": "minimax"}  # fmt: skip
    rows = cells(facts, "got")
    assert ("predicted error", "", "0.200", "largest relative error") in rows
    assert not any(row[0] == "measured error" for row in rows)
