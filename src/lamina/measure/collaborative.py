"""Which input channels and which singular components a layer can do without.

Two ways to order them: by an elementwise measure `Q(W') = sum F (W' - W)^2` with a look-ahead of
one removal (Collaborative Compression: Li et al. 2021, CVPR, "Towards Compact CNNs via
Collaborative Compression"), and by what the removal of a channel costs once the others have made up
for it (Optimal Brain Surgeon by blocks: Hassibi, Stork 1992; Kurtic et al. 2022, arXiv:2203.07259).

Here too is the paper's way to share a budget among layers (exponential sensitivities, one
Lagrange multiplier); Lamina's planner does that for all methods at once, from the
curves themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lamina.measure.stats import LayerStats

GAMMA = 0.9  # weight of the removal after next
MOST_RATE = 0.95  # no layer loses more than this share of its multiplications
EMPTY = 1e-9  # relative: singular values below are zeros


# --- the measure of one removal ------------------------------------------------------------------


def fisher(stats: LayerStats | None, shape: tuple[int, int]) -> torch.Tensor:
    """Return the expected squared gradient of every weight `[n, N]`: `G_oo H_ii`; data-free ones.

    The paper squares one mean gradient, which is almost nothing near a minimum; the mean of the
    squares is the diagonal of the empirical Fisher information.
    """
    if stats is None:
        return torch.ones(shape, dtype=torch.float64)
    g, h = (m[0] if m.dim() == 2 else m[0].diagonal() for m in (stats.G, stats.H))
    return torch.outer(g.to(torch.float64), h.to(torch.float64))


@dataclass(frozen=True)
class Running:
    """A layer on its way: its weight now, and the singular components of it.

    Args:
        weight: `[n, N]`, removed channels zero.
        kept: `[c]`, which channels are left.
        left: `[n, q]`, right: `[N, q]` singular vectors; values: `[q]`, falling.
    """

    weight: torch.Tensor
    kept: torch.Tensor
    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor

    @property
    def units(self) -> int:
        """How many channels and components are left."""
        return int(self.kept.sum()) + len(self.values)


def decompose(weight: torch.Tensor, kept: torch.Tensor, most: int) -> Running:
    """Return the state of a weight, with at most so many components, none of them zero."""
    if weight.shape[0] <= weight.shape[1]:
        values, left = torch.linalg.eigh(weight @ weight.mT)
        s = values.flip(-1).clamp_min(0).sqrt()
        some = s[:most] > EMPTY * s[0]
        left, s = left.flip(-1)[:, :most][:, some], s[:most][some]
        right = weight.mT @ left / s
    else:
        other = decompose(weight.mT, kept, most)
        left, s, right = other.right, other.values, other.left
    return Running(weight, kept, left, s, right)


def unit_scores(
    whole: torch.Tensor, now: Running, importance: torch.Tensor, gamma: float = GAMMA
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the removal of each unit costs, and gamma times that of one more at random.

    In closed form (Li et al. 2021): both families of units, channels and components, add up to the
    weight, and channels do not overlap.

    Args:
        whole: `[n, N]`, the weight that is approximated.
        now: the weight at this step.
        importance: `[n, N]`, F.
        gamma: 0: no look-ahead.

    Returns:
        of channels `[c]` (removed ones: inf), of components `[q]`.
    """
    W, F = now.weight, importance
    delta = W - whole
    fd, fw = F * delta, F * W

    def by_channel(x: torch.Tensor) -> torch.Tensor:
        return x.sum(0).reshape(len(now.kept), -1).sum(1)

    loss, cross, power = (fd * delta), (fd * W), (fw * W)
    at_d = now.values * _diagonal(now.left, fd, now.right)
    at_w = now.values * _diagonal(now.left, fw, now.right)
    left2, right2, s2 = now.left**2, now.right**2, now.values**2
    at_s = s2 * _diagonal(left2, F, right2)
    channels = float(loss.sum()) - by_channel(loss) + by_channel(F * whole**2)
    parts = float(loss.sum()) - 2 * at_d + at_s
    others = now.units - 1
    if gamma and others:
        pieces = F * ((left2 * s2) @ right2.mT)
        more_channels = (
            -4 * (float(cross.sum()) - by_channel(cross))
            + float(power.sum()) - by_channel(power)
            + float(pieces.sum()) - by_channel(pieces)
        )  # fmt: skip
        more_parts = (
            -4 * (float(cross.sum()) - at_d - at_w + at_s)
            + float(power.sum()) - 2 * at_w + at_s
            + float(at_s.sum()) - at_s
        )  # fmt: skip
        channels = channels + gamma * (channels + more_channels / others)
        parts = parts + gamma * (parts + more_parts / others)
    return channels.masked_fill(~now.kept, torch.inf), parts


def _diagonal(left: torch.Tensor, middle: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the diagonal of `left^T middle right`."""
    return ((left.mT @ middle) * right.mT).sum(1)


# --- the multi-step removal ----------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """A point of a removal: which channels are kept, and how many components of them."""

    kept: tuple[int, ...]
    rank: int
    loss: float


def remove_units(
    whole: torch.Tensor,
    importance: torch.Tensor,
    channels: int,
    gamma: float = GAMMA,
    steps: int = 100,
) -> Iterator[Removal]:
    """Remove the cheapest units, some at a time, until one channel or one component is left.

    Args:
        whole: `[n, N]`, channels consecutive along the columns.
        importance: `[n, N]`, F.
        channels: c, a divisor of N.
        gamma: of the look-ahead.
        steps: in how many steps of equal numbers of units at most.
    """
    taps = whole.shape[1] // channels
    now = decompose(whole, torch.ones(channels, dtype=torch.bool), min(whole.shape))
    batch = max(1, math.ceil(now.units / steps))
    while True:
        of_channels, of_parts = unit_scores(whole, now, importance, gamma)
        order = torch.argsort(torch.cat([of_channels, of_parts]), stable=True)[:batch].tolist()
        gone = [u for u in order if u < channels and now.kept[u]]
        parts = [u - channels for u in order if u >= channels]
        stay = torch.ones(len(now.values), dtype=torch.bool)
        stay[parts] = False
        weight = now.weight
        if parts:
            weight = (now.left[:, stay] * now.values[stay]) @ now.right[:, stay].mT
        kept = now.kept.clone()
        kept[gone] = False
        rank = len(now.values) - len(parts)
        if not int(kept.sum()) or not rank:
            return
        weight = weight * kept.repeat_interleave(taps)
        now = decompose(weight, kept, rank)
        if not len(now.values):
            return
        loss = float((importance * (weight - whole) ** 2).sum())
        yield Removal(tuple(kept.nonzero().flatten().tolist()), len(now.values), loss)


def removals_at(
    found: Sequence[Removal], cost: Callable[[Removal], float], targets: Sequence[float]
) -> list[Removal]:
    """Return, for every target, the first removal that meets it, without those met twice."""
    chosen: list[Removal] = []
    for target in sorted(targets, reverse=True):
        first = next((r for r in found if cost(r) <= target), None)
        if first is not None and first not in chosen:
            chosen.append(first)
    return chosen


# --- channels by blocks of the second moment -----------------------------------------------------


def eliminate_channels(
    matrix: torch.Tensor,
    H: torch.Tensor | None,
    G: torch.Tensor | None,
    channels: int,
    counts: Sequence[int],
    steps: int = 64,
) -> dict[int, tuple[int, ...]]:
    """Remove channels, cheapest first, while the others make up for each; return the kept ones.

    A channel's cost is `tr(G W_j (P_jj)^-1 W_j^T)`, `P` the inverse moment of the channels left;
    its removal changes the others by `- W_j (P_jj)^-1 P_j.` and `P` by its Schur complement.

    Args:
        matrix: `[n, N]`, float64; H: `[N, N]` or `[N]`, positive definite; G: `[n, n]` or `[n]`;
            None: identity.
        channels: c, a divisor of N.
        counts: numbers of channels at which to stop and look.
        steps: in how many steps of equal numbers of channels at most.

    Example:
        >>> eliminate_channels(torch.tensor([[3.0, 1.0, 2.0]]), None, None, 3, [2])
        {2: (0, 2)}
    """
    n, taps = matrix.shape[0], matrix.shape[1] // channels
    weight = matrix.clone()
    P = None if H is None or H.dim() == 1 else torch.cholesky_inverse(torch.linalg.cholesky(H))
    left = torch.arange(channels)
    found: dict[int, tuple[int, ...]] = {}
    wanted = sorted({m for m in counts if 0 < m < channels}, reverse=True)
    most = max(1, math.ceil(channels / steps))
    for goal in wanted:
        while len(left) > goal:
            W = weight.reshape(n, len(left), taps)
            GW = W
            if G is not None:
                GW = W * G[:, None, None] if G.dim() == 1 else torch.tensordot(G, W, 1)
            if P is None:
                h = torch.ones(matrix.shape[1]).to(weight) if H is None else H
                scale = h.reshape(channels, taps)[left]
                scores = ((W * GW).sum(0) * scale).sum(1)
            else:
                blocks = P.reshape(len(left), taps, len(left), taps)
                blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
                inner = torch.einsum("ncs,nct->cst", W, GW)
                scores = (inner * torch.linalg.inv(blocks)).sum((1, 2))
            worst = torch.argsort(scores, stable=True)[: min(most, len(left) - goal)]
            stay = torch.ones(len(left), dtype=torch.bool)
            stay[worst] = False
            here, gone = (m.repeat_interleave(taps) for m in (stay, ~stay))
            if P is not None:
                ratio = torch.linalg.solve(P[gone][:, gone], P[gone][:, here])
                weight = weight[:, here] - weight[:, gone] @ ratio
                P = P[here][:, here] - P[here][:, gone] @ ratio
            else:
                weight = weight[:, here]
            left = left[stay]
        found[goal] = tuple(left.tolist())
    return found


def refit(matrix: torch.Tensor, H: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    """Return the weight `[n, kept]` of some columns that is best for `tr(G E H E^T)`, for any G.

    `W H[:, S] H[S, S]^-1`; where columns are uncorrelated it is `W[:, S]`.
    """
    if H is None or H.dim() == 1:
        return matrix[:, columns]
    inner, right = H[columns][:, columns], matrix @ H[:, columns]
    return torch.linalg.solve(inner, right, left=False)


# --- the paper's way to share a budget among layers ----------------------------------------------


def fit_sensitivity(rates: Sequence[float], losses: Sequence[float]) -> tuple[float, float]:
    """Fit `a exp(b r)` to how a layer's loss grows with its rate of compression.

    By weighted least squares on the logarithm, weights `sqrt(loss)`; points without rate or loss
    are left out. `b` is at least 1e-6: a layer's loss does not fall.

    Args:
        rates: shares of the multiplications removed; losses: of each, in any unit.

    Example:
        >>> a, b = fit_sensitivity([0.1, 0.5, 0.9], [math.exp(2 * r) for r in (0.1, 0.5, 0.9)])
        >>> round(a * math.exp(2), 6), round(b, 6)
        (1.221403, 2.0)
    """
    pairs = [(r, q) for r, q in zip(rates, losses, strict=True) if r > 0 and q > 0]
    if not pairs:
        return 0.0, 1e-6
    top = max(q for _, q in pairs)
    r = torch.tensor([p[0] for p in pairs], dtype=torch.float64)
    q = torch.tensor([p[1] / top for p in pairs], dtype=torch.float64)
    w = q.sqrt()
    mean_r, mean_y = (w * r).sum() / w.sum(), (w * q.log()).sum() / w.sum()
    spread = float((w * (r - mean_r) ** 2).sum())
    slope = float((w * (r - mean_r) * q.log()).sum()) / spread if spread > 0 else 0.0
    slope = max(slope, 1e-6)
    return math.exp(float(mean_y) - slope * float(mean_r)), slope


def global_rates(
    fits: Sequence[tuple[float, float]],
    macs: Sequence[float],
    share: float,
    most: float = MOST_RATE,
) -> list[float]:
    """Share a budget: minimise `sum F_l a_l exp(b_l r_l)` subject to `sum F_l r_l = share sum F_l`.

    `r_l = ln(lambda / (a_l b_l)) / b_l`, clipped to [0, most]; the sum is monotone in lambda, which
    is found by bisection.

    Args:
        fits: (a, b) of every layer, from `fit_sensitivity`.
        macs: F, of every layer.
        share: of all multiplications to remove; more than `most` gives `most` everywhere.

    Example:
        >>> global_rates([(1.0, 2.0), (1.0, 2.0)], [5.0, 5.0], 0.5)
        [0.5, 0.5]
    """

    def rates(log_price: float) -> list[float]:
        return [
            min(most, max(0.0, (log_price - math.log(max(a, 1e-300) * b)) / b)) for a, b in fits
        ]

    logs = [math.log(max(a, 1e-300) * b) for a, b in fits]
    low = min(logs, default=0.0)
    high = max((x + b * most for x, (_, b) in zip(logs, fits, strict=True)), default=0.0)
    total = sum(macs)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(f * r for f, r in zip(macs, rates(middle), strict=True)) < share * total:
            low = middle
        else:
            high = middle
    return [round(r, 12) for r in rates(high)]
