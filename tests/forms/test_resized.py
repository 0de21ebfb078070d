"""The resized form: layers of other sizes, all zero, that are what torch builds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.artifact import pack, restore, unpack
from lamina.errors import FileError
from lamina.forms import Edit, Plain, install
from lamina.forms.resized import ELEMENTS, build_resized, sizes_of

Conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two layers are alike but for their values."""
    shapes = [[(n, t.shape, t.dtype) for n, t in m.state_dict().items()] for m in (a, b)]
    return type(a) is type(b) and repr(a) == repr(b) and shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("old", "settings", "new"),
    [
        (nn.Linear(3, 2), {}, nn.Linear(3, 2)),
        (nn.Linear(3, 2), {"inputs": 7}, nn.Linear(7, 2)),
        (nn.Linear(3, 2), {"outputs": 5, "bias": 0}, nn.Linear(3, 5, bias=False)),
        (nn.Linear(3, 2, bias=False), {"bias": 1}, nn.Linear(3, 2)),
        (nn.Conv2d(3, 8, 3), {"kernel": 5, "padding": 2}, nn.Conv2d(3, 8, 5, padding=2)),
        (nn.Conv2d(3, 8, 3, 2, 1), {}, nn.Conv2d(3, 8, 3, 2, 1)),
        (nn.Conv2d(3, 8, 3, 2, 1), {"stride": 1, "padding": 0}, nn.Conv2d(3, 8, 3)),
        (nn.Conv1d(4, 4, 3, groups=4), {"kernel": 7}, nn.Conv1d(4, 4, 7, groups=4)),
        (nn.Conv2d(4, 4, 3, groups=4), {"groups": 1, "inputs": 6}, nn.Conv2d(6, 4, 3)),
        (nn.Conv3d(2, 4, 1), {"kernel": 3, "outputs": 2}, nn.Conv3d(2, 2, 3)),
        (
            nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
            {"kernel": 1, "padding": 0},
            nn.Conv2d(3, 3, 1, padding_mode="reflect"),
        ),
    ],
)
def test_it_is_the_layer_that_torch_builds(old, settings, new):
    made = build_resized(old, settings)
    assert same(made, new)
    assert all(not t.any() for t in made.parameters()), "values come from the file"
    assert all(p is not q for p in made.parameters() for q in old.parameters())
    assert sizes_of(made) == sizes_of(new)


def test_dtype_device_and_what_is_trained_are_kept():
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    layer.weight.requires_grad_(False)
    made = build_resized(layer, {"outputs": 4})
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in made.parameters())
    with torch.device("meta"):
        empty = nn.Conv2d(2, 2, 3)
    made = build_resized(empty, {"kernel": 5})
    assert made.weight.is_meta and made.weight.shape == (2, 2, 5, 5)


def test_building_draws_no_random_numbers():
    layer = nn.Conv2d(1, 1, 3)
    state = torch.get_rng_state()
    build_resized(layer, {"kernel": 5})
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (nn.Linear(3, 2), {"kernel": 3}),
        (nn.Linear(3, 2), {"width": 3}),
        (nn.Linear(3, 2), {"inputs": 0}),
        (nn.Linear(3, 2), {"inputs": -1}),
        (nn.Linear(3, 2), {"outputs": 1 << 40}),
        (nn.Linear(3, 2), {"inputs": 1 << 20, "outputs": 1 << 20}),  # 4 TiB
        (nn.Linear(3, 2), {"bias": 2}),
        (nn.Linear(3, 2), {"bias": True}),
        (nn.Linear(3, 2), {"inputs": 3.0}),
        (nn.Linear(3, 2), {"inputs": "3"}),
        (nn.Linear(3, 2), {"inputs": None}),
        (nn.Conv2d(4, 4, 3), {"groups": 3}),
        (nn.Conv2d(4, 4, 3), {"groups": 0}),
        (nn.Conv2d(4, 4, 3), {"inputs": 5, "groups": 4}),
        (nn.Conv2d(4, 4, 3), {"kernel": 65}),
        (nn.Conv3d(4, 4, 3), {"kernel": 64, "inputs": 1 << 10, "outputs": 1 << 10}),
        (nn.Conv2d(4, 4, 3), {"stride": 0}),
        (nn.Conv2d(4, 4, 3), {"padding": -1}),
        (nn.Conv2d(4, 4, (3, 1)), {"inputs": 2}),
        (nn.Conv2d(4, 4, 3, dilation=2), {"inputs": 2}),
        (nn.Conv2d(4, 4, 3, padding="same"), {"inputs": 2}),
        (nn.ConvTranspose2d(4, 4, 3), {"inputs": 2}),
        (nn.Embedding(4, 4), {}),
        (nn.ReLU(), {}),
        (nn.BatchNorm2d(3), {"inputs": 2}),
    ],
)
def test_hostile_settings_are_refused_in_one_line(layer, settings):
    net = nn.Sequential(layer)
    with pytest.raises(FileError, match="resized") as caught:
        install(net, [Edit("0", "resized", settings)])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert net[0] is layer


def test_a_subclass_may_do_something_else_and_is_refused():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(FileError, match="cannot be resized"):
        build_resized(Own(3, 2), {})


def test_the_largest_weight_is_far_below_the_bound_of_a_layer():
    assert ELEMENTS <= 1 << 31
    with torch.device("meta"):
        layer = nn.Linear(1 << 10, 1 << 10)
    assert build_resized(layer, {"inputs": 1 << 12}).weight.is_meta


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))


EDITS = [
    Edit("0", "identity"),
    Edit("1", "identity"),
    Edit("2", "resized", {"inputs": 3, "kernel": 5, "padding": 2}),
]


@pytest.mark.parametrize("meta", [False, True])
def test_a_file_brings_it_back_bit_for_bit(meta):
    model = net()
    weight = torch.randn(4, 3, 5, 5)
    edits = [*EDITS, Edit("2.weight", "values", values=Plain(weight))]
    install(model, edits)
    file = pack(model, edits, "module", {})
    if meta:
        with torch.device("meta"):
            skeleton = net()
    else:
        skeleton = net()
        with torch.no_grad():
            [p.normal_() for p in skeleton.parameters()]
    loaded = restore(unpack(file), skeleton)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(loaded(x), model(x)) and torch.equal(loaded[2].weight, weight)
    assert sum(p.numel() for p in loaded.parameters()) == weight.numel() + 4
    held = {name: record.elements for name, record in unpack(file).records.items()}
    assert held == {"2.weight": weight.numel(), "2.bias": 4}


def test_hooks_and_the_training_flag_move_to_the_new_layer():
    model, called = net().train(), []
    model[2].eval()
    model[2].register_forward_hook(lambda *_: called.append("after"))
    install(model, EDITS)
    model(torch.zeros(1, 3, 4, 4))
    assert called == ["after"] and not model[2].training and model[1].training
