"""Weight sharing: one-dimensional k-means over a layer's survivors, beside a reserved zero."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.errors import MethodError
from lamina.forms import Codebook
from lamina.methods.kmeans import assign, fit_centroids

Floats = NDArray[np.float64]

STARTS = ("linear", "exact")
ROUNDS = 300  # of Lloyd; it stops by itself much earlier
MEMBERS = 4  # survivors per centroid, at least: a table is not worth more than what it serves


def linear_start(values: Floats, count: int) -> Floats:
    """Return `count` centroids evenly spaced over the range of the values.

    Reference: Han, Mao, Dally 2016, arXiv:1510.00149, section 3.2: few large weights matter most,
    and only this start leaves centroids for them.

    Example:
        >>> linear_start(np.array([-1.0, 0.5, 3.0]), 3).tolist()
        [-1.0, 1.0, 3.0]
    """
    low, high = float(values.min()), float(values.max())
    return np.linspace(low, high, count) if count > 1 else np.array([values.mean()])


def lloyd(values: Floats, centroids: Floats) -> tuple[Floats, list[float]]:
    """Move centroids to the means of what is nearest to them, until they stay.

    A centroid nothing is nearest to stays where it is.

    Args:
        values: [n], any order.
        centroids: [k], ascending.

    Returns:
        the centroids, and the summed squared distance before each round.

    Example:
        >>> lloyd(np.array([0.0, 1.0, 10.0]), np.array([0.0, 10.0]))[0].tolist()
        [0.5, 10.0]
    """
    ordered = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    history: list[float] = []
    for _ in range(ROUNDS):
        bounds = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, side="right")
        bounds = np.concatenate([[0], bounds, [len(ordered)]])
        counts = np.diff(bounds)
        history.append(float(((ordered - np.repeat(centroids, counts)) ** 2).sum()))
        means = np.diff(sums[bounds]) / np.maximum(counts, 1)
        moved = np.where(counts > 0, means, centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = np.sort(moved)
    return centroids, history


def share(weight: torch.Tensor, most: int, start: str = "linear") -> Codebook:
    """Return a pruned weight as indices into at most so many shared values, and zero.

    Index 0 is the exact zero of pruned places; the others follow by magnitude. Values that nothing
    is nearest to are left out of the table.

    Args:
        weight: any shape; its zeros stay zero, everything else becomes a shared value.
        most: number of shared values, 1 to 255; fewer where they would serve fewer than `MEMBERS`
            survivors each.
        start: `"linear"`, the paper's; `"exact"`, the optimum of the squared distance (dynamic
            programme), which needs no start.

    Raises:
        MethodError: such a table cannot be made.

    Example:
        >>> share(torch.tensor([[0.0, 1.0], [0.5, 1.0]]), 1).dense()
        tensor([[0.0000, 0.8333],
                [0.8333, 0.8333]])
    """
    if not 1 <= most <= 255 or start not in STARTS:
        raise MethodError("cannot share weights", f"{most} values, start={start!r}", "1 to 255")
    wide = weight.detach().to(torch.float64).cpu().numpy()
    if not np.isfinite(wide).all():
        raise MethodError("cannot share weights", "", "they are not finite", "mend the network")
    survivors = wide[wide != 0]
    index = np.zeros(wide.shape, dtype=np.int32)
    if not len(survivors):
        return Codebook(torch.from_numpy(index), torch.zeros(1), weight.dtype)
    distinct = np.unique(survivors)
    count = min(fitting(most, len(survivors)), len(distinct))
    if count == len(distinct):
        table = distinct
    elif start == "exact":
        table = fit_centroids(survivors, [count])[0].astype(np.float64)
    else:
        table = lloyd(survivors, linear_start(survivors, count))[0]
    table = np.unique(table.astype(np.float32))
    table = table[table != 0]
    if not len(table):
        return Codebook(torch.from_numpy(index), torch.zeros(1), weight.dtype)
    nearest = assign(survivors, table)
    used = np.unique(nearest)
    used = used[np.argsort(np.abs(table[used]), kind="stable")]
    symbol = np.zeros(len(table), dtype=np.int32)
    symbol[used] = np.arange(1, len(used) + 1, dtype=np.int32)
    index[wide != 0] = symbol[nearest]
    centroids = np.concatenate([np.zeros(1, np.float32), table[used]])
    return Codebook(torch.from_numpy(index), torch.from_numpy(centroids), weight.dtype)


def fitting(most: int, survivors: int) -> int:
    """Return at most `most`, so that every shared value can serve `MEMBERS` survivors.

    Example:
        >>> fitting(255, 100_000), fitting(255, 300), fitting(255, 3)
        (255, 75, 1)
    """
    return max(1, min(most, survivors // MEMBERS))
