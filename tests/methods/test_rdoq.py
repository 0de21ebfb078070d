"""rdoq: error feedback, the rate in the decision, the bias as an input, and the method contract."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lamina import codecs
from lamina.errors import MethodError, SiteError
from lamina.forms import install
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.base import Choice, Method, weights_of
from lamina.methods.rdoq import feedback, method, quantize, sizes_of
from lamina.methods.rdoq.feedback import (
    Prices,
    Side,
    code_lengths,
    feed_forward,
    inverse_root,
    side_of,
)
from lamina.methods.rdoq.problem import pose
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network


def correlated(groups: int, size: int, seed: int = 0) -> torch.Tensor:
    """A second moment `[groups, size, size]` with strongly falling eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, 4 * size, size, generator=generator, dtype=torch.float64)
    mix = torch.randn(groups, size, size, generator=generator, dtype=torch.float64)
    y = (x * torch.logspace(0, -1.5, size, dtype=torch.float64)) @ mix
    return y.transpose(1, 2) @ y / (4 * size)


def stats_for(site: Site, seed: int = 0, offset: float = 0.0) -> LayerStats:
    g, n, m = site.matrix_shape
    if site.op == "embedding":
        H = torch.arange(m, dtype=torch.float64)[None] / m
        return LayerStats(H, correlated(g, n, seed + 1), None, 4.0, 1.0, 100)
    mean = torch.full((g, m), offset, dtype=torch.float64)
    H = correlated(g, m, seed) + mean[:, :, None] * mean[:, None, :]
    return LayerStats(H, correlated(g, n, seed + 1), mean, 1.0, 1.0, 100)


LINEAR = Site("l", weight="weight", bias="bias", shape=(24, 40))
SITES = {
    "linear": (LINEAR, nn.Linear(40, 24)),
    "transposed": (Site("t", weight="weight", shape=(24, 40), transposed=True), nn.Linear(40, 24)),
    "grouped conv": (
        Site("c", op="conv", weight="weight", bias="bias", shape=(8, 3, 3, 3), groups=2),
        nn.Conv2d(6, 8, 3, groups=2),
    ),
    "conv transpose": (
        Site("d", op="conv_transpose", weight="weight", bias="bias", shape=(6, 4, 3, 3), groups=2),
        nn.ConvTranspose2d(6, 8, 3, groups=2),
    ),
    "embedding": (Site("e", op="embedding", weight="weight", shape=(50, 12)), nn.Embedding(50, 12)),
    "recurrent": (
        Site("r", op="recurrent", weight="weight_ih_l0", bias="bias_ih_l0", shape=(16, 5)),
        nn.LSTM(5, 4),
    ),
}


def case(name: str) -> tuple[Site, Network, LayerStats]:
    site, module = SITES[name]
    torch.manual_seed(3)
    for p in module.parameters():
        nn.init.normal_(p, std=0.1)
    return site, Network(module), stats_for(site)


def free(shape: tuple[int, ...]) -> Prices:
    return Prices(np.zeros(shape[-1]))


def plain_side(size: int) -> Side:
    return Side(np.zeros((0, 0, 0)), np.ones((1, size)))


def test_factor_is_the_upper_cholesky_factor_of_the_inverse() -> None:
    H = correlated(1, 30)[0] + torch.eye(30, dtype=torch.float64)
    U = inverse_root(H, torch.zeros(30, dtype=torch.float64)).numpy()
    lower = np.linalg.cholesky(np.linalg.inv(H.numpy()))
    assert np.array_equal(U, np.triu(U))
    np.testing.assert_allclose(U, lower.T, rtol=1e-6, atol=1e-9)


def test_an_indefinite_moment_still_gets_a_finite_factor() -> None:
    H = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    U = inverse_root(H, torch.full((2,), 0.01, dtype=torch.float64))
    assert bool(torch.isfinite(U).all()) and bool((U.diagonal() > 0).all())


def test_feedback_beats_plain_rounding_on_either_side() -> None:
    H, G = correlated(1, 70), correlated(1, 80, 1)  # more than one tile
    matrix = np.random.default_rng(0).normal(size=(1, 80, 70))
    W, steps = torch.from_numpy(matrix), np.full(matrix.shape, 0.5)
    held = np.zeros(matrix.shape, dtype=bool)
    errors = {}
    for name, (one, two) in {"none": (0, 0), "in": (1, 0), "out": (0, 1), "both": (1, 1)}.items():
        inputs = side_of(H, torch.full((1, 70), 1e-6)) if one else plain_side(70)
        outputs = side_of(G, torch.full((1, 80), 1e-6)) if two else plain_side(80)
        q = feed_forward(matrix, inputs, outputs, steps, free(matrix.shape), held)
        errors[name] = predict_error(LayerStats(H, G), W, torch.from_numpy(q * 0.5) - W)
    assert errors["in"] < 0.5 * errors["none"]
    assert errors["out"] < 0.5 * errors["none"]
    assert errors["both"] < 0.5 * min(errors["in"], errors["out"])


def test_without_correlation_or_rate_it_is_plain_rounding() -> None:
    matrix = np.random.default_rng(1).normal(size=(2, 70, 90))
    diagonal = torch.rand(2, 90, dtype=torch.float64) + 0.1
    inputs = side_of(torch.diag_embed(diagonal), torch.zeros(2, 90, dtype=torch.float64))
    outputs = side_of(torch.ones(2, 70, dtype=torch.float64), torch.zeros(2, 70))
    steps, held = np.full(matrix.shape, 0.3), np.zeros(matrix.shape, dtype=bool)
    q = feed_forward(matrix, inputs, outputs, steps, free(matrix.shape), held)
    assert np.array_equal(q, np.rint(matrix / 0.3))


def test_whitened_errors_are_the_exact_error() -> None:
    """Successive rounding must decide on the true cost: recompute it by definition."""
    H, G = correlated(1, 5), correlated(1, 4, 1)
    none = torch.zeros(1, 5, dtype=torch.float64)
    inputs, outputs = side_of(H, none), side_of(G, none[:, :4])
    matrix = np.random.default_rng(2).normal(size=(1, 4, 5))
    q = feed_forward(matrix, inputs, outputs, np.full((1, 4, 5), 0.7), free((1, 4, 5)),
                     np.zeros((1, 4, 5), dtype=bool))  # fmt: skip
    U, V, delta = inputs.factor[0], outputs.factor[0], matrix[0] - 0.7 * q[0]
    X = np.linalg.inv(V.T) @ delta @ np.linalg.inv(U)
    exact = np.trace(G[0].numpy() @ delta @ H[0].numpy() @ delta.T)
    assert np.isclose((X**2).sum(), exact)
    # Nearest plane (Babai): every whitened error is within half a step of its own grid.
    bound = 0.35 / (np.diag(V)[:, None] * np.diag(U)[None])
    assert bool((np.abs(X) <= bound * (1 + 1e-6)).all())


def test_tiny_problem_is_near_the_best_of_all() -> None:
    H, none = correlated(1, 4), torch.zeros(1, 4, dtype=torch.float64)
    G = torch.ones(1, 1, dtype=torch.float64)
    ratios, plain_ratios = [], []
    for seed in range(8):
        matrix = np.random.default_rng(seed).normal(size=(1, 1, 4))
        held, steps = np.zeros((1, 1, 4), dtype=bool), np.ones((1, 1, 4))

        def cost(q: object, w: np.ndarray = matrix) -> float:
            d = np.asarray(q, dtype=float).reshape(1, 4) - w[0]
            return float((d @ H[0].numpy() * d).sum())

        sides = side_of(H, none), side_of(G, 0 * G)
        q = feed_forward(matrix, *sides, steps, free((1, 1, 4)), held)
        best = min(cost(c) for c in itertools.product(range(-4, 5), repeat=4))
        assert cost(q) >= best - 1e-12
        ratios.append(cost(q) / best)
        plain_ratios.append(cost(np.rint(matrix)) / best)
    assert np.mean(ratios) < 0.5 * np.mean(plain_ratios)


def test_rate_decides_like_brute_force_where_weights_are_independent() -> None:
    rng = np.random.default_rng(4)
    matrix = rng.laplace(size=(1, 6, 7))
    power = torch.from_numpy(rng.uniform(0.2, 3, size=(1, 7)))
    inputs, outputs = side_of(power, 0 * power), plain_side(6)
    steps, held = np.full((1, 6, 7), 0.8), np.zeros((1, 6, 7), dtype=bool)
    lengths = code_lengths(np.rint(matrix / 0.8).astype(int), np.full(7, 0.2), 0)
    q = feed_forward(matrix, inputs, outputs, steps, lengths, held)

    zero, some = lengths.bits(0, slice(None), slice(None), (6, 7))

    def cost(i: int, j: int, k: int) -> float:
        bits = some[i, j] + lengths.sizes[min(abs(k), len(lengths.sizes) - 1)]
        bits = bits if k else zero[i, j]
        return float(power[0, j]) * (matrix[0, i, j] - 0.8 * k) ** 2 + 0.2 * bits

    for i, j in itertools.product(range(6), range(7)):
        near = {0, math.floor(matrix[0, i, j] / 0.8), math.ceil(matrix[0, i, j] / 0.8)}
        assert cost(i, j, int(q[0, i, j])) <= min(cost(i, j, k) for k in near) + 1e-12


def test_code_lengths_are_those_of_a_probability() -> None:
    symbols = np.random.default_rng(5).geometric(0.5, size=(2, 9, 11)) - 1
    prices = code_lengths(symbols, np.ones(12), 1)
    for group in range(2):
        zero, some = prices.bits(group, slice(None), slice(None), (9, 12))
        np.testing.assert_allclose(2.0**-zero + 2.0**-some, 1)
    assert 2 * (2.0 ** -prices.sizes[1:]).sum() == pytest.approx(1)
    assert prices.across is not None and not prices.across[:, :, 11].any()  # the bias: no model


def test_magnitudes_are_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = np.random.default_rng(6).integers(-9, 10, size=(1, 40, 50)).astype(np.int32)
    symbols[0, -1, -1] = 30
    whole = code_lengths(symbols, np.ones(50), 0)
    expected = np.bincount(np.abs(symbols[symbols != 0]), minlength=31)
    np.testing.assert_array_equal(feedback._magnitudes(symbols), expected)
    monkeypatch.setattr(feedback, "COUNTED", 7)
    np.testing.assert_array_equal(feedback._magnitudes(symbols), expected)
    np.testing.assert_array_equal(code_lengths(symbols, np.ones(50), 0).sizes, whole.sizes)


def test_compiled_and_plain_rounding_agree_to_the_integer() -> None:
    pytest.importorskip("numba")
    for name in ("linear", "grouped conv", "embedding"):
        site, network, stats = case(name)
        weights = weights_of(network, site)
        problem = pose(site, weights, stats)
        for rate in (0.0, 1.0):
            one = quantize(problem, weights, 0.05, rate, backend="numba").values["weight"]
            two = quantize(problem, weights, 0.05, rate, backend="numpy").values["weight"]
            assert torch.equal(one.symbols, two.symbols)


def test_bias_takes_up_the_mean_error() -> None:
    site, network, _ = case("linear")
    stats = stats_for(site, offset=5.0)
    weights = weights_of(network, site)
    joint = quantize(pose(site, weights, stats), weights, 0.1, 0.0)
    apart = quantize(pose(site, weights, replace(stats, mean=None)), weights, 0.1, 0.0)

    def error(values: dict) -> float:
        delta = torch.cat([
            values[k].dense().double().reshape(24, -1) - weights[k].double().reshape(24, -1)
            for k in ("weight", "bias")
        ], 1)  # fmt: skip
        H = torch.zeros(1, 41, 41, dtype=torch.float64)
        H[0, :40, :40], H[0, 40, 40] = stats.H[0], 1.0
        H[0, 40, :40] = H[0, :40, 40] = stats.mean[0]
        return predict_error(LayerStats(H, stats.G), delta[None], delta[None])

    assert joint.error == pytest.approx(error(joint.values))
    assert error(joint.values) < 0.7 * error(apart.values)


def test_more_rate_means_fewer_bytes_and_more_error() -> None:
    site = Site("w", weight="weight", shape=(64, 64))
    weights = {"weight": torch.from_numpy(np.random.default_rng(6).laplace(size=(64, 64)))}
    identity = torch.eye(64, dtype=torch.float64)[None]
    problem = pose(site, weights, LayerStats(identity, identity))
    results = [quantize(problem, weights, 1.0, rate) for rate in (0.0, 0.5, 1.0, 2.0, 4.0)]
    sizes, errors = [r.size() for r in results], [r.error for r in results]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.9 * sizes[0]
    assert errors == sorted(errors) and errors[-1] > errors[0]


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("informed", [True, False])
def test_contract(name: str, informed: bool) -> None:
    site, network, stats = case(name)
    given = stats if informed else None
    weights, before = weights_of(network, site), network.digest()
    offers = method.propose(site, weights, given)
    assert offers == method.propose(site, weights, given)
    bits, errors = [o.cost.bits for o in offers], [o.error for o in offers]
    assert len(offers) >= 10
    assert bits == sorted(bits, reverse=True) and len(set(bits)) == len(bits)
    assert errors == sorted(errors) and 0 <= errors[0] < 1e-4 * errors[-1]
    for offer in offers[::4]:
        (step,) = offer.steps
        edits = method.apply(network, Choice(site, step.settings), given)
        assert [e.path for e in edits] == [n for n in (site.weight, site.bias) if n]
        stored = sum(len(codecs.best(e.values.symbols.numpy())[1]) for e in edits)
        assert abs(offer.cost.bits / 8 - stored) <= 0.02 * stored + 64
        if informed and not site.bias:
            delta = as_matrix(site, edits[0].values.dense() - weights["weight"])
            assert predict_error(stats, delta, delta) == pytest.approx(
                offer.error, rel=1e-3, abs=1e-15
            )
        assert network.digest() == before
        install(network.module, edits)
        assert torch.equal(weights_of(network, site)["weight"], edits[0].values.dense())
        case(name)  # puts the weights back
    assert offers[0].cost.params == sum(t.numel() for t in weights.values())
    assert offers[0].cost.macs == site.macs


def test_it_is_a_final_method_for_layers() -> None:
    assert isinstance(method, Method) and method.final
    assert method.leave(LINEAR, {}, None, {}) == ()
    assert "chain" in method.refuse(Site("x", kind="chain"))
    with pytest.raises(SiteError, match="x"):
        method.apply(Network(nn.Linear(1, 1)), Choice(Site("x", kind="chain"), {"step": 1.0}), None)


@pytest.mark.parametrize("name, scale", [
    ("linear", "rows"), ("linear", "columns"), ("transposed", "rows"), ("transposed", "columns"),
    ("grouped conv", "rows"), ("conv transpose", "columns"),
    ("embedding", "rows"), ("embedding", "columns"), ("linear", "both"), ("embedding", "both"),
    ("transposed", "both"),
])  # fmt: skip
def test_spread_steps_reach_the_file_along_the_right_axis(name: str, scale: str) -> None:
    site, network, stats = case(name)
    weights = weights_of(network, site)
    result = quantize(pose(site, weights, stats), weights, 1e-3, 0.0, scale)
    grid = result.values["weight"]
    assert grid.exponents is not None and len(set(grid.exponents.tolist())) > 1
    # With feedback an entry may move by a few steps, but on the wrong axis it would be far off.
    assert float((grid.dense() - weights["weight"]).abs().max()) < 0.1


def test_scales_the_file_cannot_hold_are_refused() -> None:
    for name, scale in (("grouped conv", "columns"), ("conv transpose", "rows")):
        site, network, stats = case(name)
        with pytest.raises(MethodError, match=site.name):
            method.apply(network, Choice(site, {"step": 0.1, "scale": scale}), stats)


@pytest.mark.parametrize("settings", [
    {}, {"step": 0.0}, {"step": math.nan}, {"step": "1"},
    {"step": 1.0, "rate": -1}, {"step": 1.0, "scale": "x"},
])  # fmt: skip
def test_settings_it_does_not_have_are_refused(settings: dict) -> None:
    site, network, stats = case("linear")
    with pytest.raises(MethodError, match="step > 0"):
        method.apply(network, Choice(site, settings), stats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    site, network, stats = case("linear")
    network.module.to(dtype)
    offers = method.propose(site, weights_of(network, site), stats)
    edits = method.apply(network, Choice(site, offers[3].steps[0].settings), stats)
    assert all(e.values.dense().dtype == dtype for e in edits)
    network.module.float()


def test_odd_layers() -> None:
    one = Site("one", weight="weight", shape=(1, 1))
    for value in (0.0, 0.3, -7.0):
        offers = method.propose(one, {"weight": torch.full((1, 1), value)}, None)
        assert offers and offers[0].error < 1e-3
    same = Site("same", weight="weight", shape=(8, 8))
    for value in (0.0, 0.25):
        offers = method.propose(same, {"weight": torch.full((8, 8), value)}, stats_for(same))
        assert offers[0].error <= 1e-4 and all(math.isfinite(o.error) for o in offers)
    silent = LayerStats(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8))
    weights = {"weight": torch.randn(8, 8)}
    result = quantize(pose(same, weights, silent), weights, 0.1)
    assert result.error == 0 and not bool(result.values["weight"].symbols.any())


def test_dead_inputs_and_zeros_cost_nothing() -> None:
    site, network, stats = case("linear")
    weights = weights_of(network, site)
    H = stats.H.clone()
    H[:, 7], H[:, :, 7] = 0, 0
    weights["weight"][:, 11] = 0
    values = quantize(pose(site, weights, replace(stats, H=H)), weights, 0.01).values["weight"]
    assert not bool(values.symbols[:, [7, 11]].any()) and bool(values.symbols[:, 8].any())


def test_tokens_that_calibration_did_not_meet_live() -> None:
    site, network, stats = case("embedding")
    result = quantize(pose(site, weights_of(network, site), stats), weights_of(network, site), 0.02)
    assert float(stats.H[0, 0]) == 0 and bool(result.values["weight"].symbols[0].any())


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(SiteError, match="finite"):
        method.propose(LINEAR, {"weight": torch.full((24, 40), math.nan)}, None)


def test_sizes_of_long_tensors_are_close_without_coding_all() -> None:
    site = Site("w", weight="weight", shape=(300, 260))
    weights = {"weight": torch.from_numpy(np.random.default_rng(7).laplace(size=(300, 260)))}
    problem = pose(site, weights, None)
    results = [quantize(problem, weights, step, 0.0) for step in (1.0, 1.5, 2.0, 4.0, 8.0)]
    for size, result in zip(sizes_of(results), results, strict=True):
        assert size == pytest.approx(result.size(), rel=0.02, abs=64)
