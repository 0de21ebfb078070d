"""A network in training: masks, grids, gradients, and that what is released is what was trained."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train.quantizable import make_data, make_network
from torch import nn

from lamina.forms import Grid, Plain, Sparse, install
from lamina.methods.sawb import CONSTANTS
from lamina.methods.two_four import in_fours, keep_mask
from lamina.network.discover import discover
from lamina.network.sites import Site
from lamina.recipes.transformer import backbone
from lamina.train.quantized import QuantizedNetwork, QuantizedWeight, roundable
from lamina.train.quantizing import Tuning, tune
from lamina.train.ranges import make_quantizers, observe


def site_of(weight: torch.Tensor) -> Site:
    return Site("c", module="c", weight="c.weight", shape=tuple(weight.shape))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_net(clip: str = "statistics", rows: bool = False) -> QuantizedNetwork:
    network = make_network()
    layers = backbone(discover(network))
    net = QuantizedNetwork(network.module, layers).eval()
    net.prune()
    net.quantize(4, clip, rows, True)
    seen = observe(net.body, net, roundable(net.body, layers), make_data().calibration)
    net.round_inputs(make_quantizers(seen, 4))
    return net


def test_masked_weights_have_no_gradient_and_others_all_of_it() -> None:
    w = drawn(6, 16)
    held = QuantizedWeight(site_of(w), w)
    held.prune()
    held.quantize(4, "statistics", False, True)
    g = drawn(6, 16, seed=1)
    held().backward(g)
    mask = keep_mask(w.abs())
    assert torch.equal(held.latent.grad, g * mask)
    assert int(mask.sum()) == 48


def test_sr_ste_trains_what_is_pruned() -> None:
    w, g = drawn(6, 16), drawn(6, 16, seed=1)
    held = QuantizedWeight(site_of(w), w)
    held.prune()
    held.regrow = 0.25
    y = held()
    y.backward(g)
    mask = keep_mask(w.abs()).float()
    assert torch.equal(y.detach(), w * mask)
    assert torch.allclose(held.latent.grad, g + 0.25 * (1 - mask) * w)


@given(st.floats(0, 2), st.integers(0, 30))
def test_fractions_of_zeros_go_to_the_fours_that_lose_least(zeros: float, seed: int) -> None:
    w = drawn(5, 24, seed=seed)
    held = QuantizedWeight(site_of(w), w)
    held.prune(zeros)
    four = held.mask.reshape(-1, 4)
    count = (four == 0).sum(1)
    base = int(zeros)
    assert int(count.sum()) == base * 30 + round((zeros - base) * 30)
    assert set(count.tolist()) <= {base, base + 1}
    assert bool((held.mask.bool() >= keep_mask(w.abs())).all() or zeros > 2)  # 2:4 keeps less
    next_lost = w.abs().reshape(-1, 4).sort(1).values[:, min(base, 3)]
    if 0 < int((count > base).sum()) < 30:
        assert float(next_lost[count > base].max()) <= float(next_lost[count == base].min())


def test_importance_of_inputs_counts() -> None:
    w = torch.ones(2, 4)
    held = QuantizedWeight(site_of(w), w, torch.tensor([[1.0, 3.0, 2.0, 4.0]] * 2))
    held.prune()
    assert held.mask.tolist() == [[0, 1, 0, 1]] * 2


def test_what_does_not_divide_by_four_is_not_pruned() -> None:
    w = drawn(4, 6)
    held = QuantizedWeight(site_of(w), w)
    held.prune()
    assert bool((held.mask == 1).all())
    assert isinstance(held.release(), Plain)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("clip", ["statistics", "mse"])
@pytest.mark.parametrize("bits", sorted(CONSTANTS))
def test_what_is_released_is_what_was_computed(bits: int, clip: str, rows: bool) -> None:
    w = drawn(8, 16) * torch.logspace(-1, 0.5, 8)[:, None]
    held = QuantizedWeight(site_of(w), w)
    held.prune()
    assert isinstance(held.release(), Sparse)
    assert torch.equal(held.release().dense(), held().detach())
    held.quantize(bits, clip, rows, True)
    values = held.release()
    assert isinstance(values, Grid)
    assert (values.exponents is not None) == rows
    assert torch.equal(values.dense(), held().detach())
    assert int(values.symbols.abs().max()) <= CONSTANTS[bits][0]


def test_the_range_is_that_of_the_dense_weight() -> None:
    w = drawn(32, 64)
    held = QuantizedWeight(site_of(w), w)
    held.quantize(4, "statistics", False, True)
    before = held.step()
    held.prune()
    assert torch.equal(held.step(), before)


@pytest.mark.parametrize("rows", [False, True])
def test_the_edits_make_the_trained_network(rows: bool) -> None:
    network, net = make_network(), make_net(rows=rows)
    module = copy.deepcopy(network.module).eval()
    install(module, net.release())
    ids = torch.randint(24, (5, 8))
    assert torch.equal(module(ids), net(ids))
    assert torch.equal(net(ids), net(ids))
    assert len(net.inputs) == 12
    assert len(net.quantizers) == 8  # query, key and value share one
    assert net.inputs["layers.0.query"] is net.inputs["layers.0.value"]


def test_without_masks_and_grids_it_is_the_network() -> None:
    network = make_network()
    net = QuantizedNetwork(copy.deepcopy(network.module), backbone(discover(network))).eval()
    ids = torch.randint(24, (5, 8))
    assert torch.equal(net(ids), network.module.eval()(ids))
    module = copy.deepcopy(network.module).eval()
    install(module, net.release())
    assert all(torch.equal(a, b) for a, b in
               zip(module.parameters(), network.module.parameters(), strict=True))  # fmt: skip


def test_two_of_four_survive_a_hundred_steps() -> None:
    net, data = make_net(), make_data()
    masks = [w.mask.clone() for w in net.weights]
    latents = [w.latent.detach().clone() for w in net.weights]
    ends = [p.detach().clone() for p in net.ranges()]
    tune(net, None, data, Tuning(epochs=100 / 12, lr=2e-3), "logits")
    for weight, mask, latent in zip(net.weights, masks, latents, strict=True):
        assert torch.equal(weight.mask, mask)
        dense = weight.release().dense()
        four = in_fours(weight.site, dense).reshape(-1, 4)
        assert bool(((four == 0).sum(1) >= 2).all())
        assert bool((dense[mask == 0] == 0).all())
        assert torch.equal(weight.latent.detach()[mask == 0], latent[mask == 0])
        assert not torch.equal(weight.latent.detach(), latent)
    assert any(not torch.equal(a, b) for a, b in zip(ends, net.ranges(), strict=True))


def test_evaluation_changes_nothing_and_the_state_comes_back() -> None:
    net, other = make_net(), make_net()
    tune(net, None, make_data(), Tuning(epochs=1, lr=2e-3), "logits")
    state = {k: v.clone() for k, v in net.state_dict().items()}
    ids = torch.randint(24, (5, 8))
    first = net(ids)
    assert torch.equal(net(ids), first)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not torch.equal(other(ids), first)
    other.load_state_dict(state)
    assert torch.equal(other(ids), first)


def test_layers_read_raw_are_not_rounded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True)])
            self.fc = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.layers[0](x, x, x, need_weights=False)[0])

    from lamina.network.source import Network

    network = Network(Net(), (torch.zeros(2, 3, 8),))
    sites = discover(network)
    layers = backbone(sites)
    assert [s.name for s in layers] == ["layers.0.in_proj_weight", "layers.0.out_proj"]
    assert roundable(network.module, layers) == []
