"""Rounding with error feedback on both sides of a matrix, and the rate in the decision.

With `H^-1 = U^T U` and `G^-1 = V^T V` (U, V upper) a change `dW = V^T X U` costs
`tr(G dW H dW^T) = |X|^2`. Weights are rounded one after another; the target of weight ij is

    t_ij = w_ij - sum V_i'i U_j'j x_i'j'  over i' <= i, j' <= j but ij itself
    x_ij = (t_ij - q_ij step_ij) / (V_ii U_jj)

so that each decision sees its exact cost `x_ij^2`, given the ones before. Rows see nothing but what
earlier rows did to the same column (`A`) and earlier columns to the same row (`W`): tiles are
rounded weight by weight, the rest is updated by matrix products.

Reference: Frantar et al. 2022, arXiv:2210.17323, eq. 2-3 (columns); Tseng et al. 2025,
arXiv:2505.22988 (both sides).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.codecs.kernels import compiled

Array = NDArray[Any]
TILE = 64  # rows and columns rounded one by one before the rest is updated by a matrix product
PRECISE = 1 << 21  # symbols whose code lengths are in float64
WHOLE = 1 << 19  # weights in a tile where nothing is fed along columns
COUNTED = 1 << 22  # magnitudes counted at a time


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
        # R R^T with R upper is Cholesky seen from the last index; the inverse is never formed.
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
    factor = torch.stack([inverse_root(m, d) for m, d in zip(moment, damping, strict=True)])
    return Side(factor.numpy(), factor.diagonal(dim1=1, dim2=2).contiguous().numpy())


def round_tile(
    W: Array, A: Array, U: Array, V: Array, u: Array, v: Array, steps: Array,
    prices: Array, zero: Array, some: Array, sizes: Array, held: Array,
    Q: Array, X: Array, E: Array,
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
    prices: Array, zero: Array, some: Array, sizes: Array, held: Array,
    Q: Array, X: Array, E: Array,
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

    Being 0 or not depends on the row and the column: their logits add.

    Args:
        columns: `[in]` lambda [error / bit].
        rows, across: `[groups, out, 1]` and `[groups, 1, in]` logits of not being 0; None: all
            bits are 0.
        sizes: `[k]` bits of each magnitude and its sign.
    """

    columns: Array
    rows: Array | None = None
    across: Array | None = None
    sizes: Array = field(default_factory=lambda: np.zeros(1))

    def bits(self, group: int, i: slice, j: slice, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Return the bits of being 0 and of not being 0, of one tile, in float64."""
        if self.rows is None or self.across is None:
            return np.zeros(shape), np.zeros(shape)
        both = self.rows[group, i] + self.across[group, :, j]
        zero = np.logaddexp(0, both)
        rest = zero - both  # log(1 + e^-x) = log(1 + e^x) - x
        return (zero / math.log(2)).astype(np.float64), (rest / math.log(2)).astype(np.float64)


def code_lengths(symbols: Array, prices: Array, spare: int) -> Prices:
    """Model what an adaptive coder spends on integers like these.

    Args:
        symbols: `[groups, out, in]` integers of an earlier pass.
        prices: `[in + spare]` lambda per column.
        spare: columns without a model (0 or 1, the bias).
    """
    g, n, m = symbols.shape
    some = symbols != 0
    p = (some.sum() + 0.5) / (some.size + 1)
    by_row = _logit((some.sum(2, keepdims=True) + 4 * p) / (m + 4))
    by_column = _logit((some.sum(1, keepdims=True) + 4 * p) / (n + 4))
    # Half of float64's work, where a table has millions of weights.
    kind = np.float32 if symbols.size > PRECISE else np.float64
    across = np.concatenate([by_column, np.zeros((g, 1, spare))], 2).astype(kind)
    count = _magnitudes(symbols)
    known = np.arange(len(count))
    most, mean = len(count) - 1, float((count * known).sum() / max(1, count.sum()))
    if most == 0:
        most, mean = 1, 1.0
    # Magnitudes not seen yet get an exponential tail, so that none is free and none is forbidden.
    seen = np.zeros(most + 2)
    seen[: len(count) - 1] = count[1:]
    seen += 0.3 * np.exp(-np.arange(most + 2) / mean) + 1e-3
    bits = np.concatenate([[0.0], 1 - np.log2(seen / seen.sum())])
    return Prices(prices, (by_row - _logit(p)).astype(kind), across, bits)


def _magnitudes(symbols: Array) -> Array:
    """Return how often each magnitude from 0 to the largest occurs, 0 itself left out."""
    flat, total = symbols.reshape(-1), np.zeros(1, np.int64)
    for first in range(0, flat.size, COUNTED):
        part = np.abs(flat[first : first + COUNTED].astype(np.int64))
        found = np.bincount(np.minimum(part, 1 << 16, out=part), minlength=len(total))
        found[: len(total)] += total
        total = found
    total[0] = 0
    return np.asarray(total)


def _logit(p: Array) -> Array:
    return np.asarray(np.log(p / (1 - p)))


def feed_forward(
    matrix: Array, inputs: Side, outputs: Side, steps: Array, prices: Prices, held: Array,
    backend: str = "auto",
) -> Array:  # fmt: skip
    """Round every weight in turn, feeding errors forward; float64 throughout.

    Args:
        matrix: `[groups, out, in]`.
        inputs, outputs: how errors travel along columns and rows.
        steps: of the same shape, or a broadcast view.
        prices: what bits cost.
        held: `[groups, out, in]` truth values: what stays 0.
        backend: "auto", "numba" or "numpy": the same integers.

    Returns:
        Integers `[groups, out, in]`.
    """
    kernel = compiled(round_tile, backend) or round_tile_in_fronts
    result = np.zeros(matrix.shape, dtype=np.int32)
    _, n, m = matrix.shape
    fed_in, fed_out = inputs.factor.size > 0, outputs.factor.size > 0
    none = np.zeros((0, 0))
    high, wide = TILE if fed_out else max(n, 1), TILE if fed_in else max(1, WHOLE // max(n, 1))
    cut = np.ascontiguousarray
    for g, W in enumerate(matrix.copy() if fed_in else matrix):
        for j in (slice(k, min(k + wide, m)) for k in range(0, m, wide)):
            A, E = np.zeros((j.stop - j.start, n)), np.zeros((n, j.stop - j.start))
            for i in (slice(k, min(k + high, n)) for k in range(0, n, high)):
                tile, fed = np.array(W[i, j], order="C"), cut(A[:, i])  # the kernel writes in it
                Q, X, e = np.empty_like(tile), np.empty_like(tile), np.empty_like(tile)
                U = cut(inputs.factor[g][j, j]) if fed_in else none
                V = cut(outputs.factor[g][i, i]) if fed_out else none
                zero, some = prices.bits(g, i, j, tile.shape)
                kernel(
                    tile, fed, U, V, inputs.root[g, j], outputs.root[g, i], cut(steps[g, i, j]),
                    prices.columns[j], zero, some, prices.sizes, cut(held[g, i, j]), Q, X, e,
                )  # fmt: skip
                result[g, i, j], E[i] = Q, e
                if fed_out:
                    A[:, i.stop :] += X.T @ outputs.factor[g][i, i.stop :]
            if fed_in:
                W[:, j.stop :] -= E @ inputs.factor[g][j, j.stop :]
    return result
