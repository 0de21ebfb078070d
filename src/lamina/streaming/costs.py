"""What a streamed network costs as it is, and what of its file no choice can change."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lamina.artifact import records
from lamina.artifact.container import head_of, manifest_of, stored_names
from lamina.codecs.fields import varint
from lamina.forms import Plain
from lamina.measure.stats import Cost
from lamina.network.lazy import Lazy
from lamina.network.sites import Sites
from lamina.plan.costs import PLAN
from lamina.streaming.parts import Part

SHORT = 1 << 18  # elements; the code of more zeros is not made, only guessed


def original_cost(lazy: Lazy, sites: Sites) -> Cost:
    """Return what `plan.costs.original_cost` returns of the network opened as a whole."""
    sizes = {name: lazy.state[name] for name in lazy.firsts()}
    size = lazy.network.disk_bytes or sum(t.numel() * t.element_size() for t in sizes.values())
    params = float(sum(p.numel() for p in lazy.network.module.parameters()))
    return Cost(params, 8.0 * size, sum(site.macs for site in sites.layers))


def fixed_cost(lazy: Lazy, sites: Sites, kept: Sequence[Part]) -> Cost:
    """Return what `plan.costs.fixed_cost` returns of the network opened as a whole.

    Args:
        kept: the coded tensors of no site.
    """
    chosen = {p for site in sites.layers for p in (site.weight, site.bias) if p}
    names = stored_names(lazy.state, chosen, lambda name, t: id(t) if t.numel() else name)
    tensors = [lazy.state[name] for name in chosen]
    others = sum(part.bytes for part in kept)
    # The length of all records is written in the head; that of the sites' own is that of zeros.
    body = others + sum(_zeros(t) for t in tensors)
    held = {name: lazy.state[name] for name in names}
    network = lazy.network
    manifest = manifest_of(held, network.edits, network.source, PLAN)
    head = len(head_of(manifest, body))
    heads = sum(1 + len(varint(t.numel() * t.element_size())) for t in tensors)
    whole = sum(p.numel() for p in network.module.parameters())
    params = whole - sum(t.numel() for t in tensors)
    return Cost(params=float(params), bits=8.0 * (head + 4 + others + heads))


def _zeros(tensor: torch.Tensor) -> int:
    if math.prod(tensor.shape) > SHORT:
        return 64
    return len(records.encode(Plain(torch.zeros(tensor.shape, dtype=tensor.dtype))))
