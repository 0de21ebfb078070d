"""keep: nothing changes, and the size is the smaller of plain and sparse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lamina.artifact.exact import exact, exact_bytes
from lamina.artifact.records import encode, values_bytes
from lamina.errors import SiteError
from lamina.forms import Affine, Plain, Sparse, install
from lamina.measure.stats import LayerStats
from lamina.methods.base import Choice, Method
from lamina.methods.keep import hold, method
from lamina.network.sites import Site
from lamina.network.source import Network

SITE = Site("net.c", module="c", weight="c.weight", bias="c.bias", shape=(12, 20), positions=3.0)


def network(weight: torch.Tensor | None = None) -> Network:
    root = nn.Module()
    root.c = nn.Linear(20, 12)
    if weight is not None:
        root.c.weight.data.copy_(weight)
    return Network(root)


def sparse_weight(share: float) -> torch.Tensor:
    return torch.randn(12, 20) * (torch.rand(12, 20) < share)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.0])
def test_there_is_one_offer_and_it_is_lossless(share: float) -> None:
    net = network(sparse_weight(share))
    weights = {k: v.detach() for k, v in net.module.c.named_parameters()}
    before = copy.deepcopy(net.module.state_dict())
    stats = LayerStats(H=torch.eye(20).double()[None], G=torch.eye(12).double()[None])
    (offer,) = method.propose(SITE, weights, stats)
    assert method.propose(SITE, weights, None) == (offer,)
    assert offer.error == 0.0
    assert offer.cost.params == 252
    assert offer.cost.macs == 720
    edits = method.apply(net, Choice(SITE, {}), stats)
    assert [e.path for e in edits] == ["c.weight", "c.bias"]
    install(net.module, edits)
    for key, tensor in net.module.state_dict().items():
        assert torch.equal(tensor, before[key])
    size = sum(len(encode(e.values)) for e in edits if e.values is not None)
    assert abs(size - offer.cost.bits / 8) <= 8, "but for the heads of the records"
    assert offer.cost.bits < 32 * 252


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_plain_size_is_the_bytes_of_the_dtype(dtype: torch.dtype) -> None:
    form, size = hold(torch.randn(7, 3, 2).abs().to(dtype) + 1)
    assert isinstance(form, Plain)
    assert size <= 42 * dtype.itemsize
    assert abs(len(encode(form)) - size) <= 3


def test_a_few_zeros_are_not_worth_a_pattern() -> None:
    tensor = torch.randn(50, 50)
    tensor[0, 0] = 0
    assert isinstance(hold(tensor)[0], Plain)
    tensor[:20] = 0
    assert isinstance(hold(tensor)[0], Sparse)
    assert isinstance(hold(torch.zeros(40))[0], Sparse)
    assert hold(torch.zeros(0, 3))[1] == 0
    assert hold(torch.tensor(2.0))[1] == 4


def test_negative_zeros_of_a_sparse_tensor_become_what_a_file_gives_back() -> None:
    tensor = torch.linspace(0.1, 0.9, 1024).reshape(32, 32)
    tensor[:16] = -0.0
    form, _ = hold(tensor)
    assert isinstance(form, Sparse)
    assert torch.equal(form.dense(), tensor)
    assert not torch.signbit(form.dense()).any()


def test_it_is_a_final_method_with_a_card_and_serves_layers_only() -> None:
    import lamina.methods.keep as module

    assert isinstance(method, Method)
    assert method.final
    assert method.leave(SITE, {}, None, {}) == ()
    chain = Site("net.c", kind="chain")
    assert "chain" in method.refuse(chain)
    with pytest.raises(SiteError, match=r"net\.c"):
        method.apply(network(), Choice(chain, {}), None)
    for part in ("**What.**", "**Where.**", "**Costs", "**Does not help**", "**Reference.**"):
        assert part in module.__doc__


def test_a_sparse_tensor_on_a_grid_is_held_in_the_smaller_way() -> None:
    values, size = hold(torch.eye(64))  # it lies on a grid per block of columns as well
    assert isinstance(values, Sparse) and size < exact_bytes(exact(torch.eye(64)))
    draw = torch.Generator().manual_seed(0)
    steps = torch.rand(8, 2, generator=draw).half()
    dense = Affine(torch.randint(-7, 8, (8, 64), generator=draw), steps, None, 32).dense()
    values, size = hold(dense)
    assert isinstance(values, Affine) and torch.equal(values.dense(), dense)
    assert size < values_bytes(dense)
