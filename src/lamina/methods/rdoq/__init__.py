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
frequency, gently, since rare tokens must live), or `both`. Of a long layer only some steps are
rounded, and offers between them interpolated; the scale is the best at one step (`curves.py`).

**Does not help** latency or MACs (values are stored dense when loaded). Without statistics it is
plain rounding. Where `G` was measured on few samples, feedback through it fits their noise: hence
its strong damping. On short layers `scale` gains less than its bytes: it is tried on long ones.

**Reference.** Frantar et al. 2022 (GPTQ), arXiv:2210.17323, eq. 2-3; Tseng et al. 2025 (YAQA),
arXiv:2505.22988; Lifar et al. 2026 (WaterSIC), arXiv:2603.04956; Wiedemann et al. 2019
(DeepCABAC), arXiv:1907.11900.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lamina import codecs
from lamina.codecs.alike import ROWS, Curve, corrected, spread
from lamina.forms import Edit
from lamina.measure.stats import LayerStats
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Weights, weights_of
from lamina.methods.layers import check_served, edit_values, misfit
from lamina.methods.offers import front, offer_values
from lamina.methods.rdoq.curves import (
    HUGE,
    LONG,
    MANY,
    best_scale,
    curve_of,
    scale_of_weights,
    sizes_of,
)
from lamina.methods.rdoq.problem import Sides, pose
from lamina.methods.rdoq.rounding import (
    SCALES,
    Result,
    float32,
    quantize,
    scales_for,
    usual_rate,
)
from lamina.network.sites import Site
from lamina.network.source import Network

__all__ = ["Rdoq", "Result", "method", "quantize", "sizes_of"]

ALIKE_OCTAVES = (-8.0, -5.0, -3.5, -2.5, -1.5, -0.75, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
FINEST, COARSEST = 5e-3, 50.0  # times the error made before: beyond these no step is tried there


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
        rate = usual_rate(problem)
        scales: tuple[str, ...] = ("none",)
        if stats is not None and problem.matrix.size > HUGE:
            scales = scales_for(problem)[-1:]
        elif problem.counts is not None:
            scales = ("none", "columns")
        elif stats is not None and problem.matrix.size > LONG:
            scales = (best_scale(problem, weights, rate, scales_for(problem)),)
        offers = []
        curves = [(scale, False) for scale in scales]
        if scales[0] != "none" and problem.matrix.size <= MANY:
            curves.append(("none", True))
        for scale, coarse in curves:
            for point in curve_of(problem, weights, rate, scale, coarse):
                settings = {"step": point.step, "rate": rate, "scale": scale}
                given = (self.name, site, weights, settings)
                offers.append(offer_values(*given, point.size, point.error))
        return front(offers)[::-1]

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
            live, rms = scale_of_weights(problem)
            rate, tried = usual_rate(problem), dict[float, Result]()
            for octave in _octaves(tried, floor) if live else (0.0,):
                step = float32(rms * 2**octave)
                tried[octave] = quantize(problem, leaf.weights, step, rate)
            octaves = sorted(tried)
            results = [tried[octave] for octave in octaves]
            length = Result.size if i in exactly else None
            curves.append(Curve.of(octaves, results, _quick_size, length))
            lines.append([(r.values["weight"].step, rate, r.error) for r in results])
        found = []
        for leaf, line, sizes in zip(leaves, lines, corrected(curves), strict=True):
            offers = []
            for (step, rate, error), size in zip(line, sizes, strict=True):
                settings = {"step": step, "rate": rate, "scale": "none"}
                given = (self.name, leaf.site, leaf.weights, settings)
                offers.append(offer_values(*given, size, error))
            found.append(front(offers)[::-1])
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
        check_served(self, site)
        step, rate, scale = _read(choice.settings)
        weights = weights_of(network, site)
        result = quantize(pose(site, weights, stats), weights, step, rate, scale)
        return edit_values(site, result.values)


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
        fix = f"give step > 0, rate >= 0 and scale of {', '.join(SCALES)}"
        raise misfit("rdoq", settings, fix)
    return float32(float(step)), None if rate is None else float(rate), str(scale)  # type: ignore[arg-type]


method = Rdoq()
