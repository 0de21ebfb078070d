"""Gates on the channels inside a Tucker-2 form, and the penalty that closes them.

A convolution is rewritten exactly, at full ranks, as `A diag(g1) C diag(g2) B`; training with the
penalty closes gates all over the network, and what is left is a Tucker-2 form of the ranks that
training chose. The paper's formula for its "funnel function" was not to be had; this is our reading
of it, a funnel-type penalty: `F_c(g) = |g| / (|g| + c)`. It is as sharp as an L1 norm at zero, so
that gates really close, but it saturates, so that open gates are hardly shrunk; as c falls it
becomes the count of open gates.

Reference: Chu, Lee 2021 (funnel regularisation of Tucker-2 channels; ranks of all layers at once).
The proximal step is the standard one for a weighted L1 norm, linearised at the gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamina.forms import build_tucker
from lamina.measure.stats import LayerStats
from lamina.measure.tucker import compose, decompose
from lamina.methods.tucker import macs_of, most_ranks
from lamina.network.sites import Site

Masks = tuple[torch.Tensor, torch.Tensor]  # of the gates of a core's outputs and inputs
FAINT = 1e-4  # of the strongest channel: weaker ones are not made as strong as the others
EVENING = 3  # rounds; the two sides depend on each other
CLOSED = 1e-2  # of the layer's widest gate: a gate below counts as closed


def funnel(gates: torch.Tensor, c: float) -> torch.Tensor:
    """Return `sum |g| / (|g| + c)`: nearly the number of open gates, for small c.

    Example:
        >>> float(funnel(torch.tensor([0.0, 1.0, -3.0]), 1.0))
        1.25
    """
    size = gates.abs()
    return (size / (size + c)).sum()


def shrink(gates: torch.Tensor, step: float, c: float) -> torch.Tensor:
    """Return the gates after one proximal step of the penalty: `|g|` falls by `step c / (|g|+c)^2`.

    A gate that would cross zero becomes zero, exactly.

    Args:
        gates: of any shape.
        step: learning rate times the price of a gate.
        c: of the penalty.

    Example:
        >>> shrink(torch.tensor([0.1, -1.0]), 0.5, 1.0)
        tensor([ 0.0000, -0.8750])
    """
    size = gates.abs()
    return gates.sign() * (size - step * c / (size + c) ** 2).clamp_min(0)


class Gated(nn.Module):
    """A convolution in Tucker-2 form of full ranks, with a gate on every inner channel.

    The outer factors are fixed, but for their scale, and hold what each channel carries, so that
    all of the core is of one scale. What the core's channels gain or lose in training is moved into
    their gates (`settle`), or the core would grow as the gates shrink, and the penalty would cost
    nothing. For the same reason the widest gate of either side is kept at 1.

    Args:
        layer: the convolution; not changed.
        stats: of it; the channels are then sorted by what they mean to the loss. None: by the
            weight alone.
    """

    first: Any
    core: Any
    last: Any
    norms_out: torch.Tensor
    norms_in: torch.Tensor

    def __init__(self, layer: nn.Module, stats: LayerStats | None = None) -> None:
        super().__init__()
        old: Any = layer
        weight = old.weight.detach().cpu()
        f, c = weight.shape[:2]
        r1, r2 = most_ranks(f, c, math.prod(weight.shape[2:]))
        factors = decompose(weight.flatten(2), stats, r1, r2, balanced=False)
        decode, core, encode = even(*factors, float(weight.double().square().mean().sqrt()))
        built: Any = build_tucker(old, {"outputs": r1, "inputs": r2})
        self.first, self.core, self.last = built
        with torch.no_grad():
            for part, values in zip(built, (encode, core, decode), strict=True):
                part.weight.copy_(values.reshape(part.weight.shape))
        self.first.weight.requires_grad_(False)
        self.last.weight.requires_grad_(False)
        self.outputs, self.inputs = (nn.Parameter(old.weight.new_ones(r)) for r in (r1, r2))
        self.register_buffer("norms_out", self._norms(0), False)
        self.register_buffer("norms_in", self._norms(1), False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ones = (1,) * (self.core.weight.dim() - 2)
        x = self.core(self.first(x) * self.inputs.view(-1, *ones))
        out: torch.Tensor = self.last(x * self.outputs.view(-1, *ones))
        return out

    @property
    def gates(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The gates of the core's outputs and inputs."""
        return self.outputs, self.inputs

    def open(self) -> Masks:
        """Return masks of the open gates; at least one on each side."""
        found = []
        for gates in self.gates:
            size = gates.detach().abs()
            mask = size > CLOSED * size.max()
            mask[size.argmax()] = True
            found.append(mask.cpu())
        return found[0], found[1]

    @torch.no_grad()
    def settle(self) -> None:
        """Move the scale of the core's channels into their gates, and that of all gates out.

        The widest gate of either side is 1 then: shrinking all of them alike, which a norm behind
        the layer undoes, closes none. The function stays.
        """
        weight = self.core.weight
        for axis, (gates, before) in enumerate(
            zip(self.gates, (self.norms_out, self.norms_in), strict=True)
        ):
            now = self._norms(axis)
            clear = (before > 0) & (now > 0)
            factor = torch.where(clear, now / before, torch.ones_like(now))
            gates.mul_(factor)
            widest = gates.abs().max()
            if widest > 0:
                gates.div_(widest)
                (self.last if axis == 0 else self.first).weight.mul_(widest)
            weight.div_(factor.view([-1 if i == axis else 1 for i in range(weight.dim())]))

    def _norms(self, axis: int) -> torch.Tensor:
        norms: torch.Tensor = self.core.weight.detach().movedim(axis, 0).flatten(1).norm(dim=1)
        return norms

    def dense(self, masks: Masks) -> torch.Tensor:
        """Return the weight `[f, c, K]` that the gates left by the masks make up, float64."""
        encode, core, decode = (
            part.weight.detach().cpu().to(torch.float64).flatten(2)
            for part in (self.first, self.core, self.last)
        )
        g1, g2 = (
            g.detach().cpu().to(torch.float64) * mask
            for g, mask in zip(self.gates, masks, strict=True)
        )
        core = core * g1[:, None, None] * g2[:, None]
        return compose(decode.squeeze(2), core, encode.squeeze(2))


def even(
    decode: torch.Tensor, core: torch.Tensor, encode: torch.Tensor, size: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the same product with a core whose channels all have about one mean square.

    Else an optimizer that moves all weights alike (Adam) would turn channels that carry little over
    in a few steps.

    Args:
        decode `[f, r1]`, core `[r1, r2, K]`, encode `[r2, c]`: factors.
        size: root mean square that the core shall have.
    """
    for _ in range(EVENING):
        for axis in (0, 1):
            norms = core.square().mean([a for a in range(3) if a != axis]).sqrt()
            norms = (norms / size).clamp_min(FAINT * float(norms.max()) / size or 1.0)
            core = core / norms.view([-1 if a == axis else 1 for a in range(3)])
            if axis == 0:
                decode = decode * norms
            else:
                encode = encode * norms[:, None]
    return decode, core, encode


# --- what is left --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """One layer after the gates were closed.

    Args:
        ranks: of the Tucker-2 form (outputs, inputs); None: they save nothing, it stays dense.
        weight: the dense weight `[f, c, K]` that the open gates make up, float64.
    """

    ranks: tuple[int, int] | None
    weight: torch.Tensor


def gated_macs(site: Site, masks: Masks) -> float:
    """Return the multiply-accumulates of a layer with these gates open: dense, if that is less."""
    return min(site.macs, macs_of(site, int(masks[0].sum()), int(masks[1].sum())))


def close(
    sites: Sequence[Site], layers: Mapping[str, Gated], limit: float
) -> tuple[dict[str, Masks], float]:
    """Return which gates stay: the open ones, less the narrowest while the layers cost too much.

    Args:
        sites: the layers; layers: their gates, by site name.
        limit: of the multiply-accumulates of all these layers.

    Returns:
        masks by site name, and the multiply-accumulates they leave.
    """
    masks = {site.name: layers[site.name].open() for site in sites}
    costs = {site.name: gated_macs(site, masks[site.name]) for site in sites}
    queue = []
    for site in sites:
        for side, gates in enumerate(layers[site.name].gates):
            size = gates.detach().abs().cpu()
            size = size / size.max().clamp_min(1e-30)
            queue += [(float(v), site.name, side, i) for i, v in enumerate(size)]
    by_name = {site.name: site for site in sites}
    for _, name, side, i in sorted(queue):
        if sum(costs.values()) <= limit:
            break
        mask = masks[name][side]
        if mask[i] and int(mask.sum()) > 1:
            mask[i] = False
            costs[name] = gated_macs(by_name[name], masks[name])
    return masks, sum(costs.values())


def cut(site: Site, layer: Gated, masks: Masks) -> Cut:
    """Return what a layer's open gates make of it."""
    (r1, r2), taps = (int(m.sum()) for m in masks), math.prod(site.kernel)
    r1, r2 = min(r1, taps * r2), min(r2, taps * r1)  # more have no tensor to fill
    if macs_of(site, r1, r2) >= site.macs:
        # Closed gates stay closed: they were trained to be.
        return Cut(None, layer.dense(masks))
    return Cut((r1, r2), layer.dense(masks))
