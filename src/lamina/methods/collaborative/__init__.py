"""collaborative: leave out input channels and cut the rank of what is left, both at once.

**What.** A layer `W [f, c K]` becomes a gather of m of its c input channels and a layer
`f x m K` on them, or a low rank pair of rank q on them. Which channels: the paper removes units,
channels and singular components alike, some at a time, each scored by `sum F (W' - W)^2` and by
what one more random removal would then cost, in closed form; `F` is the empirical Fisher
information (the paper squares one mean gradient, which is almost nothing near a minimum). Besides,
channels are removed by Optimal Brain Surgeon in blocks: each by what it costs once the others have
made up for it. Of both the values are solved again by least squares on the channels kept, and the
rank is cut in the metric of the error currency. Settings: `channels` m, `kept` (a hexadecimal
number with a bit for every channel kept), and `rank` q where it is cut.

**Where.** Linear and Conv1d-3d layers with one group whose form may be replaced. A step of stage
FACTOR: other methods then shape the values of the layers it leaves.

**Costs and predicts.** `f m K` or `q (f + m K)` parameters, the bias, and the index, which takes
bits and no parameters; as many MACs per output position. The error is that of the change of the
whole weight, removed channels included: exact. With all channels it is `alds` with one fold, which
is not offered twice.

**Does not help** where every input channel is in use (a layer after a narrow bottleneck), nor much
without data. It is at its best where little is kept, where the inputs are a residual stream, and
where a layer has a channel or two that it does not need; with about half kept `alds` is mostly the
better offer. Neither
order of removal wins always. The gather moves memory: measured, not counted in MACs. The paper's
exponential fit and global rates are `fit_sensitivity` and `global_rates` of
`measure.collaborative`; the planner does that job from the curves themselves.

**Reference.** Li et al. 2021, CVPR, "Towards Compact CNNs via Collaborative Compression",
arXiv:2105.11228; blocks: Hassibi, Stork 1992; Kurtic et al. 2022, arXiv:2203.07259.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from lamina.artifact.records import values_bytes
from lamina.forms import Edit
from lamina.measure.low_rank import damp
from lamina.measure.stats import Cost, LayerStats
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Step, Weights
from lamina.methods.collaborative.problem import Problem
from lamina.methods.layers import (
    apply_leaves,
    channels_of,
    misfit,
    only_matrix,
    site_inside,
    why_no_form,
    why_tied,
)
from lamina.methods.offers import front
from lamina.network.sites import STRUCTURAL, Site
from lamina.network.source import Network


@dataclass(frozen=True)
class Collaborative:
    """The method; see the card above."""

    name: str = "collaborative"
    stage: Stage = Stage.FACTOR
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset({"input_gram", "output_gram"})
    reference: str = "Li et al. 2021, CVPR, Collaborative Compression, arXiv:2105.11228"
    final: bool = False

    def refuse(self, site: Site) -> str:
        """Return why the layer cannot do without channels, or `""`."""
        if why := why_no_form(site, "gathered layer", STRUCTURAL) or why_tied(site):
            return why
        return "it has one input channel, which it needs" if channels_of(site) < 2 else ""

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer channels and ranks that save parameters, cheapest first; no better one is cheaper.

        Raises:
            SiteError: the weights are not finite.
        """
        if self.refuse(site) or not weights["weight"].numel():
            return ()
        weight, problem = weights["weight"], _problem(site, weights, stats)
        width = 8 * values_bytes(weight) / weight.numel()
        bias = weights["bias"].numel() if "bias" in weights else 0
        rest = 8 * values_bytes(weights["bias"]) if bias else 0.0
        found = []
        for (kept, rank), error in problem.measured():
            params = problem.params(len(kept), rank)
            index = 8 * values_bytes(torch.tensor(kept))
            cost = Cost(params + bias, params * width + rest + index, params * site.positions)
            settings: dict[str, int | str] = {"channels": len(kept), "kept": _mask(kept)}
            if rank is not None:
                settings["rank"] = rank
            step = Step(self.name, site.name, settings)
            found.append(Candidate(site.name, (step,), cost, error))
        return front(found)

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return the layer on the channels kept, or its encoding and its decoding layer.

        Raises:
            SiteError: the weights are not finite.
            MethodError: the settings do not fit the layer.
        """
        kept, rank = _read(site, settings)
        weight, problem = weights["weight"], _problem(site, weights, stats)
        columns = problem.columns(kept)
        n, m = site.matrix_shape[1], len(kept)
        bits = 8 * values_bytes(torch.tensor(kept))
        conv = site.op == "conv"
        first = site_inside(site, 1, shape=(n, m, *(site.kernel if conv else ())))
        bias = {"bias": weights["bias"]} if "bias" in weights else {}
        if rank is None:
            dense = problem.values(kept).to(weight.dtype).reshape(first.shape)
            seen = None if stats is None else _seen(stats, columns)
            return (Leaf(first, {"weight": dense} | bias, seen, bits),)
        encode, decode = (t.to(weight.dtype) for t in problem.pair(kept, rank))
        inside = {"weight": encode.reshape(rank, m, *(site.kernel if conv else ()))}
        ones = (1,) * len(site.kernel)
        second = site_inside(
            site,
            2,
            shape=(n, rank, *(ones if conv else ())),
            kernel=ones,
            stride=ones,
            padding=(0,) * len(ones),
            dilation=ones,
            extent=(),
        )
        first = replace(first, bias="", shape=tuple(inside["weight"].shape))
        outside = {"weight": decode.reshape(second.shape)} | bias
        before, after = _pair_stats(stats, columns, encode, decode)
        return Leaf(first, inside, before, bits), Leaf(second, outside, after)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return the edit that puts the gather and what follows it in the layer's place.

        Raises:
            MethodError: the settings do not fit the layer.
        """
        kept, rank = _read(site, settings)
        more = {} if rank is None else {"rank": rank}
        return (Edit(site.module, "gathered", {"channels": len(kept)} | more),)

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the structural edit, then the index and the values of the new layers.

        Raises:
            SiteError: the site cannot be served.
            MethodError: the settings do not fit the layer.
        """
        site = choice.site
        kept = () if self.refuse(site) else _read(site, choice.settings)[0]
        index = {f"{site.module}.0.index": torch.tensor(kept)}
        return apply_leaves(self, network, choice, stats, index)


# --- its parts -----------------------------------------------------------------------------------


def _problem(site: Site, weights: Weights, stats: LayerStats | None) -> Problem:
    H, G = (None, None) if stats is None else (damp(stats.H[0]), damp(stats.G[0]))
    return Problem(only_matrix(site, weights), channels_of(site), stats, H, G)


def _seen(stats: LayerStats, columns: torch.Tensor) -> LayerStats:
    """Return the statistics of a layer on some columns."""
    H = stats.H[:, columns]
    H = H if H.dim() == 2 else H[:, :, columns]
    return replace(stats, H=H, mean=None if stats.mean is None else stats.mean[:, columns])


def _pair_stats(
    stats: LayerStats | None, columns: torch.Tensor, encode: torch.Tensor, decode: torch.Tensor
) -> tuple[LayerStats | None, LayerStats | None]:
    """Return the exact statistics of the two layers of a pair on some columns."""
    if stats is None:
        return None, None
    seen = _seen(stats, columns)
    B, A = encode[0].to(torch.float64), decode.to(torch.float64)
    H, G = seen.H[0].to(torch.float64), seen.G[0].to(torch.float64)
    left = G[:, None] * A if G.dim() == 1 else G @ A
    right = B * H if H.dim() == 1 else B @ H
    mean = None if seen.mean is None else (B @ seen.mean[0].to(torch.float64))[None]
    before = replace(seen, G=(A.mT @ left)[None])
    return before, replace(seen, H=(right @ B.mT)[None], mean=mean)


def _mask(kept: Iterable[int]) -> str:
    return f"{sum(1 << i for i in kept):x}"


def _read(site: Site, settings: Settings) -> tuple[tuple[int, ...], int | None]:
    """Return the channels kept, and the rank where it is cut."""
    count, mask, rank = (settings.get(k) for k in ("channels", "kept", "rank"))
    channels, (n, inputs) = channels_of(site), site.matrix_shape[1:]
    try:
        bits = int(mask, 16) if isinstance(mask, str) and len(mask) <= channels else 0
    except ValueError:
        bits = 0
    kept = tuple(i for i in range(channels) if bits >> i & 1)
    most = min(n, len(kept) * (inputs // channels))
    if (
        bits <= 0
        or bits >> channels
        or not 1 <= len(kept) < channels
        or count != len(kept)
        or not (rank is None or (isinstance(rank, int) and 1 <= rank <= most))
    ):
        fix = f"kept is a hexadecimal number of {channels} bits, channels of them set"
        raise misfit("collaborative", settings, fix, site)
    return kept, rank


method = Collaborative()
