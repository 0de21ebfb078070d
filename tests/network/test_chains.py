from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.network.tiny import Mlp, Residual, Twice
from torch import nn

from lamina.network.chains import cut
from lamina.network.discover import discover
from lamina.network.sites import Sites
from lamina.network.source import Network


def sites_of(module: nn.Module, *inputs: torch.Tensor) -> Sites:
    sites = discover(Network(module, inputs))
    assert sites.traced
    return sites


class Between(nn.Module):
    """A convolution, something, a linear layer."""

    def __init__(self, what, width: int) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.fc, self.what = nn.Linear(width, 2), what

    def forward(self, x):
        return self.fc(self.what(self, self.conv(x)))


def between(what, width: int) -> tuple[tuple[str, ...], ...] | None:
    chains = sites_of(Between(what, width), torch.zeros(2, 1, 6, 6)).chains
    return chains[0].between if chains else None


def test_functional_activations():
    (chain,) = sites_of(Mlp(), torch.zeros(2, 6)).chains
    assert (chain.name, chain.kind) == ("fc1..fc3", "chain")
    assert chain.members == ("fc1", "fc2", "fc3") and chain.between == (("relu",), ("relu",))
    assert chain.macs == 0  # its members have them


@pytest.mark.parametrize(
    ("what", "width", "expected"),
    [
        (lambda m, x: x.flatten(1), 64, ("flatten",)),
        (lambda m, x: x.view(-1, 64), 64, ("flatten",)),
        (lambda m, x: x.reshape(x.size(0), -1), 64, ("flatten",)),
        (lambda m, x: F.relu(m.norm(x)).flatten(1), 64, ("batch_norm", "relu", "flatten")),
        (
            lambda m, x: F.max_pool2d(m.drop(x), 2).flatten(1),
            16,
            ("dropout", "max_pool2d", "flatten"),
        ),
        (lambda m, x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0], 4, None),
        (
            lambda m, x: F.adaptive_avg_pool2d(x, 1).flatten(1),
            4,
            ("adaptive_avg_pool2d", "flatten"),
        ),
        (lambda m, x: F.adaptive_max_pool2d(x, 1).squeeze(), 4, ("adaptive_max_pool2d", "flatten")),
        (lambda m, x: x.contiguous().relu_().mul(2).flatten(1), 64, ("relu", "mul", "flatten")),
        (lambda m, x: (x * torch.sigmoid(x)).flatten(1), 64, None),  # two consumers
        (lambda m, x: torch.cat([x, x], 1).flatten(1), 128, None),
        (lambda m, x: x.softmax(1).flatten(1), 64, None),
        (lambda m, x: x.chunk(2, 1)[0].flatten(1), 32, None),
    ],
)
def test_what_may_lie_between(what, width, expected):
    assert between(what, width) == (None if expected is None else (expected,))


def test_hand_written_global_pooling():
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 5, 3), nn.Linear(5, 2)

        def forward(self, x):
            return self.b(self.a(x).mean((2, 3)))

    assert sites_of(Pool(), torch.zeros(2, 1, 6, 6)).chains[0].between == (("mean",),)


def test_a_residual_add_ends_a_chain():
    sites = sites_of(Residual(), torch.zeros(2, 1, 8, 8))
    assert [c.members for c in sites.chains] == [("conv1", "conv2"), ("tail", "fc")]
    assert [c.between for c in sites.chains] == [
        (("batch_norm", "relu"),),
        (("max_pool2d", "flatten"),),
    ]


def test_a_literal_reshape_is_refused_by_name():
    sites = sites_of(
        Between(lambda m, x: x.view(-1, 16).relu().view(2, 64), 64), torch.zeros(2, 1, 6, 6)
    )
    assert sites.chains == ()
    (refusal,) = sites.refusals
    assert refusal.where == "conv -> fc" and "view with literal sizes" in refusal.why


def test_layers_that_run_twice_or_are_tied_are_in_no_chain():
    assert sites_of(Twice(), torch.zeros(2, 4)).chains == ()
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    assert sites_of(net, torch.zeros(2, 3)).chains == ()


def test_an_output_in_the_middle_ends_a_chain():
    class Tap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.a(x)
            return self.b(h), h

    assert sites_of(Tap(), torch.zeros(2, 3)).chains == ()


def test_a_write_through_a_view_ends_a_chain():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.a(x)
            h.view(-1).mul_(2)
            return self.b(h)

    assert sites_of(Hidden(), torch.zeros(2, 3)).chains == ()


def test_padding_inside_a_convolution_is_part_of_it():
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Conv2d(2, 2, 3, padding="same")
    )
    assert sites_of(net, torch.zeros(1, 1, 6, 6)).chains[0].members == ("0", "1")


# --- the modules in between, and parts of chains --------------------------------------------------


def test_through_names_modules_that_do_one_thing_once():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.c, self.d = nn.Linear(3, 3), nn.Linear(3, 3)
            self.norm, self.act, self.shared = nn.BatchNorm1d(3), nn.GELU(), nn.ReLU()
            self.both = nn.Sequential(nn.Tanh(), nn.Dropout(0.5))

        def forward(self, x):
            x = self.b(F.relu(self.act(self.norm(self.a(x)))))
            return self.d(self.both(self.shared(self.c(self.shared(x)))))

    (chain,) = sites_of(Net().eval(), torch.zeros(2, 3)).chains
    assert chain.members == ("a", "b", "c", "d")
    assert chain.between[0] == ("batch_norm", "gelu", "relu")
    assert chain.through[0] == ("norm", "act", "")  # a call has no module
    assert chain.through[1] == ("",)  # it runs twice
    assert chain.between[2] == ("relu", "tanh", "dropout")
    assert chain.through[2] == ("", "both.0", "both.1")
    assert [len(ops) for ops in chain.between] == [len(paths) for paths in chain.through]


def test_a_module_of_several_ops_is_no_passage():
    class Swish(nn.Module):
        def forward(self, x):
            return (x.relu() + 1).tanh()

    net = nn.Sequential(nn.Linear(3, 3), Swish(), nn.Linear(3, 3))
    (chain,) = sites_of(net, torch.zeros(2, 3)).chains
    assert chain.between == (("relu", "add", "tanh"),) and chain.through == (("", "", ""),)


def test_a_module_in_two_slots_is_one_of_each_but_not_what_lies_in_a_shared_container():
    act, box = nn.ReLU(), nn.Sequential(nn.Tanh())

    def passages(first: nn.Module, second: nn.Module):
        net = nn.Sequential(nn.Linear(3, 3), first, nn.Linear(3, 3), second, nn.Linear(3, 3))
        (chain,) = sites_of(net, torch.zeros(2, 3)).chains
        return chain.through

    assert passages(act, act) == (("1",), ("3",))  # either slot can be given something else
    assert passages(box, nn.Sequential(box[0])) == (("1.0",), ("3.0",))
    assert passages(box, box) == (("",), ("",))


def test_parts_of_chains_are_cut_and_found_by_name():
    layers = [nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.GELU()]
    sites = sites_of(nn.Sequential(*layers, nn.Linear(3, 2)), torch.zeros(2, 3))
    (chain,) = sites.chains
    assert chain.name == "0..6" and sites["0..6"] is chain
    part = cut(chain, 1, 3)
    assert (part.name, part.members) == ("2..6", ("2", "4", "6"))
    assert part.between == (("tanh",), ("gelu",)) and part.through == (("3",), ("5",))
    assert sites["2..6"] == part and "2..6" in sites and part.kind == "chain"
    assert cut(chain, 0, 3) == chain
    for name in ("6..2", "2..2", "2..7", "..", "0..", "2..6..6", ""):
        assert name not in sites
        with pytest.raises(KeyError):
            sites[name]
