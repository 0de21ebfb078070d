from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.errors import DataError
from lamina.network.source import Network
from lamina.train import recalibrate, recalibrate_if_closer


def make_net() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3),
        nn.BatchNorm1d(3, affine=False), nn.BatchNorm1d(3, track_running_stats=False),
    )  # fmt: skip
    net.unused = nn.BatchNorm1d(5)  # part of the tree only
    net.forward = lambda x: net[6](net[5](net[4](net[3](net[2](net[1](net[0](x)))))))  # type: ignore[method-assign]
    with torch.no_grad():
        net.unused.running_mean.fill_(7)
    net.train()
    net[0].eval()
    return net


def test_moments_are_means_over_batches_and_nothing_else_changes() -> None:
    net = make_net()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    flags = [m.training for m in net.modules()]
    momenta = [m.momentum for m in (net[1], net[5])]
    batches = [torch.randn(8, 2, 6, 6) for _ in range(5)]
    random = torch.get_rng_state()
    assert recalibrate(net, batches, limit=4) == 2
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in net.modules()] == flags
    assert [m.momentum for m in (net[1], net[5])] == momenta

    with torch.no_grad():  # directly: batch by batch, in float64
        first, second = [], []
        for x in batches[:4]:
            a = net[0](x).double()
            mean, var = a.mean((0, 2, 3)), a.var((0, 2, 3))
            first.append((mean, var))
            plain = a.var((0, 2, 3), unbiased=False)
            shape = (1, -1, 1, 1)
            b = (a - mean.view(shape)) / (plain.view(shape) + 1e-5).sqrt()
            c = b.float().flatten(1) @ net[4].weight.T + net[4].bias
            second.append((c.double().mean(0), c.double().var(0)))
        for norm, moments in ((net[1], first), (net[5], second)):
            for got, part in zip(
                (norm.running_mean, norm.running_var), zip(*moments, strict=True), strict=True
            ):
                assert torch.allclose(got.double(), torch.stack(part).mean(0), atol=1e-5)
    for name, tensor in net.state_dict().items():
        if not name.startswith(("1.running", "5.running", "1.num", "5.num")):
            assert torch.equal(tensor, before[name]), name


def test_no_norms_no_work() -> None:
    def burn() -> object:
        raise AssertionError("read")
        yield

    assert recalibrate(nn.Linear(2, 2), burn()) == 0


@pytest.mark.parametrize("fail", ["empty", "broken", "wrong"])
def test_moments_are_put_back_where_it_fails(fail: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    net(torch.randn(8, 4))
    net.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}

    def broken() -> object:
        yield torch.randn(8, 4)
        raise KeyError("loader")

    batches = {"empty": [], "broken": broken(), "wrong": [torch.randn(8, 4), torch.randn(8, 5)]}
    with pytest.raises((DataError, KeyError, RuntimeError)):
        recalibrate(net, batches[fail])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net[1].training and net[1].momentum == 0.1


def test_single_samples_are_left_out() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    x = torch.randn(8, 4)
    assert recalibrate(net, [x[:1], x, x[:1]]) == 1
    assert torch.allclose(net[1].running_mean, net[0](x).mean(0), atol=1e-6)
    assert net[1].num_batches_tracked == 1
    assert recalibrate(net, [x[:1]]) == 0  # nothing to learn from: the old ones stay
    assert torch.allclose(net[1].running_mean, net[0](x).mean(0), atol=1e-6)


class Half(nn.Module):
    """A BatchNorm whose moments are right, or not, for what comes before it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        with torch.no_grad():
            self.scale.weight.copy_(scale * torch.eye(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.scale(x))


def test_new_moments_are_kept_only_where_they_help():
    torch.manual_seed(0)
    x = torch.randn(4096, 4)
    original = Half(1.0)
    recalibrate(original, [x])
    network = Network(original.eval(), (x[:2],), loss="features")
    few = [x[:8]]
    tripled, same = Half(3.0), Half(1.0)
    for module in (tripled, same):
        module.norm.load_state_dict(original.norm.state_dict())
        module.eval()
    assert recalibrate_if_closer(network, tripled, few)
    assert not torch.equal(tripled.norm.running_var, original.norm.running_var)
    before = {k: v.clone() for k, v in same.norm.state_dict().items()}
    assert not recalibrate_if_closer(network, same, few)  # eight samples know less than 4,096
    assert all(torch.equal(before[k], v) for k, v in same.norm.state_dict().items())
    assert not recalibrate_if_closer(network, nn.Linear(4, 4), few)
