"""group_shuffle: cut a layer into groups of channels that were made for each other.

**What.** A dense layer `f x c` becomes: permute the inputs, a layer of g groups, permute the
outputs back. Which outputs go with which inputs: an importance of every connection, its predicted
loss `G_oo sum_k H_kk w_ok^2` (without data `sum |w|`), is ordered so that g diagonal blocks hold as
much of it as can be, by exact linear assignments of rows and columns in turn, from several seeded
starts. With data the values inside the blocks are then solved again, jointly, for the error
currency. Settings: `groups` and `seed` (of the first random start).

**Where.** Linear and Conv1d-3d layers with one group, whose form may be replaced and whose inputs
and outputs are both even; 2, 4, 8, ... groups as far as both are divisible. A step of stage FACTOR.

**Costs and predicts.** `f c K / g` parameters and the bias; MACs likewise; the two indices take
bits, and no parameters. The error is that of the change of the whole weight: exact.

**Does not help** a network that was not trained for it: dense layers have few blocks. At
equal parameters `alds` nearly always predicts less loss, by far with two groups, less so with many.
The pressure of `train.shuffle` is what makes blocks. The
permutations move memory, and narrow groups are slow on some devices: latency is measured.

**Reference.** Zhang et al. 2021, UAI, "Structured Sparsification with Joint Optimization of Group
Convolution and Channel Shuffle", arXiv:2002.08127.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lamina.artifact.records import values_bytes
from lamina.forms import Edit
from lamina.measure.blocks import Order, find_groups, levels, refit_groups
from lamina.measure.low_rank import damp
from lamina.measure.stats import Cost, LayerStats, predict_error
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Step, Weights, weights_of
from lamina.methods.layers import (
    apply_leaves,
    channels_of,
    misfit,
    only_matrix,
    site_inside,
    why_no_form,
    why_tied,
)
from lamina.network.sites import STRUCTURAL, Site
from lamina.network.source import Network

MOST_GROUPS = 32
STARTS, ROUNDS = 5, 20
WIDE = 256  # channels: an assignment takes their cube; above, one random start and fewer rounds


@dataclass(frozen=True)
class Grouped:
    """Channels and values of a grouped layer.

    Args:
        order: of outputs and input channels; columns: `[g, c/g K]` of the matrix.
        values: `[g, f/g, c/g K]`, float64.
        change: `[f, c K]`, what it adds to the dense matrix.
    """

    order: Order
    columns: torch.Tensor
    values: torch.Tensor
    change: torch.Tensor


@dataclass(frozen=True)
class GroupShuffle:
    """The method; see the card above."""

    name: str = "group_shuffle"
    stage: Stage = Stage.FACTOR
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset({"input_gram", "output_gram"})
    reference: str = "Zhang et al. 2021, UAI, Structured Sparsification, arXiv:2002.08127"
    final: bool = False

    def refuse(self, site: Site) -> str:
        """Return why the layer cannot be cut into groups, or `""`."""
        if why := why_no_form(site, "shuffled layer", STRUCTURAL) or why_tied(site):
            return why
        outputs, channels = site.matrix_shape[1], channels_of(site)
        if outputs % 2 or channels % 2 or not outputs or not channels:
            return f"its {channels} inputs and {outputs} outputs are not both even"
        return ""

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer numbers of groups, cheapest first; no better one is cheaper.

        Raises:
            SiteError: the weights are not finite.
        """
        if self.refuse(site):
            return ()
        weight = weights["weight"]
        matrix = only_matrix(site, weights)
        width = 8 * values_bytes(weight) / weight.numel()
        bias = weights["bias"].numel() if "bias" in weights else 0
        rest = 8 * values_bytes(weights["bias"]) if bias else 0.0
        front: list[Candidate] = []
        for level in range(levels(len(matrix), channels_of(site)), 1, -1):
            groups = 2 ** (level - 1)
            if groups > MOST_GROUPS:
                continue
            found = _group(site, matrix, stats, groups, 0)
            error = predict_error(stats, matrix[None], found.change[None])
            params = weight.numel() // groups
            bits = params * width + rest + _index_bits(found.order)
            cost = Cost(params + bias, bits, params * site.positions)
            step = Step(self.name, site.name, {"groups": groups, "seed": 0})
            if not front or error < front[-1].error:
                front.append(Candidate(site.name, (step,), cost, error))
        return tuple(front)

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return the grouped layer, with the statistics of its own channels.

        Raises:
            SiteError: the weights are not finite.
            MethodError: the settings do not fit the layer.
        """
        groups, seed = _read(site, settings)
        found = _group(site, only_matrix(site, weights), stats, groups, seed)
        return (_leaf(site, weights, stats, found),)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return the edit that puts the shuffled layer in the layer's place.

        Raises:
            MethodError: the settings do not fit the layer.
        """
        groups, _ = _read(site, settings)
        return (Edit(site.module, "shuffled", {"groups": groups}),)

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the structural edit, then the indices and the values of the new layer.

        Raises:
            SiteError: the site cannot be served.
            MethodError: the settings do not fit the layer.
        """
        site = choice.site
        if self.refuse(site):  # says why
            return apply_leaves(self, network, choice, stats)
        groups, seed = _read(site, choice.settings)
        weights = weights_of(network, site)
        found = _group(site, only_matrix(site, weights), stats, groups, seed)
        index = {
            f"{site.module}.0.index": found.order.cols,
            f"{site.module}.2.index": torch.argsort(found.order.rows),
        }
        leaves = (_leaf(site, weights, stats, found),)
        return apply_leaves(self, network, choice, stats, index, leaves)


def connection_importance(
    matrix: torch.Tensor, channels: int, stats: LayerStats | None
) -> torch.Tensor:
    """Return the importance of every connection, `[f, c]`: its predicted loss, or `sum |w|`.

    Args:
        matrix: `[f, c K]`, float64; channels: c.
        stats: of the layer; None: data-free.
    """
    shape = (len(matrix), channels, -1)
    if stats is None:
        return matrix.abs().reshape(shape).sum(2)
    h, g = (m[0] if m.dim() == 2 else m[0].diagonal() for m in (stats.H, stats.G))
    return (matrix**2 * torch.outer(g, h).to(matrix)).reshape(shape).sum(2)


def _group(
    site: Site, matrix: torch.Tensor, stats: LayerStats | None, groups: int, seed: int
) -> Grouped:
    channels = channels_of(site)
    taps = matrix.shape[1] // channels
    wide = max(len(matrix), channels) > WIDE
    importance = connection_importance(matrix, channels, stats)
    order, _ = find_groups(
        importance, groups, 1 if wide else STARTS, ROUNDS // 4 if wide else ROUNDS, seed=seed
    )
    rows = order.rows.reshape(groups, -1)
    columns = order.cols.reshape(groups, -1)[:, :, None] * taps + torch.arange(taps)
    columns = columns.flatten(1)
    H, G = (None, None) if stats is None else (damp(stats.H[0]), damp(stats.G[0]))
    values = refit_groups(matrix, H, G, rows, columns)
    change = -matrix.clone()
    for r, c, block in zip(rows, columns, values, strict=True):
        change[r[:, None], c] += block
    return Grouped(order, columns, values, change)


def _leaf(site: Site, weights: Weights, stats: LayerStats | None, found: Grouped) -> Leaf:
    weight = weights["weight"]
    groups = len(found.values)
    channels, outputs = channels_of(site), len(found.order.rows)
    conv = site.op == "conv"
    shape = (outputs, channels // groups, *(site.kernel if conv else ()))
    inner = site_inside(site, 1, shape=shape, groups=groups)
    tensors = {"weight": found.values.to(weight.dtype).reshape(inner.shape)}
    if "bias" in weights:
        tensors["bias"] = weights["bias"][found.order.rows]
    seen = None
    if stats is not None:
        rows = found.order.rows.reshape(groups, -1)
        seen = replace(
            stats,
            H=_blocks(stats.H[0], found.columns),
            G=_blocks(stats.G[0], rows),
            mean=None if stats.mean is None else stats.mean[0][found.columns],
        )
    return Leaf(inner, tensors, seen, _index_bits(found.order))


def _blocks(moment: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return a moment's blocks `[g, k, k]`, or of a diagonal `[g, k]`, for index `[g, k]`."""
    if moment.dim() == 1:
        return moment[index]
    return moment[index[:, :, None], index[:, None, :]]


def _index_bits(order: Order) -> float:
    return 8.0 * (values_bytes(order.cols) + values_bytes(torch.argsort(order.rows)))


def _read(site: Site, settings: Settings) -> tuple[int, int]:
    groups, seed = settings.get("groups"), settings.get("seed", 0)
    sides = (site.matrix_shape[1], channels_of(site))
    if (
        not (isinstance(groups, int) and isinstance(seed, int))
        or groups < 2
        or any(side % groups for side in sides)
        or not 0 <= seed < 1 << 32
    ):
        fix = f"groups are at least 2 and divide {sides[0]} and {sides[1]}"
        raise misfit("group_shuffle", settings, fix, site)
    return groups, seed


method = GroupShuffle()
