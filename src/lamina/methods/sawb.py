"""sawb: few-bit weights on a symmetric grid whose range follows from two statistics.

**What.** Statistics-aware weight binning. A weight becomes `clamp(round(w n / clip), -n, n) clip /
n` with n = 1, 3, 7 or 127 for 2, 3, 4 or 8 bits: an odd number of levels, so that 0 is one of them
and pruned weights stay pruned. `clip = c0 rms(w) + c1 mean|w|` (`"statistics"`), whose constants
were fitted to the best range of six distributions, or the range of least squared error (`"mse"`),
or any number (a recipe's: see below). With `rows` the range of each stored row differs, by quarter
octaves. The plain form with 2^b levels has no zero, and turns every pruned weight into one that is
`clip / 15` large: it exists for comparison only.

**Where.** The weight of every layer; a final method, biases are kept. The constants are for *dense*
tensors: the statistics of a masked one widen the range (zeros) or narrow it (survivors), and cost
up to five times the error. So a tensor with a third of zeros or more gets `"mse"` here, and recipes
give the number that the dense tensor had. Asked for by name only: `rdoq` puts errors where they
matter less, on the same kind of grid.

**Costs and predicts.** Entropy-coded integers and one step; error `1/2 tr(G dW H dW^T)` of the very
change. The point is not bytes but integers of few bits in a fixed range, which arithmetic needs.

**Does not help** latency without kernels for such integers. Without training, 4 bits in one range a
layer are a poor use of the bits.

**Reference.** Choi et al. 2019, "Accurate and efficient 2-bit quantized neural networks", MLSys;
the zero-preserving format: "Deep compression of pre-trained transformer models", NeurIPS 2022
(35:14140-14154), with the constants of its authors' published library; those of 3 bits are our own
fit. The same authors' PACT: arXiv:1805.06085.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from lamina import codecs
from lamina.artifact.records import view_shape
from lamina.errors import MethodError
from lamina.forms import Edit, Grid
from lamina.forms.values import exponent_scale
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Weights, weights_of
from lamina.methods.layers import check_served, edit_values, finite_weight, keep_values, misfit
from lamina.methods.offers import front, grid_bytes, offer_values, other_bytes
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network

# bits: (levels on either side of 0, c0, c1), zero-preserving
CONSTANTS = {
    2: (1, 2.6, -1.71),
    3: (3, 6.962, -6.329),
    4: (7, 12.035, -12.03),
    8: (127, 31.76, -35.04),
}
PLAIN_4 = (12.68, -12.80)  # of 16 levels without a zero
CLIPS = ("statistics", "mse")
MASKED = 1 / 3  # share of zeros from which statistics are not those of a dense tensor
TRIALS = 48  # ranges of a search, twice
ROW_OCTAVES = (-12, 12)  # quarter octaves of a row's range around the tensor's: [1/8, 8]
RECORD_BYTES = 2  # besides what a grid takes


def clip_by_statistics(weight: torch.Tensor, bits: int, rows: bool = False) -> torch.Tensor:
    """Return `c0 rms(w) + c1 mean|w|`, or the largest magnitude where that is not positive.

    Args:
        weight: dense (not masked), any shape.
        bits: 2, 3, 4 or 8.
        rows: one range for each `weight[i]`.

    Returns:
        a scalar, or `[rows]`; float32, without gradient.

    Example:
        >>> w = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
        >>> round(float(clip_by_statistics(w, 4)), 1)
        2.4
    """
    _, c0, c1 = _constants(bits)
    flat = weight.detach().to(torch.float32).reshape(weight.shape[0] if rows else 1, -1)
    rms, mean, most = flat.square().mean(1).sqrt(), flat.abs().mean(1), flat.abs().amax(1)
    clip = c0 * rms + c1 * mean
    clip = torch.where(clip > 0, clip.minimum(most), most)
    return clip if rows else clip[0]


def clip_by_search(weight: torch.Tensor, bits: int, rows: bool = False) -> torch.Tensor:
    """Return the range of least squared error, by a coarse and a fine search.

    Args: as for `clip_by_statistics`; a masked tensor will do: zeros make no error.
    """
    n = _constants(bits)[0]
    flat = weight.detach().to(torch.float32).reshape(weight.shape[0] if rows else 1, -1)
    most = flat.abs().amax(1, keepdim=True)
    best, around = most.clone(), torch.linspace(1 / TRIALS, 1.0, TRIALS)
    for fine in (False, True):
        middle, least = best.clone(), torch.full_like(most, torch.inf)
        shares = 1 + (around - 0.5) * (4 / TRIALS) if fine else around
        for share in shares.tolist():
            clip = (middle if fine else most) * share
            error = (round_to(flat, clip / n, n) - flat).square().sum(1, keepdim=True)
            better = (error < least) & (clip > 0)
            least, best = torch.where(better, error, least), torch.where(better, clip, best)
    return best[:, 0] if rows else best[0, 0]


def round_to(weight: torch.Tensor, step: torch.Tensor, n: int) -> torch.Tensor:
    """Return `clamp(round(w / step), -n, n) step`; 0 where the step is 0.

    Example:
        >>> round_to(torch.tensor([0.0, 0.3, -9.0]), torch.tensor(0.25), 7).tolist()
        [0.0, 0.25, -1.75]
    """
    return symbols_of(weight, step, n) * step


def symbols_of(weight: torch.Tensor, step: torch.Tensor, n: int) -> torch.Tensor:
    """Return the integers of weights, as floats."""
    # A step of 0 belongs to a tensor of zeros, and 0 / 1 is 0.
    return torch.round(weight / torch.where(step > 0, step, 1.0)).clamp(-n, n)


def plain_sawb(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight on the 16 levels of plain 4-bit SAWB, of which 0 is none (a control)."""
    rms, mean = weight.square().mean().sqrt(), weight.abs().mean()
    step = 2 * (PLAIN_4[0] * rms + PLAIN_4[1] * mean) / 15
    return (torch.floor(weight / step).clamp(-8, 7) + 0.5) * step


def grid_of(
    weight: torch.Tensor, bits: int, clip: str | float = "statistics", rows: bool = False,
    like: torch.Tensor | None = None,
) -> Grid:  # fmt: skip
    """Return a weight on its grid of few bits.

    Args:
        weight: any shape; zeros stay zero.
        bits: 2, 3, 4 or 8.
        clip: `"statistics"`, `"mse"`, or a number.
        rows: let ranges differ by row, around the mean one (of a number: around that).
        like: the dense tensor that statistics are taken from; default: the weight.

    Raises:
        MethodError: there is no such range.
    """
    n = _constants(bits)[0]
    source = weight if like is None else like
    if not isinstance(clip, str):
        whole, how = torch.tensor(float(clip)), "statistics"
    else:
        whole, how = _clip(source, bits, clip, False).cpu(), clip
    step, exponents = float(whole.to(torch.float32) / n), None
    if rows and weight.dim() > 1 and step > 0:
        exponents = exponents_around(whole, _clip(source, bits, how, True).cpu())
    grid = Grid(torch.zeros(weight.shape, dtype=torch.int32), step, exponents, 0, weight.dtype)
    return fill_grid(grid, weight, n)


def exponents_around(whole: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
    """Return the quarter octaves, int32, that take one range nearest to each of others.

    Example:
        >>> exponents_around(torch.tensor(1.0), torch.tensor([1.0, 2.1, 0.0])).tolist()
        [0, 4, -12]
    """
    octaves = torch.log2((each / whole).clamp_min(1e-30))
    return torch.round(4 * octaves).clamp(*ROW_OCTAVES).to(torch.int32)


def steps_by_row(weight: torch.Tensor, bits: int, clip: str) -> torch.Tensor:
    """Return the steps of `grid_of(..., rows=True)`, in a shape that fits; no integers are made."""
    whole, each = (_clip(weight, bits, clip, rows) for rows in (False, True))
    step = whole / _constants(bits)[0]
    if weight.dim() < 2 or not bool(step > 0):
        return step
    scales = exponent_scale(torch.arange(ROW_OCTAVES[0], ROW_OCTAVES[1] + 1)).to(weight.device)
    found = scales[exponents_around(whole, each).long() - ROW_OCTAVES[0]] * step
    return found.reshape(-1, *[1] * (weight.dim() - 1))


def fill_grid(grid: Grid, weight: torch.Tensor, n: int) -> Grid:
    """Return the grid with the integers of a weight."""
    symbols = symbols_of(weight.detach().cpu().to(torch.float32), steps_of(grid), n)
    return Grid(symbols.to(torch.int32), grid.step, grid.exponents, grid.axis, grid.dtype)


def steps_of(grid: Grid) -> torch.Tensor:
    """Return the step of every row, in a shape that fits the tensor, or the one there is."""
    step = torch.tensor(grid.step, dtype=torch.float32)
    if grid.exponents is None:
        return step
    scale = exponent_scale(grid.exponents) * step
    return scale.reshape(-1, *[1] * (grid.symbols.dim() - 1))


def _clip(weight: torch.Tensor, bits: int, how: str, rows: bool) -> torch.Tensor:
    search = clip_by_search if how == "mse" else clip_by_statistics
    return search(weight, bits, rows)


def _constants(bits: int) -> tuple[int, float, float]:
    if bits not in CONSTANTS:
        known = ", ".join(str(b) for b in CONSTANTS)
        raise MethodError("sawb does not have this width", f"bits={bits!r}", "", f"give {known}")
    return CONSTANTS[bits]


@dataclass(frozen=True)
class Sawb:
    """The method; see the card above."""

    name: str = "sawb"
    stage: Stage = Stage.VALUES
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset()
    reference: str = "Choi et al. 2019, MLSys (SAWB); NeurIPS 2022, 35:14140-14154"
    final: bool = True
    asked: bool = False  # only where it is named

    def refuse(self, site: Site) -> str:
        """Return why the site's values cannot be put on a grid, or `""`."""
        return "" if site.kind in self.kinds else f"it is a {site.kind}, not one layer"

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer every width, by either range, with one or many; dearest first.

        Raises:
            SiteError: the weights are not finite.
        """
        weight = finite_weight(site, weights)
        if not weight.numel():
            return ()
        matrix = as_matrix(site, weight)
        extra = RECORD_BYTES + other_bytes(weights)
        masked = float((weight == 0).double().mean()) >= MASKED
        offers = []
        for bits in CONSTANTS:
            for clip in CLIPS[1:] if masked else CLIPS:
                for rows in (False, True)[: min(weight.dim(), 2)]:
                    grid = grid_of(weight, bits, clip, rows)
                    change = as_matrix(site, grid.dense().to(weight.device) - weight)
                    error = predict_error(stats, matrix, change)
                    size = grid_bytes(grid, _length) + extra
                    settings = {"bits": bits, "clip": clip, "rows": rows}
                    offers.append(offer_values(self.name, site, weights, settings, size, error))
        return front(offers)[::-1]

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return nothing: a final method leaves no layer for later ones."""
        return ()

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return nothing: the layer's form stays."""
        return ()

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the weight's integers and step, and the bias as it is.

        Raises:
            SiteError: the site is not a layer, or its weights are not finite.
            MethodError: the settings do not fit.
        """
        site = choice.site
        check_served(self, site)
        bits, clip, rows = _read(choice.settings)
        weights = weights_of(network, site)
        grid = grid_of(finite_weight(site, weights), bits, clip, rows)
        return edit_values(site, {**keep_values(weights), "weight": grid})


def _length(symbols: NDArray[Any]) -> float:
    return codecs.length(symbols.reshape(view_shape(symbols.shape)))


def _read(settings: Settings) -> tuple[int, str | float, bool]:
    bits, clip, rows = settings.get("bits"), settings.get("clip", "mse"), settings.get("rows")
    number = isinstance(clip, (int, float)) and not isinstance(clip, bool) and 0 <= clip <= 1e30
    if bits not in CONSTANTS or not (clip in CLIPS or number) or rows not in (None, False, True):
        widths, clips = ", ".join(map(str, CONSTANTS)), ", ".join(CLIPS)
        fix = f"give bits of {widths}, clip of {clips} or a number, and rows"
        raise misfit("sawb", settings, fix)
    return int(bits), clip, bool(rows)  # type: ignore[arg-type]


method = Sawb()
