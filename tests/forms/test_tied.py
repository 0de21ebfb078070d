"""Ties: one Parameter for two layers, stored once, in whatever order edits and files come."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.artifact import pack, restore, unpack
from lamina.errors import FileError
from lamina.forms import Edit, Plain, install
from lamina.forms.tied import index_of, tie


class Net(nn.Module):
    """Three blocks of two layers and a head."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 4, bias=bias))
            for _ in range(3)
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def fresh(seed: int = 0, bias: bool = True) -> Net:
    torch.manual_seed(seed)
    return Net(bias).eval()


def tied(root: nn.Module, follower: str, leader: str, bias: bool = False) -> Edit:
    settings = {"with": index_of(root, leader)} | ({"bias": 1} if bias else {})
    return Edit(follower, "tie", settings)


def test_both_hold_one_parameter_from_then_on():
    net = fresh()
    install(
        net, [tied(net, "blocks.2.0", "blocks.0.0"), tied(net, "blocks.1.2", "blocks.0.2", True)]
    )
    assert net.blocks[2][0].weight is net.blocks[0][0].weight
    assert net.blocks[2][0].bias is not net.blocks[0][0].bias
    assert net.blocks[1][2].weight is net.blocks[0][2].weight
    assert net.blocks[1][2].bias is net.blocks[0][2].bias
    whole = sum(p.numel() for p in fresh().parameters())
    assert sum(p.numel() for p in net.parameters()) == whole - 24 - 24 - 4
    net(torch.ones(1, 4)).sum().backward()
    assert net.blocks[2][0].weight.grad is net.blocks[0][0].weight.grad


def test_a_number_names_a_module_whatever_its_path_looks_like():
    net = fresh()
    for path, module in net.named_modules():
        assert list(net.modules())[index_of(net, path)] is module
    with pytest.raises(FileError, match="no such module"):
        index_of(net, "blocks.7")


def test_numbers_are_those_of_the_moment():
    """A structure that is put in before shifts them; the file replays edits in the same order."""
    net = fresh()
    first = Edit("blocks.0.0", "low_rank", {"folds": 1, "rank": 1})
    install(net, [first])
    later = tied(net, "blocks.2.2", "blocks.1.2")
    assert later.settings["with"] == index_of(fresh(), "blocks.1.2") + 2
    install(net, [later])
    assert net.blocks[2][2].weight is net.blocks[1][2].weight
    file = pack(net, [first, later], "module", {})
    loaded = restore(unpack(file), fresh(1))
    assert loaded.blocks[2][2].weight is loaded.blocks[1][2].weight
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), net(x))


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_a_file_keeps_the_tie_and_stores_the_tensor_once(meta, bias, backwards):
    net = fresh(bias=bias)
    pairs = [("blocks.1.0", "blocks.0.0"), ("blocks.2.0", "blocks.0.0")]
    if backwards:  # the leader is the last of them in the order of the state
        pairs = [("blocks.0.0", "blocks.2.0"), ("blocks.1.0", "blocks.2.0")]
    edits = [tied(net, follower, leader, bias) for follower, leader in pairs]
    install(net, edits)
    shared = Edit("blocks.0.0.weight", "values", values=Plain(torch.randn(6, 4)))
    install(net, [shared])
    package = unpack(pack(net, [*edits, shared], "module", {}))
    assert sum("0.weight" in name for name in package.records) == 1
    stored = sum(record.elements for record in package.records.values())
    assert stored == sum(p.numel() for p in net.parameters())
    if meta:
        with torch.device("meta"):
            skeleton = Net(bias).eval()
    else:
        skeleton = fresh(5, bias)
    loaded = restore(package, skeleton)
    first, second, third = (block[0] for block in loaded.blocks)
    assert first.weight is second.weight is third.weight
    assert (first.bias is second.bias) and torch.equal(first.weight, shared.values.dense())
    assert sum(p.numel() for p in loaded.parameters()) == stored
    x = torch.randn(3, 4)
    assert torch.equal(loaded(x), net(x))
    if bias:
        assert first.bias is third.bias


def test_a_tie_of_what_is_tied_joins_all():
    net = fresh()
    install(net, [tied(net, "blocks.1.0", "blocks.0.0")])
    install(net, [tied(net, "blocks.0.0", "blocks.2.0")])  # 0 goes to 2, and 1 stays behind
    assert net.blocks[0][0].weight is net.blocks[2][0].weight
    assert net.blocks[1][0].weight is not net.blocks[0][0].weight


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"with": -1},
        {"with": 10_000},
        {"with": 0},  # the network itself has no weight
        {"bias": 1},
        {"with": 3, "bias": 2},
        {"with": 3, "more": 1},
    ],
)
def test_hostile_settings_are_refused_in_one_line(settings):
    net = fresh()
    before = {n: id(p) for n, p in net.named_parameters()}
    with pytest.raises(FileError, match="tie") as caught:
        install(net, [Edit("blocks.0.0", "tie", settings)])
    assert "\n" not in str(caught.value)
    assert {n: id(p) for n, p in net.named_parameters()} == before


@pytest.mark.parametrize("value", [1.0, True, "3", None, [3], 2.5])
def test_settings_that_are_no_whole_numbers_are_refused(value):
    net = fresh()
    for settings in ({"with": value}, {"with": index_of(net, "blocks.1.0"), "bias": value}):
        with pytest.raises(FileError, match="tie"):
            tie(net, "blocks.0.0", settings)


def test_what_does_not_fit_is_refused_and_nothing_is_half_done():
    net = fresh()
    cases = [
        ("blocks.0.0", "blocks.0.2"),  # another shape
        ("blocks.0.0", "blocks.0.0"),  # itself
        ("blocks.0.1", "blocks.0.0"),  # no weight
        ("blocks.0.0", "blocks.0.1"),
        ("head", ""),
    ]
    for follower, leader in cases:
        with pytest.raises(FileError, match="tie"):
            install(net, [tied(net, follower, leader)])
    net.blocks[1][0].bias = None
    weight = net.blocks[1][0].weight
    with pytest.raises(FileError, match="bias"):
        install(net, [tied(net, "blocks.1.0", "blocks.0.0", bias=True)])
    assert net.blocks[1][0].weight is weight, "the weight was tied before the bias was looked at"
    half = fresh().blocks[2][0].to(torch.bfloat16)
    net.blocks[2][0] = half
    with pytest.raises(FileError, match="dtype"):
        install(net, [tied(net, "blocks.2.0", "blocks.0.0")])
    with pytest.raises(FileError, match="does not have"):
        install(net, [Edit("blocks.9.0", "tie", {"with": 3})])
    with pytest.raises(FileError):
        install(net, [Edit("", "tie", {"with": 3})])


def test_a_file_with_a_tie_that_does_not_fit_is_refused():
    net = fresh()
    edits = [tied(net, "blocks.1.0", "blocks.0.0")]
    install(net, edits)
    file = pack(net, edits, "module", {})
    other = fresh(1)
    other.blocks[1][0] = nn.Linear(4, 5)
    with pytest.raises(FileError):
        restore(unpack(file), other)
    hostile = pack(net, [Edit("blocks.1.0", "tie", {"with": 99})], "module", {})
    with pytest.raises(FileError, match="tie"):
        restore(unpack(hostile), fresh(1))
