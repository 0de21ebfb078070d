"""Three ratios of a network of few bits and half its weights, and what each of them counts.

The first, values alone, is what papers give; it leaves out where the values belong. The second adds
two bits for the place of each, and the steps. The third is of the file on disk, embeddings and all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamina.artifact import records
from lamina.forms import Edit, Grid, find_tensor
from lamina.methods.sawb import CONSTANTS
from lamina.methods.two_four import GROUP, KEPT, in_fours
from lamina.methods.two_four import method as two_four
from lamina.network.sites import Site
from lamina.network.source import Network

STEP_BITS = 32  # of one step
EXPONENT_BITS = 8  # of a row's


def ratios(network: Network, layers: Sequence[Site], edits: Sequence[Edit], size: int) -> list[str]:
    """Return one sentence with the three ratios, and what each counts.

    Args:
        network: the original.
        layers: the backbone.
        edits: what was made of it.
        size: of the whole file [bytes].
    """
    before = values = indices = coded = 0.0
    held = {e.path: e.values for e in edits if e.form == "values"}
    for site in layers:
        weight, now = find_tensor(network.module, site.weight), held[site.weight]
        if now is None:
            continue
        width = 8.0 * weight.element_size()
        sparse = not two_four.refuse(site) and is_two_four(site, now.dense())
        kept = weight.numel() / 2 if sparse else weight.numel()
        bits = 8.0 * weight.element_size()
        if isinstance(now, Grid):
            bits = bits_of(now)
            indices += STEP_BITS + (
                EXPONENT_BITS * now.exponents.numel() if now.exponents is not None else 0
            )
        before += width * weight.numel()
        values += bits * kept
        indices += 2 * kept if sparse else 0
        coded += 8.0 * len(records.encode(now))
    tensors = {id(t): t for t in (*network.module.parameters(), *network.module.buffers())}
    whole = sum(t.numel() * t.element_size() for t in tensors.values())
    return [
        f"Ratios: {before / values:.1f}x for the values of the blocks' layers, "
        f"{before / (values + indices):.1f}x with 2-bit indices and steps "
        f"({before / coded:.1f}x as coded in the file), and {whole / size:.1f}x for the whole "
        f"({size:,} bytes in the file, {whole:,} as tensors)."
    ]


def bits_of(grid: Grid) -> int:
    """Return the width of a grid's integers: the least of sawb's that holds them."""
    most = int(grid.symbols.abs().max()) if grid.symbols.numel() else 0
    return next((bits for bits, (n, _, _) in CONSTANTS.items() if most <= n), 32)


def is_two_four(site: Site, weight: torch.Tensor) -> bool:
    """Whether every four inputs of a layer have two zeros."""
    four = in_fours(site, weight).reshape(-1, GROUP)
    return bool(((four == 0).sum(1) >= GROUP - KEPT).all())
