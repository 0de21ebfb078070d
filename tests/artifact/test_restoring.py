"""Restoring: straight into the skeleton's memory, whatever that is, and never a mixed network."""

from __future__ import annotations

import pytest
import torch
from tests.artifact.test_container import Net, bits, edited_net, same_state
from torch import nn

from lamina.artifact import pack, restore, unpack
from lamina.errors import FileError
from lamina.forms import Edit, Grid, install


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.a.weight.requires_grad_(False)
        self.register_buffer("count", torch.tensor(3))


def test_a_skeleton_without_values_is_filled():
    net = Tied()
    file = pack(net, (), "module", {})
    with torch.device("meta"):
        skeleton = Tied()
    loaded = restore(unpack(file), skeleton)
    assert same_state(loaded, net)
    assert loaded.b.weight is loaded.a.weight, "the tie holds"
    assert isinstance(loaded.a.weight, nn.Parameter) and not loaded.a.weight.requires_grad
    assert loaded.a.bias.requires_grad
    assert not any(t.is_meta for t in loaded.state_dict().values())


def test_a_skeleton_without_values_is_edited_too():
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    edits = (Edit("0", "low_rank", {"folds": 1, "rank": 2}),)
    install(net, edits)
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    assert same_state(restore(unpack(pack(net, edits, "module", {})), skeleton), net)


def test_computed_buffers_are_not_lost():
    """What no file holds must not be made up: neither zeros nor memory as it was found."""
    net, edits = edited_net()
    file = pack(net, edits, "module", {})
    with torch.device("meta"):
        skeleton = Net()
        skeleton.scratch = torch.ones(3)
    with pytest.raises(FileError, match="lacks values at scratch"):
        restore(unpack(file), skeleton)
    assert skeleton.conv.weight.is_meta, "nothing was begun"
    with torch.device("meta"):
        skeleton = Net()
    skeleton.scratch = torch.full((3,), 5.0)
    skeleton.mask = torch.zeros(3, dtype=torch.bool)  # a part of it is on the CPU already
    loaded = restore(unpack(file), skeleton)
    assert same_state(loaded, net)
    assert loaded.scratch.tolist() == [5, 5, 5]


def test_a_skeleton_that_does_not_fit_keeps_its_values():
    file = pack(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), (), "module", {})
    for other in (nn.Linear(3, 4), nn.Linear(3, 2).double(), nn.Identity()):
        skeleton = nn.Sequential(nn.Linear(3, 3), other)
        before = bits(skeleton[0].weight)
        with pytest.raises(FileError, match=r"does not fit the file at 1\."):
            restore(unpack(file), skeleton)
        assert bits(skeleton[0].weight) == before


def test_parameters_of_another_layout_are_written_through():
    """Channels last, and a view of a larger buffer: values go where the network reads them."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 3))
    file = pack(net, (), "module", {})
    skeleton = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 3)).to(
        memory_format=torch.channels_last
    )
    large = torch.zeros(3, 8)
    skeleton[1].weight = nn.Parameter(large[:, 2:4])
    loaded = restore(unpack(file), skeleton)
    assert same_state(loaded, net)
    assert loaded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(large[:, 2:4], net[1].weight) and not large[:, 4:].any()


def test_names_the_skeleton_ties_get_the_last_ones_values():
    """As if written in order; with threads it must not be a matter of luck."""
    net = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    skeleton = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    skeleton[1].weight = skeleton[0].weight
    loaded = restore(unpack(pack(net, (), "module", {})), skeleton)
    assert torch.equal(loaded[0].weight, net[1].weight)


@pytest.mark.parametrize("threads", ["1", "4"])
def test_a_loaded_network_is_the_saved_one_at_any_number_of_threads(threads, monkeypatch):
    monkeypatch.setenv("LAMINA_THREADS", threads)
    torch.manual_seed(1)
    net = nn.Sequential(*(nn.Linear(130, 130) for _ in range(8)))
    edits = tuple(
        Edit(f"{i}.weight", "values", values=Grid(torch.randint(-7, 8, (130, 130)), 0.01 * (i + 1)))
        for i in range(0, 8, 2)
    )
    install(net, edits)
    skeleton = nn.Sequential(*(nn.Linear(130, 130) for _ in range(8)))
    assert same_state(restore(unpack(pack(net, edits, "module", {})), skeleton), net)
