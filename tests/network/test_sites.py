"""The matrices of a site are what the real layer multiplies by: checked in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamina.network.discover import discover
from lamina.network.layers import describe
from lamina.network.sites import Refusal, Site, Sites, as_matrix, from_matrix
from lamina.network.source import Network


def site_of(module: nn.Module) -> Site:
    return describe("layer", module, None)[0]


def check_round_trip(site: Site, weight: torch.Tensor) -> torch.Tensor:
    matrix = as_matrix(site, weight.detach())
    assert tuple(matrix.shape) == site.matrix_shape
    assert torch.equal(from_matrix(site, matrix), weight)
    return matrix


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2), (3, 0, 2)]
)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv2d_is_its_matrix_on_unfolded_patches(stride, padding, dilation, groups):
    conv = nn.Conv2d(4, 8, (3, 2), stride, padding, dilation, groups).double()
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    matrix = check_round_trip(site_of(conv), conv.weight)
    patches = F.unfold(x, conv.kernel_size, dilation, padding, stride)  # [B, 4*K, L]
    patches = patches.unflatten(1, (groups, -1))
    y = torch.einsum("goi,bgil->bgol", matrix, patches).flatten(1, 2)
    expected = conv(x) - conv.bias[:, None, None]
    torch.testing.assert_close(y, expected.flatten(2))
    wrong = torch.einsum("goi,bgil->bgol", matrix, patches.flip(2)).flatten(1, 2)
    assert not torch.allclose(wrong, expected.flatten(2))


def test_depthwise_conv_is_one_row_per_group():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    assert site_of(conv).matrix_shape == (4, 1, 9)
    check_round_trip(site_of(conv), conv.weight)


@pytest.mark.parametrize("groups", [1, 2])
def test_conv1d_and_conv3d(groups):
    conv = nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=groups, bias=False).double()
    x = torch.randn(2, 4, 15, dtype=torch.float64)
    patches = (
        x.unfold(2, 5, 2)[..., ::2].permute(0, 1, 3, 2).unflatten(1, (groups, -1)).flatten(2, 3)
    )
    matrix = check_round_trip(site_of(conv), conv.weight)
    torch.testing.assert_close(
        torch.einsum("goi,bgil->bgol", matrix, patches).flatten(1, 2), conv(x)
    )
    conv = nn.Conv3d(4, 6, 2, groups=groups, bias=False).double()
    x = torch.randn(2, 4, 3, 3, 4, dtype=torch.float64)
    patches = x.unfold(2, 2, 1).unfold(3, 2, 1).unfold(4, 2, 1).permute(0, 1, 5, 6, 7, 2, 3, 4)
    patches = patches.reshape(2, groups, 4 // groups * 8, -1)
    matrix = check_round_trip(site_of(conv), conv.weight)
    y = torch.einsum("goi,bgil->bgol", matrix, patches).flatten(1, 2)
    torch.testing.assert_close(y, conv(x).flatten(2))


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (2, 0, 2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_conv_transpose_is_its_matrix_then_fold(stride, padding, dilation, groups):
    conv = nn.ConvTranspose2d(4, 6, 3, stride, padding, 0, groups, False, dilation).double()
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    expected = conv(x)
    matrix = check_round_trip(site_of(conv), conv.weight)
    columns = torch.einsum("goi,bgil->bgol", matrix, x.flatten(2).unflatten(1, (groups, -1)))
    size = tuple(expected.shape[2:])
    y = F.fold(columns.flatten(1, 2), size, conv.kernel_size, dilation, padding, stride)
    torch.testing.assert_close(y, expected)


def test_linear_and_embedding_and_recurrent():
    linear = nn.Linear(5, 3).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    matrix = check_round_trip(site_of(linear), linear.weight)
    torch.testing.assert_close(x @ matrix[0].T + linear.bias, linear(x))

    table = nn.Embedding(7, 3).double()
    index = torch.tensor([0, 6, 2, 2])
    matrix = check_round_trip(site_of(table), table.weight)
    one_hot = F.one_hot(index, 7).double()
    torch.testing.assert_close(one_hot @ matrix[0].T, table(index))

    cell = nn.RNNCell(5, 3, nonlinearity="tanh").double()
    a, b = describe("cell", cell, None)
    h = torch.randn(4, 3, dtype=torch.float64)
    y = x @ check_round_trip(a, cell.weight_ih)[0].T + h @ check_round_trip(b, cell.weight_hh)[0].T
    torch.testing.assert_close(torch.tanh(y + cell.bias_ih + cell.bias_hh), cell(x, h))


def test_transposed_linear_is_stored_in_by_out():
    class Conv1D(nn.Module):
        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.nf = nf
            self.weight = nn.Parameter(torch.randn(nx, nf, dtype=torch.float64))
            self.bias = nn.Parameter(torch.randn(nf, dtype=torch.float64))

        def forward(self, x):
            flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
            return flat.view(*x.shape[:-1], self.nf)

    layer = Conv1D(3, 5)
    site = site_of(layer)
    assert site.transposed and site.matrix_shape == (1, 3, 5)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    matrix = check_round_trip(site, layer.weight)
    torch.testing.assert_close(x @ matrix[0].T + layer.bias, layer(x))
    assert discover(Network(nn.Sequential(layer), (x,)))["0"].positions == 2


def test_macs_are_size_times_positions_and_a_table_costs_none():
    conv = discover(Network(nn.Sequential(nn.Conv2d(2, 4, 3)), (torch.zeros(5, 2, 8, 8),)))["0"]
    assert conv.macs == 4 * 2 * 9 * 36
    assert replace(conv, op="embedding").macs == 0


def test_sites_are_found_by_name():
    sites = Sites((Site("a"),), (Site("a..b", "chain"),), (Refusal("x", "y", "z"),))
    assert sites["a"].kind == "layer" and sites["a..b"].kind == "chain"
    with pytest.raises(KeyError):
        sites["nope"]
