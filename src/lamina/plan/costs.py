"""What a network costs as it is, and what of its file no choice can change."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamina.artifact import pack, unpack
from lamina.artifact.records import varint
from lamina.forms import Edit, Plain, find_tensor
from lamina.measure.stats import Cost
from lamina.network.sites import Sites
from lamina.network.source import Network

PLAN = {"*": "x" * 24}  # stands for the plan's summary in the file


def original_cost(network: Network, sites: Sites) -> Cost:
    """Return what the whole network costs: its plain state, its parameters, its sites' MACs.

    A network that was opened from files of its own (bfloat16 shards, 4-bit GGUF) is as large as
    these, whatever its tensors take in memory.

    Example:
        >>> from torch import nn
        >>> original_cost(Network(nn.Linear(3, 2)), Sites(())).bits
        256.0
    """
    seen: dict[tuple[int, tuple[int, ...]], int] = {}
    for tensor in network.module.state_dict().values():
        seen[tensor.data_ptr(), tuple(tensor.shape)] = tensor.numel() * tensor.element_size()
    params = float(sum(p.numel() for p in network.module.parameters()))
    size = network.disk_bytes or sum(seen.values())
    return Cost(params, 8.0 * size, sum(site.macs for site in sites.layers))


def fixed_cost(network: Network, sites: Sites, structure: Sequence[Edit] = ()) -> Cost:
    """Return what lies outside the sites' values: other tensors, manifest, heads, checksum.

    Args:
        network, sites: which tensors are chosen for.
        structure: structural edits that the file names whatever is chosen.
    """
    chosen = {p for site in sites.layers for p in (site.weight, site.bias) if p}
    tensors = [find_tensor(network.module, name) for name in chosen]
    # The sites' values are left out before packing: coding them takes long, and nobody asks here.
    edits = tuple(
        Edit(name, "values", values=Plain(torch.zeros_like(tensor)))
        for name, tensor in zip(chosen, tensors, strict=True)
    )
    file = pack(network.module, (*network.edits, *structure, *edits), network.source, PLAN)
    ledger = unpack(file, max_bytes=1 << 62).ledger  # so many zeros would look like a bomb
    others = sum(size for part, size in ledger.items() if part not in chosen)
    heads = sum(1 + len(varint(t.numel() * t.element_size())) for t in tensors)
    params = sum(p.numel() for p in network.module.parameters()) - sum(t.numel() for t in tensors)
    return Cost(params=float(params), bits=8.0 * (others + heads))
