from __future__ import annotations

import torch
from tests.network.tiny import Counting, Gpt, Residual, Twice
from torch import nn

from lamina.network.tensors import join, named_tensors, unfit


def test_names_and_order_are_those_of_the_state_dict():
    for module in (Residual(), Gpt(), Twice(), Counting(), nn.LSTM(2, 2)):
        assert list(named_tensors(module).by_name) == list(module.state_dict())


def test_ties_by_parameter_by_module_and_by_storage():
    assert named_tensors(Gpt()).aliases("wte.weight") == ("head.weight",)
    assert named_tensors(Twice()).aliases("shared.bias") == ("same.bias",)
    pair = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    pair[1].weight = nn.Parameter(pair[0].weight.data)
    assert pair[1].weight is not pair[0].weight
    tensors = named_tensors(pair)
    assert tensors.first["1.weight"] == "0.weight" and tensors.overlaps == {}


def test_equal_values_are_not_ties():
    pair = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    pair[1].load_state_dict(pair[0].state_dict())
    assert all(name == first for name, first in named_tensors(pair).first.items())
    empty = nn.ParameterList([nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(0))])
    assert named_tensors(empty).first == {"0": "0", "1": "1"}


def test_partial_overlaps():
    flat = torch.randn(20)
    part = nn.ParameterDict(
        {
            "a": nn.Parameter(flat[:8].view(2, 4)),
            "b": nn.Parameter(flat[6:10]),
            "c": nn.Parameter(flat[10:14]),
            "t": nn.Parameter(flat[:8].view(2, 4).t()),
        }
    )
    overlaps = named_tensors(part).overlaps
    assert set(overlaps) == {"a", "b", "t"}  # c only touches


def test_unfit_says_why():
    assert unfit(nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))) == ""
    assert unfit(torch.zeros(2, 2, dtype=torch.float64)) == ""
    assert "dtype is int8" in unfit(torch.zeros(2, 2, dtype=torch.int8))
    assert "dtype is complex64" in unfit(torch.zeros(2, 2, dtype=torch.complex64))
    assert "dtype is float8_e4m3fn" in unfit(torch.zeros(2).to(torch.float8_e4m3fn))
    assert "layout is sparse_coo" in unfit(torch.eye(2).to_sparse())
    assert "meta" in unfit(torch.zeros(2, device="meta"))
    assert "share memory" in unfit(torch.zeros(1, 2).expand(3, 2))
    assert "uninitialised" in unfit(nn.UninitializedParameter())

    class Own(torch.Tensor):
        pass

    assert "subclass (Own)" in unfit(torch.zeros(2).as_subclass(Own))


def test_join():
    assert (join("", "weight"), join("a.b", "weight")) == ("weight", "a.b.weight")
