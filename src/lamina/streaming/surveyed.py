"""What a layer with statistics offers: all of a short one, and of a long one a few of its outputs.

With a diagonal `G` the outputs of a layer do not see each other, so that a few rows of its matrix,
quantized with the whole input moment, tell size and error of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from lamina.errors import MethodError
from lamina.measure.stats import LayerStats
from lamina.methods.base import Candidate, Method
from lamina.network.lazy import Lazy
from lamina.network.sites import Site, as_matrix
from lamina.plan.chains import pareto, propose_site
from lamina.streaming.sampled import SHORT, weights_of

ROWS_OF = 1 << 17  # weights of a sample


def check_final(methods: Sequence[Method]) -> None:
    """Refuse methods that change a layer's form: later blocks need their outputs as they were.

    Raises:
        MethodError: one is not final.
    """
    for method in methods:
        if not method.final:
            raise MethodError(
                f"{method.name} does not go with streaming", "",
                "blocks are calibrated one after another, with layers of their own form",
                "use rdoq, kmeans or keep, or open the folder as a whole (stream=False)",
            )  # fmt: skip


def survey_layer(
    lazy: Lazy, site: Site, stats: LayerStats, methods: Sequence[Method]
) -> tuple[Candidate, ...]:
    """Return a layer's candidates.

    Raises:
        SiteError: its weights are not finite.
    """
    weights = weights_of(lazy, site)
    if math.prod(site.shape) <= SHORT:
        return propose_site(site, weights, stats, methods)
    groups, out, inner = site.matrix_shape
    few = max(4, ROWS_OF // inner)
    if groups > 1 or few >= out or site.op == "conv_transpose":
        return propose_site(site, weights, stats, methods)
    rows = torch.linspace(0, out - 1, few).long()
    matrix = as_matrix(site, weights["weight"])[0][rows].clone()
    embedding = site.op == "embedding"
    part = replace(
        site, op="embedding" if embedding else "linear", transposed=False, rigid="",
        shape=(inner, few) if embedding else (few, inner), aliases=(),
    )  # fmt: skip
    some = {"weight": matrix.T.contiguous() if embedding else matrix}
    if "bias" in weights:
        some["bias"] = weights["bias"].reshape(-1)[rows].clone()
    seen = replace(stats, G=stats.G[:, rows])
    times = out / few
    return pareto(
        replace(
            c, error=c.error * times,
            cost=replace(c.cost, bits=c.cost.bits * times, params=_count(weights), macs=site.macs),
        )
        for c in propose_site(part, some, seen, methods)
    )  # fmt: skip


def _count(weights: dict[str, torch.Tensor]) -> float:
    return float(sum(tensor.numel() for tensor in weights.values()))
