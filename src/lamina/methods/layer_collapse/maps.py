"""Affine maps and moments: what is best put in the place of two layers and what lies between.

`x` goes into the first layer, `h = W1 x + b1` comes out of it, `z` goes into the second, after the
activation, the BatchNorm and whatever else works on each channel alone. An affine map from x to z
that stands in for all that turns the two layers into one: `W = W2 A`, `b = W2 c + b2`.

Reference: LayerCollapse (the collapse at slope 1, with BatchNorm folded); ordinary least squares
for the others, its ridge by generalised cross-validation (Golub, Heath, Wahba 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.measure.cross import COLUMNS_PER_WIDTH, FEWEST
from lamina.measure.stats import Cross

RIDGES = [10.0 ** (e / 2) for e in range(-14, 9)]  # of the mean variance of x, that are tried
FAINT = 1e-12  # of the largest variance: a unit that varies less does not vary


@dataclass(frozen=True)
class Map:
    """An affine map `y = weight x + bias`.

    Args:
        weight: `[out, in]`, float64.
        bias: `[out]`, float64.
    """

    weight: Tensor
    bias: Tensor

    def after(self, first: Map) -> Map:
        """Return the map that runs `first`, then this one.

        Example:
            >>> one, two = (Map(torch.eye(1).mul(k), torch.ones(1)) for k in (2, 3))
            >>> two.after(one)
            Map(weight=tensor([[6.]]), bias=tensor([4.]))
        """
        return Map(self.weight @ first.weight, self.weight @ first.bias + self.bias)


def scaled(first: Map, norms: Sequence[tuple[Tensor, Tensor]] = ()) -> Map:
    """Return `x -> D (W1 x + b1) + t`: what reaches the second layer if activations do nothing.

    This is the collapse at slope 1, exact once the activation is the identity.

    Args:
        first: the first layer.
        norms: the (scale `[h]`, shift `[h]`) of each BatchNorm in evaluation mode, in order.
    """
    weight, bias = first.weight, first.bias
    for scale, shift in norms:
        scale, shift = scale.to(weight), shift.to(weight)
        weight, bias = scale[:, None] * weight, scale * bias + shift
    return Map(weight, bias)


def slope_bound(second: Tensor, hidden: Tensor, slope: float | Tensor = 0.0,
                scale: Tensor | None = None) -> Tensor:  # fmt: skip
    """Bound what the collapse at slope 1 changes of the second layer's output.

    `f_a(x) - f_1(x) = -(1 - a) W2 D min(h, 0)`, for a PReLU of slope a, so its norm is at most
    `|1 - a| |W2 D|_2 |relu(-h)|_2`; tight where one unit alone is negative.

    Args:
        second: `[out, h]` weight of the second layer.
        hidden: `[..., h]` what goes into the PReLU.
        slope: a; one for all units, or `[h]` (then `|W2 D (1 - a)|_2` is the factor).
        scale: `[h]` D of a BatchNorm after the PReLU; None: there is none. One before it is in
            `hidden` already.

    Returns:
        `[...]`, the bound on the 2-norm of the change.

    Reference: derived from the definition; LayerCollapse bounds the same quantity.

    Example:
        >>> slope_bound(torch.eye(2), torch.tensor([-3.0, 4.0]), slope=0.5)
        tensor(1.5000)
    """
    slopes = torch.as_tensor(slope, dtype=second.dtype, device=second.device)
    factor = second if scale is None else second * scale
    factor = factor * (1 - slopes)
    norm = torch.linalg.matrix_norm(factor, 2)
    return norm * (-hidden).clamp_min(0).norm(dim=-1)


# --- moments ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joint:
    """Means and covariances of x and z, per position, float64.

    Args:
        xx: `[n, n]`; zx: `[h, n]`; zz: `[h, h]`: covariances.
        x_mean: `[n]`; z_mean: `[h]`.
        count: observations they rest on; inf: none, they are a model.
    """

    xx: Tensor
    zx: Tensor
    zz: Tensor
    x_mean: Tensor
    z_mean: Tensor
    count: float


def joint_of(cross: Cross, samples: int) -> Joint:
    """Return the covariances behind the moments that calibration summed up.

    Args:
        cross: of two neighbours.
        samples: that were seen. Positions of one sample count as observations of their own.
    """
    p = cross.positions
    x, z = cross.x_mean / p, cross.mean / p
    most = max(FEWEST, COLUMNS_PER_WIDTH * len(x))  # no more positions are looked at
    return Joint(
        xx=cross.x_second / p - torch.outer(x, x),
        zx=cross.moment / p - torch.outer(z, x),
        zz=cross.second / p - torch.outer(z, z),
        x_mean=x,
        z_mean=z,
        count=float(min(samples * p, most)),
    )


def residual(joint: Joint, fit: Map) -> Tensor:
    """Return the second moment `[h, h]` of `z - fit(x)`; exact for any affine map."""
    through = joint.zx @ fit.weight.mT
    moment = joint.zz - through - through.mT + fit.weight @ joint.xx @ fit.weight.mT
    off = joint.z_mean - fit.weight @ joint.x_mean - fit.bias
    return moment + torch.outer(off, off)


# --- fits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A map from x to z, and the parameters per output that the data had to determine."""

    map: Map
    freedom: float = 0.0

    def optimism(self, count: float) -> float:
        """Return by how much errors on other data are larger than on the data of the fit.

        The factor of generalised cross-validation, `(1 - freedom / count)^-2`.
        """
        return (1 - min(self.freedom / count, 0.9)) ** -2


def fit_units(first: Map, joint: Joint) -> Fit:
    """Fit every hidden unit by its own line: `z_i = s_i h_i + o_i`, by least squares.

    `s_i = cov(z_i, h_i) / var(h_i)`: half of it is 0 and half 1 for a ReLU of a centred h. A unit
    that does not vary gives its mean.

    Args:
        first: x to h.
        joint: moments of x and z.

    Example:
        >>> eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        >>> fit_units(Map(eye, zero), Joint(eye, eye / 2, eye, zero, zero, 100)).map.weight.diag()
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    covariance = (joint.zx * first.weight).sum(1)
    variance = ((first.weight @ joint.xx) * first.weight).sum(1)
    varies = variance > FAINT * variance.max().clamp_min(1e-300)
    slopes = torch.where(
        varies, covariance / variance.where(varies, torch.ones(()).to(variance)), 0
    )
    weight = slopes[:, None] * first.weight
    return Fit(Map(weight, joint.z_mean - weight @ joint.x_mean), 2.0)


def fit_full(start: Fit, joint: Joint, seen: Tensor, G: Tensor) -> Fit:
    """Fit all of z by all of x: `A = A0 + (Czx - A0 Cxx) (Cxx + r I)^-1`, `c = mean z - A mean x`.

    The ridge r draws towards a simpler fit A0 instead of towards nothing, and is the one for which
    generalised cross-validation expects the least error of the second layer's output in the metric
    G: with few observations A0 stays, with many it is ordinary least squares.

    Args:
        start: A0, with the mean of z met.
        joint: moments of x and z.
        seen: `[out, h]` weight of the second layer.
        G: `[out, out]` or its diagonal `[out]`: what the loss feels of each output.
    """
    base = start.map.weight
    values, vectors = torch.linalg.eigh(joint.xx)
    values = values.clamp_min(0)
    level = float(values.mean())
    if not level > 0:
        return start
    excess = (joint.zx - base @ joint.xx) @ vectors
    felt = seen @ excess
    weighed = (G[:, None] * felt if G.dim() == 1 else G @ felt).mul(felt).sum(0)
    whole = loss_of(residual(joint, start.map), seen, G)
    best, ridge = whole * start.optimism(joint.count), None
    freedom = start.freedom
    for step in RIDGES:
        inverse = 1 / (values + step * level)
        share = float((values * inverse).sum())
        if start.freedom + share > 0.8 * joint.count:
            continue
        left = whole - float((weighed * (2 * inverse - values * inverse.square())).sum())
        risk = max(left, 0.0) * Fit(start.map, start.freedom + share).optimism(joint.count)
        if risk < best:
            best, ridge, freedom = risk, step * level, start.freedom + share
    if ridge is None:
        return start
    weight = base + (excess / (values + ridge)) @ vectors.mT
    return Fit(Map(weight, joint.z_mean - weight @ joint.x_mean), freedom)


def loss_of(moment: Tensor, seen: Tensor, G: Tensor) -> float:
    """Return `tr(G W2 R W2^T)` of an error R of what goes into the second layer."""
    out = seen @ moment
    if G.dim() == 1:
        return max(0.0, float((G * (out * seen).sum(1)).sum()))
    return max(0.0, float((G * (out @ seen.mT)).sum()))


# --- without data -------------------------------------------------------------------------------

F = torch.nn.functional
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "softsign": F.softsign,
}
NODES = 64  # of the quadrature over one normal variable


def joint_model(
    first: Map,
    passages: Sequence[tuple[str, Mapping[str, Tensor]]],
    mean: Tensor,
    covariance: Tensor,
) -> Joint | None:
    """Model x and z for a normal x: what stands in for moments where there are no data.

    Exact but for the covariances of what the units' lines leave, which are taken for none.

    Args:
        first: x to h.
        passages: the operation and the tensors of everything in between, in order.
        mean, covariance: `[n]`, `[n, n]` of x.

    Returns:
        None where an operation is not known by its name alone.

    Reference: Stein's lemma, `cov(f(h), x) = E[f'(h)] cov(h, x)`; Gauss-Hermite quadrature.
    """
    points, weights = _nodes(mean)
    h_mean = first.weight @ mean + first.bias
    hx = first.weight @ covariance
    variance = (hx * first.weight).sum(1).clamp_min(0)
    deviation = variance.sqrt()
    values = h_mean + deviation * points[:, None]  # [nodes, h]
    for op, tensors in passages:
        if op == "batch_norm":
            values = tensors["scale"].to(values) * values + tensors["shift"].to(values)
        elif "slope" in tensors:
            values = torch.where(values > 0, values, tensors["slope"].to(values) * values)
        elif op in FUNCTIONS:
            values = FUNCTIONS[op](values)
        elif "dropout" not in op:
            return None
    z_mean = weights @ values
    away = values - z_mean
    # E[f'(h)] = cov(f(h), h) / var(h)
    slopes = (weights @ (away * points[:, None])) / deviation.where(deviation > 0, 1 + deviation)
    left = (weights @ away.square() - slopes.square() * variance).clamp_min(0)
    zx = slopes[:, None] * hx
    zz = slopes[:, None] * (hx @ first.weight.mT) * slopes + left.diag_embed()
    return Joint(covariance, zx, zz, mean, z_mean, float("inf"))


def _nodes(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights `[NODES]` of the quadrature over a standard normal variable."""
    import numpy as np

    points, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return torch.as_tensor(points).to(like), torch.as_tensor(weights / weights.sum()).to(like)
