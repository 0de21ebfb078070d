"""The choice of each layer on the page: one colour per chain, the taken point in its place."""

from __future__ import annotations

import re

import pytest
from tests.report.sample import sample
from tests.report.test_html import HOSTILE, Page

from lamina.report.html import render_html
from lamina.report.layers import COLOURS, LAYERS, colours, layer_curves


def test_every_layer_has_its_curves() -> None:
    facts = sample()
    found = layer_curves(facts)
    assert [layer["name"] for layer in found] == list(facts["curves"])
    fc1 = found[2]
    assert fc1["takes"] == "rdoq(step=0.03)" and fc1["at"] == "50.0 kB, error 0.00612"
    assert len(fc1["charts"]) == 1  # bytes are all that has a price
    dots = re.findall(r'class="dot (\w+)"', fc1["charts"][0])
    assert len(dots) == len(facts["curves"]["fc1"])
    assert set(dots) == {kind for kind, _ in fc1["legend"]}
    assert [row[0] for row in fc1["near"]] == ["next cheaper", "taken", "next dearer"]
    rows = {row[0]: row[1:] for row in fc1["chains"]}
    assert rows["alds > rdoq"] == ("5", "49.0 kB to 204 kB", "2.00x")
    assert rows["keep"] == ("1", "1.60 MB", "32.0x")


def test_a_point_without_error_lies_on_the_axis() -> None:
    facts = sample()
    curve = facts["curves"]["fc2"]
    for p in curve:
        p["taken"] = p["chain"] == "keep"
    svg = layer_curves(facts)[3]["charts"][0]
    ring = re.search(r'cy="([\d.]+)" r="7"', svg)
    axis = re.search(r'class="axis" d="M\d+ \d+V(\d+)H', svg)
    assert ring and axis and float(ring[1]) == float(axis[1])


def test_what_is_scarce_has_a_chart_of_its_own() -> None:
    facts = sample()
    facts["prices"] = {"bytes": 1e-7, "macs": 1e-9, "params": 0.0}
    for layer in layer_curves(facts):
        titles = [re.search(r'aria-label="([^"]+)"', svg) for svg in layer["charts"]]
        assert [t and "multiply" in t[1] for t in titles] == [False, True]


def test_many_layers_show_the_largest() -> None:
    facts = sample()
    first, curve = facts["sites"][0], facts["curves"]["conv1"]
    for i in range(20):
        facts["sites"].append(first | {"site": f"x{i}", "bytes_before": 100 * i})
        facts["curves"][f"x{i}"] = curve
    found = [layer["name"] for layer in layer_curves(facts)]
    assert len(found) == LAYERS
    assert {"conv2", "fc1", "fc2", "conv1", "x19", "x12"} <= set(found)
    assert "x11" not in found
    assert f"The {LAYERS} largest layers" in render_html(facts)
    assert "largest layers" not in render_html(sample())


def test_chains_keep_their_colour_and_only_the_first_have_one() -> None:
    facts = sample()
    found = layer_curves(facts)
    assert len({tuple(sorted(layer["legend"])) for layer in found}) == 1
    many = {"fc": [{"chain": f"m{i}"} for i in range(12) for _ in range(12 - i)]}
    kinds = colours(many)
    assert len(set(kinds.values())) == COLOURS + 1
    assert kinds["m0"] == "c0" and kinds["m11"] == "small"


@pytest.mark.parametrize("error", [0.0, None])
def test_curves_that_cannot_be_drawn_are_left_out(error: float | None) -> None:
    facts = sample()
    for p in facts["curves"]["fc1"]:
        p["error"] = error
    assert [len(layer["charts"]) for layer in layer_curves(facts)] == [1, 1, 0, 1]
    Page(render_html(facts))


def test_names_on_the_page_are_escaped() -> None:
    facts = sample()
    facts["curves"][HOSTILE] = facts["curves"].pop("fc1")
    for p in facts["curves"][HOSTILE]:
        p["chain"] = p["steps"] = HOSTILE
    facts["rounds"][0]["note"] = facts["rounds"][0]["asked"] = HOSTILE
    text = render_html(facts)
    page = Page(text)
    assert "script" not in page.tags and "details" in page.tags
    assert HOSTILE in page.text
    assert not [a for a in page.attributes if a[1].startswith("on")]


def test_a_page_without_curves_has_none_of_it() -> None:
    facts = sample()
    for name in ("rounds", "curves", "prices", "seconds"):
        del facts[name]
    page = Page(render_html(facts))
    assert "details" not in page.tags
    assert "Rounds" not in page.text and "could have been" not in page.text
