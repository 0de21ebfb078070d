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

from lamina import codecs
from lamina.artifact.records import values_bytes
from lamina.errors import MethodError, SiteError
from lamina.forms import Edit, Grid, grid_of
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
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network

BITS = 8
LEVELS = 254  # steps in the range of a row of the input
HEADER_BYTES = 4  # a step
HALVINGS = 50  # of the search for a range
NO_FORM = "no form replaces a Conv1D"  # says discovery; this one does,
TIED = "tied with"  # and it computes with the very parameter, which stays tied


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
        if site.kind not in self.kinds:
            return f"it is a {site.kind}, not one layer"
        if site.op != "linear":
            return f"there is no product of integers for the operation {site.op}"
        if site.rigid and not site.rigid.startswith(TIED) and site.rigid != NO_FORM:
            return site.rigid
        if site.groups != 1:
            return f"its {site.groups} blocks are multiplied one by one"
        return "" if site.module else "it is the whole network, and a form needs a place to be in"

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer the one candidate there is.

        Raises:
            SiteError: the weights are not finite.
        """
        weight = _finite(site, weights["weight"])
        if not weight.numel():
            return ()
        grid = grid_of(weight, site.transposed)
        matrix = as_matrix(site, weight)
        rounded = as_matrix(site, grid.dense())
        error = predict_error(stats, matrix, rounded.double() - matrix.double())
        error += input_error(matrix[0], stats)
        size = _bytes(grid) + sum(values_bytes(t) for k, t in weights.items() if k != "weight")
        cost = Cost(sum(t.numel() for t in weights.values()), 8 * size, site.macs)
        return (Candidate(site.name, (Step(self.name, site.name, {"bits": BITS}),), cost, error),)

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return the same layer with its rounded weight; its form is its own from now on."""
        _check(settings)
        weight = grid_of(_finite(site, weights["weight"]), site.transposed).dense()
        weight = weight.to(weights["weight"].device)
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
        if why := self.refuse(site):
            raise SiteError(f"{self.name} cannot serve this site", site.name, why)
        edits = list(self.structure(site, choice.settings))
        weight = _finite(site, weights_of(network, site)["weight"])
        return [*edits, Edit(site.weight, "values", values=grid_of(weight, site.transposed))]


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
    second = _diagonal(stats.H)[0].cpu().double() / stats.positions
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


def _diagonal(moment: torch.Tensor) -> torch.Tensor:
    return moment if moment.dim() == 2 else moment.diagonal(dim1=-2, dim2=-1)


def _bytes(grid: Grid) -> float:
    size = HEADER_BYTES + codecs.length(grid.symbols.numpy())
    if grid.exponents is not None:
        size += codecs.length(grid.exponents.numpy().reshape(1, -1))
    return float(size)


def _check(settings: Settings) -> None:
    if dict(settings) != {"bits": BITS}:
        why = f"give bits={BITS}, and nothing else"
        raise MethodError("int8 does not have these settings", repr(dict(settings)), "", why)


def _finite(site: Site, weight: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise SiteError(
            "the weights are not finite", site.name, "NaN or inf has no integer",
            "mend the network",
        )  # fmt: skip
    return weight


method = Int8()
