"""What methods do with layers alike: refusals, checks, and edits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lamina.errors import MethodError, SiteError
from lamina.methods import layers
from lamina.methods.base import Leaf, Parts, registry, spanning
from lamina.methods.layers import (
    CONV1D,
    check_parts,
    check_served,
    edit_leaves,
    finite_weight,
    misfit,
    site_inside,
    why_no_form,
    why_stuck,
    why_tied,
)
from lamina.network.sites import Site

FC = Site("net.fc", module="net.fc", weight="net.fc.weight", bias="net.fc.bias", shape=(4, 6))
WEIGHTS = {"weight": torch.ones(4, 6), "bias": torch.ones(4)}


def test_a_file_without_a_method_is_no_method() -> None:
    assert not hasattr(layers, "method")
    every = {**registry(), **spanning()}.values()
    assert layers.__name__ not in {type(method).__module__ for method in every}
    assert "keep" in registry() and "layer_merge" in spanning()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, ""),
        ({"kind": "chain"}, "it is a chain, not one layer"),
        ({"op": "conv"}, "there is no form for the operation conv"),
        ({"rigid": "someone reads it"}, "someone reads it"),
        ({"rigid": CONV1D}, ""),
        ({"rigid": CONV1D + "Normed"}, CONV1D + "Normed"),
        ({"groups": 2}, "it has 2 groups already: its blocks are multiplied one by one"),
        ({"module": ""}, "it is the whole network, and a form needs a module to be in"),
    ],
)
def test_why_a_layer_has_no_other_form(change, why) -> None:
    assert why_no_form(replace(FC, **change), "form", ("linear",), unless=CONV1D) == why


def test_ties_are_named() -> None:
    assert not why_tied(FC)
    assert why_tied(replace(FC, aliases=("a", "b"))) == "its weight is tied to a, b"


def test_what_is_between_layers_may_be_stuck() -> None:
    chain = Site("a..c", "chain", members=("a", "b", "c"), between=(("relu",), ("softmax",)))
    assert "relu between a and b is a call in a forward" in why_stuck(chain, {"relu"}, "")
    held = replace(chain, through=(("act",), ("soft",)))
    assert why_stuck(held, {"relu"}, ": no") == "soft between b and c is a softmax: no"
    assert not why_stuck(held, {"relu", "softmax"}, "")


def test_a_refusal_is_an_error_with_its_reason() -> None:
    method = registry()["keep"]
    check_served(method, FC)
    with pytest.raises(SiteError, match=r"keep cannot serve this site at net\.fc: it is a chain"):
        check_served(method, replace(FC, kind="chain"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(bad) -> None:
    assert finite_weight(FC, WEIGHTS) is WEIGHTS["weight"]
    broken = WEIGHTS | {"bias": torch.tensor([0, bad])}
    assert finite_weight(FC, broken) is broken["weight"]  # of its bias nothing is said
    parts = Parts((Leaf(FC, WEIGHTS, None), Leaf(replace(FC, name="2"), broken, None)))
    with pytest.raises(SiteError, match=r"not finite at 2 in net\.fc"):
        check_parts(FC, parts)
    broken = WEIGHTS | {"weight": torch.tensor([[1, bad]])}
    with pytest.raises(SiteError, match=r"not finite at net\.fc"):
        finite_weight(FC, broken)


def test_settings_that_do_not_fit_name_the_method_and_the_site() -> None:
    error = misfit("sawb", {"bits": 5}, "give fewer")
    assert isinstance(error, MethodError)
    assert str(error) == "sawb does not have these settings at {'bits': 5}; give fewer"
    error = misfit("alds", {}, "give a rank", FC)
    assert (
        str(error) == "alds does not have these settings for this layer at net.fc: {}; give a rank"
    )


def test_a_layer_inside_is_named_after_its_place() -> None:
    inner = site_inside(FC, 1, shape=(4, 2))
    assert (inner.name, inner.module, inner.weight) == ("net.fc.1", "net.fc.1", "net.fc.1.weight")
    assert inner.bias == "net.fc.1.bias" and inner.shape == (4, 2)
    assert not site_inside(replace(FC, bias=""), 0).bias and not site_inside(FC, 0, bias="").bias
    assert site_inside(FC, 2, replace(FC, groups=2)).groups == 2


def test_leaves_become_edits_of_their_tensors() -> None:
    edits = edit_leaves([Leaf(FC, WEIGHTS, None)])
    assert [edit.path for edit in edits] == ["net.fc.weight", "net.fc.bias"]
    assert all(edit.form == "values" for edit in edits)
    assert edits[0].values.dense() is WEIGHTS["weight"]
