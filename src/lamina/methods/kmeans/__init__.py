"""kmeans: let the weights of a layer share a few values (a codebook).

**What.** Every weight becomes the nearest of k centroids; the file holds the entropy-coded indices
and k float32 values. The centroids come from the exact optimum over a histogram of 4,096 bins
(dynamic programme with divide and conquer) and are then refined on the weights themselves. With
statistics the squared distances may be weighted by `G_ii H_jj` (setting `weighted`), the diagonal
of the error currency; whichever predicts less is offered. Exact zeros stay zero: where a layer has
any, one centroid is 0 and does not move, so that pruned layers stay pruned.

**Where.** The weight of every layer, whatever its operation. Biases are kept as they are. A final
method of stage VALUES.

**Costs and predicts.** `coded indices + 4 k + 1` bytes, and the bias; parameters and MACs are those
of the dense layer. The error is `1/2 tr(G dW H dW^T)` of the shared weights themselves.

**Does not help** as much as `rdoq` on most layers: no error feedback, and centroids that follow the
density spend the rate where entropy coding would have saved it. It is the better form where few
values are wanted (k <= 16, look-up arithmetic), or where a layer has few distinct values already:
then it is exact.

**Reference.** Han, Mao, Dally 2016, arXiv:1510.00149, section 3 (eq. 2: within-cluster squares);
weighting: Choi, El-Khamy, Lee 2017, arXiv:1612.01543, eq. 9; the exact programme: Wu 1991,
"Optimal quantization by matrix searching", J. Algorithms 12(4), and Groenlund et al. 2017,
arXiv:1701.07204.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lamina import codecs
from lamina.codecs.alike import ROWS, Curve, corrected, spread
from lamina.errors import MethodError
from lamina.forms import Codebook, Edit
from lamina.measure.stats import LayerStats, diagonal_of, predict_error
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Weights, weights_of
from lamina.methods.kmeans.centroids import Ints, assign, fit_centroids
from lamina.methods.layers import check_finite, check_served, edit_values, keep_values
from lamina.methods.offers import offer_values, other_bytes
from lamina.network.sites import Site, as_matrix, from_matrix
from lamina.network.source import Network

__all__ = ["KMeans", "assign", "codebook_bits", "fit_centroids", "method", "shared", "sizes_of"]

SIZES = (2, 4, 8, 16, 32, 64, 256)
ALIKE_SIZES = (4, 8, 16)
EXACT_SIZE = 1 << 9  # symbols up to which every codebook is coded
ANCHORS = 3  # codebooks of a longer tensor that are coded


@dataclass(frozen=True)
class KMeans:
    """The method; see the card above."""

    name: str = "kmeans"
    stage: Stage = Stage.VALUES
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset()
    reference: str = "Han, Mao, Dally 2016, arXiv:1510.00149"
    final: bool = True

    def refuse(self, site: Site) -> str:
        """Return why the site's values cannot be shared, or `""`."""
        return "" if site.kind in self.kinds else f"it is a {site.kind}, not one layer"

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer every codebook size, cheapest first; a larger one that is no better is left out.

        Raises:
            SiteError: the weights are not finite.
        """
        weight = weights["weight"]
        if not weight.numel():
            return ()
        matrix = as_matrix(site, weight)
        extra = other_bytes(weights)
        offers: list[tuple[float, float, Settings, Codebook]] = []
        for weighted in (False, True) if stats is not None else (False,):
            forms = shared(site, weight, stats, SIZES, weighted)
            for size, form in zip(SIZES, forms, strict=True):
                error = predict_error(stats, matrix, as_matrix(site, form.dense() - weight))
                settings = {"k": size, "weighted": weighted}
                offers.append((codebook_bits(form, codecs.estimate), error, settings, form))
        front: list[tuple[float, float, Settings, Codebook]] = []
        for offer in sorted(offers, key=lambda o: o[:2]):
            if not front or offer[1] < front[-1][1]:
                front.append(offer)
        bits = np.maximum.accumulate(sizes_of([offer[3] for offer in front])).tolist()
        return tuple(
            offer_values(self.name, site, weights, settings, size / 8 + extra, error)
            for size, (_, error, settings, _) in zip(bits, front, strict=True)
        )

    def propose_alike(
        self, leaves: Sequence[Leaf], floors: Sequence[float]
    ) -> list[tuple[Candidate, ...]]:
        """Offer a few codebook sizes for layers alike, weighted where there are statistics.

        Raises:
            SiteError: the weights are not finite.
        """
        exactly = set(spread(len(leaves), ROWS))
        places = [float(size) for size in ALIKE_SIZES]
        lost, curves = [], []
        for i, leaf in enumerate(leaves):
            weight, weighted = leaf.weights["weight"], leaf.stats is not None
            forms = shared(leaf.site, weight, leaf.stats, ALIKE_SIZES, weighted)
            matrix = as_matrix(leaf.site, weight)
            deltas = (as_matrix(leaf.site, form.dense() - weight) for form in forms)
            lost.append([predict_error(leaf.stats, matrix, delta) for delta in deltas])
            curves.append(Curve.of(places, forms, _quick_bytes, _bytes if i in exactly else None))
        found = []
        for leaf, errors, sizes in zip(leaves, lost, corrected(curves), strict=True):
            extra = other_bytes(leaf.weights)
            offers: list[Candidate] = []
            for k, error, length in zip(ALIKE_SIZES, errors, sizes, strict=True):
                settings, size = {"k": k, "weighted": leaf.stats is not None}, length + extra
                one = offer_values(self.name, leaf.site, leaf.weights, settings, size, error)
                last = offers[-1] if offers else None
                if last is None or (error < last.error and one.cost.bits > last.cost.bits):
                    offers.append(one)
            found.append(tuple(offers))
        return found

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return nothing: a final method leaves no layer for later ones."""
        return ()

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        return ()  # the layer's form stays

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the codebook of the weight, and the bias as it is.

        Raises:
            SiteError: the site is not a layer, or its weights are not finite.
            MethodError: the settings do not fit.
        """
        site = choice.site
        check_served(self, site)
        size, weighted = choice.settings.get("k"), bool(choice.settings.get("weighted", False))
        if not isinstance(size, int) or not 2 <= size <= 256:
            raise MethodError("kmeans does not have this k", repr(size), "", "k is 2 to 256")
        weights = weights_of(network, site)
        (form,) = shared(site, weights["weight"], stats, (size,), weighted)
        return edit_values(site, {**keep_values(weights), "weight": form})


def shared(
    site: Site,
    weight: torch.Tensor,
    stats: LayerStats | None,
    sizes: Sequence[int],
    weighted: bool,
) -> list[Codebook]:
    """Return the weight as a codebook of each size.

    Raises:
        SiteError: the weights are not finite.
        MethodError: a weighted fit is asked for without statistics.
    """
    check_finite(site.name, weight)
    importance = None
    if weighted:
        if stats is None:
            raise MethodError("weighted k-means needs statistics", site.name, "this run has none")
        h, g = diagonal_of(stats.H), diagonal_of(stats.G)
        both = (g[:, :, None] * h[:, None, :]).clamp_min(0)
        importance = from_matrix(site, both).cpu().numpy()
    values = weight.detach().to(torch.float64).cpu().numpy()
    forms = []
    for centroids in fit_centroids(values, sizes, importance):
        index = assign(values, centroids)
        # Smallest first: zero is symbol 0, whose pattern in rows and columns the coder can use.
        used = np.unique(index)
        used = used[np.argsort(np.abs(centroids[used]), kind="stable")]
        symbol = np.zeros(len(centroids), dtype=np.int32)
        symbol[used] = np.arange(len(used), dtype=np.int32)
        table = torch.from_numpy(centroids[used])
        forms.append(Codebook(torch.from_numpy(symbol[index]), table, weight.dtype))
    return forms


def codebook_bits(form: Codebook, count: Callable[[Ints], float] = codecs.length) -> float:
    """Return the size of a codebook in the file [bits]: coded indices, centroids, their number."""
    index = form.index.reshape(form.index.shape[0], -1)
    return 8.0 * (count(index.numpy()) + 4 * len(form.centroids) + 1)


def _bytes(form: Codebook) -> float:
    return codebook_bits(form) / 8


def _quick_bytes(form: Codebook) -> float:
    return codebook_bits(form, codecs.estimate) / 8


def sizes_of(forms: Sequence[Codebook]) -> list[float]:
    """Return the sizes of the codebooks of one layer, cheapest first [bits].

    Coding a long tensor takes a second. There the estimate serves, corrected at both ends and in
    the middle by how far it is off.
    """
    if all(form.index.numel() <= EXACT_SIZE for form in forms):
        return [codebook_bits(form) for form in forms]
    quick = [codebook_bits(form, codecs.estimate) for form in forms]
    return codecs.anchored(quick, lambda i: codebook_bits(forms[i]), ANCHORS)


method = KMeans()
