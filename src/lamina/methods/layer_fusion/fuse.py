"""Fusing: which layers share a weight, and which weight they share.

**Reference.** O'Neill, Ver Steeg, Galstyan 2020, arXiv:2007.14917: pairs by distance; mean, freeze
and mix. Groups by union-find, the norm of the mean, and the shared weight of least predicted loss
are our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lamina.errors import MethodError
from lamina.measure.stats import LayerStats, diagonal_of, predict_error
from lamina.network.sites import Site, as_matrix, from_matrix

COMBINES = ("mean", "freeze", "first", "max", "solve")
LINKAGES = ("average", "complete", "single")
ROUNDS = 25  # of conjugate gradients: the last digits of a shared weight are trained away anyway
CLOSE = 1e-6  # of the first residual
Partition = tuple[int, ...]  # the group of each member; groups are numbered as they appear


# --- which ---------------------------------------------------------------------------------------


def groups_of(count: int, pairs: Iterable[tuple[int, int]]) -> Partition:
    """Return the groups that pairs of members make (union-find).

    Args:
        count: number of members.
        pairs: members that share; `(a, b)` and `(b, a)` are one pair.

    Raises:
        MethodError: a pair names a member that is not there.

    Example:
        >>> groups_of(5, [(0, 3), (3, 4)])
        (0, 1, 2, 0, 0)
    """
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for a, b in pairs:
        if not (0 <= a < count and 0 <= b < count):
            raise MethodError("a pair names a layer that is not there", f"({a}, {b})")
        one, two = root(a), root(b)
        parent[max(one, two)] = min(one, two)
    return numbered([root(i) for i in range(count)])


def numbered(labels: Sequence[int]) -> Partition:
    """Return labels numbered as they appear.

    Example:
        >>> numbered([4, 4, 2, 4])
        (0, 0, 1, 0)
    """
    known: dict[int, int] = {}
    return tuple(known.setdefault(label, len(known)) for label in labels)


def joined(one: Sequence[int], two: Sequence[int]) -> Partition:
    """Return the finest partition that puts together whatever either of two puts together.

    Example:
        >>> joined((0, 0, 1, 2), (0, 1, 1, 2))
        (0, 0, 0, 1)
    """
    pairs = [(group[0], i) for p in (one, two) for group in members_of(p) for i in group[1:]]
    return groups_of(len(one), pairs)


def members_of(partition: Sequence[int]) -> list[list[int]]:
    """Return the members of each group, ascending.

    Example:
        >>> members_of((0, 1, 0))
        [[0, 2], [1]]
    """
    return [
        [i for i, label in enumerate(partition) if label == group]
        for group in sorted(set(partition))
    ]


def merge_order(
    distances: Tensor,
    linkage: str = "average",
    start: Sequence[int] | None = None,
    neighbours: bool = False,
) -> list[tuple[Partition, float]]:
    """Return partitions from all apart to all together, the nearest two groups joined each time.

    Args:
        distances: `[n, n]`, symmetric.
        linkage: distance of two groups: the `"average"` of all pairs, the farthest pair
            (`"complete"`), or the nearest (`"single"`: pairs in the order of their distances).
        start: the first partition; None: all apart.
        neighbours: join only groups of which one begins where the other ends.

    Returns:
        (partition, distance at which its last two groups were joined), the first at 0.

    Raises:
        MethodError: unknown linkage.

    Example:
        >>> far = torch.tensor([[0.0, 1.0, 5.0], [1.0, 0.0, 5.0], [5.0, 5.0, 0.0]])
        >>> merge_order(far)
        [((0, 1, 2), 0.0), ((0, 0, 1), 1.0), ((0, 0, 0), 5.0)]
    """
    if linkage not in LINKAGES:
        raise MethodError(
            "unknown linkage", repr(linkage), "", f"choose from {', '.join(LINKAGES)}"
        )
    labels = list(numbered(range(len(distances)) if start is None else start))
    found = [(tuple(labels), 0.0)]
    while len(groups := members_of(labels)) > 1:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
        if neighbours:
            pairs = [(i, j) for i, j in pairs if groups[i][-1] + 1 == groups[j][0]] or pairs
        apart = {(i, j): _joined(distances[groups[i]][:, groups[j]], linkage) for i, j in pairs}
        i, j = min(apart, key=lambda pair: (apart[pair], pair))
        for member in groups[j]:
            labels[member] = labels[groups[i][0]]
        labels = list(numbered(labels))
        found.append((tuple(labels), apart[i, j]))
    return found


def _joined(pairs: Tensor, linkage: str) -> float:
    if linkage == "average":
        return float(pairs.mean())
    return float(pairs.max() if linkage == "complete" else pairs.min())


def along(count: int, groups: int, pattern: str) -> Partition:
    """Return a partition that does not look at weights.

    Args:
        count, groups: of members and of groups.
        pattern: `"neighbours"`: runs of about equal length; `"cycle"`: member i in group
            `i mod groups`.

    Raises:
        MethodError: unknown pattern, or no such number of groups.

    Example:
        >>> along(5, 2, "neighbours"), along(5, 2, "cycle")
        ((0, 0, 0, 1, 1), (0, 1, 0, 1, 0))
    """
    if not 1 <= groups <= count:
        raise MethodError("there are 1 to as many groups as layers", f"{groups} of {count}")
    if pattern == "neighbours":
        return tuple(i * groups // count for i in range(count))
    if pattern == "cycle":
        return tuple(i % groups for i in range(count))
    raise MethodError("unknown pattern", repr(pattern), "", "choose from neighbours, cycle")


# --- what ----------------------------------------------------------------------------------------


def combine(weights: Sequence[Tensor], how: str = "mean", rescale: bool = False) -> Tensor:
    """Return the one weight for several layers, in the dtype of the first.

    Args:
        weights: of one shape.
        how: `"mean"`; `"freeze"`: the one that is nearest to all others (ties: the first), as it
            is; `"first"`: the first as it is; `"max"`: of each entry the one of largest magnitude.
        rescale: give it the mean of their norms; the mean of unlike layers is much smaller than
            any of them.

    Raises:
        MethodError: unknown way, no weights, or shapes differ.

    Example:
        >>> combine([torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 1.0]])], "max").tolist()
        [[2.0, -3.0]]
    """
    if how not in COMBINES[:-1]:
        known = ", ".join(COMBINES[:-1])
        raise MethodError("unknown way to combine", repr(how), "", f"choose from {known}")
    if not weights or len({w.shape for w in weights}) > 1:
        raise MethodError("only weights of one shape are combined", str([w.shape for w in weights]))
    wide = torch.stack([w.detach().to(torch.float64) for w in weights])
    if how in ("freeze", "first"):
        return weights[centre(wide) if how == "freeze" else 0].detach().clone()
    if how == "max":
        one = wide.gather(0, wide.abs().argmax(0, keepdim=True))[0]
    else:
        one = wide.mean(0)
    if rescale:
        norms = wide.flatten(1).norm(dim=1)
        one = one * (norms.mean() / one.norm()) if float(one.norm()) > 0 else one
    return one.to(weights[0].dtype)


def centre(weights: Tensor) -> int:
    """Return which of `[n, ...]` has the least summed distance to all others; the first of equals.

    Example:
        >>> centre(torch.tensor([[0.0], [1.0], [5.0]]))
        1
    """
    flat = weights.flatten(1)
    sums = torch.stack([(flat - row).norm(dim=1).sum() for row in flat])
    return int((sums <= sums.min() * (1 + 1e-12)).nonzero()[0])


def mix(
    weights: Sequence[Tensor], seed: int, share: float = 0.5, noise: float = 0.0
) -> list[Tensor]:
    """Return weights that have swapped some of their entries; nothing is lost.

    Members pair up at random, and every coordinate of a pair is swapped with probability `share`:
    per coordinate the same numbers are there as before. They stay apart: to save parameters they
    must be tied in the end.

    Args:
        weights: of one shape.
        seed: of pairs, masks and noise.
        share: 0: nothing changes.
        noise: standard deviation of Gaussian noise that is added, over that of a weight.

    Example:
        >>> one, two = mix([torch.zeros(1000), torch.ones(1000)], seed=0)
        >>> bool(((one + two) == 1).all()), 450 < int(one.sum()) < 550
        (True, True)
    """
    if not 0 <= share <= 1 or noise < 0:
        raise MethodError("cannot mix weights", f"share={share}, noise={noise}", "0..1, and 0 on")
    drawn = torch.Generator().manual_seed(seed)
    out = [w.detach().clone() for w in weights]
    order = torch.randperm(len(out), generator=drawn).tolist()
    for a, b in zip(order[0::2], order[1::2], strict=False):
        swap = (torch.rand(out[a].shape, generator=drawn) < share).to(out[a].device)
        out[a], out[b] = torch.where(swap, out[b], out[a]), torch.where(swap, out[a], out[b])
    if noise:
        for w in out:
            drawn_noise = torch.randn(w.shape, generator=drawn).to(w.device, w.dtype)
            w += noise * w.std(correction=0) * drawn_noise
    return out


def solve(site: Site, weights: Sequence[Tensor], stats: Sequence[LayerStats]) -> Tensor:
    """Return the one weight of least predicted loss in the place of several.

    It solves `sum_i s_i G_i W H_i = sum_i s_i G_i W_i H_i` from the mean on, by conjugate gradients
    that stop early; the loss predicted falls with every round.

    Args:
        site: one of the layers, for the shape of its matrix.
        weights: as stored.
        stats: of each.

    Example:
        >>> one = torch.eye(2, dtype=torch.float64)[None]
        >>> stats = [LayerStats(H=one, G=one), LayerStats(H=3 * one, G=one)]
        >>> solve(Site("a", shape=(2, 2)), [torch.zeros(2, 2), torch.ones(2, 2)], stats)
        tensor([[0.7500, 0.7500],
                [0.7500, 0.7500]])
    """
    matrices = [as_matrix(site, w.detach().to("cpu", torch.float64)) for w in weights]

    def apply(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for s in stats:
            total += s.scale * _sides(s, x)
        return total

    target = torch.zeros_like(matrices[0])
    for s, m in zip(stats, matrices, strict=True):
        target += s.scale * _sides(s, m)
    x = torch.stack(matrices).mean(0)
    residual = target - apply(x)
    towards, size = residual.clone(), float(residual.pow(2).sum())
    first = size
    for _ in range(ROUNDS):
        if size <= CLOSE**2 * first or size <= 1e-300:
            break
        image = apply(towards)
        bend = float((towards * image).sum())
        if bend <= 0:
            break
        x = x + size / bend * towards
        residual = residual - size / bend * image
        new = float(residual.pow(2).sum())
        towards, size = residual + new / size * towards, new
    return from_matrix(site, x).to(weights[0].dtype)


def shared_error(
    site: Site, weights: Sequence[Tensor], stats: Sequence[LayerStats | None], one: Tensor
) -> float:
    """Return what one weight in the place of several is predicted to cost [nats per sample].

    Data-free: the largest relative spectral error of a member.
    """
    errors = []
    for weight, seen in zip(weights, stats, strict=True):
        matrix = as_matrix(site, weight.detach().to("cpu", torch.float64))
        change = as_matrix(site, one.detach().to("cpu", torch.float64)) - matrix
        errors.append(predict_error(seen, matrix, change))
    free = any(s is None for s in stats)
    return max(errors, default=0.0) if free else sum(errors)


def shared_stats(stats: Sequence[LayerStats]) -> LayerStats:
    """Return statistics of a shared weight, whose errors are about the sums of its members'.

    A change D of the weight costs `sum_i s_i tr(G_i D H_i D^T) / 2`. The Kronecker product of one G
    and one H nearest to `sum_i s_i G_i (x) H_i` has weighted means of the G and of the H as
    factors; it is scaled so that changes of independent entries cost exactly their sum.

    Reference: Van Loan, Pitsianis 1993, doi:10.1007/978-94-015-8196-7_17.

    Example:
        >>> one = torch.eye(2, dtype=torch.float64)[None]
        >>> both = shared_stats([LayerStats(H=one, G=one), LayerStats(H=3 * one, G=one)])
        >>> predict_error(both, one, one)
        4.0
    """
    if len(stats) == 1:
        return stats[0]
    hs = _alike([s.H for s in stats])
    gs = _alike([s.G for s in stats])
    scales = torch.tensor([s.scale for s in stats], dtype=torch.float64)
    gram_h, gram_g = (
        torch.tensor([[float((a * b).sum()) for b in side] for a in side], dtype=torch.float64)
        for side in (hs, gs)
    )
    alpha = scales.clone()  # the sum is  sum_i s_i g_i h_i^T: its leading singular pair
    beta = torch.ones_like(scales)
    for _ in range(50):
        beta = scales * (gram_g @ alpha)
        beta = beta / beta.sum().clamp_min(1e-300)
        alpha = scales * (gram_h @ beta)
        alpha = alpha / alpha.sum().clamp_min(1e-300)
    H = sum((b * h for b, h in zip(beta.tolist(), hs, strict=True)), torch.zeros_like(hs[0]))
    G = sum((a * g for a, g in zip(alpha.tolist(), gs, strict=True)), torch.zeros_like(gs[0]))
    true = sum(
        float(s) * float((_trace(g) * _trace(h)).sum())
        for s, g, h in zip(scales, gs, hs, strict=True)
    )
    now = float((_trace(G) * _trace(H)).sum())
    means = [s.mean for s in stats]
    mean = None
    if all(m is not None for m in means):
        mean = sum((b * m for b, m in zip(beta.tolist(), means, strict=True) if m is not None),
                   torch.zeros_like(means[0]))  # type: ignore[arg-type]  # fmt: skip
    positions = sum(b * s.positions for b, s in zip(beta.tolist(), stats, strict=True))
    scale = true / now if now > 0 else 0.0
    return LayerStats(H, G, mean, positions, scale, min(s.samples for s in stats))


def _sides(stats: LayerStats, x: Tensor) -> Tensor:
    right = x * stats.H[:, None, :] if stats.H.dim() == 2 else x @ stats.H
    return right * stats.G[:, :, None] if stats.G.dim() == 2 else stats.G @ right


def _alike(parts: Sequence[Tensor]) -> list[Tensor]:
    """Return moments that are all matrices, or all diagonals where one is."""
    return list(parts) if all(p.dim() == 3 for p in parts) else [diagonal_of(p) for p in parts]


def _trace(moment: Tensor) -> Tensor:
    return diagonal_of(moment).sum(-1)
