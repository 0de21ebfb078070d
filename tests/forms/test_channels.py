"""Gathered and shuffled layers: the dense layer with a mask, in every geometry."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from lamina.artifact import pack, restore, unpack
from lamina.errors import FileError
from lamina.forms import Edit, Gather, GroupedLinear, Plain, check_indices, install
from lamina.forms.channels import build_gathered, build_shuffled


class Conv1D(nn.Module):
    """Stored [in, out], as GPT-2 has it; known by its name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


LAYERS = {
    "linear": (nn.Linear(8, 6), (2, 3, 8)),
    "no bias": (nn.Linear(8, 4, bias=False), (5, 8)),
    "hf": (Conv1D(6, 8), (2, 3, 8)),
    "conv": (nn.Conv2d(8, 6, 3, stride=2, padding=1), (2, 8, 9, 7)),
    "unbatched": (nn.Conv2d(8, 6, 3), (8, 9, 7)),
    "same": (nn.Conv2d(8, 6, (3, 5), padding="same", bias=False), (2, 8, 9, 8)),
    "reflect": (nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), (2, 8, 9, 8)),
    "1d": (nn.Conv1d(8, 6, 3, dilation=2), (2, 8, 9)),
    "3d": (nn.Conv3d(8, 6, 2, padding=1, bias=False), (2, 8, 4, 5, 3)),
}


def double(name: str) -> tuple[nn.Module, torch.Tensor]:
    layer, shape = LAYERS[name]
    return copy.deepcopy(layer).double(), torch.randn(shape, dtype=torch.float64)


def rows_of(layer: nn.Module) -> torch.Tensor:
    """The weight as `[out, in, *kernel]`, a view of it."""
    weight = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def masked(layer: nn.Module, mask: torch.Tensor) -> nn.Module:
    """The dense layer without the weights outside a mask `[out, in]`."""
    layer = copy.deepcopy(layer)
    rows = rows_of(layer)
    rows.mul_(mask.reshape(mask.shape + (1,) * (rows.dim() - 2)))
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_a_gathered_layer_is_the_layer_of_some_channels(name: str) -> None:
    layer, x = double(name)
    kept = torch.tensor([1, 2, 5, 7])
    mask = torch.zeros(rows_of(layer).shape[:2], dtype=torch.float64)
    mask[:, kept] = 1
    built = build_gathered(layer, {"channels": 4})
    built[0].index.copy_(kept)
    with torch.no_grad():
        built[1].weight.copy_(rows_of(layer)[:, kept])
    torch.testing.assert_close(built(x), masked(layer, mask)(x), rtol=0, atol=1e-12)
    assert not torch.allclose(built(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_gathered_pair_of_full_rank_is_the_layer_of_some_channels(name: str) -> None:
    layer, x = double(name)
    kept = torch.tensor([0, 3, 4])
    rows = rows_of(layer)
    mask = torch.zeros(rows.shape[:2], dtype=torch.float64)
    mask[:, kept] = 1
    part = rows[:, kept]
    matrix = part.flatten(1)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    built = build_gathered(layer, {"channels": 3, "rank": len(s)})
    built[0].index.copy_(kept)
    with torch.no_grad():
        built[1].weight.copy_(vh.reshape(built[1].weight.shape))
        built[2].weight.copy_((u * s).reshape(built[2].weight.shape))
    torch.testing.assert_close(built(x), masked(layer, mask)(x), rtol=0, atol=1e-12)


def fill_shuffled(layer: nn.Module, groups: int, rows: torch.Tensor, cols: torch.Tensor):
    """The grouped layer, filled by hand, and the dense layer with the same support."""
    dense = rows_of(layer)
    n, c = dense.shape[:2]
    built = build_shuffled(layer, {"groups": groups})
    built[0].index.copy_(cols)
    built[2].index.copy_(torch.argsort(rows))
    mask = torch.zeros(n, c, dtype=torch.float64)
    parts = []
    for r, k in zip(rows.chunk(groups), cols.chunk(groups), strict=True):
        mask[r[:, None], k] = 1
        parts.append(dense[r][:, k])
    with torch.no_grad():
        built[1].weight.copy_(torch.cat(parts))
        if layer.bias is not None:
            built[1].bias.copy_(layer.bias[rows])
    return built, masked(layer, mask)


@pytest.mark.parametrize("groups", [2, 1])
@pytest.mark.parametrize("name", LAYERS)
def test_a_shuffled_layer_is_the_masked_layer(name: str, groups: int) -> None:
    layer, x = double(name)
    n, c = rows_of(layer).shape[:2]
    if groups == 1:
        with pytest.raises(FileError):
            build_shuffled(layer, {"groups": 1})
        return
    rows, cols = torch.randperm(n), torch.randperm(c)
    built, dense = fill_shuffled(layer, groups, rows, cols)
    torch.testing.assert_close(built(x), dense(x), rtol=0, atol=1e-12)
    bias = 0 if layer.bias is None else layer.bias.numel()
    weight = sum(p.numel() for p in built.parameters()) - bias
    assert weight == layer.weight.numel() // groups
    built[2].index.copy_(torch.arange(n))
    assert not torch.allclose(built(x), dense(x)), "the order of the outputs matters"


def test_four_groups_and_a_bias() -> None:
    layer = nn.Linear(8, 4).double()
    built, dense = fill_shuffled(layer, 4, torch.tensor([2, 0, 3, 1]), torch.arange(8).flip(0))
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(built(x), dense(x), rtol=0, atol=1e-12)
    assert isinstance(built[1], GroupedLinear)


def test_flags_dtype_and_random_numbers() -> None:
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False)
    before = torch.get_rng_state()
    for built in (
        build_gathered(layer, {"channels": 3}),
        build_gathered(layer, {"channels": 3, "rank": 2}),
        build_shuffled(layer, {"groups": 2}),
    ):
        assert torch.equal(torch.get_rng_state(), before)
        assert {p.dtype for p in built.parameters()} == {torch.bfloat16}
        for name, p in built.named_parameters():
            assert p.requires_grad == name.endswith("bias")
            assert p.abs().sum() == 0 or torch.equal(p, layer.bias)
        assert not any(t.is_meta for t in built.state_dict().values())
        assert all(t.dtype == torch.int64 for t in built.buffers())
    assert torch.equal(build_gathered(layer, {"channels": 3})[1].bias, layer.bias)


WILD = [0, -1, 8, 9, 1 << 20, 1 << 40, 1 << 63, 1 << 200]


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), nn.Conv2d(8, 6, 3)])
@pytest.mark.parametrize("wild", WILD)
def test_wild_integers_build_nothing(layer: nn.Module, wild: int) -> None:
    with pytest.raises(FileError, match="does not fit"):
        build_gathered(layer, {"channels": wild})
    if not 1 <= wild <= 6:
        with pytest.raises(FileError, match=r"rank|does not fit"):
            build_gathered(layer, {"channels": 4, "rank": wild * 10})
    with pytest.raises(FileError, match="does not fit"):
        build_shuffled(layer, {"groups": wild})


@pytest.mark.parametrize(
    "layer", [nn.ReLU(), nn.Embedding(8, 8), nn.Conv2d(8, 8, 3, groups=2), nn.Sequential()]
)
def test_other_modules_are_refused(layer: nn.Module) -> None:
    for build, settings in ((build_gathered, {"channels": 2}), (build_shuffled, {"groups": 2})):
        with pytest.raises(FileError, match="cannot be gathered"):
            build(layer, settings)


def edited() -> tuple[nn.Module, list[Edit]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    edits = [
        Edit("0", "gathered", {"channels": 3, "rank": 2}),
        Edit("0.0.index", "values", values=Plain(torch.tensor([1, 4, 7]))),
        Edit("0.1.weight", "values", values=Plain(torch.randn(2, 3))),
        Edit("0.2.weight", "values", values=Plain(torch.randn(6, 2))),
        Edit("2", "shuffled", {"groups": 2}),
        Edit("2.0.index", "values", values=Plain(torch.randperm(6))),
        Edit("2.1.weight", "values", values=Plain(torch.randn(4, 3))),
        Edit("2.2.index", "values", values=Plain(torch.randperm(4))),
    ]
    install(net, edits)
    return net, edits


def test_it_trains_copies_pickles_and_comes_back_from_a_file() -> None:
    net, edits = edited()
    x = torch.randn(3, 8)
    net(x).square().sum().backward()
    assert net[0][1].weight.grad.abs().sum() > 0 and net[2][1].weight.grad.abs().sum() > 0
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        assert torch.equal(twin(x), net(x))
    package = unpack(pack(net, tuple(edits), "module", {}))
    skeleton = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    assert torch.equal(restore(package, skeleton)(x), net(x))
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    assert torch.equal(restore(package, skeleton)(x), net(x))


@pytest.mark.parametrize("wrong", [-1, 8, 1 << 40, -(1 << 63)])
@pytest.mark.parametrize("place", [0, 2])
def test_an_index_out_of_range_is_refused_when_a_file_is_read(wrong: int, place: int) -> None:
    net, edits = edited()
    index = torch.tensor([1, 4, 7])
    index[place] = wrong
    net[0][0].index.copy_(index)
    edits[1] = replace(edits[1], values=Plain(index))
    package = unpack(pack(net, tuple(edits), "module", {}))
    skeleton = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    with pytest.raises(FileError, match=r"0\.0\.index.*8 channels"):
        restore(package, skeleton)


def test_indices_in_range_pass() -> None:
    take = Gather(3, 2, -1)
    take.index.copy_(torch.tensor([2, 0]))
    check_indices(take)
    check_indices(nn.Sequential(take, Gather(3, 2, -1).to("meta")))


def test_edits_within_edits_do_not_grow() -> None:
    """Each layer holds an index as long as the one it is in: 8 bytes for a few of JSON."""
    from tests.attacks.files import seal

    net = nn.Sequential(nn.Linear(500, 1, bias=False))
    paths = [".".join(["0"] + ["1"] * k) for k in range(100)]
    edits = [[path, "gathered", {"channels": 499 - k}] for k, path in enumerate(paths)]
    with pytest.raises(FileError, match="grow"):
        restore(unpack(seal({"edits": edits})), net)
    assert sum(t.numel() for t in (*net.parameters(), *net.buffers())) <= 4 * 500
