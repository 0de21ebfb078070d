"""sawb: the range, the grid, and that zero stays zero."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lamina.errors import MethodError, SiteError
from lamina.forms import Grid, Plain, install
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.base import Choice, Method
from lamina.methods.sawb import (
    CONSTANTS,
    clip_by_search,
    clip_by_statistics,
    grid_of,
    method,
    plain_sawb,
    round_to,
)
from lamina.methods.two_four import keep_mask
from lamina.network.sites import Site
from lamina.network.source import Network

WIDTHS = sorted(CONSTANTS)


def drawn(name: str, count: int = 200_000) -> torch.Tensor:
    """Quantiles of a distribution: no randomness, so that ranges can be compared closely."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    if name == "gaussian":
        w = torch.special.ndtri(u)
    elif name == "laplace":
        w = torch.where(u < 0.5, (2 * u).log(), -(2 - 2 * u).log())
    else:
        w = 2 * u - 1
    return w.float()


def best_clip(weight: torch.Tensor, n: int) -> float:
    """The range of least squared error, by brute force in float64."""
    w = weight.double()
    clips = torch.linspace(0.02, 1.0, 800, dtype=torch.float64) * w.abs().max()
    errors = [(((w * n / c).round().clamp(-n, n) * c / n - w) ** 2).mean() for c in clips]
    return float(clips[int(torch.stack(errors).argmin())])


@pytest.mark.parametrize("name", ["gaussian", "laplace", "uniform"])
@pytest.mark.parametrize("bits", [3, 4])
def test_the_range_from_statistics_is_near_the_best_one(name: str, bits: int) -> None:
    weight = drawn(name, 20_000)
    best = best_clip(weight, CONSTANTS[bits][0])
    assert float(clip_by_statistics(weight, bits)) == pytest.approx(best, rel=0.05)


def test_the_specified_ranges_of_4_bits() -> None:
    """Figures of the specification; the largest Gaussian value would cost 2.7 times the error."""
    for name, clip in (("gaussian", 2.436), ("laplace", 4.977), ("uniform", 0.932)):
        assert float(clip_by_statistics(drawn(name), 4)) == pytest.approx(clip, rel=5e-3)
    weight = drawn("gaussian")

    def error(clip: torch.Tensor) -> float:
        return float((round_to(weight, clip / 7, 7) - weight).square().mean())

    assert error(clip_by_statistics(weight, 4)) == pytest.approx(0.01293, rel=0.01)
    assert error(weight.abs().max()) > 2.5 * error(clip_by_statistics(weight, 4))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("name", ["gaussian", "laplace", "uniform"])
def test_the_search_finds_the_best_range(name: str, bits: int) -> None:
    weight = drawn(name, 5000)
    n = CONSTANTS[bits][0]

    def error(clip: float) -> float:
        return float((round_to(weight, torch.tensor(clip / n), n) - weight).square().mean())

    # Up to the last half step nothing is clipped, so a range may be that much past the end.
    assert error(float(clip_by_search(weight, bits))) <= 1.01 * error(best_clip(weight, n))


@given(st.floats(1e-3, 1e3), st.sampled_from(WIDTHS), st.integers(0, 50))
def test_ranges_scale_with_the_weights(scale: float, bits: int, seed: int) -> None:
    weight = torch.randn(300, generator=torch.Generator().manual_seed(seed))
    for clip in (clip_by_statistics, clip_by_search):
        assert float(clip(scale * weight, bits)) == pytest.approx(
            scale * float(clip(weight, bits)), rel=1e-4
        )


@given(st.sampled_from(WIDTHS), st.floats(1e-6, 1e4), st.integers(0, 99))
def test_the_grid_is_zero_preserving_odd_and_idempotent(bits: int, clip: float, seed: int) -> None:
    n = CONSTANTS[bits][0]
    step = torch.tensor(clip, dtype=torch.float32) / n
    weight = clip * torch.randn(200, generator=torch.Generator().manual_seed(seed))
    weight[:3] = torch.tensor([0.0, -0.0, 1e30])
    once = round_to(weight, step, n)
    assert bool((once[:2] == 0).all())
    assert len(torch.unique(once)) <= 2 * n + 1
    assert torch.equal(round_to(once, step, n), once)
    assert torch.equal(round_to(-weight, step, n), -once)
    inside = weight.abs() <= clip
    assert bool(((once - weight)[inside].abs() <= step / 2 * (1 + 1e-5)).all())


def test_plain_sawb_has_no_zero() -> None:
    """The control: what 2:4 set to zero comes back as the smallest level."""
    weight = drawn("gaussian", 4000)
    weight[::2] = 0
    plain = plain_sawb(weight)
    assert len(torch.unique(plain_sawb(drawn("gaussian", 4000)))) == 16
    assert float(plain[::2].abs().min()) > 0
    grid = grid_of(weight, 4)
    assert bool((grid.dense()[::2] == 0).all())
    assert len(torch.unique(grid.symbols)) <= 15


def test_statistics_of_a_masked_tensor_are_worse() -> None:
    """The control: the range is that of the dense weight, or searched, or it costs much more."""
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(1000, 400, generator=generator)
    masked = dense * keep_mask(dense.abs())
    live = masked[masked != 0]

    def error(clip: torch.Tensor) -> float:
        return float((round_to(live, clip / 7, 7) - live).square().mean())

    good, searched = error(clip_by_statistics(dense, 4)), error(clip_by_search(masked, 4))
    assert good == pytest.approx(0.0158, rel=0.03)
    assert searched <= good
    assert error(clip_by_statistics(masked, 4)) > 1.6 * good  # 0.0281
    assert error(clip_by_statistics(live, 4)) > 4 * good  # 0.0821


def test_8_bits_are_near_and_4_are_not() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32).requires_grad_(False), torch.randn(50, 64)
    want = layer(x)
    errors = {}
    for bits in (2, 3, 4, 8):
        grid = grid_of(layer.weight, bits, "mse")
        got = nn.functional.linear(x, grid.dense(), layer.bias)
        errors[bits] = float((got - want).norm() / want.norm())
    assert errors[8] < 1e-2 < errors[4] < errors[3] < errors[2]


def test_ranges_by_row_help_where_rows_differ() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 200) * torch.logspace(-1, 1, 16)[:, None]
    weight[3] = 0
    whole, rows = (
        float((grid_of(weight, 4, "mse", r).dense() - weight).square().sum()) for r in (False, True)
    )
    assert rows < 0.5 * whole
    grid = grid_of(weight, 4, "mse", True)
    assert grid.exponents is not None
    assert grid.exponents.shape == (16,)
    assert grid.axis == 0
    assert bool((grid.dense()[3] == 0).all())


def site_of(layer: nn.Module) -> Site:
    return Site("net.c", "layer", "linear", "c", "c.weight", "c.bias", tuple(layer.weight.shape))


def stats_for(n: int, f: int) -> LayerStats:
    torch.manual_seed(2)
    x, y = torch.randn(100, n).double(), torch.randn(100, f).double()
    return LayerStats(H=(x.mT @ x / 100)[None], G=(y.mT @ y / 100)[None], samples=10)


@pytest.mark.parametrize("data", [False, True])
def test_offers_are_what_is_applied(data: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 24)
    site, stats = site_of(layer), stats_for(40, 24) if data else None
    weights = {k: p.detach() for k, p in layer.named_parameters()}
    offers = method.propose(site, weights, stats)
    errors = [c.error for c in offers]
    assert errors == sorted(errors)
    assert {c.steps[0].settings["bits"] for c in offers} == set(CONSTANTS)
    for offer in offers:
        root = nn.Module()
        root.c = nn.Linear(40, 24)
        root.c.load_state_dict(layer.state_dict())
        weight, bias = method.apply(Network(root), Choice(site, offer.steps[0].settings), stats)
        assert isinstance(weight.values, Grid)
        assert isinstance(bias.values, Plain)
        install(root, [weight, bias])
        change = root.c.weight.detach() - weights["weight"]
        assert offer.error == predict_error(stats, weights["weight"][None], change[None])


def test_a_masked_layer_is_searched() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 24)
    weight = layer.weight.detach() * keep_mask(layer.weight.detach().abs())
    offers = method.propose(site_of(layer), {"weight": weight}, None)
    assert {c.steps[0].settings["clip"] for c in offers} == {"mse"}
    assert method.propose(site_of(layer), {"weight": torch.zeros(0, 4)}, None) == ()
    (zero,) = method.propose(site_of(layer), {"weight": torch.zeros(8, 4)}, None)
    assert zero.error == 0


@pytest.mark.parametrize(
    "settings", [{}, {"bits": 5}, {"bits": 4, "clip": "max"}, {"bits": 4, "clip": -1.0},
                 {"bits": 4, "clip": True}, {"bits": 4, "rows": 2}],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object]) -> None:
    root = nn.Module()
    root.c = nn.Linear(8, 4)
    with pytest.raises(MethodError, match="give bits of"):
        method.apply(Network(root), Choice(site_of(root.c), settings), None)


def test_bad_input_is_named() -> None:
    root = nn.Module()
    root.c = nn.Linear(8, 4)
    site = site_of(root.c)
    with pytest.raises(MethodError, match="bits=5"):
        clip_by_statistics(root.c.weight, 5)
    with pytest.raises(SiteError, match=r"net\.c.*not one layer"):
        method.apply(Network(root), Choice(Site("net.c", kind="chain"), {"bits": 4}), None)
    root.c.weight.data[0, 0] = torch.nan
    with pytest.raises(SiteError, match=r"not finite at net\.c"):
        method.apply(Network(root), Choice(site, {"bits": 4}), None)


def test_it_is_a_method_that_is_asked_by_name_only() -> None:
    from lamina.plan.chains import choose_methods

    assert isinstance(method, Method)
    assert method.final
    assert "sawb" not in [m.name for m in choose_methods(None)]
    assert "sawb" in [m.name for m in choose_methods(["sawb"])]
