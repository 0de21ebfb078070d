"""How far two layers of one shape are apart: every measure that Layer Fusion is run with.

Rows are neurons. All are symmetric, 0 for equal layers, never negative, in float64. Some say
whether two weights are alike place by place (`euclidean`, `cosine`), some only whether they look
alike as sets of neurons or of numbers (`w2`, `moments`): layers that are the same but for the order
of their neurons are alike to the second kind alone.

**Reference.** O'Neill, Ver Steeg, Galstyan 2020, arXiv:2007.14917; Kornblith et al. 2019,
arXiv:1905.00414 (CKA); Dowson, Landau 1982, doi:10.1016/0047-259X(82)90077-X (Gaussian transport);
Feydy et al. 2019, arXiv:1810.08278 (debiased Sinkhorn).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lamina.errors import MethodError

TINY = 1e-300
FLAT = 1e-12  # of its largest entry: a column that varies less has no spread to be divided by
ITERATIONS = 100  # of Sinkhorn
BLUR = 0.05  # entropy, as a share of the mean cost

Distance = Callable[[Tensor, Tensor], float]


def euclidean(a: Tensor, b: Tensor) -> float:
    """Return `|a - b| / sqrt(|a| |b|)`, Frobenius.

    Example:
        >>> round(euclidean(torch.eye(2), 2 * torch.eye(2)), 4)
        0.7071
    """
    return _relative(float((a - b).norm()), float(a.norm()), float(b.norm()))


def manhattan(a: Tensor, b: Tensor) -> float:
    """Return the sum of `|a - b|` over the geometric mean of those of `|a|` and `|b|`."""
    sums = (float(x.abs().sum()) for x in (a - b, a, b))
    return _relative(*sums)


def cosine(a: Tensor, b: Tensor) -> float:
    """Return 1 minus the cosine of the flattened weights, whatever their scales; 0 to 2."""
    # As half a squared distance: exactly 0 for equal weights, where 1 - cos cancels.
    unit = [x / x.norm().clamp_min(TINY) for x in (a, b)]
    return 0.5 * float((unit[0] - unit[1]).pow(2).sum())


def cov(a: Tensor, b: Tensor) -> float:
    """Return `|C_a - C_b| / (|C_a| + |C_b|)`, where C are the correlations of the columns.

    The order of the rows does not matter.
    """
    x, y = standardised(a), standardised(b)
    if x.shape[1] <= x.shape[0]:
        one, two = x.mT @ x, y.mT @ y
        apart, norms = float((one - two).norm()), float(one.norm() + two.norm())
    else:  # from the products of rows: as many as the shorter side
        one, two = x @ x.mT, y @ y.mT
        square = one.pow(2).sum() + two.pow(2).sum() - 2 * (x @ y.mT).pow(2).sum()
        apart, norms = float(square.clamp_min(0).sqrt()), float(one.norm() + two.norm())
    return apart / max(norms, TINY)


def cov_eig(a: Tensor, b: Tensor) -> float:
    """Return the distance of the singular values of the standardised weights, over their norm."""
    one, two = (torch.linalg.svdvals(standardised(x)) for x in (a, b))
    return _relative(float((one - two).norm()), float(one.norm()), float(two.norm()))


def cka(a: Tensor, b: Tensor) -> float:
    """Return 1 minus linear centred kernel alignment: rows pair up, columns may be rotated."""
    x, y = (v - v.mean(0) for v in (a, b))
    if x.shape[0] <= x.shape[1]:
        one, two = x @ x.mT, y @ y.mT
        inner, norms = float((one * two).sum()), float(one.norm() * two.norm())
    else:
        inner = float((x.mT @ y).pow(2).sum())
        norms = float((x.mT @ x).norm() * (y.mT @ y).norm())
    if norms <= TINY:  # a constant layer has no directions
        return 0.0 if torch.equal(x, y) else 1.0
    return min(1.0, max(0.0, 1.0 - inner / norms))


def kl(a: Tensor, b: Tensor) -> float:
    """Return the Jensen-Shannon divergence of the softmaxes of all entries [nats], 0 to log 2."""
    p, q = (x.flatten().log_softmax(0) for x in (a, b))
    middle = torch.logaddexp(p, q) - torch.log(p.new_tensor(2.0))
    both = ((p.exp() * (p - middle)).sum(), (q.exp() * (q - middle)).sum())
    return max(0.0, 0.5 * float(both[0] + both[1]))


def moments(a: Tensor, b: Tensor) -> float:
    """Return the distance of (mean, standard deviation) of all entries: 1-D Gaussian transport."""
    one, two = (torch.stack([x.mean(), x.std(correction=0)]) for x in (a, b))
    return float((one - two).norm())


def w2(a: Tensor, b: Tensor) -> float:
    """Return the 2-Wasserstein distance of the Gaussians that the rows would be drawn from.

    `sqrt(|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2))`. With centred rows X and Y
    the last trace is the nuclear norm of `X Y^T / n`, so no covariance has to be formed, and none
    has to be invertible.

    Example:
        >>> a = torch.randn(5, 3, dtype=torch.float64)
        >>> w2(a, a.flip(0)) < 1e-6
        True
    """
    shift = (a.mean(0) - b.mean(0)).pow(2).sum()
    x, y = (_tall_to_square(v - v.mean(0)) for v in (a, b))
    shared = torch.linalg.svdvals(x @ y.mT).sum()
    spread = (x.pow(2).sum() + y.pow(2).sum() - 2 * shared) / max(1, len(a))
    return float((shift + spread.clamp_min(0)).sqrt())


def w1(a: Tensor, b: Tensor) -> float:
    """Return the mean distance of the sorted entries: exact 1-D transport."""
    return float((a.flatten().sort().values - b.flatten().sort().values).abs().mean())


def emd(a: Tensor, b: Tensor) -> float:
    """Return the root mean squared distance of rows, paired as cheaply as can be (exact)."""
    from scipy.optimize import linear_sum_assignment

    cost = _costs(a, b)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return float((a[rows] - b[columns]).pow(2).sum(1).mean().sqrt())


def sinkhorn(a: Tensor, b: Tensor) -> float:
    """Return the root of the debiased entropic transport cost between rows.

    Half the costs from each layer to itself are taken off, or no layer would be at distance 0 from
    itself; the entropy is that of 5 % of the mean cost.
    """
    cross, own_a, own_b = _costs(a, b), _costs(a, a), _costs(b, b)
    blur = BLUR * float(cross.mean())
    if blur <= 0:
        return 0.0
    parts = [_entropic(cost, blur) for cost in (cross, own_a, own_b)]
    return max(0.0, parts[0] - 0.5 * (parts[1] + parts[2])) ** 0.5


DISTANCES: dict[str, Distance] = {
    f.__name__: f
    for f in (euclidean, manhattan, cosine, cov, cov_eig, cka, kl, moments, w2, w1, emd, sinkhorn)
}


def distances(matrices: Sequence[Tensor], name: str = "euclidean") -> Tensor:
    """Return the distances of every two layers `[n, n]`.

    Args:
        matrices: weights `[rows, columns]` of one shape.
        name: of the measure, see `DISTANCES`.

    Raises:
        MethodError: there is no such measure; shapes differ; or a weight is not finite.

    Example:
        >>> distances([torch.ones(2, 2), torch.ones(2, 2)], "cosine").tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """
    if name not in DISTANCES:
        raise MethodError("unknown distance", repr(name), "", f"choose from {', '.join(DISTANCES)}")
    if len({m.shape for m in matrices}) > 1:
        shapes = ", ".join(str(tuple(m.shape)) for m in matrices)
        raise MethodError("only layers of one shape have a distance", shapes)
    wide = [m.detach().to("cpu", torch.float64).flatten(1) for m in matrices]
    if not all(bool(torch.isfinite(m).all()) for m in wide):
        raise MethodError("cannot compare layers", "", "weights are not finite", "mend the network")
    found = torch.zeros(len(wide), len(wide), dtype=torch.float64)
    for i, one in enumerate(wide):
        for j in range(i):
            found[i, j] = found[j, i] = DISTANCES[name](one, wide[j])
    return found


def standardised(matrix: Tensor) -> Tensor:
    """Return a matrix whose columns have mean 0 and deviation 1; constant columns become 0."""
    centred = matrix - matrix.mean(0)
    spread = centred.pow(2).mean(0).sqrt()
    flat = spread <= FLAT * matrix.abs().max().clamp_min(TINY)
    return torch.where(flat, torch.zeros_like(centred), centred / spread.clamp_min(TINY))


def _relative(apart: float, one: float, two: float) -> float:
    return 0.0 if apart == 0 else apart / max((one * two) ** 0.5, TINY)


def _tall_to_square(matrix: Tensor) -> Tensor:
    """Return a matrix of no more rows than columns with the same `X^T X`."""
    tall = matrix.shape[0] > matrix.shape[1]
    return torch.linalg.qr(matrix, mode="r").R if tall else matrix


def _costs(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").pow(2)


def _entropic(cost: Tensor, blur: float) -> float:
    """Return the dual value of entropic transport between equal weights, in the log domain."""
    n = cost.shape[0]
    even = -torch.log(cost.new_tensor(float(n)))
    f = g = cost.new_zeros(n)
    for _ in range(ITERATIONS):  # both at once, averaged: the same whichever layer comes first
        to_f = -blur * ((g - cost) / blur + even).logsumexp(1)
        to_g = -blur * ((f[:, None] - cost) / blur + even).logsumexp(0)
        f, g = (f + to_f) / 2, (g + to_g) / 2
    return float(f.mean() + g.mean())
