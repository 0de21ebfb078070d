"""Markdown: tables of the right size, and nothing in a name that could break them."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st
from tests.report.sample import sample

from lamina.report.markdown import escape, render_markdown


def tables(text: str) -> dict[str, list[str]]:
    """Return the lines of each section's table."""
    found = {}
    for block in text.split("\n## ")[1:]:
        title, _, rest = block.partition("\n")
        found[title] = [line for line in rest.splitlines() if line.startswith("|")]
    return found


def columns(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


def test_row_counts() -> None:
    facts = sample()
    found = tables(render_markdown(facts))
    assert len(found["Layer by layer"]) == 2 + len(facts["sites"]) + 1
    assert len(found["Every byte of the file"]) == 2 + len(facts["ledger"]) + 1
    assert len(found["Rounds: asked, predicted, measured"]) == 2 + len(facts["rounds"])
    assert len(found["What each layer could have been"]) == 2 + len(facts["curves"])
    assert len(found["What could not be compressed"]) == 2 + len(facts["refusals"])


def test_every_line_of_a_table_has_the_same_columns() -> None:
    facts = sample()
    facts["sites"][0]["site"] = facts["sites"][1]["chain"] = "a|b\n|c|"
    for title, lines in tables(render_markdown(facts)).items():
        assert len({columns(line) for line in lines}) <= 1, title


@given(st.text())
def test_escaped_text_stays_on_its_line_and_in_its_cell(text: str) -> None:
    found = escape(text)
    assert len(found.splitlines()) <= 1
    assert "<" not in found
    assert columns(f"| {found} |") == 1


def test_addresses_do_not_become_links() -> None:
    assert "http:" not in escape("see http://example.org")
    assert "www." not in escape("www.example.org")
