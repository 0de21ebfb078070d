from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.network.discover import discover
from lamina.network.layers import describe
from lamina.network.sites import as_matrix, from_matrix
from lamina.network.source import Network


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class SameForward(nn.Linear):
    pass


class Adapter(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.low = nn.Linear(3, 1)


class GroupedLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features, self.groups = 6, 4, 2
        self.weight = nn.Parameter(torch.zeros(4, 3))


def test_conv_geometry():
    conv = nn.Conv2d(4, 8, (3, 5), (2, 1), (1, 2), (1, 3), 2, False, "circular")
    (site,) = describe("a.c", conv, None)
    assert (site.kernel, site.stride, site.padding) == ((3, 5), (2, 1), (1, 2))
    assert (site.dilation, site.groups, site.padding_mode) == ((1, 3), 2, "circular")
    assert (site.name, site.weight, site.bias) == ("a.c", "a.c.weight", "")
    assert describe("c", nn.Conv1d(1, 1, 3, padding="same"), None)[0].padding == ("same",)
    assert describe("c", nn.Conv1d(1, 1, 3, padding="valid"), None)[0].padding == (0,)


@pytest.mark.parametrize(
    ("module", "op"),
    [
        (nn.Linear(2, 3), "linear"),
        (SameForward(2, 3), "linear"),
        (nn.Conv1d(2, 3, 1), "conv"),
        (nn.Conv3d(2, 3, 1), "conv"),
        (nn.ConvTranspose1d(2, 3, 1), "conv_transpose"),
        (nn.ConvTranspose3d(2, 3, 1), "conv_transpose"),
        (nn.Embedding(2, 3), "embedding"),
        (nn.EmbeddingBag(2, 3), "embedding"),
    ],
)
def test_plain_layers_may_be_replaced(module, op):
    (site,) = describe("x", module, None)
    assert (site.op, site.rigid, site.shape) == (op, "", tuple(module.weight.shape))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (OwnForward(3, 3), "forward of its own"),
        (Adapter(), "holds more than a weight (low)"),
        (nn.Embedding(3, 3, max_norm=1.0), "max_norm"),
        (GroupedLinear(), "no form replaces"),
    ],
)
def test_unusual_layers_keep_their_form(module, reason):
    (site,) = describe("x", module, None)
    assert reason in site.rigid


def test_a_patched_forward_and_the_root_keep_their_form():
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    assert "forward of its own" in describe("x", patched, None)[0].rigid
    (site,) = describe("", nn.Linear(2, 2), None)
    assert (site.name, site.weight, site.rigid) == ("weight", "weight", "it is the whole network")


def test_grouped_linear_by_its_attributes():
    (site,) = describe("x", GroupedLinear(), None)
    assert (site.op, site.groups, site.matrix_shape) == ("linear", 2, (2, 2, 3))


def test_recurrent_weights_are_sites_of_their_own():
    lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2)
    sites = describe("rnn", lstm, None)
    weights = [name for name, p in lstm.named_parameters() if p.dim() == 2]
    assert [s.weight for s in sites] == [f"rnn.{name}" for name in weights]
    by_name = {s.name: s for s in sites}
    assert by_name["rnn.weight_hh_l1_reverse"].bias == "rnn.bias_hh_l1_reverse"
    assert by_name["rnn.weight_hr_l0"].bias == ""
    assert all(s.op == "recurrent" and s.rigid and s.module == "rnn" for s in sites)
    assert [s.name for s in describe("c", nn.GRUCell(2, 2, bias=False), None)] == [
        "c.weight_ih",
        "c.weight_hh",
    ]


def test_attention_in_one_and_in_three_weights():
    whole = nn.MultiheadAttention(4, 2)
    (site,) = describe("attn", whole, None)
    assert (site.name, site.bias) == ("attn.in_proj_weight", "attn.in_proj_bias")
    assert "MultiheadAttention" in site.rigid
    assert "MultiheadAttention" in describe("attn.out_proj", whole.out_proj, whole)[0].rigid
    apart = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    sites = describe("attn", apart, None)
    assert [s.shape for s in sites] == [(4, 4), (4, 3), (4, 5)]
    assert [s.bias for s in sites] == ["", "", ""]  # one bias for all three: none can claim it


def test_encoder_layers_read_their_linears_raw():
    """The reason for the rule: hooks switch the fast path off, so that no pass could show it."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    assert "fast path" in describe("l.linear1", layer.linear1, layer)[0].rigid
    layer.linear1 = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 8))
    with pytest.raises(AttributeError), torch.no_grad():
        layer(torch.zeros(1, 3, 4))
    decoder = nn.TransformerDecoderLayer(4, 2, 8)
    assert describe("l.linear1", decoder.linear1, decoder)[0].rigid == ""


def test_others_are_no_layers():
    for module in (nn.BatchNorm2d(2), nn.LayerNorm(2), nn.Bilinear(2, 2, 2), nn.PReLU(), nn.ReLU()):
        assert describe("x", module, None) == ()


class TinyExperts(nn.Module):
    """Experts in one tensor, as `transformers` keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 6))
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x, index):
        made = torch.einsum("bd,bkfd->bkf", x, self.up[index]).relu()
        return torch.einsum("bkf,bkdf->bd", made, self.down[index])


class OneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = TinyExperts()

    def forward(self, x, index):
        return self.mlp(x, index)


def test_experts_are_a_group_each():
    net = OneBlock()
    given = torch.randn(8, 4), torch.randint(0, 3, (8, 2))
    sites = discover(Network(net, given))
    assert [site.name for site in sites.layers] == ["mlp.up", "mlp.down"]
    up = sites.layers[0]
    assert up.matrix_shape == (3, 6, 4) and up.rigid and sites.rest == ("mlp.scale",)
    assert torch.equal(from_matrix(up, as_matrix(up, net.mlp.up)), net.mlp.up)
    # each of 8 samples meets 2 of the 3 experts: 2 matrices of 6 x 4
    assert up.macs == 2 * 6 * 4
