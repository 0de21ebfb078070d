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
from numpy.typing import NDArray

from lamina import codecs
from lamina.artifact.records import values_bytes
from lamina.codecs.kernels import compiled
from lamina.errors import MethodError, SiteError
from lamina.forms import Codebook, Edit, Plain
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
from lamina.network.sites import Site, as_matrix, from_matrix
from lamina.network.source import Network

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SIZES = (2, 4, 8, 16, 32, 64, 256)
BINS = 4096
ROUNDS = 100  # of refinement; it stops by itself much earlier
EXACT_SIZE = 1 << 9  # symbols up to which every codebook is coded
ANCHORS = 3  # codebooks of a longer tensor that are coded
FLOOR = 1e-6  # of the mean weight: a point without weight still has a nearest centroid


# --- the exact programme over bins ---------------------------------------------------------------


def _cuts_kernel(w: Floats, s1: Floats, s2: Floats, most: int) -> NDArray[np.int32]:
    """See `optimal_cuts`; a plain loop, worth running only when compiled."""
    m = len(w) - 1
    cuts = np.zeros((most, m + 1), dtype=np.int32)
    old = np.zeros(m + 1)
    new = np.zeros(m + 1)
    for i in range(1, m + 1):
        t = s1[i] - s1[0]
        old[i] = max(s2[i] - s2[0] - t * t / (w[i] - w[0]), 0.0)
    stack = np.zeros((64, 4), dtype=np.int64)
    for c in range(1, most):
        stack[0, 0], stack[0, 1], stack[0, 2], stack[0, 3] = c + 1, m, c, m
        top = 1
        while top > 0:
            top -= 1
            lo, hi, first, last = stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3]
            if lo > hi:
                continue
            mid = (lo + hi) // 2
            best, where = np.inf, first
            for a in range(max(first, c), min(last, mid - 1) + 1):
                t = s1[mid] - s1[a]
                total = old[a] + max(s2[mid] - s2[a] - t * t / (w[mid] - w[a]), 0.0)
                if total < best:
                    best, where = total, a
            new[mid], cuts[c, mid] = best, where
            stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = lo, mid - 1, first, where
            top += 1
            stack[top, 0], stack[top, 1], stack[top, 2], stack[top, 3] = mid + 1, hi, where, last
            top += 1
        old[:] = new
    return cuts


def _cuts_numpy(w: Floats, s1: Floats, s2: Floats, most: int) -> NDArray[np.int32]:
    """See `optimal_cuts`; all nodes of one depth of the recursion at once."""
    m = len(w) - 1
    cuts = np.zeros((most, m + 1), dtype=np.int32)
    t = s1 - s1[0]
    mass = w - w[0]
    mass[0] = 1.0
    old = np.maximum(s2 - s2[0] - t * t / mass, 0.0)
    for c in range(1, most):
        new = np.zeros(m + 1)
        lo, hi = np.array([c + 1]), np.array([m])
        first, last = np.array([c]), np.array([m])
        while True:
            live = lo <= hi
            if not live.any():
                break
            lo, hi, first, last = lo[live], hi[live], first[live], last[live]
            mid = (lo + hi) // 2
            start = np.maximum(first, c)
            count = np.minimum(last, mid - 1) - start + 1
            at = np.cumsum(count) - count
            a = np.arange(int(count.sum())) - np.repeat(at - start, count)
            end = np.repeat(mid, count)
            t = s1[end] - s1[a]
            total = old[a] + np.maximum(s2[end] - s2[a] - t * t / (w[end] - w[a]), 0.0)
            best = np.minimum.reduceat(total, at)
            hits = np.flatnonzero(total == np.repeat(best, count))
            where = a[hits[np.searchsorted(hits, at)]]
            new[mid], cuts[c, mid] = best, where
            lo, hi = np.stack([lo, mid + 1], 1).ravel(), np.stack([mid - 1, hi], 1).ravel()
            first, last = np.stack([first, where], 1).ravel(), np.stack([where, last], 1).ravel()
        old = new
    return cuts


def optimal_cuts(
    w: Floats, s1: Floats, s2: Floats, most: int, *, backend: str = "auto"
) -> NDArray[np.int32]:
    """Return where the last cluster starts, for every number of clusters and of leading bins.

    The least within-cluster squares of the first i bins in c + 1 clusters is
    `min_a D_c-1[a] + cost(a, i)`; the best `a` never falls as i grows, so that one level takes
    m log m steps. Both backends do the same operations in the same order of choice.

    Args:
        w, s1, s2: `[m + 1]` running sums over m bins of weight (rising strictly), weight * value
            and weight * value^2.
        most: largest number of clusters, at most m.
        backend: "auto", "numba" or "numpy".

    Returns:
        `[most, m + 1]`: entry `[c, i]` is the first bin of the last of c + 1 clusters.
    """
    fast = compiled(_cuts_kernel, backend)
    return _cuts_numpy(w, s1, s2, most) if fast is None else fast(w, s1, s2, most)


def _trace(cuts: NDArray[np.int32], clusters: int) -> Ints:
    """Return the `clusters + 1` bounds of the best clusters of all bins."""
    bounds = [cuts.shape[1] - 1]
    for c in range(clusters - 1, -1, -1):
        bounds.append(int(cuts[c, bounds[-1]]))
    return np.array(bounds[::-1])


# --- centroids -----------------------------------------------------------------------------------


def fit_centroids(
    values: NDArray[np.generic],
    sizes: Sequence[int],
    weights: NDArray[np.generic] | None = None,
    *,
    backend: str = "auto",
) -> list[NDArray[np.float32]]:
    """Return one codebook per size: ascending float32 centroids of least (weighted) squares.

    Exact zeros among the values make 0 a fixed centroid. Up to 4,096 distinct values the start is
    the global optimum; above, that of the histogram. A codebook has fewer centroids than asked for
    where there are fewer distinct values.

    Args:
        values: weights of a layer, any shape.
        sizes: numbers of centroids, each at least 2.
        weights: importance of each value, same shape, not negative; None: all alike.

    Example:
        >>> fit_centroids(np.array([0.0, 0.0, 1.0, 1.5, 9.0]), [3])[0].tolist()
        [0.0, 1.25, 9.0]
    """
    flat = np.asarray(values, dtype=np.float64).reshape(-1)
    weigh = np.ones_like(flat) if weights is None else np.asarray(weights, np.float64).reshape(-1)
    mean = float(weigh.mean()) if len(weigh) else 0.0
    weigh = weigh / mean + FLOOR if mean > 0 else np.ones_like(flat)
    zero = bool((flat == 0).any())
    weigh, flat = weigh[flat != 0], flat[flat != 0]
    if not len(flat):
        return [np.zeros(1, dtype=np.float32) for _ in sizes]
    order = np.argsort(flat, kind="stable")
    flat, weigh = flat[order], weigh[order]
    sums = [
        np.concatenate([[0.0], np.cumsum(s)]) for s in (weigh, weigh * flat, weigh * flat * flat)
    ]
    bins = _bin_bounds(flat)
    wanted = [min(size - zero, len(bins) - 1) for size in sizes]
    w, s1, s2 = (s[bins] for s in sums)
    cuts = optimal_cuts(w, s1, s2, max(wanted), backend=backend)
    found = []
    for count in wanted:
        bounds = bins[_trace(cuts, count)]
        start = np.diff(sums[1][bounds]) / np.diff(sums[0][bounds])
        if zero:
            start = np.sort(np.append(start, 0.0))
        found.append(_refine(flat, sums[0], sums[1], start, zero))
    return found


def _bin_bounds(ordered: Floats) -> Ints:
    """Return where each non-empty bin of sorted values starts, and their number at the end."""
    fresh = np.flatnonzero(np.diff(ordered)) + 1
    if len(fresh) >= BINS:
        edges = np.linspace(ordered[0], ordered[-1], BINS + 1)[1:-1]
        fresh = np.unique(np.searchsorted(ordered, edges))
        fresh = fresh[(fresh > 0) & (fresh < len(ordered))]
    return np.concatenate([[0], fresh, [len(ordered)]])


def _refine(
    ordered: Floats, w: Floats, s1: Floats, centroids: Floats, zero: bool
) -> NDArray[np.float32]:
    """Lloyd's rounds on sorted values by running sums; an exact zero centroid stays."""
    for _ in range(ROUNDS):
        middle = (centroids[1:] + centroids[:-1]) / 2
        bounds = np.searchsorted(ordered, middle, side="right")
        bounds = np.concatenate([[0], bounds, [len(ordered)]])
        mass = np.diff(w[bounds])
        moved = np.where(mass > 0, np.diff(s1[bounds]) / np.where(mass > 0, mass, 1.0), centroids)
        if zero:
            moved[centroids == 0] = 0.0
        if np.array_equal(moved, centroids):
            break
        centroids = np.sort(moved)
    return np.unique(centroids.astype(np.float32))


def assign(values: NDArray[np.generic], centroids: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the index of the nearest centroid (ascending); a tie goes to the smaller one."""
    wide = centroids.astype(np.float64)
    flat = np.asarray(values, dtype=np.float64)
    return np.searchsorted((wide[1:] + wide[:-1]) / 2, flat, side="left").astype(np.int32)


# --- the method ----------------------------------------------------------------------------------


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
        extra = sum(8.0 * values_bytes(t) for k, t in weights.items() if k != "weight")
        params = sum(t.numel() for t in weights.values())
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
            Candidate(
                site.name,
                (Step(self.name, site.name, settings),),
                Cost(params, size + extra, site.macs),
                error,
            )
            for size, (_, error, settings, _) in zip(bits, front, strict=True)
        )

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
        if why := self.refuse(site):
            raise SiteError(f"{self.name} cannot serve this site", site.name, why)
        size, weighted = choice.settings.get("k"), bool(choice.settings.get("weighted", False))
        if not isinstance(size, int) or not 2 <= size <= 256:
            raise MethodError("kmeans does not have this k", repr(size), "", "k is 2 to 256")
        weights = weights_of(network, site)
        (form,) = shared(site, weights["weight"], stats, (size,), weighted)
        edits = [Edit(site.weight, "values", values=form)]
        if "bias" in weights:
            edits.append(Edit(site.bias, "values", values=Plain(weights["bias"])))
        return edits


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
    if not bool(torch.isfinite(weight).all()):
        raise SiteError(
            "the weights are not finite",
            site.name,
            "NaN or inf has no centroid",
            "mend the network",
        )
    importance = None
    if weighted:
        if stats is None:
            raise MethodError("weighted k-means needs statistics", site.name, "this run has none")
        h = stats.H if stats.H.dim() == 2 else stats.H.diagonal(dim1=-2, dim2=-1)
        g = stats.G if stats.G.dim() == 2 else stats.G.diagonal(dim1=-2, dim2=-1)
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
