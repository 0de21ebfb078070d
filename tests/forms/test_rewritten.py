"""Forms of a rewritten network: what they compute, what they refuse, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms import Edit, conv_weights, install, is_channels_last
from lamina.forms.rewritten import build_layout

LAYERS = {
    "linear": (nn.Linear(6, 5, bias=False), (3, 6)),
    "1d": (nn.Conv1d(6, 4, 3, stride=2, bias=False), (2, 6, 9)),
    "groups": (nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False), (2, 6, 9, 8)),
    "reflect": (nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", bias=False), (2, 6, 9, 8)),
    "3d": (nn.Conv3d(6, 4, 2, bias=False), (2, 6, 4, 5, 3)),
}
LAYOUT = Edit("", "layout", {"channels_last": 1})


@pytest.mark.parametrize("name", LAYERS)
def test_a_biased_layer_is_the_layer_and_a_bias(name: str) -> None:
    layer, shape = LAYERS[name]
    layer.weight.requires_grad_(name != "linear")
    net = nn.Sequential(layer)
    x = torch.randn(shape)
    before = net(x).detach()
    install(net, [Edit("0", "biased")])
    assert type(net[0]) is type(layer) and net[0] is not layer and layer.bias is None
    assert torch.equal(net(x), before) and net[0].weight is layer.weight
    assert net[0].bias.requires_grad == layer.weight.requires_grad
    with torch.no_grad():
        net[0].bias += 1
    assert torch.allclose(net(x), before + 1, atol=1e-6)
    assert list(net.state_dict()) == ["0.weight", "0.bias"]


def test_hooks_and_flags_stay() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)).eval()
    heard: list[str] = []
    for i, layer in enumerate(net):
        layer.register_forward_hook(lambda *_, i=i: heard.append(str(i)))
    install(net, [Edit("0", "biased"), Edit("1", "identity")])
    x = torch.randn(2, 3)
    assert torch.equal(net(x), net[0](x)) and heard == ["0", "1", "0"]
    assert not net[0].training and not net[1].training and isinstance(net[1], nn.Identity)
    assert net.double()[0].bias.dtype == torch.float64


class Tied(nn.Module):
    """Convolutions of all sorts; two are one by their parameter, two by their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))
        self.b.weight = self.a.weight
        self.c.weight = nn.Parameter(self.a.weight.data)
        self.point, self.depth = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
        self.up, self.line = nn.ConvTranspose2d(6, 3, 2), nn.Conv1d(3, 2, 3)
        self.table = nn.Parameter(torch.randn(1, 4, 8, 8))

    def forward(self, x):  # type: ignore[no-untyped-def]
        x = self.c(self.b(self.a(x + self.table)))
        return self.line(self.up(self.depth(self.point(x))).flatten(2))


def test_the_layout_changes_strides_of_convolutions_and_nothing_else() -> None:
    torch.manual_seed(0)
    net, x = Tied().eval(), torch.randn(2, 4, 8, 8)
    before, state = net(x).detach(), {n: t.clone() for n, t in net.state_dict().items()}
    modules = list(net.modules())
    install(net, [LAYOUT])
    assert list(net.modules()) == modules and len(conv_weights(net)) == 6
    assert all(is_channels_last(w) for w in conv_weights(net))
    assert net.table.is_contiguous() and net.line.weight.is_contiguous()
    assert all(torch.equal(t, state[n]) for n, t in net.state_dict().items())
    assert torch.allclose(net(x), before, atol=1e-6)
    assert net.b.weight is net.a.weight and net.c.weight is not net.a.weight
    assert net.c.weight.data_ptr() == net.a.weight.data_ptr()
    strides = {n: t.stride() for n, t in net.state_dict().items()}
    pointers = {n: t.data_ptr() for n, t in net.state_dict().items()}
    install(net, [LAYOUT])  # nothing is left to do
    assert {n: t.data_ptr() for n, t in net.state_dict().items()} == pointers
    twin = Tied().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for weight, other in zip(conv_weights(net), conv_weights(twin), strict=True):
        assert weight.stride() == other.stride()
    with torch.device("meta"):
        empty = Tied()
    build_layout(empty, {"channels_last": 1})
    assert empty.b.weight is empty.a.weight
    assert {n: t.stride() for n, t in empty.state_dict().items() if n != "table"} == {
        n: s for n, s in strides.items() if n != "table"
    }


WRONG = [
    (Edit("0", "biased"), "it has a bias"),
    (Edit("1", "biased"), "no form gives this layer a bias"),
    (Edit("0", "biased", {"outputs": 1 << 40}), "unknown settings"),
    (Edit("1", "identity", {"x": 1}), "unknown settings"),
    (Edit("", "layout", {"channels_last": 2}), "unknown layout"),
    (Edit("", "layout", {}), "unknown layout"),
    (Edit("", "layout", {"channels_last": 1, "more": 1}), "unknown layout"),
    (Edit("0", "layout", {"channels_last": 1}), "wrong place"),
    (Edit("", "biased"), "wrong place"),
    (Edit("", "identity"), "wrong place"),
    (Edit("", "low_rank", {"folds": 1, "rank": 1}), "wrong place"),
]


@pytest.mark.parametrize(("edit", "text"), WRONG)
def test_what_does_not_fit_is_refused(edit: Edit, text: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    modules = list(net.modules())
    with pytest.raises(FileError, match=text):
        install(net, [edit])
    assert list(net.modules()) == modules


def test_classes_of_ones_own_are_refused() -> None:
    class Own(nn.Linear):
        pass

    with pytest.raises(FileError, match="no form gives this layer a bias"):
        install(nn.Sequential(Own(3, 2, bias=False)), [Edit("0", "biased")])
