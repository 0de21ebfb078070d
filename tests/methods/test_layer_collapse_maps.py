"""Affine stand-ins: against brute force on the very points, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lamina.measure.stats import Cross
from lamina.methods.layer_collapse.maps import (
    FUNCTIONS,
    Fit,
    Joint,
    Map,
    fit_full,
    fit_units,
    joint_model,
    joint_of,
    loss_of,
    residual,
    scaled,
    slope_bound,
)

SEEDS = st.integers(0, 10_000)
SLOPES = st.floats(-0.5, 1.5)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layers(seed: int, n: int = 5, h: int = 12, f: int = 4) -> tuple[Map, Map]:
    first = Map(draw(seed, h, n) / n**0.5, draw(seed + 1, h))
    return first, Map(draw(seed + 2, f, h) / h**0.5, draw(seed + 3, f))


def run(map_: Map, x: Tensor) -> Tensor:
    return x @ map_.weight.T + map_.bias


def moments(x: Tensor, z: Tensor, positions: int = 1) -> Joint:
    """The moments as calibration sums them up: per sample over positions."""
    samples = len(x) / positions
    cross = Cross(
        z.T @ x / samples, z.T @ z / samples, z.sum(0) / samples,
        x.T @ x / samples, x.sum(0) / samples, float(positions),
    )  # fmt: skip
    return joint_of(cross, int(samples))


# --- the collapse at slope 1 ---------------------------------------------------------------------


@given(SEEDS)
def test_maps_compose_and_norms_fold(seed: int) -> None:
    first, second = layers(seed)
    x, scale, shift = draw(seed + 4, 30, 5), draw(seed + 5, 12), draw(seed + 6, 12)
    hidden = scale * run(first, x) + shift
    twice = 0.5 * hidden - shift
    both = scaled(first, [(scale, shift), (torch.full((12,), 0.5), -shift)])
    torch.testing.assert_close(run(both, x), twice, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(run(second.after(both), x), run(second, twice))
    assert scaled(first).weight is first.weight


@given(SEEDS, SLOPES, st.booleans())
def test_the_bound_holds_at_every_slope(seed: int, slope: float, normed: bool) -> None:
    first, second = layers(seed)
    x, scale = draw(seed + 4, 40, 5), draw(seed + 5, 12) if normed else None
    h = run(first, x)
    kept = torch.where(h > 0, h, slope * h)
    d = torch.ones(12, dtype=h.dtype) if scale is None else scale
    change = (run(second, d * kept) - run(second, d * h)).norm(dim=1)
    bound = slope_bound(second.weight, h, slope, scale)
    assert bound.shape == (40,)
    assert (change <= bound * (1 + 1e-9) + 1e-12).all()
    if abs(slope - 1) > 0.1:
        assert (change > 0.02 * bound).any(), "a bound far from everything bounds nothing"


def test_the_bound_is_tight_where_one_unit_is_negative() -> None:
    second = torch.diag(torch.tensor([3.0, 1.0]))
    h = torch.tensor([[-2.0, 5.0]])
    change = (F.prelu(h, torch.tensor([0.25])) - h) @ second.T
    assert float(slope_bound(second, h, 0.25)) == pytest.approx(float(change.norm()))
    assert float(slope_bound(second, h.abs())) == 0.0
    assert float(slope_bound(second, h, 1.0)) == 0.0


def test_the_bound_takes_a_slope_for_each_unit() -> None:
    second, h = draw(0, 3, 6), draw(1, 50, 6)
    slopes = torch.linspace(0, 1, 6, dtype=torch.float64)
    change = (torch.where(h > 0, h, slopes * h) - h) @ second.T
    bound = slope_bound(second, h, slopes)
    assert (change.norm(dim=1) <= bound + 1e-12).all()
    uniform = slope_bound(second, h, 0.0)
    assert (bound < uniform)[uniform > 0].all()


# --- moments -------------------------------------------------------------------------------------


def test_moments_per_sample_become_covariances() -> None:
    x, z = draw(0, 60, 5) + 3, draw(1, 60, 7) - 2
    joint = moments(x, z, positions=4)
    both = torch.cov(torch.cat([z, x], 1).T, correction=0)
    torch.testing.assert_close(joint.zz, both[:7, :7])
    torch.testing.assert_close(joint.zx, both[:7, 7:])
    torch.testing.assert_close(joint.xx, both[7:, 7:])
    torch.testing.assert_close(joint.x_mean, x.mean(0))
    assert joint.count == 60


@given(SEEDS, SLOPES)
def test_the_residual_is_that_of_the_points(seed: int, slope: float) -> None:
    first, _ = layers(seed)
    x = draw(seed + 4, 50, 5) + 1
    z = torch.where(run(first, x) > 0, run(first, x), slope * run(first, x))
    fit = Map(draw(seed + 5, 12, 5), draw(seed + 6, 12))
    off = z - run(fit, x)
    torch.testing.assert_close(residual(moments(x, z), fit), off.T @ off / 50)


@given(SEEDS, st.booleans())
def test_the_loss_is_felt_through_the_second_layer(seed: int, diagonal: bool) -> None:
    _, second = layers(seed)
    off, root = draw(seed + 4, 30, 12), draw(seed + 5, 4, 4)
    G = root @ root.T
    G = G.diagonal() if diagonal else G
    out = off @ second.weight.T
    whole = torch.diag(G) if diagonal else G
    expected = float(torch.einsum("ni,ij,nj->", out, whole, out)) / 30
    assert loss_of(off.T @ off / 30, second.weight, G) == pytest.approx(expected)


# --- the fits ------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from(sorted(FUNCTIONS)))
@settings(max_examples=40)
def test_units_are_lines_through_each_units_points(seed: int, name: str) -> None:
    first, _ = layers(seed)
    x = draw(seed + 4, 200, 5)
    h = run(first, x)
    z = FUNCTIONS[name](h)
    fit = fit_units(first, moments(x, z)).map
    for i in range(12):
        line = torch.stack([h[:, i], torch.ones(200, dtype=h.dtype)], 1)
        slope, offset = torch.linalg.lstsq(line, z[:, i : i + 1]).solution.flatten()
        expected = slope * h[:, i] + offset
        torch.testing.assert_close(run(fit, x)[:, i], expected, rtol=1e-6, atol=1e-8)


@given(SEEDS, st.floats(0, 1))
def test_a_centred_prelu_has_half_of_its_slopes(seed: int, slope: float) -> None:
    weight = draw(seed, 6, 4)
    x = draw(seed + 1, 500, 4)
    x = torch.cat([x, -x])  # symmetric
    h = x @ weight.T
    z = torch.where(h > 0, h, slope * h)
    first = Map(weight, torch.zeros(6, dtype=torch.float64))
    fit = fit_units(first, moments(x, z)).map
    torch.testing.assert_close(fit.weight, (1 + slope) / 2 * weight)


def test_the_identity_is_fitted_by_itself() -> None:
    first, second = layers(0)
    x = draw(1, 40, 5)
    joint = moments(x, run(first, x))
    units = fit_units(first, joint)
    torch.testing.assert_close(units.map.weight, first.weight)
    torch.testing.assert_close(units.map.bias, first.bias)
    full = fit_full(units, joint, second.weight, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(full.map.weight, first.weight)
    assert loss_of(residual(joint, full.map), second.weight, torch.ones(4).double()) < 1e-12


@given(SEEDS, st.floats(0, 1))
@settings(max_examples=30)
def test_least_squares_is_never_worse_than_slope_one(seed: int, slope: float) -> None:
    first, second = layers(seed)
    x = draw(seed + 4, 400, 5)
    h = run(first, x)
    z = torch.where(h > 0, h, slope * h)
    joint, G = moments(x, z), torch.eye(4, dtype=torch.float64)
    units = fit_units(first, joint)
    full = fit_full(units, joint, second.weight, G)
    lost = [loss_of(residual(joint, m), second.weight, G)
            for m in (scaled(first), units.map, full.map)]  # fmt: skip
    assert lost[2] <= lost[0] * (1 + 1e-9) + 1e-12
    assert lost[2] <= lost[1] * (1 + 1e-9) + 1e-12
    if slope <= 0.5:
        assert lost[2] < 0.5 * lost[0], "at a slope of 1/2 or less half the error is saved"
    per_unit = [residual(joint, m).diagonal() for m in (scaled(first), units.map)]
    assert (per_unit[1] <= per_unit[0] + 1e-12).all()


def test_full_is_the_regression_of_the_points_where_there_are_many() -> None:
    first, second = layers(3)
    x = draw(4, 5000, 5).pow(3) @ draw(5, 5, 5)  # not normal: lines of units are not best
    z = F.gelu(run(first, x))
    joint = moments(x, z)
    units = fit_units(first, joint)
    full = fit_full(units, joint, second.weight, torch.ones(4, dtype=torch.float64))
    line = torch.cat([x, torch.ones(5000, 1, dtype=x.dtype)], 1)
    best = torch.linalg.lstsq(line, z).solution
    left = [float((z - run(m, x)).square().sum()) for m in (units.map, full.map)]
    least = float((z - line @ best).square().sum())
    assert least <= left[1] < least * (1 + 1e-3)
    assert left[1] < left[0]
    assert full.freedom == pytest.approx(7, abs=0.3)  # two of a line, five inputs


def test_with_few_points_the_ridge_keeps_to_the_units() -> None:
    """Where ordinary least squares meets every point, and nothing else, ours must not."""
    n, h, f, few = 40, 60, 5, 50
    first, second = layers(7, n, h, f)
    x, other = draw(1, few, n), draw(2, 4000, n)
    z, truth = F.relu(run(first, x)), F.relu(run(first, other))
    joint, G = moments(x, z), torch.ones(f, dtype=torch.float64)
    units = fit_units(first, joint)
    full = fit_full(units, joint, second.weight, G)
    line = torch.cat([x, torch.ones(few, 1, dtype=x.dtype)], 1)
    free = torch.linalg.lstsq(line, z, driver="gelsd").solution

    def lost(guess: Tensor) -> float:
        return float(((truth - guess) @ second.weight.T).square().mean())

    on_others = lost(run(full.map, other))
    wild = lost(torch.cat([other, torch.ones(4000, 1, dtype=x.dtype)], 1) @ free)
    assert on_others < 0.5 * wild
    assert on_others < 1.3 * lost(run(units.map, other))
    # and it says so: the expected error is that of other data, not that of the fit
    fitted = loss_of(residual(joint, full.map), second.weight, G) / f
    expected = fitted * full.optimism(joint.count)
    assert abs(math.log(expected / on_others)) < 0.5


def test_units_that_do_not_vary_give_their_mean() -> None:
    first = Map(torch.zeros(3, 2, dtype=torch.float64), torch.tensor([1.0, -1.0, 2.0]).double())
    x = draw(0, 20, 2)
    z = F.relu(run(first, x))
    joint = moments(x, z)
    units = fit_units(first, joint)
    torch.testing.assert_close(run(units.map, x), z)
    still = moments(torch.ones_like(x), z)
    assert fit_full(units, still, torch.eye(3).double(), torch.ones(3).double()) is units


def test_freedom_costs_more_the_fewer_points_there_are() -> None:
    fit = Fit(layers(0)[0], 10.0)
    assert fit.optimism(20) == pytest.approx(4.0)
    assert fit.optimism(math.inf) == 1.0 < fit.optimism(1000) < fit.optimism(100)


# --- without data --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "silu", "prelu"])
def test_the_model_agrees_with_many_normal_points(name: str) -> None:
    first, _ = layers(11, 4, 6)
    root, mean = draw(1, 4, 4), draw(2, 4)
    x = draw(3, 400_000, 4) @ root.T + mean
    slope = torch.tensor([0.3], dtype=torch.float64)
    scale, shift = draw(4, 6), draw(5, 6)
    norm = ("batch_norm", {"scale": scale, "shift": shift})
    act = (name, {"slope": slope} if name == "prelu" else {})
    model = joint_model(first, [norm, act, ("dropout", {})], mean, root @ root.T)
    h = scale * run(first, x) + shift
    z = F.prelu(h, slope) if name == "prelu" else FUNCTIONS[name](h)
    seen = moments(x, z)
    assert model is not None and model.count == math.inf
    torch.testing.assert_close(model.z_mean, seen.z_mean, rtol=0.02, atol=0.02)
    torch.testing.assert_close(model.zx, seen.zx, rtol=0.02, atol=0.05)
    torch.testing.assert_close(model.zz.diagonal(), seen.zz.diagonal(), rtol=0.03, atol=0.03)
    assert joint_model(first, [("unheard of", {})], mean, root @ root.T) is None
