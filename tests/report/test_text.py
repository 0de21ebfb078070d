"""The terminal table: plain, narrow enough, and safe whatever a name holds."""

from __future__ import annotations

import pytest
from tests.report.sample import sample

from lamina.report import Report
from lamina.report.text import render_text


@pytest.mark.parametrize("width", [40, 80, 110, 300])
def test_lines_fit(width: int) -> None:
    text = render_text(sample(), width, color=False)
    assert max(len(line) for line in text.splitlines()) <= min(width, 110)
    assert "\x1b" not in text
    assert text.isascii()


def test_colour_only_where_it_is_wanted() -> None:
    assert "\x1b[" in render_text(sample(), 100, color=True)
    assert "\x1b" not in Report(sample()).table()  # tests have no terminal


def test_names_steer_nothing() -> None:
    facts = sample()
    facts["network"]["name"] = facts["sites"][0]["site"] = "[bold]x[/bold]\x1b[31m:smile:"
    text = render_text(facts, 110, color=False)
    assert "\x1b" not in text
    assert "[bold]x[/bold][31m:smile:" in text


def test_a_long_table_is_cut_and_says_so() -> None:
    facts = sample()
    facts["sites"] *= 20
    text = render_text(facts, 110, color=False)
    assert "and 40 more, in report.html and report.json" in text
    assert "more, in report.html" not in render_text(sample(), 110, color=False)


def test_the_answers_are_there() -> None:
    text = render_text(sample(), 110, color=False)
    for words in ("100x smaller", "17,217 bytes", "budget met", "0.15 points lost", "1.16x faster",
                  "max_pool2d lies between", "latency=0.9x", "alds > rdoq, 2.00x"):  # fmt: skip
        assert words in text
