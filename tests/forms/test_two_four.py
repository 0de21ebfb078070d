"""2:4 kernels: what is found out before anything is moved. The GPU itself is played here."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.forms import two_four as t


def sparse_weight(outputs: int = 64, inputs: int = 128) -> torch.Tensor:
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs // 4, 4)
    drop = torch.rand(outputs, inputs // 4, 4).argsort(-1) < 2
    return weight.masked_fill(drop, 0).reshape(outputs, inputs)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that computes on the CPU; returns what it is told."""
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: seen.append(w) or w)
    monkeypatch.setattr(nn.Module, "to", lambda self, **k: seen.append(k) or self)
    return seen


def test_patterns():
    weight = sparse_weight()
    assert t.is_two_four(weight) and t.is_two_four(torch.zeros(2, 8))
    dense = weight.clone()
    dense[3, 4:8] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    assert not t.is_two_four(dense)
    assert not t.is_two_four(weight[:, 1:]), "groups start at the first input"
    assert not t.is_two_four(weight[:, :126]), "a part of a group is none"
    assert not t.is_two_four(weight.reshape(64, 32, 4)) and not t.is_two_four(weight[:0])


def test_this_machine_says_why():
    assert "CUDA only" in t.missing_here("cpu")
    if not torch.cuda.is_available():
        assert "sees no CUDA" in t.missing_here("cuda")


def test_a_gpu_is_judged_by_its_capability(gpu, monkeypatch):
    assert t.missing_here("cuda") == ""
    for capability, fits in (((7, 5), False), ((8, 6), True), ((9, 0), True), ((6, 1), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d=None, c=capability: c)
        assert (t.missing_here("cuda:0") == "") == fits
        if not fits:
            assert f"{capability[0]}.{capability[1]}" in t.missing_here("cuda:0")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in t.missing_here("cuda")


def test_weights_that_do_not_fit_are_told_by_name():
    half = sparse_weight().half()
    assert t.unfit(half) == "" and t.unfit(half.float(), torch.bfloat16) == ""
    assert "float32" in t.unfit(half.float())
    assert "32 x 64" in t.unfit(half[:40]) and "32 x 64" in t.unfit(half[:, :96])
    assert "32 x 128" in t.unfit(half[:, :64].to(torch.int8))
    assert "more than two" in t.unfit(torch.ones(64, 128).half())
    assert "dimensions" in t.unfit(half[None])


def net() -> nn.Module:
    root = nn.Module()
    root.good, root.full = nn.Linear(128, 64), nn.Linear(128, 64)
    root.odd, root.tied, root.table = nn.Linear(20, 6), nn.Linear(128, 64), nn.Embedding(64, 128)
    with torch.no_grad():
        root.good.weight.copy_(sparse_weight())
        root.table.weight.copy_(sparse_weight())
    root.tied.weight = root.table.weight
    return root


def test_only_what_fits_is_put_in(gpu):
    module = net()
    others = {n: p for n, p in module.named_parameters() if n != "good.weight"}
    placed = t.accelerate(module, "cuda", torch.bfloat16)
    assert placed.sparse == ("good",)
    assert set(placed.dense) == {"full", "odd", "tied"}
    assert "more than two" in placed.dense["full"] and "tied" in placed.dense["tied"]
    assert gpu[0] == {"device": "cuda", "dtype": torch.bfloat16} and len(gpu) == 2
    assert not module.good.weight.requires_grad
    assert all(dict(module.named_parameters())[n] is p for n, p in others.items())


def test_without_a_gpu_nothing_is_touched():
    module = net()
    before = {n: (id(p), p.device) for n, p in module.named_parameters()}
    placed = t.accelerate(module, "cpu")
    assert placed.sparse == () and set(placed.dense) == {"good", "full", "odd", "tied"}
    assert {n: (id(p), p.device) for n, p in module.named_parameters()} == before
