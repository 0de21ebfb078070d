"""rdoq: entropy-coded uniform quantization, with error feedback and the rate in the decision.

**What.** Every weight becomes `q * step` with an integer `q`, and the integers are entropy coded.
Weights are rounded one after another; what one rounding did to the output is taken back by those
that follow, along inputs (through `H`, as in GPTQ) and along outputs (through `G`, as in YAQA): see
`feedback.py`. Each q is, of the two nearest integers and 0, the one with the least
`error + lambda bits(q)` (RDOQ of video coding); `lambda` is `rate` times the slope of entropy-coded
quantization at high rate, so that the step alone spans the curve. A bias is one more input that is
always 1, and comes last: it takes up the mean error of its row.

**Where.** The weight and bias of every layer, after any other method; zeros stay zero.

**Costs and predicts.** Coded bytes of the very integers, plus the step; error
`1/2 tr(G dW H dW^T)` of the very change, bias included. `scale` may spread the steps in quarter
octaves: `rows` by output (`V_ii`), `columns` by input (`U_jj`, WaterSIC; embeddings: token
frequency, gently, since rare tokens must live).

**Does not help** latency or MACs (values are stored dense when loaded). Without statistics it is
plain rounding. Where `G` was measured on few samples, feedback through it fits their noise: hence
its strong damping. On LeNet-5 `scale` gained less than its bytes; on embeddings it saves a tenth.

**Reference.** Frantar et al. 2022 (GPTQ), arXiv:2210.17323, eq. 2-3; Tseng et al. 2025 (YAQA),
arXiv:2505.22988; Lifar et al. 2026 (WaterSIC), arXiv:2603.04956; Wiedemann et al. 2019
(DeepCABAC), arXiv:1907.11900.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lamina import codecs
from lamina.codecs.alike import ROWS, Curve, corrected, spread
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
from lamina.methods.rdoq.feedback import Array, Prices, code_lengths, feed_forward
from lamina.methods.rdoq.problem import Problem, Sides, diagonal_of, pose
from lamina.network.sites import Site, as_matrix, from_matrix
from lamina.network.source import Network

# Steps on offer, as log2(step / rms of the weights): dense where a fifth to five bits are spent.
COARSE = (*(k / 2 for k in range(9)), 5.0, 6.0)
ALIKE_OCTAVES = (-8.0, -5.0, -3.5, -2.5, -1.5, -0.75, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
FINEST, COARSEST = 5e-3, 50.0  # times the error made before: beyond these no step is tried there
OCTAVES = (-12.0, -8.0, -5.0, -3.5, -2.5, -1.5, -0.75, *COARSE)
SCALES = ("none", "rows", "columns")
EXACT, ANCHORS = 1 << 9, 4  # above so many symbols, only so many candidates are coded
MOST = 1 << 26  # the largest integer asked for; feedback may add to it
HEADER_BYTES = 4  # a step, in float32
EXPONENTS = (-6, 6)  # quarter octaves around the mean step: [0.35, 2.8]
FREQUENCY_POWER = -0.2  # of the step of an embedding's row


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


def exponents_of(problem: Problem, scale: str) -> Array | None:
    """Return quarter-octave exponents of the steps, `[groups, out, 1]` or `[groups, 1, in]`.

    Raises:
        MethodError: the file could not hold such exponents for this layer.
    """
    if scale == "none":
        return None
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
    exponents = np.clip(np.rint(4 * relative), *EXPONENTS).astype(np.int32)
    return np.expand_dims(exponents, axis)


@dataclass(frozen=True)
class Result:
    """A quantized layer: the form of each of its tensors, and the error [nats per sample]."""

    values: dict[str, Grid]
    error: float

    def size(self, count: Callable[[Array], float] = codecs.length) -> float:
        """Return the bytes of all tensors, their integers counted by `count`."""
        total = 0.0
        for grid in self.values.values():
            total += HEADER_BYTES + count(grid.symbols.numpy())
            if grid.exponents is not None:
                total += count(grid.exponents.numpy().reshape(1, -1))
        return total


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


def quantize(
    problem: Problem,
    weights: Weights,
    step: float,
    rate: float | None = None,
    scale: str = "none",
    backend: str = "auto",
) -> Result:
    """Quantize a layer at one step.

    Args:
        problem: the layer, from `pose`.
        weights: its tensors, as stored.
        step: grid step, a float32 value; its mean where `scale` spreads it.
        rate: lambda as a multiple of the high-rate slope; 0 rounds to the nearest, None is usual.
        scale: `"none"`, `"rows"` or `"columns"`.
        backend: of `feed_forward`.

    Raises:
        MethodError: the step is too fine for 32-bit integers, or the scale does not fit the layer.
    """
    rate = usual_rate(problem) if rate is None else rate
    if problem.matrix.size and float(np.abs(problem.matrix).max()) > step * MOST:
        raise MethodError("rdoq cannot use this step", problem.site.name, f"{step} is too fine")
    g, n, whole = problem.matrix.shape
    m = whole - problem.biased
    exponents = exponents_of(problem, scale)
    steps = np.full(problem.matrix.shape, step)
    if exponents is not None:
        spread = exponent_scale(torch.from_numpy(exponents.reshape(-1))).double().numpy()
        steps[:, :, :m] *= spread.reshape(exponents.shape)
    power = problem.outputs.power[:, :, None] * problem.inputs.power[:, None, :]
    distortion = float((power[:, :, :m] * steps[:, :, :m] ** 2).mean()) if g * n * m else 1.0
    # The bias at the same slope: all distortions equal (its step has little to do with `step`).
    bias_step = 0.0
    if problem.biased:
        bias_step = _float32(math.sqrt(distortion / float(power[:, :, m].mean())))
        steps[:, :, m] = bias_step
    del power
    prices = np.zeros(whole)
    nothing = np.zeros(problem.matrix.shape)
    free = Prices(prices, nothing, nothing, np.zeros(1))
    given = (problem.matrix, problem.inputs, problem.outputs, steps)
    symbols = feed_forward(*given, free, problem.held, backend)
    if rate > 0:
        prices[:m] = rate * math.log(2) / 6 * distortion
        lengths = code_lengths(symbols[:, :, :m], prices, int(problem.biased))
        symbols = feed_forward(*given, lengths, problem.held, backend)
    return _hold(problem, weights, symbols, step, exponents, scale, bias_step)


def _hold(
    problem: Problem, weights: Weights, symbols: Array, step: float, exponents: Array | None,
    scale: str, bias_step: float,
) -> Result:  # fmt: skip
    """Return integers as the forms of the stored tensors, with their error."""
    site, m = problem.site, problem.matrix.shape[2] - problem.biased
    stored = from_matrix(site, torch.from_numpy(symbols[:, :, :m])).contiguous()
    along = None if exponents is None else torch.from_numpy(exponents.reshape(-1).copy())
    axis = 1 if (scale == "rows") == _swapped(site) else 0
    weight = Grid(stored, step, along, axis, weights["weight"].dtype)
    values = {"weight": weight}
    dense = as_matrix(site, weight.dense().to("cpu", torch.float64))
    if "bias" in weights:
        bias = weights["bias"]
        if problem.biased:
            column = torch.from_numpy(symbols[:, :, m].reshape(tuple(bias.shape)).copy())
        else:  # a bias that is not one number per row of the matrices (transposed convolutions)
            power = float(problem.inputs.power.mean())
            bias_step = _float32(
                step * math.sqrt(power / (problem.stats.positions if problem.stats else 1))
            )
            column = torch.round(bias.detach().to("cpu", torch.float64) / bias_step).to(torch.int32)
        values["bias"] = Grid(column, bias_step, None, 1, bias.dtype)
    error = 0.0
    if problem.biased:
        shape = (*dense.shape[:2], 1)
        dense = torch.cat(
            [dense, values["bias"].dense().to("cpu", torch.float64).reshape(shape)], 2
        )
    elif "bias" in values:
        lost = values["bias"].dense().to("cpu", torch.float64) - weights["bias"].detach().to(
            "cpu", torch.float64
        )
        error += _bias_error(problem.stats, lost)
    matrix = torch.from_numpy(problem.matrix)
    error += predict_error(problem.stats, matrix, dense - matrix)
    return Result(values, error)


def _bias_error(stats: LayerStats | None, lost: torch.Tensor) -> float:
    """Return the error of a bias on its own: each output adds the rows that end in it."""
    if stats is None:
        return 0.0
    rows = diagonal_of(stats.G).to("cpu", torch.float64).reshape(lost.numel(), -1).sum(1)
    return 0.5 * stats.scale * stats.positions * float((rows * lost.reshape(-1) ** 2).sum())


def _float32(value: float) -> float:
    return float(np.float32(min(max(value, 1e-30), 1e30)))


@dataclass(frozen=True)
class Rdoq:
    """The method; see the card above."""

    name: str = "rdoq"
    stage: Stage = Stage.VALUES
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset({"input_gram", "output_gram"})
    reference: str = "Frantar et al. 2022, arXiv:2210.17323; Tseng et al. 2025, arXiv:2505.22988"
    final: bool = True

    def refuse(self, site: Site) -> str:
        """Return why the site cannot be quantized, or `""`."""
        return "" if site.kind in self.kinds else f"it is a {site.kind}, not one layer"

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer steps from very fine to nearly everything zero, by falling cost.

        Raises:
            SiteError: the weights are not finite.
        """
        if not weights["weight"].numel():
            return ()
        problem = pose(site, weights, stats)
        live, rms = _scale_of(problem)
        params = sum(tensor.numel() for tensor in weights.values())
        scales = ("none", "columns") if problem.counts is not None else ("none",)
        rate = usual_rate(problem)
        octaves = OCTAVES if live else (0.0,)
        offers = []
        for scale in scales:
            steps = [_float32(rms * 2**octave) for octave in octaves]
            results = [quantize(problem, weights, step, rate, scale) for step in steps]
            for step, result, size in zip(steps, results, sizes_of(results), strict=True):
                settings = {"step": step, "rate": rate, "scale": scale}
                chain = (Step(self.name, site.name, settings),)
                cost = Cost(params, 8 * size, site.macs)
                offers.append(Candidate(site.name, chain, cost, result.error))
        return _front(offers)

    def propose_alike(
        self, leaves: Sequence[Leaf], floors: Sequence[float]
    ) -> list[tuple[Candidate, ...]]:
        """Offer steps for layers alike, none that loses far less or far more than was lost before.

        Raises:
            SiteError: the weights are not finite.
        """
        exactly = set(spread(len(leaves), ROWS))
        sides: Sides = []
        lines: list[list[tuple[float, float, float]]] = []
        curves = []
        for i, (leaf, floor) in enumerate(zip(leaves, floors, strict=True)):
            problem = pose(leaf.site, leaf.weights, leaf.stats, sides)
            live, rms = _scale_of(problem)
            rate, tried = usual_rate(problem), dict[float, Result]()
            for octave in _octaves(tried, floor) if live else (0.0,):
                step = _float32(rms * 2**octave)
                tried[octave] = quantize(problem, leaf.weights, step, rate)
            octaves = sorted(tried)
            results = [tried[octave] for octave in octaves]
            length = Result.size if i in exactly else None
            curves.append(Curve.of(octaves, results, _quick_size, length))
            lines.append([(r.values["weight"].step, rate, r.error) for r in results])
        found = []
        for leaf, line, sizes in zip(leaves, lines, corrected(curves), strict=True):
            params = sum(tensor.numel() for tensor in leaf.weights.values())
            offers = []
            for (step, rate, error), size in zip(line, sizes, strict=True):
                settings = {"step": step, "rate": rate, "scale": "none"}
                chain = (Step(self.name, leaf.site.name, settings),)
                cost = Cost(params, 8 * size, leaf.site.macs)
                offers.append(Candidate(leaf.site.name, chain, cost, error))
            found.append(_front(offers))
        return found

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return nothing: a final method leaves no layer for later ones."""
        return ()

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return nothing: the layer's form stays."""
        return ()

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the integers and steps of the weight and the bias.

        Raises:
            SiteError: the site is not a layer, or its weights are not finite.
            MethodError: the settings do not fit.
        """
        site = choice.site
        if why := self.refuse(site):
            raise SiteError(f"{self.name} cannot serve this site", site.name, why)
        step, rate, scale = _read(choice.settings)
        weights = weights_of(network, site)
        result = quantize(pose(site, weights, stats), weights, step, rate, scale)
        names = {"weight": site.weight, "bias": site.bias}
        return [Edit(names[key], "values", values=grid) for key, grid in result.values.items()]


def _scale_of(problem: Problem) -> tuple[bool, float]:
    """Return whether any weight is not zero, and the root mean square of those that are not."""
    live = problem.matrix[problem.matrix != 0]
    return bool(live.size), math.sqrt(float((live**2).mean())) if live.size else 1.0


def _octaves(tried: Mapping[float, Result], floor: float) -> Iterator[float]:
    """Yield octaves of steps for one of layers alike, from the middle outwards.

    Args:
        tried: what the steps yielded so far gave.
        floor: the error made before; steps that lose far less, or far more, help nobody.
    """
    start = ALIKE_OCTAVES.index(0.0)
    for octave in ALIKE_OCTAVES[start::-1]:
        yield octave
        if tried[octave].error <= FINEST * floor:
            break
    for octave in ALIKE_OCTAVES[start + 1 :]:
        if floor > 0 and tried[max(tried)].error > COARSEST * floor and len(tried) > 2:
            break
        yield octave


def _quick_size(result: Result) -> float:
    return result.size(codecs.estimate)


def _read(settings: Settings) -> tuple[float, float | None, str]:
    step, rate, scale = settings.get("step"), settings.get("rate"), settings.get("scale", "none")
    good = isinstance(step, (int, float)) and 1e-30 <= step <= 1e30 and scale in SCALES
    if not good or not (rate is None or (isinstance(rate, (int, float)) and 0 <= rate < math.inf)):
        why = f"give step > 0, rate >= 0 and scale of {', '.join(SCALES)}"
        raise MethodError("rdoq does not have these settings", repr(dict(settings)), "", why)
    return _float32(float(step)), None if rate is None else float(rate), str(scale)  # type: ignore[arg-type]


def _front(offers: list[Candidate]) -> tuple[Candidate, ...]:
    """Keep the offers that no cheaper one beats, dearest first."""
    front: list[Candidate] = []
    for offer in sorted(offers, key=lambda c: (c.cost.bits, c.error)):
        if not front or offer.error < front[-1].error:
            front.append(offer)
    return tuple(reversed(front))


method = Rdoq()
