"""rdoq: entropy-coded uniform quantization, with error feedback and the rate in the decision.

**What.** Every weight becomes `q * step` with an integer `q`, and the integers are entropy coded.
Weights are rounded one after another; what one rounding did to the output is taken back by those
that follow, along inputs (through `H`, as GPTQ does) and along outputs (through `G`, as YAQA
does): with `H^-1 = U^T U`, `G^-1 = V^T V` (U, V upper) the target of weight ij is

    t_ij = w_ij - sum_{i'<=i, j'<=j, not both equal} V_i'i U_j'j x_i'j',  x_ij = (t_ij - q_ij step) / (V_ii U_jj)

and the error `tr(G dW H dW^T)` is exactly `sum x_ij^2`. Each q is, of the two nearest integers and
0, the one with the least `x^2 + lambda bits(q)` (RDOQ of video coding). `lambda` is `rate` times
the slope of entropy-coded quantization at high rate, so that the step alone spans the curve.
A bias is one more input that is always 1, and comes last: it takes up the mean error of its row.

**Where.** The weight and bias of every layer, after any other method; zeros stay zero.

**Costs and predicts.** Coded bytes of the very integers, plus the step; error
`1/2 tr(G dW H dW^T)` of the very change, bias included. `scale` may spread the steps in quarter
octaves: `rows` by output (`V_ii`), `columns` by input (`U_jj`, WaterSIC; embeddings: token
frequency, gently, since rare tokens must live).

**Does not help** latency or MACs (values are stored dense when loaded). Without statistics it is
plain rounding. Where `G` was measured on few samples, feedback through it would fit their noise:
hence its strong damping. `scale` rarely pays for its bytes in convolutional networks.

**Reference.** Frantar et al. 2022 (GPTQ), arXiv:2210.17323, eq. 2-3; Tseng et al. 2025 (YAQA),
arXiv:2505.22988; Lifar et al. 2026 (WaterSIC), arXiv:2603.04956; Wiedemann et al. 2019
(DeepCABAC), arXiv:1907.11900.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamina import codecs
from lamina.codecs.kernels import compiled
from lamina.errors import MethodError, SiteError
from lamina.forms import Edit, Grid
from lamina.forms.values import exponent_scale
from lamina.measure.stats import Cost, LayerStats, predict_error
from lamina.methods.base import (
    Candidate,
    Choice,
    Leaf,
    Settings,
    Stage,
    Step,
    Weights,
    weights_of,
)
from lamina.network.sites import Site, as_matrix, from_matrix
from lamina.network.source import Network

Array = NDArray[Any]
# Steps on offer, as log2(step / rms of the weights): dense where one to five bits are spent.
OCTAVES = (-12.0, -8.0, -6.0, -4.5, -3.5, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
RATE = 0.1  # with feedback more than this gains nothing: see `Rdoq.propose`
SCALES = ("none", "rows", "columns")
DAMP_INPUT, DAMP_OUTPUT, DAMP_BIAS = 0.03, 1.0, 0.01  # of the mean diagonal; of the bias' own
TILE = 64  # rows and columns quantized one by one before the rest is updated by a matrix product
HEADER_BYTES = 4  # a step, in float32
EXPONENTS = (-6, 6)  # quarter octaves around the mean step: [0.35, 2.8]
FREQUENCY_POWER = -0.2  # of the step of an embedding's row
FREQUENCY_COUNTS = 3.0  # added to every token's count


def inverse_root(moment: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """Return upper triangular `U` with `(moment + diag(damping))^-1 = U^T U`.

    Args:
        moment: `[n, n]` second moment, float64.
        damping: `[n]`, added to the diagonal; tenfold more is tried until the sum is definite.

    Example:
        >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> U = inverse_root(H, torch.zeros(2, dtype=torch.float64))
        >>> bool(torch.allclose(U.T @ U, torch.linalg.inv(H)))
        True
    """
    for _ in range(12):
        # R R^T with R upper is a Cholesky factor seen from the last index; U = R^-1 is never squared.
        low, info = torch.linalg.cholesky_ex((moment + torch.diag(damping)).flip(0, 1))
        if int(info) == 0:
            break
        damping = 10 * damping + 1e-9 * moment.diagonal().abs().max().clamp_min(1e-30)
    eye = torch.eye(len(moment), dtype=moment.dtype)
    return torch.linalg.solve_triangular(low.flip(0, 1), eye, upper=True)


@dataclass(frozen=True)
class Side:
    """How errors travel along one side of a matrix, per group.

    Args:
        factor: `[groups, n, n]` upper `U`, or an empty array where nothing is fed forward.
        root: `[groups, n]` its diagonal.
    """

    factor: Array
    root: Array

    @property
    def power(self) -> Array:
        """Distortion of a unit error `[groups, n]`: `1 / U_jj^2`."""
        return np.asarray(self.root**-2.0)


def side_of(moment: torch.Tensor, damping: torch.Tensor) -> Side:
    """Return the feedback along one side; a diagonal moment `[groups, n]` feeds nothing forward."""
    moment = moment.detach().to("cpu", torch.float64)
    if moment.dim() == 2:
        return Side(np.zeros((0, 0, 0)), (moment + damping).rsqrt().numpy())
    factor = torch.stack([inverse_root(m, d) for m, d in zip(moment, damping)])
    return Side(factor.numpy(), factor.diagonal(dim1=1, dim2=2).contiguous().numpy())


@dataclass(frozen=True)
class Problem:
    """One layer, ready to be quantized at any step.

    Args:
        matrix: `[groups, out, in (+ 1 with bias)]`, float64.
        inputs, outputs: feedback along columns and rows.
        stats: statistics with the constant input, or None.
        biased: the last column is the bias.
        held: same shape as `matrix`: values that stay zero.
    """

    site: Site
    matrix: Array
    inputs: Side
    outputs: Side
    stats: LayerStats | None
    biased: bool
    held: Array
    counts: Array | None = None  # token counts of an embedding


def diagonal_of(moment: torch.Tensor) -> torch.Tensor:
    """Return the diagonal `[groups, n]` of a moment, full or diagonal."""
    return moment if moment.dim() == 2 else moment.diagonal(dim1=1, dim2=2)


def _damping(diagonal: torch.Tensor, share: float) -> torch.Tensor:
    whole = float(diagonal.mean()) if diagonal.numel() else 0.0
    floor = 1e-6 * whole if whole > 0 else 1.0  # a group that is never used still needs a factor
    mean = diagonal.mean(1, keepdim=True).clamp_min(floor)
    return (share * mean).expand_as(diagonal).clone()


def pose(site: Site, weights: Weights, stats: LayerStats | None) -> Problem:
    """Prepare a layer: matrices, bias as an input, and the factors every step shares.

    Raises:
        SiteError: the weights are not finite.
    """
    for tensor in weights.values():
        if not bool(torch.isfinite(tensor).all()):
            raise SiteError("the weights are not finite", site.name, "NaN or inf has no grid point")
    matrix = as_matrix(site, weights["weight"].detach().to("cpu", torch.float64))
    g, n, m = matrix.shape
    held = matrix == 0
    bias = weights.get("bias")
    biased = bias is not None and bias.numel() == g * n
    if bias is not None and biased:
        column = bias.detach().to("cpu", torch.float64).reshape(g, n, 1)
        matrix = torch.cat([matrix, column], 2)
        held = torch.cat([held, column == 0], 2)
    ones = torch.ones(g, matrix.shape[2], dtype=torch.float64)
    if stats is None:
        inputs, outputs = side_of(ones, 0 * ones), side_of(0 * matrix[:, :, 0] + 1, 0 * matrix[:, :, 0])
        return Problem(site, matrix.numpy(), inputs, outputs, None, biased, held.numpy())
    H, G = stats.H.to("cpu", torch.float64), stats.G.to("cpu", torch.float64)
    diagonal = diagonal_of(H)
    damping = _damping(diagonal, DAMP_INPUT)
    counts = None
    if site.op == "embedding":
        # Tokens that calibration did not meet must live: a few counts are added to all.
        smooth = FREQUENCY_COUNTS / max(1, stats.samples)
        damping = torch.full_like(diagonal, smooth)
        counts = (diagonal[0] + smooth).numpy()
    else:
        dead = diagonal <= 1e-12 * diagonal.mean()  # inputs that never vary from 0: free to drop
        held[:, :, :m] |= dead[:, None, :]
    if biased:
        H = _with_constant(H, stats)
        own = torch.full((g, 1), DAMP_BIAS * max(stats.positions, 1e-12), dtype=torch.float64)
        damping = torch.cat([damping, own], 1)
        stats = LayerStats(H, G, None, stats.positions, stats.scale, stats.samples)
    inputs = side_of(H, damping)
    outputs = side_of(G, _damping(diagonal_of(G), DAMP_OUTPUT))
    return Problem(site, matrix.numpy(), inputs, outputs, stats, biased, held.numpy(), counts)


def _with_constant(H: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    """Return `[[H, mean], [mean^T, positions]]`, or a diagonal one entry longer."""
    g, m = H.shape[:2]
    corner = torch.full((g, 1), stats.positions, dtype=torch.float64)
    if H.dim() == 2:
        return torch.cat([H, corner], 1)
    whole = torch.zeros(g, m + 1, m + 1, dtype=torch.float64)
    whole[:, :m, :m] = H
    whole[:, m, m] = stats.positions
    if stats.mean is not None:
        whole[:, :m, m] = whole[:, m, :m] = stats.mean.to("cpu", torch.float64)
    return whole


def round_tile(
    W: Array, A: Array, U: Array, V: Array, u: Array, v: Array, steps: Array,
    prices: Array, zero: Array, some: Array, sizes: Array, held: Array, Q: Array, X: Array, E: Array,
) -> None:  # fmt: skip
    """Quantize one tile, weight by weight, in place (compiled where numba is there).

    Args:
        W: `[a, b]` targets after the columns before; A: `[b, a]` what rows before feed.
        U: `[b, b]`, V: `[a, a]` upper factors, or empty; u: `[b]`, v: `[a]` their diagonals.
        steps: `[a, b]`; prices: `[b]` lambda [error / bit].
        zero, some: `[a, b]` bits of being 0, or not; sizes: `[k]` bits of a magnitude and its sign.
        held: `[a, b]` stays 0.
        Q, X, E: `[a, b]` results: integers, whitened errors, errors fed along columns.
    """
    last = sizes.shape[0] - 1
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            step = steps[i, j]
            t = W[i, j] - u[j] * A[j, i]
            best = 0.0
            if not held[i, j]:
                power = 1.0 / (u[j] * u[j] * v[i] * v[i])
                least = power * t * t + prices[j] * zero[i, j]
                low = np.floor(t / step)
                for k in range(2):
                    q = low + k
                    if q != 0.0:
                        d = t - q * step
                        bits = some[i, j] + sizes[int(min(abs(q), last))]
                        cost = power * d * d + prices[j] * bits
                        if cost < least:
                            least, best = cost, q
            x = (t - best * step) / (u[j] * v[i])
            e = A[j, i] + v[i] * x
            Q[i, j] = best
            X[i, j] = x
            E[i, j] = e
            if U.shape[0]:
                for k in range(j + 1, W.shape[1]):
                    W[i, k] -= e * U[j, k]
            if V.shape[0]:
                for k in range(i + 1, W.shape[0]):
                    A[j, k] += x * V[i, k]


def round_tile_in_fronts(
    W: Array, A: Array, U: Array, V: Array, u: Array, v: Array, steps: Array,
    prices: Array, zero: Array, some: Array, sizes: Array, held: Array, Q: Array, X: Array, E: Array,
) -> None:  # fmt: skip
    """Do what `round_tile` does, without a compiler: weights that do not see each other at once."""
    a, b = W.shape
    last = sizes.shape[0] - 1
    rows, columns = np.indices((a, b))
    # Which front a weight is in: its column, its row, its anti-diagonal, or all in one.
    front = (columns if U.shape[0] else 0 * columns) + (rows if V.shape[0] else 0 * rows)
    for s in range(int(front.max()) + 1):
        i, j = np.nonzero(front == s)
        t = W[i, j] - u[j] * A[j, i]
        power = 1.0 / (u[j] * u[j] * v[i] * v[i])
        best, least = np.zeros_like(t), power * t * t + prices[j] * zero[i, j]
        low = np.floor(t / steps[i, j])
        for q in (low, low + 1):
            d = t - q * steps[i, j]
            bits = some[i, j] + sizes[np.minimum(np.abs(q), last).astype(np.int64)]
            cost = np.where(q == 0, np.inf, power * d * d + prices[j] * bits)
            best, least = np.where(cost < least, q, best), np.minimum(cost, least)
        best = np.where(held[i, j], 0.0, best)
        x = (t - best * steps[i, j]) / (u[j] * v[i])
        e = A[j, i] + v[i] * x
        Q[i, j], X[i, j], E[i, j] = best, x, e
        # A factor is 0 before its diagonal, and what is written on the diagonal is not read again.
        if U.shape[0]:
            W[i] -= e[:, None] * U[j]
        if V.shape[0]:
            A[j] += x[:, None] * V[i]


@dataclass(frozen=True)
class Prices:
    """What integers cost: lambda per column, and the code lengths of the last pass.

    Args:
        columns: `[in]` lambda [error / bit].
        zero, some: `[groups, out, in]` bits of being 0, or not.
        sizes: `[k]` bits of each magnitude and its sign.
    """

    columns: Array
    zero: Array
    some: Array
    sizes: Array


def code_lengths(symbols: Array, prices: Array, spare: int) -> Prices:
    """Model what an adaptive coder spends on integers like these.

    Being 0 or not depends on the row and the column (their logits add), magnitudes on nothing.

    Args:
        symbols: `[groups, out, in]` integers of an earlier pass.
        prices: `[in + spare]` lambda per column.
        spare: columns without a model (0 or 1, the bias), whose bits are 0.
    """
    g, n, m = symbols.shape
    some = symbols != 0
    p = (some.sum() + 0.5) / (some.size + 1)
    logit: Callable[[Array], Array] = lambda x: np.log(x / (1 - x))  # noqa: E731
    by_row = logit((some.sum(2, keepdims=True) + 4 * p) / (m + 4))
    by_column = logit((some.sum(1, keepdims=True) + 4 * p) / (n + 4))
    both = by_row + by_column - logit(p)
    both = np.concatenate([both, np.zeros((g, n, spare))], 2)
    sizes = np.minimum(np.abs(symbols[some]), 1 << 16).astype(np.int64)
    most, mean = (int(sizes.max()), float(sizes.mean())) if sizes.size else (1, 1.0)
    # Magnitudes not seen yet get an exponential tail, so that none is free and none is forbidden.
    count = np.bincount(sizes, minlength=most + 3)[1:] + 0.3 * np.exp(-np.arange(most + 2) / mean) + 1e-3
    bits = np.concatenate([[0.0], 1 - np.log2(count / count.sum())])
    nats = 1 / math.log(2)
    return Prices(prices, nats * np.logaddexp(0, both), nats * np.logaddexp(0, -both), bits)


def feed_forward(problem: Problem, steps: Array, prices: Prices, backend: str = "auto") -> Array:
    """Round every weight in turn, feeding errors forward; float64 throughout.

    Args:
        problem: the layer.
        steps: `[groups, out, in]` (bias column included, as everywhere here).
        prices: what bits cost.
        backend: "auto", "numba" or "numpy": the same integers.

    Returns:
        Integers `[groups, out, in]`.
    """
    kernel = compiled(round_tile, backend) or round_tile_in_fronts
    result = np.zeros(problem.matrix.shape, dtype=np.int32)
    _, n, m = result.shape
    inputs, outputs = problem.inputs, problem.outputs
    fed_in, fed_out = inputs.factor.size > 0, outputs.factor.size > 0
    none = np.zeros((0, 0))
    high, wide = TILE if fed_out else max(n, 1), TILE if fed_in else max(1, (1 << 22) // max(n, 1))
    cut = np.ascontiguousarray
    for g, W in enumerate(problem.matrix.copy()):
        for j in (slice(k, min(k + wide, m)) for k in range(0, m, wide)):
            A, E = np.zeros((j.stop - j.start, n)), np.zeros((n, j.stop - j.start))
            for i in (slice(k, min(k + high, n)) for k in range(0, n, high)):
                tile, fed = cut(W[i, j]), cut(A[:, i])
                Q, X, e = np.empty_like(tile), np.empty_like(tile), np.empty_like(tile)
                U = cut(inputs.factor[g][j, j]) if fed_in else none
                V = cut(outputs.factor[g][i, i]) if fed_out else none
                kernel(
                    tile, fed, U, V, inputs.root[g, j], outputs.root[g, i], cut(steps[g, i, j]),
                    prices.columns[j], cut(prices.zero[g, i, j]), cut(prices.some[g, i, j]),
                    prices.sizes, cut(problem.held[g, i, j]), Q, X, e,
                )  # fmt: skip
                result[g, i, j], E[i] = Q, e
                if fed_out:
                    A[:, i.stop :] += X.T @ outputs.factor[g][i, i.stop :]
            if fed_in:
                W[:, j.stop :] -= E @ inputs.factor[g][j, j.stop :]
    return result


def exponents_of(problem: Problem, scale: str) -> Array | None:
    """Return quarter-octave exponents of the steps, `[groups, out, 1]` or `[groups, 1, in]`.

    Raises:
        MethodError: the file could not hold such exponents for this layer.
    """
    if scale == "none":
        return None
    site = problem.site
    columns_are_stored_rows = site.transposed or site.op in ("embedding", "conv_transpose")
    if scale == "columns" and problem.matrix.shape[0] > 1 and not columns_are_stored_rows:
        raise MethodError("rdoq cannot scale these columns", site.name, "groups share a stored column")
    if scale == "rows" and site.op == "conv_transpose":
        raise MethodError("rdoq cannot scale these rows", site.name, "they are not rows as stored")
    side, axis = (problem.outputs, 2) if scale == "rows" else (problem.inputs, 1)
    root = side.root[:, : problem.matrix.shape[2] - problem.biased] if axis == 1 else side.root
    if problem.counts is not None and scale == "columns":
        root = problem.counts[None] ** FREQUENCY_POWER
    relative = np.log2(root) - np.log2(root).mean()
    exponents = np.clip(np.rint(4 * relative), *EXPONENTS).astype(np.int32)
    return np.expand_dims(exponents, axis)


@dataclass(frozen=True)
class Result:
    """A quantized layer: the values of its tensors, and what they cost and lose."""

    values: dict[str, Grid]
    size: float
    error: float


def quantize(
    problem: Problem, step: float, rate: float = RATE, scale: str = "none", backend: str = "auto"
) -> Array:
    """PLACEHOLDER"""
    raise NotImplementedError
