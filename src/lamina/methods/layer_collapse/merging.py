"""From the parts of a chain to one layer, or to a low rank pair: values, error, statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lamina.measure.low_rank import balance, damp, encoded_moments, fold_basis, solve_decoder
from lamina.measure.stats import LayerStats
from lamina.methods.base import Leaf, Parts, Passage
from lamina.methods.layer_collapse.maps import (
    Fit,
    Joint,
    Map,
    fit_full,
    fit_units,
    joint_model,
    joint_of,
    loss_of,
    residual,
    scaled,
)
from lamina.methods.layer_collapse.places import ACTIVATIONS
from lamina.methods.layers import site_inside
from lamina.network.sites import Site, as_matrix

FITS = ("slope", "units", "full")
RANKS = 12  # points of the geometric grid
FAST = 8  # ranks above twice this are its multiples, which dense kernels like


@dataclass(frozen=True)
class Merged:
    """The affine map that stands in for a part of a chain.

    Args:
        map: `[out of the last layer, in of the first]`.
        error: predicted [nats per sample]; data-free relative and spectral.
        metric: what rank reduction is measured in: covariance of the first layer's input `[n, n]`
            (its mean is `mean`), and G of the last layer, times what makes nats of it.
    """

    map: Map
    error: float
    covariance: Tensor
    mean: Tensor
    G: Tensor
    unit: float
    relative: bool

    def truncated(self, rank: int) -> Truncated:
        """Return the pair of a rank that costs least, its bias such that the mean output stays."""
        return self.truncations([rank])[0]

    def truncations(self, ranks: Sequence[int]) -> list[Truncated]:
        """Return the pairs of several ranks."""
        W, H = self.map.weight, damp(self.covariance)
        rows = fold_basis(W, H, damp(self.G), 1).encode
        found = []
        for rank in ranks:
            encode = rows[:, :rank]
            decode = solve_decoder(*encoded_moments(W, H, encode))
            encode, decode = balance(encode, decode)
            change = W - decode @ encode[0]
            bias = self.map.bias + change @ self.mean
            lost = loss_of(self.covariance, change, self.G)
            error = self.error + self.unit * lost
            if self.relative:
                lost, whole = (float(torch.linalg.matrix_norm(m, 2)) for m in (change, W))
                error = math.hypot(self.error, lost / max(1e-300, whole))
            found.append(Truncated(encode[0], decode, bias, error))
        return found


@dataclass(frozen=True)
class Truncated:
    """A low rank pair: `encode [r, n]`, `decode [f, r]`, `bias [f]`, and its predicted error."""

    encode: Tensor
    decode: Tensor
    bias: Tensor
    error: float


def map_of(leaf: Leaf) -> Map:
    """Return a layer as an affine map in float64."""
    weight = as_matrix(leaf.site, leaf.weights["weight"].detach())[0].to(torch.float64).cpu()
    bias = leaf.weights.get("bias")
    zero = weight.new_zeros(len(weight))
    return Map(weight, zero if bias is None else bias.detach().to(zero))


def fits_of(parts: Parts) -> tuple[str, ...]:
    """Return the fits there are for these parts, the simplest first."""
    bent = [is_bent(between) for between in parts.passages]
    if not any(bent):
        return ("slope",)
    if joints_of(parts) is None:
        return ()
    measured = any(c is not None for c, b in zip(parts.cross, bent, strict=False) if b)
    return FITS if measured else FITS[:2]


def is_bent(between: Sequence[Passage]) -> bool:
    """Whether there is an activation in a link."""
    return any(p.op in ACTIVATIONS for p in between)


def joints_of(parts: Parts) -> list[Joint | None] | None:
    """Return the moments of each link; None: no model is known of what lies between two layers.

    Measured where they were; else modelled, for normal inputs of the moments that the first layer
    of the link saw, or without any data for those that the link before leaves.
    """
    samples = [leaf.stats.samples for leaf in parts.members if leaf.stats is not None]
    found: list[Joint | None] = []
    before: Joint | None = None
    crosses = parts.cross or tuple(None for _ in parts.passages)
    for leaf, between, cross in zip(parts.members[:-1], parts.passages, crosses, strict=True):
        joint = joint_of(cross, max(1, min(samples))) if cross is not None and samples else None
        if joint is None and (is_bent(between) or leaf.stats is None):
            first = map_of(leaf)
            covariance, mean = _inputs(leaf.stats, None, first.weight)
            if leaf.stats is None and before is not None:
                covariance, mean = before.zz, before.z_mean
            joint = joint_model(first, [(p.op, p.tensors) for p in between], mean, covariance)
            if joint is None:
                return None
        found.append(joint)
        before = joint
    return found


def merge(parts: Parts, fit: str) -> Merged:
    """Return the one affine map in place of a part of a chain.

    Every link has its own fit from the moments on its two sides. Errors of several links add up as
    if what each leaves were seen by the next fit and by nothing else; of one link the error is that
    of the calibration data, times what generalised cross-validation puts on top.

    Args:
        parts: the layers, what lies between, and moments.
        fit: `"slope"`: activations become the identity; `"units"`: a line for every hidden unit;
            `"full"`: any affine map of the layer's input.
    """
    members = [map_of(leaf) for leaf in parts.members]
    stats = [leaf.stats for leaf in parts.members]
    joints = joints_of(parts) or [None for _ in parts.passages]
    whole: Map | None = None
    left: Tensor | None = None  # second moment of the error of z, None: exact so far
    for i, (between, joint) in enumerate(zip(parts.passages, joints, strict=True)):
        start = Fit(scaled(members[i], norms_of(between)))
        found = start
        if is_bent(between) and joint is not None and fit != "slope":
            found = fit_units(members[i], joint)
            if fit == "full":
                found = fit_full(
                    found, joint, members[i + 1].weight, _metric(stats[i + 1], members)
                )
        through = found.map.weight
        left = None if left is None else through @ left @ through.mT
        if is_bent(between) and joint is not None:
            own = residual(joint, found.map) * found.optimism(joint.count)
            left = own if left is None else left + own
        whole = found.map if whole is None else found.map.after(whole)
    assert whole is not None
    last, seen = members[-1], stats[-1]
    covariance, mean = _inputs(stats[0], joints[0], members[0].weight)
    if seen is None:
        G = last.weight.new_ones(len(last.weight))
        end = joints[-1]
        relative = 0.0
        if left is not None and end is not None:
            power = [torch.linalg.eigvalsh(last.weight @ m @ last.weight.mT)[-1]
                     for m in (left, end.zz)]  # fmt: skip
            relative = math.sqrt(max(0.0, float(power[0])) / max(1e-300, float(power[1])))
        return Merged(last.after(whole), relative, covariance, mean, G, 0.0, True)
    G = seen.G[0].to(torch.float64)
    unit = 0.5 * seen.scale * seen.positions
    error = 0.0 if left is None else unit * loss_of(left, last.weight, G)
    return Merged(last.after(whole), error, covariance, mean, G, unit, False)


def norms_of(between: Sequence[Passage]) -> list[tuple[Tensor, Tensor]]:
    """Return the scale and shift of every BatchNorm in a link."""
    return [(p.tensors["scale"], p.tensors["shift"]) for p in between if p.op == "batch_norm"]


def _metric(stats: LayerStats | None, members: Sequence[Map]) -> Tensor:
    if stats is None:
        return torch.ones(1, dtype=torch.float64)
    return stats.G[0].to(torch.float64)


def _inputs(stats: LayerStats | None, joint: Joint | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return covariance and mean of what goes into the first layer."""
    if joint is not None:
        return joint.xx, joint.x_mean
    n = like.shape[1]
    if stats is None or stats.positions <= 0:
        return torch.eye(n, dtype=like.dtype), like.new_zeros(n)
    H = stats.H[0].to(torch.float64) / stats.positions
    H = H.diag_embed() if H.dim() == 1 else H
    if stats.mean is None:
        return H, like.new_zeros(n)
    mean = stats.mean[0].to(torch.float64) / stats.positions
    return H - torch.outer(mean, mean), mean


# --- what is left --------------------------------------------------------------------------------


def rank_grid(most: int) -> list[int]:
    """Return a geometric grid of ranks up to `most`, which is in it; above 16 multiples of 8.

    Example:
        >>> rank_grid(96)
        [1, 2, 3, 5, 8, 12, 16, 32, 40, 64, 96]
    """
    found = {most}
    for i in range(RANKS):
        rank = round(most ** (i / (RANKS - 1)))
        found.add(rank if rank <= 2 * FAST else min(most, round(rank / FAST) * FAST))
    return sorted(found)


def dense_site(last: Site, inputs: int, bias: bool) -> Site:
    """Describe the one layer that is left, where the last one was."""
    ones = (1,) * len(last.kernel)
    shape = (last.matrix_shape[1], inputs, *ones)
    name = f"{last.module}.bias" if bias else ""
    return replace(last, name=last.module, shape=shape, transposed=False, bias=name, rigid="")


def pair_sites(dense: Site, rank: int) -> tuple[Site, Site]:
    """Describe the two layers of a low rank pair in a layer's place."""
    f, n, *ones = dense.shape
    encode = site_inside(dense, 0, bias="", shape=(rank, n, *ones))
    return encode, site_inside(dense, 1, shape=(f, rank, *ones))


def dense_stats(first: LayerStats | None, last: LayerStats | None) -> LayerStats | None:
    """Return the statistics of the one layer: it sees what the first saw; its outputs are felt
    as those of the last."""
    if first is None or last is None:
        return None
    return replace(last, H=first.H, mean=first.mean, positions=first.positions)


def pair_stats(
    stats: LayerStats | None, encode: Tensor, decode: Tensor
) -> tuple[LayerStats | None, LayerStats | None]:
    """Return the statistics of a pair from those of the one layer; exact."""
    if stats is None:
        return None, None
    H, G = stats.H[0].to(encode), stats.G[0].to(encode)
    inner = (encode * H if H.dim() == 1 else encode @ H) @ encode.mT
    through = decode.mT @ (G[:, None] * decode if G.dim() == 1 else G @ decode)
    mean = None if stats.mean is None else (stats.mean[0].to(encode) @ encode.mT)[None]
    return replace(stats, G=through[None]), replace(stats, H=inner[None], mean=mean)
