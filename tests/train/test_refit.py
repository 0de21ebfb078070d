"""Where masked weights on grids begin: against plain references, and on a network."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.train.quantizable import make_data, make_network
from torch import Tensor, nn

from lamina.errors import DataError
from lamina.methods.sawb import round_to
from lamina.methods.two_four import in_fours, mask_of, prune_in_order
from lamina.network.discover import discover
from lamina.network.sites import Site, as_matrix, from_matrix
from lamina.recipes.transformer import backbone
from lamina.train import refit as module
from lamina.train.pact import InputQuantizer
from lamina.train.quantized import QuantizedNetwork
from lamina.train.refit import observe_moments, refit, settle_in_order


def drawn(out: int = 12, columns: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, inputs that depend on each other, and their second moment."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(out, columns, generator=g, dtype=torch.float64)
    mixed = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    x = torch.randn(400, columns, generator=g, dtype=torch.float64) @ mixed
    return w, x, x.T @ x / len(x)


def make_net() -> QuantizedNetwork:
    network = make_network()
    return QuantizedNetwork(network.module, backbone(discover(network)))


def test_without_a_grid_it_is_the_pruning_in_order() -> None:
    w, _, H = drawn()
    before, mask = settle_in_order(w, H, None, 0, True)
    assert torch.allclose(torch.where(mask, before, 0.0), prune_in_order(w, H), atol=1e-12)
    assert bool((mask.reshape(-1, 4).sum(1) == 2).all())


def test_each_step_makes_up_as_least_squares_would() -> None:
    """One column rounded: the best of the others is a regression, solved here without factors."""
    w, _, H = drawn(columns=4)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(4)
    step = torch.full_like(w, 0.5)
    before, mask = settle_in_order(w, H, step, 7, False)
    assert bool(mask.all())
    now = w.clone()
    for j in range(4):
        assert torch.allclose(before[:, j], now[:, j], atol=1e-9)
        held = round_to(now[:, j], step[:, j], 7)
        rest = slice(j + 1, 4)
        if j < 3:
            change = torch.linalg.solve(damped[rest, rest], damped[rest, j : j + 1])
            now[:, rest] += (now[:, j] - held)[:, None] @ change.T
        now[:, j] = held


@pytest.mark.parametrize("prune", [True, False])
def test_it_loses_less_than_rounding_by_itself(prune: bool) -> None:
    w, x, H = drawn(64, 32)
    step = torch.full_like(w, 0.35)
    before, mask = settle_in_order(w, H, step, 7, prune)
    kept = round_to(torch.where(mask, before, 0.0), step, 7)
    plain = round_to(torch.where(mask, w, 0.0), step, 7)
    losses = [float(((v - w) @ x.T).square().mean()) for v in (kept, plain)]
    assert losses[0] < 0.7 * losses[1]
    white, _ = settle_in_order(w, torch.eye(32, dtype=torch.float64), step, 7, prune)
    assert torch.allclose(white, w)  # inputs that have nothing in common make up for nothing


def test_a_column_that_sees_nothing_does_no_harm() -> None:
    w, _, H = drawn()
    H[3], H[:, 3] = 0.0, 0.0
    for moment in (H, torch.zeros_like(H)):
        before, mask = settle_in_order(w, moment, torch.full_like(w, 0.4), 7, True)
        assert bool(before.isfinite().all())
        assert bool((mask.reshape(-1, 4).sum(1) == 2).all())


def test_moments_are_those_of_rounded_inputs_without_padding() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.fc(x)

    site = Site("fc", module="fc", weight="fc.weight", bias="fc.bias", shape=(2, 4))
    net = QuantizedNetwork(Net(), [site])
    quantizer = InputQuantizer("symmetric", 4, 1.75)
    net.round_inputs([(["fc"], quantizer)])
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    batch = {"x": x, "attention_mask": mask}
    (H,) = observe_moments(net, list(net.weights), [batch, batch, batch], 2)
    rows = quantizer(x).detach()[mask.bool()]
    assert torch.allclose(H, rows.T @ rows / len(rows), atol=1e-5)
    raw = x[mask.bool()]
    assert not torch.allclose(H, raw.T @ raw / len(raw), atol=1e-3)
    assert len(net.body.fc._forward_pre_hooks) == 1  # the rounding is left


def test_a_network_begins_nearer_to_what_it_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    data, dense = make_data(), make_net().eval()
    ids = data.validation[0][0]
    want = dense(ids).detach()
    errors = {}
    for how in ("magnitude", "in order", "in several passes"):
        net = make_net()
        monkeypatch.setattr(module, "ROOM", 1 << (11 if how == "in several passes" else 28))
        if how == "magnitude":
            net.prune()
        net.quantize(4, "statistics", False, True)
        if how != "magnitude":
            refit(net, data.calibration, 4, True)
        for weight in net.weights:
            four = in_fours(weight.site, weight()).reshape(-1, 4)
            assert bool(((four != 0).sum(1) <= 2).all())
            assert bool((weight.latent != 0).all())  # pruned ones too: statistics are of all
        errors[how] = float((net.eval()(ids).detach() - want).square().mean())
    assert errors["in order"] < 0.6 * errors["magnitude"]
    assert errors["in several passes"] < 0.6 * errors["magnitude"]


def test_ranges_of_rows_and_transposed_layers() -> None:
    """A stored row is an output of a Linear and an input of a Conv1D."""
    w, _, H = drawn(8, 8)
    for transposed in (False, True):
        site = Site("a", module="a", weight="a.weight", shape=(8, 8), transposed=transposed)
        net = QuantizedNetwork(nn.ModuleDict({"a": nn.Linear(8, 8)}), [site])
        weight = net.weights[0]
        scale = torch.linspace(0.5, 2.0, 8)[:, None]
        stored = from_matrix(site, w[None])[...].float() * scale
        with torch.no_grad():
            weight.latent.copy_(stored)
        weight.quantize(4, "statistics", True, True)
        steps = weight.step().double().expand(8, 8)
        before, _ = settle_in_order(
            as_matrix(site, stored)[0].double(), H, as_matrix(site, steps)[0], 7, True
        )
        module._settle(copy.copy(weight), H.float(), True)
        assert torch.allclose(
            as_matrix(site, weight.latent.detach())[0].double(), before, atol=1e-3
        )


def test_layers_that_show_nothing_go_by_magnitude() -> None:
    net = make_net()
    net.body.layers[1].forward = lambda x: x  # type: ignore[method-assign]
    before = [w.latent.detach().clone() for w in net.weights]
    refit(net, make_data().calibration, 1, True)
    for weight, latent in zip(net.weights, before, strict=True):
        four = in_fours(weight.site, weight.mask).reshape(-1, 4)
        assert bool((four.sum(1) == 2).all())
        reached = ".0." in weight.site.name
        assert torch.equal(weight.latent, latent) != reached
        if not reached:
            assert torch.equal(weight.mask.bool(), mask_of(weight.site, latent.abs()))
    with pytest.raises(DataError, match="no batches"):
        refit(make_net(), [], 1, True)
