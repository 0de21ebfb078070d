"""Centroids on a line: the exact optimum over a histogram, refined on the values themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lamina.codecs.kernels import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 4096
ROUNDS = 100  # of refinement; it stops by itself much earlier
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
