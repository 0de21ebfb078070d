"""Edits: put in by one function, in place, touching only what they name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms import BUILDERS, Codebook, Edit, Plain, find_tensor, install


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def test_values_are_written_into_the_existing_parameter() -> None:
    net = network()
    weight = net[0].weight
    tied = net[2]
    tied.twin = weight  # a tie must survive
    weight.requires_grad_(False)
    others = {k: v.clone() for k, v in net.state_dict().items() if k not in ("0.weight", "2.twin")}
    new = torch.randn(3, 4)
    install(net, [Edit("0.weight", "values", values=Plain(new))])
    assert net[0].weight is weight is tied.twin
    assert torch.equal(weight, new)
    assert not weight.requires_grad
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in others.items())


def test_values_take_the_dtype_of_the_network() -> None:
    net = network().half()
    form = Codebook(torch.ones(2, 3, dtype=torch.int32), torch.tensor([0.0, 0.1]), torch.float16)
    install(net, [Edit("2.weight", "values", values=form)])
    assert net[2].weight.dtype == torch.float16
    assert torch.equal(net[2].weight, torch.full((2, 3), 0.1).half())


def test_buffers_can_be_written() -> None:
    net = network()
    install(net, [Edit("1.running_mean", "values", values=Plain(torch.tensor([1.0, 2.0, 3.0])))])
    assert net[1].running_mean.tolist() == [1, 2, 3]


def test_a_form_keeps_mode_and_hooks_of_the_module_it_replaces() -> None:
    net = network().eval()
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append("forward"))
    net[0].register_forward_pre_hook(lambda *_, **__: seen.append("pre"), with_kwargs=True)
    net[0].register_full_backward_hook(lambda *_: seen.append("backward"))
    install(net, [Edit("0", "low_rank", {"folds": 1, "rank": 1})])
    assert not any(m.training for m in net.modules())
    net(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "backward"]


def test_edits_are_put_in_in_order() -> None:
    net = network()
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    edits = [Edit("0.weight", "values", values=Plain(t)) for t in (a, b)]
    install(net, edits)
    assert torch.equal(net[0].weight, b)


def test_a_computed_tensor_is_not_taken_for_a_parameter() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(FileError, match=r"no such tensor at 0\.weight"):
        find_tensor(net, "0.weight")
    assert find_tensor(net, "0.bias") is net[0].bias


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (Edit("0", "no_such_form"), "unknown form"),
        (Edit("7", "low_rank", {"folds": 1, "rank": 1}), "module the skeleton does not have"),
        (Edit("a.b", "low_rank", {"folds": 1, "rank": 1}), "module the skeleton does not have"),
        (Edit("1", "low_rank", {"folds": 1, "rank": 1}), "low rank"),
        (Edit("0.weight", "values"), "no values"),
        (Edit("9.weight", "values", values=Plain(torch.zeros(1))), "no such tensor"),
        (Edit("0.no", "values", values=Plain(torch.zeros(1))), "no such tensor"),
        (Edit("0.forward", "values", values=Plain(torch.zeros(1))), "no such tensor"),
        (Edit("0.weight", "values", values=Plain(torch.zeros(4, 3))), "shapes differ"),
    ],
)
def test_what_does_not_fit_names_the_path_and_changes_nothing(edit: Edit, match: str) -> None:
    net = network()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(FileError, match=match):
        install(net, [edit])
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_every_form_is_registered() -> None:
    assert "low_rank" in BUILDERS
