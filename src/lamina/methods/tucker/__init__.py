"""tucker: replace a convolution by a 1x1, its kernel on fewer channels, and a 1x1 back.

**What.** The weight `W [f, c, K]` (f outputs, c input channels, K kernel taps) is approximated by
`A C B`: a 1x1 convolution `c -> r2`, a core `r2 -> r1` that keeps kernel, stride, padding and
dilation, and a 1x1 convolution `r1 -> f` with the bias. Where `alds` cuts a layer down once, this
cuts it down on both sides. `B` is the truncated HOSVD along the inputs, in the metric of the
Kronecker product nearest to the input moment; given `B`, decoder and core are exactly optimal for
the predicted loss (sequential truncation, with a least squares core). Data-free the metric is the
identity. No extra is needed: alternating sweeps (HOOI, as in tensorly) would make every pair of
ranks a problem of its own, for little.

**Where.** Conv1d-3d layers with a kernel and one group whose form may be replaced, where the size
of the input is known. Linear layers and 1x1 convolutions have two sides only and belong to `alds`;
grouped and transposed convolutions and tied weights are refused. A step of stage FACTOR: other
methods then shape the values of the three layers it leaves.

**Costs and predicts.** `c r2 + r1 r2 K + r1 f` parameters and the bias. The first layer runs at
the resolution of the input, which a stride makes dear: what saves no parameters or no MACs is not
offered. Ranks above 16 are multiples of 8. The error is that of the difference between the product
of the three factors and W: exact, but for its rounding to the layer's dtype. The statistics handed
on to core and decoder are exact too; those of the first layer are a Kronecker product that is
right for errors without structure (`leaf_stats`).

**Does not help** thin layers, whose 1x1 layers cost more than the core saves, and latency where
kernels are launched one by one: three small layers may be slower than one of twice the MACs. Under
a stride the first layer is dear, and `alds` is the better offer. It pays on 3x3 convolutions of
stride one, the more the less is kept.

**Reference.** Kim, Park, Yoo, Choi, Yang, Shin 2016, arXiv:1511.06530, section 3.1 (Tucker-2);
De Lathauwer, De Moor, Vandewalle 2000, doi:10.1137/S0895479896305696 (HOSVD); Vannieuwenhoven,
Vandebril, Meerbergen 2012, doi:10.1137/110836067 (sequential truncation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lamina.artifact.records import values_bytes
from lamina.forms import Edit
from lamina.measure.stats import Cost, LayerStats
from lamina.measure.tucker import decompose, errors_of_ranks
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Step, Weights
from lamina.methods.layers import apply_leaves, finite_weight, misfit, why_no_form, why_tied
from lamina.methods.tucker.leaves import input_positions, leaf_sites, leaf_stats
from lamina.network.sites import Site
from lamina.network.source import Network

RANKS = 9  # points of the geometric grid of ranks, per side
FAST = 8  # ranks above twice this are its multiples, which dense kernels like


@dataclass(frozen=True)
class Tucker:
    """The method; see the card above."""

    name: str = "tucker"
    stage: Stage = Stage.FACTOR
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset({"input_gram", "output_gram"})
    reference: str = "Kim et al. 2016, arXiv:1511.06530"
    final: bool = False

    def refuse(self, site: Site) -> str:
        """Return why the layer cannot become three, or `""`."""
        if why := why_no_form(site, "tucker form", ("conv",)) or why_tied(site):
            return why
        if math.prod(site.kernel) == 1:
            return "a 1x1 convolution has two sides only, which alds takes apart"
        if input_positions(site) is None:
            return "the size of its input is not known, and the first layer runs at that size"
        return ""

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer ranks that save parameters and MACs, cheapest first; no better one is cheaper.

        Raises:
            SiteError: the weights are not finite.
        """
        weight = weights["weight"]
        if self.refuse(site) or not weight.numel():
            return ()
        tensor = _tensor(site, weights)
        f, c, taps = tensor.shape
        pairs = [
            (r1, r2)
            for r1 in rank_grid(f)
            for r2 in rank_grid(c)
            if r1 <= taps * r2
            and r2 <= taps * r1
            and params_of(site, r1, r2) < weight.numel()
            and macs_of(site, r1, r2) < site.macs
        ]
        errors = errors_of_ranks(tensor, stats, pairs) if pairs else {}
        bias = weights["bias"].numel() if "bias" in weights else 0
        # factors are floats as the weight itself: the same share of their bits is noise
        width = 8 * values_bytes(weight) / weight.numel()
        rest = 8 * values_bytes(weights["bias"]) if bias else 0.0
        found: list[Candidate] = []
        for r1, r2 in sorted(pairs, key=lambda pair: (params_of(site, *pair), errors[pair])):
            if found and errors[r1, r2] >= found[-1].error:
                continue
            params = params_of(site, r1, r2)
            cost = Cost(params + bias, params * width + rest, macs_of(site, r1, r2))
            step = Step(self.name, site.name, {"outputs": r1, "inputs": r2})
            found.append(Candidate(site.name, (step,), cost, errors[r1, r2]))
        return tuple(found)

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return the three layers, with the statistics that follow from the factors.

        Raises:
            SiteError: the weights are not finite.
            MethodError: the settings do not fit the layer.
        """
        r1, r2 = _read(site, settings)
        weight = weights["weight"]
        factors = decompose(_tensor(site, weights), stats, r1, r2)
        decode, core, encode = (factor.to(weight.dtype) for factor in factors)
        sites = leaf_sites(site, r1, r2)
        tensors = [
            {"weight": t.reshape(s.shape)}
            for s, t in zip(sites, (encode, core, decode), strict=True)
        ]
        if "bias" in weights:
            tensors[2]["bias"] = weights["bias"]
        moments = leaf_stats(site, stats, decode, core, encode)
        return tuple(Leaf(*parts) for parts in zip(sites, tensors, moments, strict=True))

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return the edit that puts three layers in the layer's place.

        Raises:
            MethodError: the settings do not fit the layer.
        """
        r1, r2 = _read(site, settings)
        return (Edit(site.module, "tucker", {"outputs": r1, "inputs": r2}),)

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the structural edit, then the values of the new layers.

        Raises:
            SiteError: the site cannot be served.
            MethodError: the settings do not fit the layer.
        """
        return apply_leaves(self, network, choice, stats)


# --- sizes ---------------------------------------------------------------------------------------


def rank_grid(channels: int) -> list[int]:
    """Return a geometric grid of ranks up to `channels`; above 16 multiples of 8.

    Example:
        >>> rank_grid(5), rank_grid(64)
        ([1, 2, 3, 4, 5], [1, 2, 3, 5, 8, 13, 24, 40, 64])
    """
    found = set()
    for i in range(RANKS):
        rank = round(channels ** (i / (RANKS - 1)))
        found.add(rank if rank <= 2 * FAST else min(channels, round(rank / FAST) * FAST))
    return sorted(found)


def most_ranks(outputs: int, channels: int, taps: int) -> tuple[int, int]:
    """Return the full ranks of a weight, of outputs and inputs: a form of these is exact.

    Example:
        >>> most_ranks(64, 3, 9)
        (27, 3)
    """
    return min(outputs, taps * channels), min(channels, taps * outputs)


def params_of(site: Site, r1: int, r2: int) -> float:
    """Return the weights of the three layers, biases aside."""
    f, c = site.shape[:2]
    return float(c * r2 + r1 * r2 * math.prod(site.kernel) + r1 * f)


def macs_of(site: Site, r1: int, r2: int) -> float:
    """Return the multiply-accumulates of the three layers per sample; the first at input size."""
    f, c = site.shape[:2]
    after = r1 * r2 * math.prod(site.kernel) + r1 * f
    return float(c * r2 * (input_positions(site) or 0.0) + after * site.positions)


# --- reading -------------------------------------------------------------------------------------


def _tensor(site: Site, weights: Weights) -> torch.Tensor:
    return finite_weight(site, weights).detach().to(torch.float64).flatten(2)


def _read(site: Site, settings: Settings) -> tuple[int, int]:
    r1, r2 = settings.get("outputs"), settings.get("inputs")
    f, c, taps = *site.shape[:2], math.prod(site.kernel)
    if (
        not (isinstance(r1, int) and isinstance(r2, int))
        or not 1 <= r1 <= most_ranks(f, r2, taps)[0]
        or not 1 <= r2 <= most_ranks(r1, c, taps)[1]
    ):
        fix = f"outputs is 1 to {f}, inputs 1 to {c}, and neither over {taps} times the other"
        raise misfit("tucker", settings, fix, site)
    return r1, r2


method = Tucker()
