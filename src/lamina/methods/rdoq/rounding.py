"""One layer at one step: integers, the forms that hold them, and the error they make."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from lamina import codecs
from lamina.errors import MethodError
from lamina.forms import Grid
from lamina.forms.values import BOTH, exponent_scale
from lamina.measure.stats import LayerStats, diagonal_of, predict_change
from lamina.methods.base import Weights
from lamina.methods.offers import grid_bytes
from lamina.methods.rdoq.feedback import Array, Prices, code_lengths, feed_forward
from lamina.methods.rdoq.problem import Problem
from lamina.network.sites import Site, as_matrix, from_matrix

SCALES = ("none", "rows", "columns", "both")
MOST = 1 << 26  # the largest integer asked for; feedback may add to it
EXPONENTS = (-24, 24)  # quarter octaves around the mean step: 6 octaves
EMBEDDED = (-8, 8)  # the same for tokens: [0.25, 4]
FREQUENCY_POWER = -0.3  # of the step of an embedding's row


def usual_rate(problem: Problem) -> float:
    """Return the rate that measured best.

    Where inputs are one-hot (embeddings) errors do not meet, and the textbook's 1 saves most. With
    feedback, bits saved in one weight come back in those that make up for it: 0 was up to 6 % less
    than 0.1 at equal divergence on both LeNets. Without feedback, a dead zone shrinks whole rows.
    """
    return 1.0 if problem.site.op == "embedding" and problem.stats is not None else 0.0


def _swapped(site: Site) -> bool:
    """Return whether the columns of the matrices are the rows of the stored tensor."""
    return site.transposed or site.op in ("embedding", "conv_transpose")


def exponents_of(problem: Problem, scale: str) -> Array:
    """Return quarter-octave exponents of the steps, `[groups, out, 1]` or `[groups, 1, in]`.

    Args:
        problem: the layer.
        scale: `"rows"` or `"columns"`.

    Raises:
        MethodError: the file could not hold such exponents for this layer.
    """
    site = problem.site
    if scale == "columns" and problem.matrix.shape[0] > 1 and not _swapped(site):
        raise MethodError(
            "rdoq cannot scale these columns", site.name, "groups share a stored column"
        )
    if scale == "rows" and site.op == "conv_transpose":
        raise MethodError("rdoq cannot scale these rows", site.name, "they are not rows as stored")
    side, axis = (problem.outputs, 2) if scale == "rows" else (problem.inputs, 1)
    root = side.root[:, : problem.matrix.shape[2] - problem.biased] if axis == 1 else side.root
    if problem.counts is not None and scale == "columns":
        root = problem.counts[None] ** FREQUENCY_POWER
    relative = np.log2(root) - np.log2(root).mean()
    limits = EMBEDDED if site.op == "embedding" else EXPONENTS
    exponents = np.clip(np.rint(4 * relative), *limits).astype(np.int32)
    return np.expand_dims(exponents, axis)


@dataclass(frozen=True)
class Result:
    """A quantized layer: the form of each of its tensors, and the error [nats per sample]."""

    values: dict[str, Grid]
    error: float

    def size(self, count: Callable[[Array], float] = codecs.length) -> float:
        """Return the bytes of all tensors, their integers counted by `count`."""
        return sum(grid_bytes(grid, count) for grid in self.values.values())


def scales_for(problem: Problem) -> tuple[str, ...]:
    """Return the scales that the file can hold for a layer."""
    site, groups = problem.site, problem.matrix.shape[0]
    rows = ("rows",) if site.op != "conv_transpose" else ()
    columns = ("columns",) if groups == 1 or _swapped(site) else ()
    return ("none", *rows, *columns, *(("both",) if rows and columns else ()))


@dataclass(frozen=True)
class Spread:
    """How steps are spread over a layer, and the distortion that follows.

    Args:
        rows, columns: quarter octaves `[groups, out, 1]` and `[groups, 1, in]`, or None.
        distortion: mean whitened distortion of a unit mean step, over weights without the bias.
    """

    rows: Array | None
    columns: Array | None
    distortion: float

    @classmethod
    def of(cls, problem: Problem, scale: str) -> Spread:
        """Return a layer's spread.

        Raises:
            MethodError: the file could not hold it for this layer.
        """
        rows = exponents_of(problem, "rows") if scale in ("rows", "both") else None
        columns = exponents_of(problem, "columns") if scale in ("columns", "both") else None
        m = problem.matrix.shape[2] - problem.biased
        outputs, inputs = problem.outputs.power, problem.inputs.power[:, :m]
        if rows is not None:
            outputs = outputs * scale_of(rows)[:, :, 0] ** 2
        if columns is not None:
            inputs = inputs * scale_of(columns)[:, 0, :] ** 2
        whole = float((outputs.mean(1) * inputs.mean(1)).mean()) if problem.matrix.size else 1.0
        return cls(rows, columns, whole)

    def stored(self, swapped: bool) -> tuple[torch.Tensor | None, int]:
        """Return the exponents as a `Grid` has them, and their axis.

        Args:
            swapped: the columns of the matrices are the rows of the stored tensor.
        """
        first, second = (self.columns, self.rows) if swapped else (self.rows, self.columns)
        given = [torch.from_numpy(e.reshape(-1)) for e in (first, second) if e is not None]
        axis = BOTH if len(given) > 1 else int(first is None)
        return (torch.cat(given) if given else None), axis


def scale_of(exponents: Array) -> Array:
    """Return the factors of steps, as the file's float32 has them, in float64."""
    flat = exponent_scale(torch.from_numpy(exponents.reshape(-1))).double().numpy()
    return np.asarray(flat.reshape(exponents.shape))


def quantize(
    problem: Problem,
    weights: Weights,
    step: float,
    rate: float | None = None,
    scale: str = "none",
    backend: str = "auto",
    spread: Spread | None = None,
) -> Result:
    """Quantize a layer at one step.

    Args:
        problem: the layer, from `pose`.
        weights: its tensors, as stored.
        step: grid step, a float32 value; its mean where `scale` spreads it.
        rate: lambda as a multiple of the high-rate slope; 0 rounds to the nearest, None is usual.
        scale: `"none"`, `"rows"`, `"columns"` or `"both"`.
        backend: of `feed_forward`.
        spread: of the steps, where it is known already.

    Raises:
        MethodError: the step is too fine for 32-bit integers, or the scale does not fit the layer.
    """
    rate = usual_rate(problem) if rate is None else rate
    largest = max(-problem.matrix.min(), problem.matrix.max()) if problem.matrix.size else 0.0
    if largest > step * MOST:
        raise MethodError("rdoq cannot use this step", problem.site.name, f"{step} is too fine")
    whole = problem.matrix.shape[2]
    m = whole - problem.biased
    spread = Spread.of(problem, scale) if spread is None else spread
    across = np.full((len(problem.matrix), 1, whole), step)
    if spread.columns is not None:
        across[:, :, :m] *= scale_of(spread.columns)
    distortion = spread.distortion * step**2 if m else 1.0
    # The bias at the same slope: all distortions equal (its step has little to do with `step`).
    bias_step = 0.0
    if problem.biased:
        power = float((problem.outputs.power.mean(1) * problem.inputs.power[:, m]).mean())
        bias_step = float32(math.sqrt(distortion / power))
        across[:, :, m] = bias_step
    steps = np.broadcast_to(across, problem.matrix.shape)
    if spread.rows is not None:
        steps = steps.copy()
        steps[:, :, :m] *= scale_of(spread.rows)
    prices = np.zeros(whole)
    given = (problem.matrix, problem.inputs, problem.outputs, steps)
    symbols = feed_forward(*given, Prices(prices), problem.held, backend)
    if rate > 0:
        prices[:m] = rate * math.log(2) / 6 * distortion
        lengths = code_lengths(symbols[:, :, :m], prices, int(problem.biased))
        symbols = feed_forward(*given, lengths, problem.held, backend)
    return _hold(problem, weights, symbols, step, spread, bias_step)


def _hold(
    problem: Problem, weights: Weights, symbols: Array, step: float, spread: Spread,
    bias_step: float,
) -> Result:  # fmt: skip
    """Return integers as the forms of the stored tensors, with their error."""
    site, m = problem.site, problem.matrix.shape[2] - problem.biased
    stored = from_matrix(site, torch.from_numpy(symbols[:, :, :m])).contiguous()
    along, axis = spread.stored(_swapped(site))
    weight = Grid(stored, step, along, axis, weights["weight"].dtype)
    values = {"weight": weight}
    dense = as_matrix(site, weight.dense().cpu())
    if "bias" in weights:
        bias = weights["bias"]
        if problem.biased:
            column = torch.from_numpy(symbols[:, :, m].reshape(tuple(bias.shape)).copy())
        else:  # a bias that is not one number per row of the matrices (transposed convolutions)
            power = float(problem.inputs.power.mean())
            bias_step = float32(
                step * math.sqrt(power / (problem.stats.positions if problem.stats else 1))
            )
            column = torch.round(bias.detach().to("cpu", torch.float64) / bias_step).to(torch.int32)
        values["bias"] = Grid(column, bias_step, None, 1, bias.dtype)
    error = 0.0
    if problem.biased:
        shape = (*dense.shape[:2], 1)
        column = values["bias"].dense().to("cpu", torch.float64).reshape(shape)
        dense = torch.cat([dense.to(torch.float64), column], 2)
    elif "bias" in values:
        lost = values["bias"].dense().to("cpu", torch.float64) - weights["bias"].detach().to(
            "cpu", torch.float64
        )
        error += _bias_error(problem.stats, lost)
    error += predict_change(problem.stats, torch.from_numpy(problem.matrix), dense)
    return Result(values, error)


def _bias_error(stats: LayerStats | None, lost: torch.Tensor) -> float:
    """Return the error of a bias on its own: each output adds the rows that end in it."""
    if stats is None:
        return 0.0
    rows = diagonal_of(stats.G).to("cpu", torch.float64).reshape(lost.numel(), -1).sum(1)
    return 0.5 * stats.scale * stats.positions * float((rows * lost.reshape(-1) ** 2).sum())


def float32(value: float) -> float:
    return float(np.float32(min(max(value, 1e-30), 1e30)))
