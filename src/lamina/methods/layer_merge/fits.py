"""Convolutions that stand in for several with activations between, from calibration moments.

What goes into the next layer, `z`, is predicted from what the layer before sees, `x`, by least
squares: `z ~ A x + c`, where `A` is a convolution of the layer's kernel, or of a smaller one in its
middle. The last layer is kept, or held to the middle of its own kernel. The product of these has no
activation and is one convolution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lamina.measure.stats import Cross, LayerStats
from lamina.methods.base import Leaf, Parts
from lamina.methods.layer_merge.merging import Conv, merge, regrouped
from lamina.network.sites import Site

RIDGE = 1e-4  # of the mean variance of x: what a direction that was never seen is held at


@dataclass(frozen=True)
class Fit:
    """One way to merge a span.

    Args:
        supports: for each layer the width of the middle of its kernel that is used.
        conv: the merged convolution.
        error: predicted increase of the loss [nats per sample].
    """

    supports: tuple[int, ...]
    conv: Conv
    error: float


def supports_of(site: Site) -> list[int]:
    """Return the widths of the middle of a kernel, from all of it to one tap.

    Example:
        >>> supports_of(Site("a", kernel=(5, 5))), supports_of(Site("a", kernel=(1, 7)))
        ([5, 3, 1], [7, 1])
    """
    width = max(site.kernel)
    if set(site.kernel) == {width}:
        return list(range(width, 0, -2)) if width % 2 else [width]
    return [width, 1] if all(k % 2 for k in site.kernel) else [width]


class Fits:
    """The fits of one span; what several of them share is computed once."""

    def __init__(self, parts: Parts) -> None:
        self.members = parts.members
        self.cross = parts.cross
        self.groups = math.gcd(*(leaf.site.groups for leaf in parts.members))
        self.links: dict[tuple[int, int], tuple[Conv, Tensor]] = {}
        self.ends: dict[int, tuple[Conv, float]] = {}

    @cached_property
    def stats(self) -> LayerStats | None:
        return self.members[-1].stats

    def all(self) -> Iterator[Fit]:
        """Yield a fit for every choice of supports whose merged convolution can be built."""
        if self.stats is None or any(c is None for c in self.cross):
            return
        for supports in itertools.product(*(supports_of(leaf.site) for leaf in self.members)):
            if self.pads(supports):
                yield self.fit(supports)

    def pads(self, supports: Sequence[int]) -> bool:
        """Whether the merged convolution does not begin inside its input."""
        sites = [leaf.site for leaf in self.members]
        for axis in range(len(sites[0].kernel)):
            padding, step = 0, 1
            for site, width in zip(sites, supports, strict=True):
                cut = (site.kernel[axis] - min(width, site.kernel[axis])) // 2
                padding += step * (int(site.padding[axis]) - cut)
                step *= site.stride[axis]
            if padding < 0:
                return False
        return True

    def fit(self, supports: Sequence[int]) -> Fit:
        """Return one fit."""
        assert self.stats is not None
        last, error = self._end(supports[-1])
        parts = [self._link(i, width) for i, width in enumerate(supports[:-1])]
        after = last
        for i in range(len(parts) - 1, -1, -1):
            conv, rest = parts[i]
            # What a fit leaves goes through all that follows; neighbours count as unrelated.
            error += self._lost(after, rest) + self._border(i, after, conv.bias)
            after = merge((conv, after))
        return Fit(tuple(supports), after, error)

    def _lost(self, after: Conv, rest: Tensor) -> float:
        """Return the loss of a rest `[channels, channels]` that goes through a convolution."""
        stats = self.stats
        assert stats is not None
        taps = _dense(after).flatten(2)
        seen = torch.einsum("oct,cd,pdt->op", taps, rest, taps)
        return 0.5 * stats.scale * stats.positions * _against(stats.G, seen)

    def _border(self, i: int, after: Conv, bias: Tensor) -> float:
        """Return the loss at the border: what follows padded with zeros, and now sees `bias`.

        Exact where the fit has one tap; a wider one sees some of the image out there.
        """
        stats, extent = self.stats, self.members[i + 1].site.extent
        if stats is None or not extent or min(after.padding) < 0 or not any(after.padding):
            return 0.0
        outside = bias.reshape(1, -1, *[1] * len(extent)).repeat(
            1, 1, *(n + 2 * p for n, p in zip(extent, after.padding, strict=True))
        )
        inside = (slice(p, p + n) for n, p in zip(extent, after.padding, strict=True))
        outside[(slice(None), slice(None), *inside)] = 0
        still = replace(after, bias=torch.zeros_like(after.bias), padding=(0,) * len(extent))
        wrong = still(outside)[0].flatten(1)
        return 0.5 * stats.scale * _against(stats.G, wrong @ wrong.T)

    def _link(self, i: int, width: int) -> tuple[Conv, Tensor]:
        """Return the fit from what layer i sees to what layer i + 1 does, and what it leaves."""
        if (i, width) not in self.links:
            site, cross = self.members[i].site, self.cross[i]
            assert cross is not None
            self.links[i, width] = fit_link(site, cross, width, self.groups)
        return self.links[i, width]

    def _end(self, width: int) -> tuple[Conv, float]:
        """Return the last layer, held to the middle of its kernel, and what that costs."""
        if width not in self.ends:
            leaf = self.members[-1]
            assert leaf.stats is not None
            self.ends[width] = fit_end(leaf, width)
        return self.ends[width]


def fit_link(site: Site, cross: Cross, width: int, groups: int) -> tuple[Conv, Tensor]:
    """Fit the inputs of the next layer to what a layer sees.

    Args:
        site: the layer.
        cross: how the two go together.
        width: of the middle of the kernel that is used.
        groups: that the fit keeps apart.

    Returns:
        the convolution, and the covariance of what it leaves, at one position.
    """
    n = max(cross.positions, 1e-12)
    mx, mz = cross.x_mean / n, cross.mean / n
    xx = cross.x_second / n - torch.outer(mx, mx)
    zx = cross.moment / n - torch.outer(mz, mx)
    zz = cross.second / n - torch.outer(mz, mz)
    inputs = site.shape[1] * site.groups
    taps = _middle(site.kernel, width)
    used = taps.repeat(inputs)
    channel = torch.arange(inputs).repeat_interleave(taps.numel())
    weight = torch.zeros_like(zx)
    rows = len(mz) // groups
    for g in range(groups):
        mine = used & (channel // (inputs // groups) == g)
        block = xx[mine][:, mine]
        block = block + RIDGE * block.diagonal().mean().clamp_min(1e-12) * torch.eye(len(block))
        out = slice(g * rows, (g + 1) * rows)
        weight[out, mine] = torch.linalg.solve(block, zx[out][:, mine].T).T
    left = zz - weight @ zx.T - zx @ weight.T + weight @ xx @ weight.T
    bias = mz - weight @ mx
    own = _grouped(weight.reshape(len(mz), inputs, -1)[:, :, taps], groups)
    kernel = tuple(min(k, width) for k in site.kernel)
    conv = Conv(
        own.reshape(len(mz), inputs // groups, *kernel), bias, site.stride,
        _padding(site, width), groups,
    )  # fmt: skip
    return conv, left


def fit_end(leaf: Leaf, width: int) -> tuple[Conv, float]:
    """Hold a layer to the middle of its kernel, by least squares on what it sees.

    Returns:
        the convolution, and its predicted error [nats per sample].
    """
    site, stats = leaf.site, leaf.stats
    assert stats is not None
    weight = leaf.weights["weight"].detach().double().cpu()
    bias = leaf.weights.get("bias")
    shift = torch.zeros(len(weight)).double() if bias is None else bias.detach().double().cpu()
    if width >= max(site.kernel):
        return Conv(weight, shift, site.stride, _padding(site, width), site.groups), 0.0
    taps = _middle(site.kernel, width)
    used = taps.repeat(site.shape[1])
    own = weight.reshape(site.groups, len(weight) // site.groups, -1)
    n = max(stats.positions, 1e-12)
    H = stats.H if stats.H.dim() == 3 else torch.diag_embed(stats.H)
    mean = torch.zeros(H.shape[:2], dtype=H.dtype) if stats.mean is None else stats.mean / n
    cov = H / n - mean[:, :, None] * mean[:, None, :]
    small = torch.zeros_like(own)
    for g in range(site.groups):
        block = cov[g][used][:, used]
        block = block + RIDGE * block.diagonal().mean().clamp_min(1e-12) * torch.eye(len(block))
        small[g][:, used] = torch.linalg.solve(block, (own[g] @ cov[g])[:, used].T).T
    change = small - own
    shift = shift - torch.einsum("goi,gi->go", change, mean).reshape(-1)
    lost = change @ cov @ change.transpose(1, 2)
    error = 0.5 * stats.scale * n * _against(stats.G, lost)
    kernel = tuple(min(k, width) for k in site.kernel)
    kept = small.reshape(len(weight), site.shape[1], -1)[:, :, taps]
    conv = Conv(
        kept.reshape(len(weight), site.shape[1], *kernel), shift, site.stride,
        _padding(site, width), site.groups,
    )  # fmt: skip
    return conv, error


def _against(G: Tensor, seen: Tensor) -> float:
    """Return the inner product of a gradient moment, by groups, and an output moment.

    Args:
        G: `[groups, out, out]` or its diagonal.
        seen: `[out, out]` over all groups, or by groups.
    """
    if seen.dim() == 2:
        groups, rows = G.shape[0], G.shape[1]
        blocks = seen.reshape(groups, rows, groups, rows)
        seen = torch.stack([blocks[g, :, g] for g in range(groups)])
    if G.dim() == 2:
        return max(0.0, float((G * seen.diagonal(dim1=1, dim2=2)).sum()))
    return max(0.0, float((G * seen).sum()))


def _middle(kernel: Sequence[int], width: int) -> Tensor:
    """Return which taps of a kernel are in its middle, `[taps]`."""
    found = torch.ones(1, dtype=torch.bool)
    for k in kernel:
        cut = (k - min(width, k)) // 2
        axis = torch.zeros(k, dtype=torch.bool)
        axis[cut : k - cut] = True
        found = (found[:, None] & axis[None, :]).reshape(-1)
    return found


def _padding(site: Site, width: int) -> tuple[int, ...]:
    """Return the padding of a layer whose kernel is held to its middle; it may be below zero."""
    return tuple(
        int(p) - (k - min(width, k)) // 2 for p, k in zip(site.padding, site.kernel, strict=True)
    )


def _grouped(weight: Tensor, groups: int) -> Tensor:
    """Return the blocks of a weight `[out, in, taps]` that is zero outside them."""
    out, inputs = weight.shape[0] // groups, weight.shape[1] // groups
    blocks = weight.reshape(groups, out, groups, inputs, -1)
    return torch.stack([blocks[g, :, g] for g in range(groups)]).reshape(
        groups * out, inputs, weight.shape[-1]
    )


def _dense(conv: Conv) -> Tensor:
    """Return a weight as if it had one group."""
    return regrouped(conv, 1).weight
