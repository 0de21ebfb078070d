"""Curves of offers: which steps are tried, what they take in the file, and what lies between.

Rounding and coding a long tensor takes seconds, and a planner wants steps an eighth of an octave
apart. So a long one is rounded at a few knots only. Between them error and size are smooth
functions of the step: what lies between is read off a monotone curve through the knots. The
tokens of an embedding, or of a wide head, do not meet, so there a knot needs only some of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lamina import codecs
from lamina.codecs import blocks
from lamina.measure.stats import LayerStats
from lamina.methods.base import Weights
from lamina.methods.rdoq.feedback import Array, Side
from lamina.methods.rdoq.problem import Problem
from lamina.methods.rdoq.rounding import Result, Spread, float32, quantize

# Steps on offer, as log2(step / rms of the weights): dense where a fifth to five bits are spent.
OCTAVES = (-12.0, -8.0, -5.0, -3.5, -2.5, -1.5, -0.75, *(k / 2 for k in range(9)), 5.0, 6.0)
EXACT, ANCHORS = 1 << 9, 4  # above so many symbols, only so many candidates are coded
COARSE = 1.0  # octave from which on a scale that is best at fine steps may be worse than none
LONG = 1 << 16  # weights; of more, knots are rounded, and what lies between is interpolated
KNOTS = (-12.0, -8.0, -5.0, -3.0, -2.0, -1.0, 0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
FEW_KNOTS = (-12.0, -8.0, -5.0, -3.0, -1.75, -0.5, 0.75, 2.0, 3.25, 6.0)
FINE_KNOTS = 3  # of these nobody needs the size to the byte
WHOLE = (4, 6)  # of these, the ones at which a table is rounded as a whole
MANY = 1 << 19  # weights; of more, only few knots
HUGE = 1 << 21  # weights; of more, only some tokens at most knots, and no trial of scales
FINE = 8  # offers an octave between knots
BETWEEN = (-3.5, 2.0)  # octaves between which they are worth it, and curves are smooth
HEAD_BITS = 64  # of exponents in the file, about
TRIED = -0.75  # the octave at which scales are compared
TOKENS = 3072  # of a table's tokens, so many are looked at, a third of them the commonest


@dataclass(frozen=True)
class Point:
    """One step of a curve.

    Args:
        step: the grid step, a float32 value.
        error: [nats per sample].
        size: of all tensors of the layer [bytes].
    """

    step: float
    error: float
    size: float


def sizes_of(results: list[Result]) -> list[float]:
    """Return the bytes of the results of one layer, steps rising.

    Coding a long tensor takes a second. There the quick estimate serves, corrected by how far it is
    off at a few of them: that changes slowly with the step, and leaves about 1 %.
    """
    if all(r.values["weight"].symbols.numel() <= EXACT for r in results):
        return [r.size() for r in results]
    # At the finest step nearly every integer is another, and the estimate is off as nowhere else.
    quick = [r.size(codecs.estimate) for r in results[1:]]
    rest = codecs.anchored(quick, lambda i: results[i + 1].size(), ANCHORS)
    return [results[0].size(), *rest]


def knot_sizes(results: list[Result]) -> list[float]:
    """Return the bytes of the results at the knots of a long layer, steps rising.

    What lies between is as good as they are, so they are coded, but for the fine ones.
    """
    coded = [r.size() for r in results[FINE_KNOTS:]]
    first = results[FINE_KNOTS]
    ratio = coded[0] / max(first.size(codecs.estimate), 1.0)
    return [ratio * r.size(codecs.estimate) for r in results[:FINE_KNOTS]] + coded


def curve_of(
    problem: Problem, weights: Weights, rate: float, scale: str = "none", coarse: bool = False
) -> list[Point]:
    """Return the curve of a layer: every step tried, finest first, and some between them.

    Args:
        problem: the layer, from `pose`.
        weights: its tensors, as stored.
        rate, scale: of `quantize`.
        coarse: only steps that leave less than about a bit a weight, and nothing between them.
    """
    live, rms = scale_of_weights(problem)
    long = live and problem.matrix.size > LONG and not coarse
    octaves = (FEW_KNOTS if problem.matrix.size > MANY else KNOTS) if long else OCTAVES
    octaves = tuple(o for o in octaves if o >= COARSE) if coarse else octaves
    octaves = octaves if live else (0.0,)
    steps = [float32(rms * 2**octave) for octave in octaves]
    if live and problem.matrix.size > HUGE and (side := _apart(problem)):
        points = _sampled(problem, weights, steps, rate, scale, side)
    else:
        spread = Spread.of(problem, scale)
        results = [quantize(problem, weights, step, rate, scale, spread=spread) for step in steps]
        points = [
            Point(step, result.error, size)
            for step, result, size in zip(
                steps, results, (knot_sizes if long else sizes_of)(results), strict=True
            )
        ]
    return between(points, rms) if long else points


def scale_of_weights(problem: Problem) -> tuple[bool, float]:
    """Return whether any weight is not zero, and the root mean square of those that are not."""
    live = int(np.count_nonzero(problem.matrix))
    norm = float(torch.linalg.vector_norm(torch.from_numpy(problem.matrix)))
    return live > 0, norm / math.sqrt(live) if live else 1.0


def best_scale(problem: Problem, weights: Weights, rate: float, scales: Sequence[str]) -> str:
    """Return the scale of least bits at equal error, judged at one step.

    At high rate an error that is 4 times as large saves one bit of every weight.
    """
    live, rms = scale_of_weights(problem)
    if not live or len(scales) < 2:
        return scales[0]
    step = float32(rms * 2**TRIED)
    found = []
    for scale in scales:
        result = quantize(problem, weights, step, rate, scale)
        bits = 8 * result.size(codecs.estimate) + HEAD_BITS * (scale != "none")
        worth = 0.5 * math.log2(max(result.error, 1e-300)) * problem.matrix.size
        found.append((bits + worth, scale))
    return min(found)[1]


def between(points: Sequence[Point], rms: float) -> list[Point]:
    """Return points with others between them, an eighth of an octave apart.

    Args:
        points: finest step first; errors must not be 0 where points come between.
        rms: of the weights; steps are seen in octaves of it.

    Example:
        >>> line = between([Point(0.5, 1.0, 100.0), Point(1.0, 4.0, 50.0), Point(2, 16, 25)], 1.0)
        >>> len(line), round(line[4].step, 4), round(line[4].error, 4), round(line[4].size, 2)
        (17, 0.7071, 2.0, 70.71)
    """
    from scipy.interpolate import PchipInterpolator

    known = [p for p in points if p.error > 0 and p.size > 0]
    if len(known) < 3:
        return list(points)
    octaves = [math.log2(p.step / rms) for p in known]
    curve = PchipInterpolator(octaves, np.log2([[p.error, p.size] for p in known]))
    first, last = max(octaves[0], BETWEEN[0]), min(octaves[-1], BETWEEN[1])
    found = {p.step: p for p in points}
    for k in range(math.ceil(first * FINE), math.floor(last * FINE) + 1):
        step = float32(rms * 2 ** (k / FINE))
        if all(abs(math.log2(step / p.step)) > 0.5 / FINE for p in known):
            error, size = (float(2**x) for x in curve(math.log2(step / rms)))
            found[step] = Point(step, error, size)
    return [found[step] for step in sorted(found)]


def _sampled(
    problem: Problem, weights: Weights, steps: Sequence[float], rate: float, scale: str, side: int
) -> list[Point]:
    """Return the points of a layer from some of its rows or columns, and the whole at two steps.

    Args:
        side: from `_apart`.
    """
    assert problem.stats is not None
    spread = Spread.of(problem, scale)
    use = problem.stats.H if side == 2 else problem.stats.G
    order = np.argsort(-use[0].numpy(), kind="stable")
    common, rest = order[: TOKENS // 3], order[TOKENS // 3 :]
    some = rest[np.linspace(0, len(rest) - 1, TOKENS - len(common)).round().astype(np.int64)]
    share = len(rest) / len(some)
    parts = [
        (_part(problem, weights, spread, np.sort(pick), side), worth)
        for pick, worth in ((common, 1.0), (some, share))
    ]
    points = []
    for step in steps:
        error = size = 0.0
        for (part, own, sliced), worth in parts:
            result = quantize(part, own, step, rate, scale, spread=sliced)
            error, size = error + worth * result.error, size + worth * result.size(blocks.length)
        points.append(Point(step, error, size))
    places, off = np.log([p.step for p in points]), []
    for k in WHOLE:
        known = points[k]
        whole = quantize(problem, weights, known.step, rate, scale, spread=spread)
        off.append((whole.error / max(known.error, 1e-300), whole.size() / known.size))
    more, larger = (
        np.interp(places, places[list(WHOLE)], ratio) for ratio in zip(*off, strict=True)
    )
    return [
        Point(p.step, float(m * p.error), float(n * p.size))
        for p, m, n in zip(points, more, larger, strict=True)
    ]


def _apart(problem: Problem) -> int:
    """Return the axis of a layer's matrix whose lines never meet: 2 columns, 1 rows, 0 neither.

    So it is with the tokens of an embedding, and of a head that is too wide for a full `G`.
    """
    stats, simple = problem.stats, len(problem.matrix) == 1 and not problem.biased
    if stats is None or not simple or problem.site.transposed:
        return 0
    if problem.site.op == "embedding":
        return 2 if stats.H.dim() == 2 else 0
    return 1 if problem.site.op == "linear" and stats.G.dim() == 2 else 0


def _part(
    problem: Problem, weights: Weights, spread: Spread, pick: Array, side: int
) -> tuple[Problem, Weights, Spread]:
    """Return some rows or columns as a problem of their own, with the whole's distortion.

    Either way they are rows as stored. Statistics and factors are shared, not made again.
    """
    stats, counts = problem.stats, problem.counts
    assert stats is not None
    index = torch.from_numpy(pick)
    weight = weights["weight"][index]
    matrix, held = (
        np.ascontiguousarray(np.take(a, pick, side)) for a in (problem.matrix, problem.held)
    )
    inputs, outputs, H, G, rows, columns = (
        problem.inputs, problem.outputs, stats.H, stats.G, spread.rows, spread.columns,
    )  # fmt: skip
    if side == 2:
        inputs, H = Side(inputs.factor, inputs.root[:, pick]), H[:, index]
        counts = None if counts is None else counts[pick]
        columns = None if columns is None else columns[:, :, pick]
    else:
        outputs, G = Side(outputs.factor, outputs.root[:, pick]), G[:, index]
        rows = None if rows is None else rows[:, pick]
    own = LayerStats(H, G, None, stats.positions, stats.scale, stats.samples)
    site = replace(problem.site, shape=tuple(weight.shape))
    part = Problem(site, matrix, inputs, outputs, own, False, held, counts)
    return part, {"weight": weight}, Spread(rows, columns, spread.distortion)
