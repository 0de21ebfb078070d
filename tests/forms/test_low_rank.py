"""The low rank pair: same function as the layer at full rank, in every geometry."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms import Edit, GroupedLinear, Plain, install
from lamina.forms.low_rank import build_low_rank


class Conv1D(nn.Module):
    """Stored [in, out], as GPT-2 has it; known by its name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def fill_full_rank(layer: nn.Module, folds: int) -> nn.Module:
    """Build a pair of full rank by hand: encode = identity of every fold, decode = its weight."""
    weight = layer.weight.detach().double()
    matrix = weight.T if isinstance(layer, Conv1D) else weight.flatten(1)
    f, n = matrix.shape
    rank = min(f, n // folds)
    pair = build_low_rank(layer, {"folds": folds, "rank": rank})
    parts = [
        torch.linalg.svd(m, full_matrices=False) for m in matrix.reshape(f, folds, -1).unbind(1)
    ]
    with torch.no_grad():
        pair[0].weight.copy_(torch.cat([vh for _, _, vh in parts]).reshape(pair[0].weight.shape))
        pair[1].weight.copy_(
            torch.cat([u * s for u, s, _ in parts], 1).reshape(pair[1].weight.shape)
        )
    return pair


CONVS = {
    "plain": (nn.Conv2d(4, 5, 3), (2, 4, 9, 8)),
    "stride": (nn.Conv2d(4, 5, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "dilation": (nn.Conv2d(4, 5, 3, dilation=2, padding=1), (2, 4, 9, 8)),
    "same": (nn.Conv2d(4, 5, (3, 5), padding="same", bias=False), (2, 4, 9, 8)),
    "reflect": (nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 8)),
    "oblong": (nn.Conv2d(4, 3, (1, 5), stride=(1, 3), padding=(0, 2)), (2, 4, 9, 8)),
    "1d": (nn.Conv1d(4, 5, 3, stride=2), (2, 4, 9)),
    "3d": (nn.Conv3d(4, 5, 2, padding=1, bias=False), (2, 4, 4, 5, 3)),
}


@pytest.mark.parametrize("folds", [1, 2, 4])
@pytest.mark.parametrize("name", CONVS)
def test_a_full_rank_pair_is_the_convolution(name: str, folds: int) -> None:
    layer, shape = CONVS[name]
    layer = copy.deepcopy(layer).double()
    x = torch.randn(shape, dtype=torch.float64)
    pair = fill_full_rank(layer, folds)
    assert pair[0].groups == folds
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("folds", [1, 2, 3, 6])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Linear(6, 9, bias=False)])
def test_a_full_rank_pair_is_the_linear_layer(make, folds: int) -> None:
    layer = make().double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    pair = fill_full_rank(layer, folds)
    assert isinstance(pair[0], nn.Linear if folds == 1 else GroupedLinear)
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("folds", [1, 3])
def test_a_layer_stored_in_out_is_served(folds: int) -> None:
    layer = Conv1D(4, 6).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(fill_full_rank(layer, folds)(x), layer(x), rtol=0, atol=1e-10)


def test_grouped_linear_is_a_grouped_convolution() -> None:
    layer = GroupedLinear(6, 4, 2)
    layer.weight.data.normal_()
    x = torch.randn(5, 6)
    conv = torch.nn.functional.conv1d(x[..., None], layer.weight[..., None], groups=2)[..., 0]
    torch.testing.assert_close(layer(x), conv)
    wrong = torch.nn.functional.conv1d(x[..., None], layer.weight.flip(0)[..., None], groups=2)
    assert not torch.allclose(layer(x), wrong[..., 0])  # the order of the blocks matters


def test_the_pair_keeps_dtype_flags_and_bias_and_spends_no_random_numbers() -> None:
    layer = nn.Linear(6, 4, dtype=torch.bfloat16)
    layer.weight.requires_grad_(False)
    before = torch.get_rng_state()
    pair = build_low_rank(layer, {"folds": 2, "rank": 2})
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in pair.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in pair.parameters()] == [False, False, True]
    assert torch.equal(pair[1].bias, layer.bias)
    assert not any(p.is_meta for p in pair.parameters())
    assert float(pair[0].weight.abs().sum()) == 0.0  # not whatever the memory held


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (nn.Linear(6, 4), {"folds": 4, "rank": 1}),
        (nn.Linear(6, 4), {"folds": 0, "rank": 1}),
        (nn.Linear(6, 4), {"folds": 1}),
        (nn.Linear(6, 4), {"folds": 1, "rank": 5}),
        (nn.Linear(6, 4), {"folds": 1, "rank": 1 << 40}),
        (nn.Conv2d(4, 4, 3, groups=2), {"folds": 1, "rank": 1}),
        (nn.ConvTranspose2d(4, 4, 3), {"folds": 1, "rank": 1}),
        (nn.Embedding(4, 4), {"folds": 1, "rank": 1}),
        (nn.ReLU(), {"folds": 1, "rank": 1}),
    ],
)
def test_what_does_not_fit_is_refused(layer: nn.Module, settings: dict[str, int]) -> None:
    with pytest.raises(FileError, match="low rank"):
        build_low_rank(layer, settings)


def test_an_installed_pair_trains_copies_and_pickles() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    edits = [
        Edit("0", "low_rank", {"folds": 2, "rank": 1}),
        Edit("0.0.weight", "values", values=Plain(torch.randn(2, 3))),
        Edit("0.1.weight", "values", values=Plain(torch.randn(5, 2))),
    ]
    install(net, edits)
    x = torch.randn(3, 6)
    net(x).square().sum().backward()
    assert net[0][0].weight.grad.abs().sum() > 0
    assert net[0][1].weight.grad.abs().sum() > 0
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        assert torch.equal(twin(x), net(x))
    other = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    install(other, edits[:1])
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
