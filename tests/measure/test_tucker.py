"""Tucker-2: ranks, errors and optimality, against brute force, theory and tensorly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.measure.stats import LayerStats, predict_error
from lamina.measure.tucker import (
    balance,
    compose,
    decoders,
    decompose,
    encoded,
    errors_of_ranks,
    input_basis,
    metric_of,
)


def moment(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + n)
    x = torch.randn(4 * n, n, generator=g, dtype=torch.float64)
    x = x @ torch.randn(n, n, generator=g, dtype=torch.float64)
    return x.T @ x / len(x)


def weight_of(f: int, c: int, taps: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(f, c, taps, generator=g, dtype=torch.float64)
    return torch.einsum(
        "fg,gck,cd,kl->fdl", moment(f, 1), W, moment(c, 2), moment(taps, 3)
    )  # spectra that fall


def stats_of(kind: str, f: int, c: int, taps: int) -> LayerStats | None:
    if kind == "free":
        return None
    H, G = moment(c * taps), moment(f)
    H = H.diagonal() if kind == "diagonal inputs" else H
    G = G.diagonal() if kind == "diagonal outputs" else G
    return LayerStats(H=H[None], G=G[None], scale=1.7)


KINDS = ["free", "full", "diagonal inputs", "diagonal outputs"]
SHAPES = [(8, 6, 9), (5, 12, 3), (20, 2, 4)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_full_ranks_give_the_weight_back(kind: str, shape: tuple[int, int, int]) -> None:
    f, c, taps = shape
    W = weight_of(*shape)
    r1, r2 = min(f, c * taps), min(c, f * taps)
    back = compose(*decompose(W, stats_of(kind, *shape), r1, r2))
    torch.testing.assert_close(back, W, rtol=1e-7, atol=1e-7 * float(W.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_errors_are_those_of_the_difference(kind: str, shape: tuple[int, int, int]) -> None:
    f, c, taps = shape
    W, stats = weight_of(*shape), stats_of(kind, *shape)
    pairs = [
        (r1, r2)
        for r1 in range(1, f + 1, 2)
        for r2 in range(1, c + 1)
        if r1 <= taps * r2 and r2 <= taps * r1
    ]
    errors = errors_of_ranks(W, stats, pairs)
    assert set(errors) == set(pairs)
    for pair, error in errors.items():
        change = compose(*decompose(W, stats, *pair)) - W
        true = predict_error(stats, W.flatten(1)[None], change.flatten(1)[None])
        whole = predict_error(stats, W.flatten(1)[None], W.flatten(1)[None])
        assert error == pytest.approx(true, rel=1e-6, abs=1e-7 * whole)


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 9), st.integers(0, 1 << 30), st.data())
@settings(max_examples=60, deadline=None)
def test_truncation_keeps_to_the_bound(f: int, c: int, taps: int, seed: int, data) -> None:
    """Squared error at most the sum of the discarded tails of both unfoldings (HOSVD)."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(f, c, taps, generator=g, dtype=torch.float64)
    r2 = data.draw(st.integers(1, min(c, f * taps)))
    r1 = data.draw(st.integers(1, min(f, r2 * taps)))
    lost = float((compose(*decompose(W, None, r1, r2)) - W).square().sum())
    outputs = torch.linalg.svdvals(W.flatten(1)).square()
    inputs = torch.linalg.svdvals(W.transpose(0, 1).flatten(1)).square()
    tails = float(outputs[r1:].sum()), float(inputs[r2:].sum())
    assert lost <= sum(tails) * (1 + 1e-9) + 1e-12
    assert lost >= max(tails) * (1 - 1e-9) - 1e-9, "no approximation of these ranks is better"


def test_the_core_and_the_decoder_are_optimal_for_the_encoder() -> None:
    """No change of core or decoder lowers the (damped) loss; one of the encoder can."""
    f, c, taps, r1, r2 = 6, 5, 4, 3, 2
    W, stats = weight_of(f, c, taps), stats_of("full", f, c, taps)
    metric = metric_of(stats, W.shape)
    H, G = metric.H.reshape(c * taps, -1), metric.G
    factors = decompose(W, stats, r1, r2)

    def loss(A, C, B):
        E = (compose(A, C, B) - W).flatten(1)
        return (torch.trace(G @ E @ H @ E.T)) / 2

    at = [t.clone().requires_grad_() for t in factors]
    value = loss(*at)
    gradients = torch.autograd.grad(value, at)
    scales = [g.norm() * t.norm() / value.detach() for g, t in zip(gradients, factors, strict=True)]
    assert scales[0] < 1e-6 and scales[1] < 1e-6
    assert scales[2] > 1e-4, "the control: encoders are only nearly optimal"
    # and globally: whatever the decoder, with its own best core
    g = torch.Generator().manual_seed(0)
    B = factors[2]
    patches = torch.kron(B.contiguous(), torch.eye(taps, dtype=torch.float64))
    Y, N = W.flatten(1) @ H @ patches.T, patches @ H @ patches.T
    for _ in range(20):
        A = torch.randn(f, r1, generator=g, dtype=torch.float64)
        C = torch.linalg.solve(A.T @ G @ A, A.T @ G @ Y) @ torch.linalg.inv(N)
        assert loss(A, C.reshape(r1, r2, taps), B) >= value * (1 - 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_what_decoders_explain_is_what_they_say(kind: str) -> None:
    f, c, taps = 6, 5, 4
    W, metric = weight_of(f, c, taps), metric_of(stats_of(kind, f, c, taps), (f, c, taps))
    B = input_basis(W, metric)[:3]
    decode, _, values = decoders(encoded(W, metric.H, B), metric.G)
    torch.testing.assert_close(
        decode.T @ metric.G @ decode, torch.eye(f, dtype=torch.float64), rtol=0, atol=1e-8
    )
    assert torch.equal(values, values.sort(descending=True).values)
    assert int((values > 1e-9 * values[0]).sum()) == min(f, 3 * taps)


def test_the_encoders_of_a_kronecker_moment_are_those_of_the_whitened_tensor() -> None:
    """Where H is a Kronecker product, the basis is the exact HOSVD of the whitened weight."""
    f, c, taps = 6, 5, 4
    W, G = weight_of(f, c, taps), moment(f)
    a, b = moment(c, 5), moment(taps, 6)
    stats = LayerStats(H=torch.kron(a, b)[None], G=G[None])
    metric = metric_of(stats, W.shape, damped=False)
    rows = input_basis(W, metric)
    L, Ra, Rb = (torch.linalg.cholesky(m) for m in (G, a, b))
    seen = torch.einsum("gf,gck,cd,kl->fdl", L, W, Ra, Rb)
    U = torch.linalg.svd(seen.transpose(0, 1).flatten(1)).U
    # same spans, rank by rank: rows of the basis are U^T Ra^-1
    back = rows @ Ra
    for r in range(1, c):
        torch.testing.assert_close(
            back[:r].T @ torch.linalg.inv(back[:r] @ back[:r].T) @ back[:r],
            U[:, :r] @ U[:, :r].T, rtol=0, atol=1e-7,
        )  # fmt: skip


@pytest.mark.parametrize("ranks", [(2, 2), (4, 3), (6, 2), (3, 5)])
def test_tensorly_finds_nothing_much_better(ranks: tuple[int, int]) -> None:
    """Alternating least squares (HOOI) is the reference: a few per cent are left to it, no more."""
    tensorly = pytest.importorskip("tensorly.decomposition")
    W = weight_of(8, 6, 9)
    (core, (A, B)), _ = tensorly.partial_tucker(
        W.numpy(), rank=list(ranks), modes=[0, 1], n_iter_max=200, tol=1e-10
    )
    core, A, B = (torch.tensor(t.copy()) for t in (core, A, B))
    theirs = float((compose(A, core, B.T) - W).square().sum())
    ours = float((compose(*decompose(W, None, *ranks)) - W).square().sum())
    assert theirs * (1 - 1e-6) <= ours <= 1.1 * theirs
    worse = float((compose(*decompose(W, None, 1, 1)) - W).square().sum())
    assert worse > 1.1 * theirs, "the control: other ranks are far from that"


def test_tensorly_composes_alike() -> None:
    tensorly = pytest.importorskip("tensorly")
    A, C, B = torch.randn(4, 2), torch.randn(2, 3, 5), torch.randn(3, 6)
    theirs = tensorly.tenalg.multi_mode_dot(C.numpy(), [A.numpy(), B.T.numpy()], modes=[0, 1])
    torch.testing.assert_close(compose(A, C, B), torch.tensor(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_balancing_keeps_the_product_and_evens_the_scale(scale: float) -> None:
    A, C, B = torch.randn(7, 3).double() * scale, torch.randn(3, 2, 4).double(), torch.randn(2, 5)
    before = compose(A, C, B.double())
    after = balance(A, C, B.double())
    torch.testing.assert_close(compose(*after), before, rtol=1e-9, atol=1e-12 * scale)
    norms = [float(t.norm()) for t in after]
    assert max(norms) < 5 * min(norms)
    assert (after[0].sum(0) >= -1e-9 * norms[0]).all(), "signs are fixed"
    core = after[1]
    order = compose(*after).flatten(1)
    assert torch.linalg.matrix_rank(order) == 3
    assert core.shape == C.shape


def test_balancing_survives_zeros() -> None:
    zero = balance(torch.zeros(4, 2).double(), torch.zeros(2, 2, 3).double(), torch.eye(2).double())
    assert all(torch.isfinite(t).all() for t in zero)
    assert compose(*zero).abs().max() == 0
    W = torch.zeros(4, 3, 2, dtype=torch.float64)
    W[0, 0, 0] = 2.0  # rank one, asked for more
    factors = decompose(W, None, 3, 2)
    assert all(torch.isfinite(t).all() for t in factors)
    torch.testing.assert_close(compose(*factors), W)
    assert errors_of_ranks(W, None, [(1, 1), (3, 2)])[1, 1] < 1e-6


def test_the_currency_beats_the_weights_own_truncation() -> None:
    """Whitened factors lose less of the predicted loss than those of the plain HOSVD."""
    shape = (8, 6, 9)
    W, stats = weight_of(*shape), stats_of("full", *shape)
    for pair in ((2, 2), (4, 3), (6, 4)):
        change = compose(*decompose(W, None, *pair)) - W
        plain = predict_error(stats, W.flatten(1)[None], change.flatten(1)[None])
        assert errors_of_ranks(W, stats, [pair])[pair] < 0.9 * plain
