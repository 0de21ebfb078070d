"""In which metric a pair is made: the loss's (the default), the weights' own, or the outputs'.

`"weights"` ignores the statistics, as the published method does; `"outputs"` is PCA of what the
layer gives, to compare with. Neither is proposed: for the predicted loss the default is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lamina.errors import MethodError
from lamina.measure.low_rank import damp, factorize
from lamina.measure.pca import principal_bias, principal_pair
from lamina.measure.schemes import Scheme
from lamina.measure.stats import LayerStats
from lamina.methods.alds.leaves import about_mean, shifted_bias
from lamina.methods.layers import misfit
from lamina.network.sites import Site

METRICS = ("loss", "weights", "outputs")


def read_metric(site: Site, settings: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the metric, and whether the pair gets a bias that the layer does not have.

    Raises:
        MethodError: there is no such metric, or it does not go with the other settings.
    """
    metric, more = settings.get("metric", "loss"), settings.get("bias", 0)
    why = ""
    if metric not in METRICS:
        why = f"the metric is one of {', '.join(METRICS)}"
    elif metric == "outputs" and (settings.get("folds", 1) != 1 or settings.get("scheme", 0)):
        why = "the outputs' metric has one fold and scheme 0"
    elif type(more) is not int or more not in (0, 1) or (more and metric != "outputs"):
        why = "a bias is 0 or 1, and only the outputs' metric adds one"
    if why:
        raise misfit("alds", settings, why, site)
    return metric, bool(more) and not site.bias


def with_bias(site: Site) -> Site:
    """Return the site as if its layer had a bias."""
    return site if site.bias else replace(site, bias=f"{site.module}.bias")


def factors_of(
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    stats: LayerStats | None,
    metric: str,
    folds: int,
    rank: int,
    scheme: Scheme,
    dtype: torch.dtype,
    added: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the encoding and the decoding weights and the bias of a pair, in a dtype.

    Args:
        matrix: `[f, c K]`, float64; bias: `[f]` or None.
        stats: of the layer; None: data-free.
        metric: from `read_metric`, with whether a bias is `added`.
        folds, rank, scheme: of the pair.
        dtype: of the weights.

    Raises:
        MethodError: there are no statistics, and the metric needs them.
    """
    if metric == "outputs":
        if stats is None:
            raise MethodError(
                "the outputs' metric needs statistics", "", "nothing was calibrated", "give data"
            )
        encode, decode = (part.to(dtype) for part in principal_pair(matrix, stats, rank))
        if bias is None and not added:
            return encode, decode, None
        moved = principal_bias(bias, matrix, decode.double() @ encode[0].double(), stats)
        return encode, decode, moved.to(dtype if bias is None else bias.dtype)
    seen, mean = (stats, None) if metric == "loss" else (None, None)
    if seen is not None and bias is not None:  # a bias takes up the mean of what is lost
        seen, mean = about_mean(seen)
    H = damp(seen.H[0]) if seen is not None else None
    G = damp(seen.G[0]) if seen is not None else None
    factors = factorize(matrix, H, G, folds, rank, scheme)
    encode, decode = (part.to(dtype) for part in factors)
    if bias is not None:
        bias = shifted_bias(bias, matrix, mean, encode, decode, scheme)
    return encode, decode, bias
