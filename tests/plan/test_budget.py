"""Reading budgets: every spelling, every refusal, and round trips."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import BudgetError
from lamina.plan.budget import Budget

WHOLE = {"bytes": 1e6, "seconds": 0.01, "macs": 2e9, "params": 5e6}


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("size", "4MB", 4e6),
        ("size", " 4 mb ", 4e6),
        ("size", "4M", 4e6),
        ("size", "1.5kB", 1500),
        ("size", "2GiB", 2**31),
        ("size", "3KiB", 3072),
        ("size", "700", 700),
        ("size", "700B", 700),
        ("size", "1e3", 1000),
        ("size", 4096, 4096),
        ("size", np.int64(4096), 4096),
        ("size", np.float32(0.5e6), 5e5),
        ("size", "10%", 1e5),
        ("size", "100%", 1e6),
        ("size", "12.5x", 8e4),
        ("size", "12.5X", 8e4),
        ("size", "1x", 1e6),
        ("size", "1/400", 2500),
        ("size", "3 / 4", 7.5e5),
        ("latency", "3ms", 0.003),
        ("latency", "3 s", 3),
        ("latency", "250us", 250e-6),
        ("latency", "250µs", 250e-6),
        ("latency", 0.004, 0.004),
        ("latency", "0.5x", 0.005),
        ("latency", "1x", 0.01),
        ("latency", "25%", 0.0025),
        ("latency", "1/2", 0.005),
        ("macs", "50%", 1e9),
        ("macs", "2x", 1e9),
        ("macs", "300G", 3e11),
        ("macs", "1.5M", 1.5e6),
        ("params", "2x", 2.5e6),
        ("params", "1.5M", 1.5e6),
        ("params", "7B", 7e9),
        ("params", 1234, 1234),
    ],
)
def test_every_spelling(name, value, limit):
    limits = Budget(**{name: value}).resolve(WHOLE)
    key = {"size": "bytes", "latency": "seconds"}.get(name, name)
    assert limits == {key: pytest.approx(limit, rel=1e-12)}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("size", "0", "positive"),
        ("size", 0, "positive"),
        ("size", "-3MB", "positive"),
        ("size", "200%", "100%"),
        ("size", "0%", "positive"),
        ("size", "-5%", "positive"),
        ("size", "nan%", "neither"),
        ("size", "", "empty"),
        ("size", "  ", "empty"),
        ("size", "abc", "neither"),
        ("size", "4,5MB", "neither"),
        ("size", "4PB", "no unit of size"),
        ("size", "4ms", "no unit of size"),
        ("size", "\u0664MB", "neither"),  # a digit, but not one of ours
        ("size", "1e999", "finite"),
        ("size", "1e999x", "finite"),
        ("size", 10**400, "finite"),
        ("size", math.nan, "finite"),
        ("size", math.inf, "finite"),
        ("size", True, "bool"),
        ("size", b"4MB", "bytes"),
        ("size", [4], "list"),
        ("size", "0.5x", "50%"),
        ("size", "0x", "positive"),
        ("size", 0.1, "10%"),
        ("size", "0.1", "10%"),
        ("size", "3/2", "100%"),
        ("size", "1/0", "positive"),
        ("size", "-1/-2", "positive"),
        ("size", "0/5", "positive"),
        ("latency", "2x", "'50%' or '0.5x'"),
        ("latency", "0x", "positive"),
        ("latency", "3", "'3ms'"),
        ("latency", "3MB", "no unit of latency"),
        ("latency", -1, "positive"),
        ("macs", "0.5x", "2x"),
        ("params", "4MB", "no unit of params"),
        ("params", "4Ki", "no unit of params"),
        ("params", 0.5, "50%"),
        ("max_drop", -0.1, "at least 0"),
        ("max_drop", "-1", "at least 0"),
        ("max_drop", "0.3%", "points"),
        ("max_drop", "", "points"),
        ("max_drop", "inf", "points"),
        ("max_drop", "1e999", "finite"),
        ("max_drop", math.nan, "finite"),
        ("max_drop", False, "bool"),
    ],
)
def test_every_refusal_is_one_line_with_the_place_and_a_way_out(name, value, says):
    with pytest.raises(BudgetError) as caught:
        Budget(**{name: value})
    line = str(caught.value)
    assert says in line
    assert f"{name}=" in line
    assert caught.value.why and caught.value.fix
    assert "\n" not in line and len(line) < 250


def test_an_empty_budget_is_refused():
    for make in (Budget, lambda: Budget.parse({}), lambda: Budget.parse({"size": None})):
        with pytest.raises(BudgetError, match="at least one of size"):
            make()


def test_max_drop_alone_is_a_budget_without_limits():
    budget = Budget(max_drop="0.3")
    assert budget.max_drop == 0.3
    assert budget.resolve({}) == {}
    assert Budget(max_drop=0).max_drop == 0


def test_several_limits_hold_at_once():
    budget = Budget(size="4MB", latency="0.5x", macs="50%", params="1M", max_drop=1)
    assert budget.resolve(WHOLE) == {"bytes": 4e6, "seconds": 0.005, "macs": 1e9, "params": 1e6}


@pytest.mark.parametrize("original", [{}, {"seconds": 0.0}, {"seconds": math.nan}])
def test_a_share_of_what_is_not_known(original):
    with pytest.raises(BudgetError, match="latency='50%'"):
        Budget(latency="50%").resolve(original)
    assert Budget(latency="3ms").resolve(original) == {"seconds": 0.003}


def test_parse_takes_what_a_user_may_give():
    budget = Budget(size="2%")
    assert Budget.parse(budget) is budget
    assert (
        Budget.parse("2%") == Budget.parse({"size": "2%"}) == Budget.parse(" size = 2% ") == budget
    )
    assert Budget.parse(5000) == Budget(size=5000)
    assert Budget.parse("size=4MB,latency=0.5x") == Budget(size="4MB", latency="0.5x")


@pytest.mark.parametrize(
    "given_",
    [None, True, ["2%"], {"sise": "2%"}, "sise=2%", "size=2%,size=3%", "size=2%,4", "=", b"2%"],
)
def test_parse_refuses(given_):
    with pytest.raises(BudgetError) as caught:
        Budget.parse(given_)
    assert caught.value.fix


def test_it_is_a_value():
    assert Budget(size=4e6) == Budget(size=4_000_000)
    assert len({Budget(size="2%"), Budget(size=" 2%")}) == 1
    with pytest.raises(AttributeError):
        Budget(size="2%").size = "3%"


positive = st.floats(1e-3, 1e3).map(lambda x: f"{x:.6g}")
shares = st.one_of(
    st.floats(1e-4, 100).map(lambda x: f"{x:.6g}%"), st.integers(1, 999).map(lambda n: f"1/{n}")
)
smaller = st.floats(1, 1e4).map(lambda x: f"{x:.6g}x")
counts = st.one_of(st.floats(1, 1e15), st.integers(1, 10**15))
budgets = st.builds(
    Budget,
    size=st.one_of(shares, smaller, counts, positive.map(lambda x: f"{x}MiB")),
    latency=st.none() | shares | positive.map(lambda x: f"{x}ms") | st.floats(1e-12, 1e6),
    macs=st.none() | shares | smaller | counts,
    params=st.none() | shares | smaller | counts,
    max_drop=st.none() | st.floats(0, 100),
)


@given(budgets)
def test_describe_is_read_back_to_the_same_limits(budget):
    again = Budget.parse(budget.describe())
    assert again.resolve(WHOLE) == budget.resolve(WHOLE)
    assert again.max_drop == budget.max_drop
    assert again.describe() == budget.describe()


@given(budgets)
def test_json_is_read_back_to_an_equal_budget(budget):
    assert Budget.from_json(json.loads(json.dumps(budget.to_json()))) == budget


@given(st.text(max_size=30))
def test_any_text_is_a_budget_or_a_clear_refusal(text):
    try:
        budget = Budget.parse(text)
    except BudgetError as error:
        assert "\n" not in str(error)
    else:
        assert all(0 < limit < math.inf for limit in budget.resolve(WHOLE).values()) or (
            budget.max_drop is not None
        )


def test_numbers_are_described_in_plain_units():
    assert Budget(size=1500, latency=25e-6, macs=3e11, params=7).describe() == (
        "size=1.5kB, latency=25us, macs=300G, params=7"
    )
