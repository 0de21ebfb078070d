"""int8: compute a linear layer with 8-bit integers.

**What.** The layer becomes one that multiplies integers (A8W8, dynamic): its weight rounded to
8-bit integers with one scale per output, a power of 2^(1/4); its input, at every forward pass and
row by row (token by token), to 255 levels between its least and its largest value.

**Where.** Linear layers, Hugging Face's Conv1D and the factors of a low rank pair; not the blocks
of a grouped one. A step of stage VALUES; then `keep` stores the integers, `rdoq` and `kmeans`
coarser values. Values on one grid of up to 127 steps, as `rdoq` makes them, are taken as they are.
Asked where a budget limits latency, or by name.

**Costs and predicts.** Bytes of the coded integers. Parameters and MACs stay; seconds are measured.
The error is `1/2 tr(G dW H dW^T)` of the rounded weight, plus what the rounded input adds to the
output, `1/2 tr(G W D W^T)`: D is a step^2 / 12, the step that of an input with Gaussian channels of
the measured means and variances. Data-free: the relative spectral error plus that of a rounded
Gaussian input.

**Does not help** on machines without 8-bit products of vectors (there the result is the same, the
speed that of floats), nor for few rows on small layers: where it is not faster as measured, a plan
for latency leaves it out. Inputs with a few channels far larger than the rest lose most.

**Reference.** Jacob et al. 2018, arXiv:1712.05877, eq. 1-4 (integer products); Yao et al. 2022
(ZeroQuant), arXiv:2206.01861, section 4.2 (rows of the input rounded each by itself).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lamina.forms import Edit, grid_of
from lamina.measure.stats import LayerStats, diagonal_of, predict_error
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Weights, weights_of
from lamina.methods.layers import (
    CONV1D,
    check_served,
    edit_values,
    finite_weight,
    misfit,
    why_no_form,
)
from lamina.methods.offers import grid_bytes, offer_values, other_bytes
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network

BITS = 8
LEVELS = 254  # steps in the range of a row of the input
HALVINGS = 50  # of the search for a range
TIED = "tied with"  # says discovery; it computes with the very parameter, which stays tied


@dataclass(frozen=True)
class Int8:
    """The method; see the card above."""

    name: str = "int8"
    stage: Stage = Stage.VALUES
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset({"input_gram", "output_gram"})
    reference: str = "Jacob et al. 2018, arXiv:1712.05877; Yao et al. 2022, arXiv:2206.01861"
    final: bool = False
    asked: bool = False  # only where it is named, or where
    saves_time: bool = True  # seconds count

    def refuse(self, site: Site) -> str:
        """Return why the layer cannot compute with integers, or `""`."""
        free = replace(site, rigid="") if site.rigid.startswith(TIED) else site
        return why_no_form(free, "layer of integers", ("linear",), unless=CONV1D)

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer the one candidate there is.

        Raises:
            SiteError: the weights are not finite.
        """
        weight = finite_weight(site, weights)
        if not weight.numel():
            return ()
        grid = grid_of(weight, site.transposed)
        matrix, rounded = as_matrix(site, weight).double(), as_matrix(site, grid.dense()).double()
        error = predict_error(stats, matrix, rounded - matrix) + input_error(matrix[0], stats)
        size = grid_bytes(grid) + other_bytes(weights)
        return (offer_values(self.name, site, weights, {"bits": BITS}, size, error),)

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return the same layer with its rounded weight; its form is its own from now on."""
        _check(settings)
        weight = finite_weight(site, weights)
        weight = grid_of(weight, site.transposed).dense().to(weight.device)
        place = replace(site, rigid="it computes with integers")
        return (Leaf(place, {**weights, "weight": weight}, stats),)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return the edit that changes what the layer computes with."""
        _check(settings)
        return (Edit(site.module, "int8", {"bits": BITS}),)

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the form, then the rounded weight.

        Raises:
            SiteError: the site is refused, or its weights are not finite.
            MethodError: there are settings.
        """
        site = choice.site
        check_served(self, site)
        edits = self.structure(site, choice.settings)
        weight = finite_weight(site, weights_of(network, site))
        return [*edits, *edit_values(site, {"weight": grid_of(weight, site.transposed)})]


def input_error(matrix: torch.Tensor, stats: LayerStats | None) -> float:
    """Return what rounding the input of a layer is predicted to cost.

    Args:
        matrix: the weight, `[out, in]`.
        stats: of the layer.

    Returns:
        [nats per sample]; data-free the relative error of the output.
    """
    matrix = matrix.detach().cpu().double()
    if stats is None or stats.positions <= 0:
        deep = 2 * math.sqrt(2 * math.log(max(2, matrix.shape[1])))
        return deep / LEVELS / math.sqrt(12)
    second = diagonal_of(stats.H)[0].cpu().double() / stats.positions
    mean = torch.zeros_like(second)
    if stats.mean is not None:
        mean = stats.mean[0].cpu().double()[: len(second)] / stats.positions
    spread = (second - mean**2).clamp_min(0).sqrt()
    step = (reach(mean, spread) + reach(-mean, spread)) / LEVELS
    variance = max(0.0, step) ** 2 / 12
    noise = replace(stats, H=torch.full_like(second, variance * stats.positions)[None])
    return predict_error(noise, matrix[None], matrix[None])


def reach(mean: torch.Tensor, spread: torch.Tensor) -> float:
    """Return about the largest of independent Gaussians: half of the time none is above.

    Args:
        mean, spread: `[channels]`, float64.

    Example:
        >>> one = torch.ones(1000, dtype=torch.float64)
        >>> round(reach(0 * one, one), 1)
        3.2
    """
    low, high = float((mean + 0 * spread).max()), float((mean + 10 * spread).max())
    wide = spread.clamp_min(1e-300)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        none = torch.special.log_ndtr((middle - mean) / wide).sum()
        low, high = (middle, high) if float(none) < math.log(0.5) else (low, middle)
    return high


def _check(settings: Settings) -> None:
    if dict(settings) != {"bits": BITS}:
        raise misfit("int8", settings, f"give bits={BITS}, and nothing else")


method = Int8()
