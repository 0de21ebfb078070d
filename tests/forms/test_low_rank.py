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
        (nn.Conv2d(4, 4, 3), {"folds": 1, "rank": 1, "scheme": 4}),
        (nn.Conv2d(4, 4, 3), {"folds": 1, "rank": 1, "scheme": -1}),
        (nn.Conv2d(4, 4, 3), {"folds": 1, "rank": 1, "scheme": 1 << 80}),
        (nn.Conv2d(4, 4, 3), {"folds": 1, "rank": 5, "scheme": 3}),
        (nn.Conv2d(4, 4, 3), {"folds": 4, "rank": 4, "scheme": 1}),
        (nn.Conv2d(4, 4, 3), {"folds": 1, "rank": 1, "bias": 2}),
        (nn.Conv2d(4, 4, 3), {"folds": 1, "rank": 1, "bias": -1}),
        (nn.Conv1d(4, 4, 3), {"folds": 1, "rank": 1, "scheme": 3}),
        (nn.Conv3d(4, 4, 3), {"folds": 1, "rank": 1, "scheme": 1}),
        (nn.Linear(4, 4), {"folds": 1, "rank": 1, "scheme": 1}),
    ],
)
def test_what_does_not_fit_is_refused(layer: nn.Module, settings: dict[str, int]) -> None:
    with pytest.raises(FileError, match="low rank"):
        build_low_rank(layer, settings)


PLACES = {  # by scheme: the decoder's axes of [f, c, k1, k2] to the rows of the folded matrix
    1: ((0, 2, 1, 3), lambda f, k1, k2: f * k1),
    2: ((0, 3, 1, 2), lambda f, k1, k2: f * k2),
    3: ((0, 2, 3, 1), lambda f, k1, k2: f * k1 * k2),
}


def fill_scheme(layer: nn.Conv2d, folds: int, scheme: int) -> nn.Sequential:
    """Build a pair of full rank by hand, fold by fold, from the table of the schemes."""
    weight = layer.weight.detach().double()
    f, c, k1, k2 = weight.shape
    order, rows = PLACES[scheme]
    encoders, decoders = [], []
    for part in weight.split(c // folds, 1):
        u, s, vh = torch.linalg.svd(
            part.permute(order).reshape(rows(f, k1, k2), -1), full_matrices=False
        )
        rank = len(s)
        ones = {1: (1, k2), 2: (k1, 1), 3: (1, 1)}[scheme]
        encoders.append(vh.reshape(rank, c // folds, *ones))
        taps = {1: (k1, 1), 2: (1, k2), 3: (k1, k2)}[scheme]
        decoders.append((u * s).reshape(f, *taps, rank).permute(0, 3, 1, 2))
    pair = build_low_rank(layer, {"folds": folds, "rank": rank, "scheme": scheme})
    with torch.no_grad():
        pair[0].weight.copy_(torch.cat(encoders))
        pair[1].weight.copy_(torch.cat(decoders, 1))
    return pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("folds", [1, 2, 4])
@pytest.mark.parametrize("scheme", [1, 2, 3])
@pytest.mark.parametrize("name", [name for name in CONVS if name not in ("1d", "3d")])
def test_a_full_rank_pair_of_any_scheme_is_the_convolution(
    name: str, scheme: int, folds: int, dtype: torch.dtype
) -> None:
    layer, shape = CONVS[name]
    layer = copy.deepcopy(layer).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    pair = fill_scheme(layer, folds, scheme)
    assert pair[0].groups == folds and pair[1].groups == 1
    assert pair[0].bias is None and (pair[1].bias is None) == (layer.bias is None)
    for axis in range(2):
        owner, other = (pair[0], pair[1]) if scheme == 2 - axis else (pair[1], pair[0])
        assert owner.kernel_size[axis] == layer.kernel_size[axis]
        assert owner.stride[axis] == layer.stride[axis]
        assert (other.kernel_size[axis], other.stride[axis]) == (1, 1)
    atol = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=atol)


def test_the_wrong_axis_is_another_layer() -> None:
    """Negative control: what scheme 1 holds is no convolution in scheme 2."""
    layer = nn.Conv2d(4, 5, 3, stride=2, padding=1).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    pair = fill_scheme(layer, 1, 1)
    turned = build_low_rank(layer, {"folds": 1, "rank": pair[0].out_channels, "scheme": 2})
    with torch.no_grad():
        turned[0].weight.copy_(pair[0].weight.transpose(2, 3))
        turned[1].weight.copy_(pair[1].weight.transpose(2, 3))
    torch.testing.assert_close(pair(x), layer(x), rtol=0, atol=1e-10)
    assert float((turned(x) - layer(x)).detach().abs().max()) > 0.1


@pytest.mark.parametrize("scheme", [0, 3])
def test_a_pair_may_have_a_bias_of_its_own(scheme: int) -> None:
    layer = nn.Conv2d(4, 5, 3, bias=False)
    settings = {"folds": 2, "rank": 1, "scheme": scheme}
    assert build_low_rank(layer, settings)[1].bias is None
    pair = build_low_rank(layer, settings | {"bias": 1})
    assert pair[0].bias is None and torch.equal(pair[1].bias, torch.zeros(5))
    layer = nn.Linear(6, 4)
    pair = build_low_rank(layer, {"rank": 1, "bias": 1})
    assert torch.equal(pair[1].bias, layer.bias)  # which it had already


def test_settings_of_old_files_mean_what_they_meant() -> None:
    layer = nn.Conv2d(4, 5, 3, stride=2, padding=1)
    old = build_low_rank(layer, {"folds": 2, "rank": 3})
    new = build_low_rank(layer, {"folds": 2, "rank": 3, "scheme": 0, "bias": 0})
    assert repr(old) == repr(new)
    assert old[0].kernel_size == (3, 3) and old[1].kernel_size == (1, 1)


@pytest.mark.parametrize("scheme", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 40, 3), (40, 2, 3), (8, 8, 5)])
def test_no_pair_is_over_twice_its_layer(scheme: int, shape: tuple[int, int, int]) -> None:
    """Whatever the integers of a file say: the largest rank that is taken."""
    layer = nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
    dense = layer.weight.numel()
    for folds in (k for k in range(1, shape[1] + 1) if shape[1] % k == 0):
        sizes = []
        for rank in range(1, dense + 1):
            try:
                pair = build_low_rank(layer, {"folds": folds, "rank": rank, "scheme": scheme})
            except FileError:
                break
            sizes.append(sum(p.numel() for p in pair.parameters()))
        assert sizes and max(sizes) <= 2 * dense


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
