"""Rewriting: the same network to rounding, where it is known to be; what is not known stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.recipes.thin import settle
from torch import Tensor, nn

from lamina import artifact
from lamina.errors import PlanError
from lamina.forms import conv_weights, install, is_channels_last
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Step
from lamina.network.discover import discover
from lamina.network.source import Network
from lamina.plan import Decision, Plan, apply
from lamina.plan.rewrite import copy_module, find_folds, folded, orders, rewrite, same
from lamina.zoo import untrained

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Two convolutions with BatchNorm and a head, run by a function."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **norm: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, **norm)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc, self.run = nn.Linear(4, 2), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.run(self, x).mean((2, 3)))


def plain(net: nn.Module, x: Tensor) -> Tensor:
    return net.bn2(net.conv2(net.bn1(net.conv1(x)).relu())).relu()


def made(module: nn.Module, x: Tensor = X) -> Network:
    return Network(settle(module), (x,))


def zoo(name: str) -> Network:
    network = untrained(name)
    settle(network.module)
    shape = network.example_inputs[0].shape[1:]
    return replace(network, example_inputs=(torch.randn(4, *shape),))


@pytest.mark.parametrize(("name", "count"), [("resnet20", 19), ("small-cnn", 3)])
def test_zoo_networks_compute_the_same(name: str, count: int) -> None:
    network = zoo(name)
    before, digest = network.forward(*network.example_inputs), network.digest()
    found = rewrite(network)
    after = found.network.forward(*network.example_inputs)
    assert len(found.folds) == count and network.digest() == digest
    assert (before - after).abs().max() <= 1e-5 * before.abs().max()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in found.network.module.modules())
    assert all(map(is_channels_last, conv_weights(found.network.module)))
    assert same(network, found.network)
    broken = copy_module(found.network.module)
    with torch.no_grad():
        conv_weights(broken)[0].mul_(1.01)
    assert not same(network, replace(network, module=broken))  # the negative control


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (4, 6)),
        (nn.Conv1d(6, 5, 3, bias=False), (4, 6, 9)),
        (nn.Conv2d(6, 4, 3, stride=2, groups=2), (4, 6, 9, 7)),
        (nn.Conv3d(6, 5, 2, bias=False), (4, 6, 4, 5, 3)),
    ],
)
def test_a_folded_layer_is_the_layer_and_its_norm(layer, shape, affine: bool) -> None:
    kind = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][len(shape) - 2]
    norm = kind(layer.weight.shape[0], eps=0.1, affine=affine)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        if affine:
            norm.weight.normal_()
            norm.bias.normal_()
    net = nn.Sequential(layer, norm, nn.ReLU()).double().eval()
    network = Network(net, (torch.randn(shape, dtype=torch.float64),))
    assert find_folds(network) == (("0", "1"),)
    found = rewrite(network, ["fold"])
    x = network.example_inputs[0]
    assert torch.allclose(found.network.module[0](x), norm(layer(x)), rtol=1e-12, atol=1e-12)
    weight, bias = folded(layer, norm)
    assert torch.equal(found.network.module[0].weight, weight) and len(bias) == len(weight)


def shared(net: nn.Module, x: Tensor) -> Tensor:
    x = net.bn1(net.conv1(x))
    return net.bn2(net.conv2(x)) + net.conv2(x)


def read_twice(net: nn.Module, x: Tensor) -> Tensor:
    y = net.conv1(x)
    return net.bn2(net.conv2(net.bn1(y))) + y


def one_norm(net: nn.Module, x: Tensor) -> Tensor:
    return net.bn1(net.conv2(net.bn1(net.conv1(x))))


def between(net: nn.Module, x: Tensor) -> Tensor:
    return net.bn2(net.conv2(net.bn1(net.conv1(x).relu())))


def returned(net: nn.Module, x: Tensor) -> Tensor:
    return net.bn2(net.conv2(net.bn1(net.conv1(x * net.conv1.weight.mean()))))


@pytest.mark.parametrize(
    ("forward", "left"),
    [
        (plain, (("conv1", "bn1"), ("conv2", "bn2"))),
        (shared, (("conv1", "bn1"),)),
        (read_twice, (("conv2", "bn2"),)),
        (one_norm, ()),
        (between, (("conv2", "bn2"),)),
        (returned, (("conv2", "bn2"),)),
    ],
)
def test_only_what_is_read_by_its_norm_alone_is_folded(forward, left) -> None:
    network = made(Net(forward))
    assert find_folds(network) == left
    if left:
        found = rewrite(network)
        assert same(network, found.network)
    else:
        with pytest.raises(PlanError, match="no BatchNorm to fold"):
            rewrite(network)


def test_no_moments_hooks_ties_or_own_classes() -> None:
    class Own(nn.Conv2d):
        pass

    class Norm(nn.BatchNorm2d):
        pass

    free = Network(Net(plain, track_running_stats=False).eval(), (X,))
    assert find_folds(free) == (("conv2", "bn2"),)
    hooked = made(Net(plain))
    hooked.module.bn1.register_forward_pre_hook(lambda *_: None)
    assert find_folds(hooked) == (("conv2", "bn2"),)
    tied = made(Net(plain))
    tied.module.bn2.weight = tied.module.bn1.weight
    assert find_folds(tied) == ()
    own = Net(plain)
    own.conv1, own.bn2 = Own(3, 4, 3), Norm(4)
    assert find_folds(made(own)) == ()
    dead = made(Net(plain))
    dead.module.bn1.running_var[0] = float("inf")
    dead.module.bn1.weight.data[0] = float("nan")
    assert find_folds(dead) == (("conv2", "bn2"),)
    assert find_folds(replace(made(Net(plain)), example_inputs=())) == ()


def test_a_linear_layer_over_tokens_has_its_channels_elsewhere() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).eval()
    assert find_folds(Network(net, (torch.randn(3, 5, 6),))) == ()
    assert find_folds(Network(net, (torch.randn(3, 6),))) == (("0", "1"),)


def test_a_view_that_needs_the_old_order_is_seen() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).view(len(x), -1))

    network = made(Flat())
    found = rewrite(network, ["channels_last"])
    assert not same(network, found.network)


def test_orders_only_what_has_an_order() -> None:
    assert orders(Net(plain)) and not orders(nn.Linear(3, 3))
    assert not orders(rewrite(made(Net(plain)), ["channels_last"]).network.module)
    with pytest.raises(PlanError, match="unknown rewriting"):
        rewrite(made(Net(plain)), ["faster"])


PAIR = (
    Step("alds", "conv2", {"folds": 1, "rank": 2}),
    Step("keep", "conv2.0"), Step("rdoq", "conv2.1", {"step": 0.01, "rate": 0.0}),
)  # fmt: skip


@pytest.mark.parametrize("names", [("fold",), ("channels_last",), ("fold", "channels_last")])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_plan_that_begins_with_a_rewriting_comes_back_bit_for_bit(names, inplace: bool) -> None:
    network = made(Net(plain))
    first = rewrite(network, names)
    sites = discover(first.network)
    steps = {s.name: (Step("keep", s.name),) for s in sites.layers} | {"conv2": PAIR}
    sites_of = {name: Decision(chain, Cost(), 0.0) for name, chain in steps.items()}
    plan = Plan(network.digest(), sites_of, rewrite=names)
    plan = Plan.from_dict(plan.dict())
    assert plan.rewrite == names
    before = network.forward(X)
    skeleton = copy_module(network.module)
    edited = apply(network, plan, sites, Stats(), inplace=inplace)
    assert (edited.model is network.module) == inplace
    assert (before - edited.network.forward(X)).abs().max() < 0.5
    file = artifact.pack(edited.model, edited.edits, "module", {"*": "keep"})
    for blank in (settle(Net(plain), 7), skeleton):
        loaded = artifact.restore(artifact.unpack(file), blank).eval()
        assert [type(m) for m in loaded.modules()] == [type(m) for m in edited.model.modules()]
        assert torch.equal(loaded(X), edited.model(X))
        for name, tensor in edited.model.state_dict().items():
            other = loaded.state_dict()[name]
            assert torch.equal(other, tensor) and other.stride() == tensor.stride()
    with torch.device("meta"):
        empty = Net(plain)
    loaded = artifact.restore(artifact.unpack(file), empty).eval()
    assert torch.equal(loaded(X), edited.model(X))
    again = settle(Net(plain))
    install(again, edited.edits)  # values of every site are edits too
    for name in ("conv1.weight", "fc.bias"):
        assert torch.equal(again.state_dict()[name], edited.model.state_dict()[name])


def test_a_plan_document_says_its_rewriting() -> None:
    plan = Plan("x", {})
    assert "rewrite" not in plan.dict() and Plan.from_dict(plan.dict()).rewrite == ()
    document = replace(plan, rewrite=("fold",)).dict()
    assert Plan.from_dict(document).rewrite == ("fold",)
    assert "rewritten first: fold" in Plan.from_dict(document).show()
    for wrong in (["faster"], "fold", [1]):
        with pytest.raises(PlanError, match="rewrite"):
            Plan.from_dict(document | {"rewrite": wrong})
