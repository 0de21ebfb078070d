"""keep: store a layer's values as they are.

**What.** Every value stays bit for bit, in its own dtype. A tensor with many exact zeros is held
as a coded pattern and its non-zeros, one of 8-bit integers (see `int8`) as those and their scales,
one that was opened from a file of 4- to 8-bit integers (GGUF) as those, their steps and their least
values, where that is smaller.

**Where.** Every layer site; the end of a chain that only changes a layer's form or its zeros.

**Costs and predicts.** One candidate, error exactly 0: the lossless end of every site's curve. Its
size is that of the values, split in planes where that is shorter, or for a sparse tensor the coded
0/1 pattern plus that of the non-zeros; of long tensors it is predicted from a sample. Parameters
and MACs are those of the dense layer: zeros inside a tensor save bytes, not arithmetic.

**Does not help** dense weights much: float mantissas are noise to a coder. For bytes use `rdoq` or
`kmeans`.

**Reference.** Han, Mao, Dally 2016, arXiv:1510.00149, section 2, stores a pruned layer as pattern
and non-zeros; here the pattern is entropy coded instead of relatively indexed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamina.artifact.exact import exact, exact_bytes
from lamina.forms import Affine, Edit, Grid, Plain, Sparse, find_grid
from lamina.measure.stats import LayerStats
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Weights, weights_of
from lamina.methods.layers import check_served, edit_values
from lamina.methods.offers import grid_bytes, offer_values, sparse_bytes
from lamina.network.sites import Site
from lamina.network.source import Network

FEWEST_ZEROS = 0.05  # below this share of zeros a pattern is not worth looking at


def hold(tensor: torch.Tensor) -> tuple[Plain | Affine | Sparse | Grid, float]:
    """Return the smaller exact form of a tensor, and its size [bytes].

    A sparse tensor's negative zeros become zeros: the pattern cannot tell them apart.

    Example:
        >>> hold(torch.eye(64))[0].__class__.__name__
        'Sparse'
    """
    held = exact(tensor)
    plain = exact_bytes(held)
    grid = None if isinstance(held, Affine) else find_grid(tensor)
    if grid is not None and (size := grid_bytes(grid)) < plain:
        return grid, size
    zeros = tensor == 0
    if tensor.numel() and float(zeros.double().mean()) > FEWEST_ZEROS:
        sparse = sparse_bytes(tensor)
        if sparse < plain:
            return Sparse(tensor.masked_fill(zeros, 0)), sparse
    return held, plain


@dataclass(frozen=True)
class Keep:
    """The method; see the card above."""

    name: str = "keep"
    stage: Stage = Stage.VALUES
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset()
    reference: str = "Han, Mao, Dally 2016, arXiv:1510.00149"
    final: bool = True

    def refuse(self, site: Site) -> str:
        """Return why the site cannot be kept, or `""`."""
        return "" if site.kind in self.kinds else f"it is a {site.kind}, not one layer"

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer the one candidate there is."""
        size = sum(hold(tensor)[1] for tensor in weights.values())
        return (offer_values(self.name, site, weights, {}, size, 0.0),)

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return nothing: a final method leaves no layer for later ones."""
        return ()

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return nothing: the layer's form stays."""
        return ()

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the values of every tensor of the site.

        Raises:
            SiteError: the site is not a layer.
        """
        site = choice.site
        check_served(self, site)
        return edit_values(site, {k: hold(t)[0] for k, t in weights_of(network, site).items()})


method = Keep()
