"""The HTML page: well formed, self-contained, escaped, and true to the facts."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from tests.report.sample import sample

from lamina.report import Report
from lamina.report.html import charts, headlines, ledger_bar, render_html

HOSTILE = '<script>alert("x")</script>&\'"{{ 7*7 }}'
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collect tags, attributes and text, and check that tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data + "\n"


def test_the_page_needs_nothing_else() -> None:
    page = Page(Report(sample()).html())
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
    assert not [a for a in page.attributes if a[1] in loading or a[1].startswith("on")]
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"https?://|url\(|@import", Report(sample()).html())


@pytest.mark.parametrize("place", ["name", "site", "chain", "refusal", "note", "unit", "cpu"])
def test_everything_is_escaped(place: str) -> None:
    facts = sample()
    if place == "name":
        facts["network"]["name"] = HOSTILE
    elif place == "site":
        facts["sites"][0]["site"] = facts["ledger"][2]["part"] = HOSTILE
    elif place == "chain":
        facts["sites"][0]["chain"] = HOSTILE
    elif place == "refusal":
        facts["refusals"][0]["why"] = HOSTILE
    elif place == "note":
        facts["notes"] = [HOSTILE]
    elif place == "unit":
        facts["quality"]["unit"] = HOSTILE
    else:
        facts["machine"]["cpu"] = HOSTILE
    text = render_html(facts)
    page = Page(text)
    assert "script" not in page.tags
    assert HOSTILE in page.text  # shown as it is, and not run as a template either


def test_the_headlines_say_the_facts() -> None:
    cards = {card["words"]: card for card in headlines(sample())}
    assert cards["smaller"]["value"] == "100x"
    assert cards["on disk"]["tone"] == "good"
    assert cards["accuracy, test"]["value"] == "98.40"
    assert cards["per sample"]["detail"] == "0.314 ms before; 1.16x faster"


def test_a_time_of_a_batch_is_not_called_one_of_a_sample() -> None:
    facts = sample()
    facts["latency"]["batch"] = 64
    assert "per batch of 64" in {card["words"] for card in headlines(facts)}


def test_a_missed_budget_is_a_bad_headline() -> None:
    facts = sample()
    facts["budget"]["met"] = {"bytes": False}
    assert {c["words"]: c["tone"] for c in headlines(facts)}["on disk"] == "bad"


def test_without_labels_the_headline_is_fidelity() -> None:
    facts = sample()
    facts["quality"] |= {"validation": None, "test": None}
    assert "same predictions" in {card["words"] for card in headlines(facts)}


def test_the_bars_hold_every_byte() -> None:
    facts = sample()
    widths = [float(w) for w in re.findall(r'width="([\d.]+)"', ledger_bar(facts)["after"])]
    assert sum(widths) == pytest.approx(1000, abs=0.1)
    by_site = {row["name"]: row["after"] for row in ledger_bar(facts)["legend"]}
    assert by_site["conv2"] == "4.88 kB"
    assert by_site["header and checksum"] == "356 B"


def test_many_layers_share_the_last_colour() -> None:
    facts = sample()
    first = facts["sites"][0]
    facts["sites"] += [first | {"site": f"extra{i}"} for i in range(20)]
    legend = ledger_bar(facts)["legend"]
    assert len(legend) == 11  # nine colours, the rest of the layers, the frame
    assert any(row["name"] == "15 smaller layers" for row in legend)


def test_the_curve_shows_plan_and_file() -> None:
    found = charts(sample())
    assert [c["title"] for c in found] == [
        "Rate and distortion", "Size while training", "Loss while training",
    ]  # fmt: skip
    assert [kind for kind, _ in found[0]["legend"]] == ["line", "planned", "final", "limit"]
    assert 'class="mark planned"' in found[0]["svg"]
    assert 'class="mark final"' in found[0]["svg"]


@pytest.mark.parametrize(
    "points",
    [[], [[10, 1.0]], [[10, 0.0], [20, 0.0]], [[None, 1.0], [5, None]], [[0, 1.0], [-1, 2.0]]],
)
def test_a_curve_that_cannot_be_drawn_is_left_out(points: list[Any]) -> None:
    facts = sample()
    facts["curve"]["points"] = points
    assert "Rate and distortion" not in [c["title"] for c in charts(facts)]
    Page(render_html(facts))


def test_a_lossless_file_is_on_the_curve() -> None:
    facts = sample()
    facts["curve"]["final"] = [17_000, 0.0]
    assert 'class="mark final"' in charts(facts)[0]["svg"]


def test_training_without_a_limit_shows_the_loss_alone() -> None:
    facts = sample()
    facts["recovery"]["history"] = [{"step": s, "loss": 1 / s} for s in range(1, 9)]
    titles = [c["title"] for c in charts(facts)]
    assert titles == ["Rate and distortion", "Loss while training"]
