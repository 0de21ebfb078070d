"""The plan document: written, read, edited by hand; and what is wrong is said in one line."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import PlanError
from lamina.measure.stats import Cost
from lamina.methods.base import Step
from lamina.plan import Decision, Plan

FINITE = st.floats(0, 1e12)
COSTS = st.builds(Cost, FINITE, FINITE, FINITE, FINITE)
SETTINGS = st.dictionaries(
    st.sampled_from(["rank", "step", "scale"]),
    st.one_of(st.integers(), FINITE, st.text(max_size=5)),
)
STEPS = st.lists(
    st.builds(Step, st.sampled_from(["keep", "rdoq", "alds"]), st.text(max_size=5), SETTINGS),
    max_size=3,
).map(tuple)
DECISIONS = st.builds(Decision, STEPS, COSTS, FINITE)
PLANS = st.builds(
    Plan,
    network=st.text(max_size=16),
    sites=st.dictionaries(
        st.text(max_size=8), st.builds(Decision, STEPS, COSTS, FINITE), max_size=3
    ),
    budget=st.dictionaries(st.sampled_from(["size", "macs"]), st.text(max_size=4)),
    objective=st.sampled_from(["sum", "minimax"]),
    original=COSTS,
    predicted=COSTS,
    fixed_bits=FINITE,
    error=FINITE,
    curve=st.lists(st.tuples(FINITE, FINITE), max_size=3).map(tuple),
    name=st.text(max_size=8),
)


def small() -> Plan:
    steps = (Step("alds", "fc", {"folds": 1, "rank": 3}), Step("rdoq", "fc.0", {"step": 0.03}))
    steps += (Step("keep", "fc.1"),)
    return Plan(
        "0123456789abcdef",
        {"fc": Decision(steps, Cost(10, 800, 20), 0.25)},
        budget={"size": "2%"},
        original=Cost(100, 32_000, 50),
        predicted=Cost(10, 1600, 20),
        fixed_bits=800,
        error=0.25,
        curve=((100.0, 0.5), (200.0, 0.25)),
        name="net",
    )


@given(PLANS)
def test_every_plan_survives_json(plan):
    assert Plan.from_dict(json.loads(json.dumps(plan.dict()))) == plan


def test_it_is_written_and_read(tmp_path):
    path = tmp_path / "plan.json"
    small().save(path)
    assert Plan.load(path) == small()
    assert json.loads(path.read_text())["lamina_plan"] == 1
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


def test_a_person_can_edit_it(tmp_path):
    path = tmp_path / "plan.json"
    small().save(path)
    path.write_text(path.read_text().replace('"rank": 3', '"rank": 2'))
    assert Plan.load(path).sites["fc"].steps[0].settings == {"folds": 1, "rank": 2}


def test_a_short_plan_by_hand_is_enough():
    plan = Plan.from_dict(
        {
            "lamina_plan": 1,
            "network": "x",
            "sites": {"fc": {"steps": [{"method": "keep", "at": "fc"}]}},
        }
    )
    assert plan.sites["fc"] == Decision((Step("keep", "fc"),), Cost(), 0.0)


def test_it_shows_itself():
    text = small().show()
    assert "alds(folds=1, rank=3) | rdoq(step=0.03) | keep()" in text
    assert "4,000 -> 200 bytes (20.0x smaller)" in text
    assert Plan("x", {}).show(), "a plan without sites"


def changed(*path, value):
    document = json.loads(json.dumps(small().dict()))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


WRONG = {
    "not an object": ([], "document"),
    "another version": (changed("lamina_plan", value=2), "lamina_plan"),
    "sites missing": ({"lamina_plan": 1, "network": "x"}, "sites"),
    "a word for a number": (changed("sites", "fc", "error", value="much"), r"sites\.fc\.error"),
    "an unknown key": (changed("speed", value=1), "speed"),
    "an unknown key of a step": (
        changed("sites", "fc", "steps", 0, "where", value=1),
        r"steps\.0\.where",
    ),
    "an unknown method": (
        changed("sites", "fc", "steps", 0, "method", value="svd"),
        "unknown method.*fc.*choose from",
    ),
    "an unknown objective": (changed("objective", value="mean"), "objective"),
    "steps that are no list": (changed("sites", "fc", "steps", value="keep"), "steps"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_document_is_refused_and_the_place_is_named(name):
    document, words = WRONG[name]
    with pytest.raises(PlanError, match=words) as caught:
        Plan.from_dict(copy.deepcopy(document), "plan.json")
    assert "plan.json" in str(caught.value) and "\n" not in str(caught.value)


def test_the_helper_starts_from_a_right_document():
    assert Plan.from_dict(changed("name", value="other")).name == "other"


@pytest.mark.parametrize("text", ["", "{", '{"lamina_plan": 1', "[" * 100_000, "\0", "NaN"])
def test_what_is_not_json_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(path)


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"none\.json"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(PlanError):
        Plan.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"binary\.json"):
        Plan.load(tmp_path / "binary.json")
