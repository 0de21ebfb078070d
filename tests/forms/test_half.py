"""The form "bf16": what it computes, and that its cast weight follows the weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lamina.artifact import pack, restore, unpack
from lamina.errors import FileError
from lamina.forms import Edit, Plain, install
from lamina.forms.half import Half, build_bf16


def layer(seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(96, 32, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_computes_what_its_definition_says(dtype, bias):
    dense = layer(bias=bias).to(dtype)
    module = build_bf16(dense, {}).eval()
    x = torch.randn(2, 7, 96, dtype=dtype)
    short = torch.bfloat16
    with torch.no_grad():
        y, full = module(x), dense(x)
        wanted = x.to(short).double() @ dense.weight.to(short).double().T
        wanted += dense.bias.to(short).double() if bias else 0
    assert y.dtype == dtype and y.shape == (2, 7, 32)
    assert float((y.double() - wanted).abs().max()) < 2**-8 * float(wanted.abs().max())
    if dtype != short:
        assert 1e-4 < float((y - full).norm() / full.norm()) < 1e-2


def test_the_cast_weight_follows_the_weight():
    module, x = build_bf16(layer(), {}).eval(), torch.randn(3, 96)
    for change in (
        lambda m: m.weight.mul_(-2),
        lambda m: m.bias.add_(1),
        lambda m: m.load_state_dict(layer(5).state_dict()),
        lambda m: (m.weight.data.add_(0.5), m.eval()),
    ):
        with torch.no_grad():
            before = module(x)
            change(module)
            fresh = nn.Linear(96, 32)
            fresh.load_state_dict(module.state_dict())
            assert torch.equal(module(x), build_bf16(fresh, {}).eval()(x))
            assert not torch.equal(module(x), before)


def test_copies_gradients_autocast_and_empty_batches():
    module, x = build_bf16(layer(), {}).eval(), torch.randn(3, 96)
    with torch.no_grad():
        y = module(x)
        twin = copy.deepcopy(module)
        assert twin._cast is None and torch.equal(twin(x), y)
        assert module(torch.zeros(0, 96)).shape == (0, 32)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(module(x), y)
    x.requires_grad_()
    module.train()(x).sum().backward()
    assert module.weight.grad.dtype == torch.float32
    assert torch.allclose(x.grad, module.weight.detach().sum(0).expand(3, 96), atol=0.05)
    assert list(module.state_dict()) == ["weight", "bias"]


def test_a_file_gives_the_same_bits_in_half_the_bytes():
    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(256, 128)).eval()

    changed, plain = net(0), net(0)
    weight = changed[0].weight.detach().to(torch.bfloat16).float()
    edits = [Edit("0", "bf16"), Edit("0.weight", "values", values=Plain(weight))]
    install(changed, edits)
    file = pack(changed, tuple(edits), "module", {})
    loaded = restore(unpack(file), net(9)).eval()
    x = torch.randn(4, 256)
    with torch.no_grad():
        assert torch.equal(loaded(x), changed(x))
    assert isinstance(loaded[0], Half)
    assert len(file) < 0.6 * len(pack(plain, (), "module", {}))


def test_traced_and_exported():
    module, x = build_bf16(layer(), {}).eval(), torch.randn(3, 96)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        assert torch.allclose(program.module()(x), module(x), atol=1e-2)


def test_ties_stay_and_others_are_refused():
    net = nn.Module()
    net.table, net.head = nn.Embedding(32, 96), nn.Linear(96, 32)
    net.head.weight = net.table.weight
    install(net, [Edit("head", "bf16")])
    assert net.head.weight is net.table.weight
    for module, given in ((nn.Conv2d(1, 1, 1), {}), (nn.Linear(2, 2), {"bits": 16})):
        with pytest.raises(FileError):
            install(nn.Sequential(module), [Edit("0", "bf16", given)])
