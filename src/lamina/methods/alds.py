"""alds: replace a layer by two thinner ones, with k folds of the input channels.

**What.** The weight `W [f, c K]` (f outputs, c input channels, K kernel taps) is cut along its
input channels into k folds, and each fold is approximated with rank j: an encoding layer
`c -> k j` with k groups that keeps kernel, stride, padding and dilation, and a decoding 1x1 layer
`k j -> f` with the bias. With statistics each fold is truncated in the metric of the error
currency, and the decoder is then solved again over all folds together, which is exact least
squares; for k = 1 the pair is the best rank j layer for the predicted loss (beyond ALDS, which is
data-free). Without data the metric is the identity and this is ALDS's own decomposition.

**Where.** Linear and Conv1d-3d layers with one group whose form may be replaced. Grouped and
transposed convolutions, embeddings and recurrent layers are refused, and so are tied weights.
A step of stage FACTOR: other methods then shape the values of the two layers it leaves.

**Costs and predicts.** `j (k f + c K)` parameters and the bias; as many MACs per output position;
ranks of which this saves nothing are not offered. The error is that of the difference between the
product of the two factors, in the layer's dtype, and W: exact, not the bound of Theorem 1, unless
`Alds(score="paper")` or `"rss"` is asked for (data-free certificates).

**Does not help** layers of flat spectrum (small convolutions, square projections of good
transformers), and bytes alone, where entropy-coded quantization is nearly always the better
offer. It earns its place where MACs or milliseconds count. k > 1 pays where the folds have
low rank of their own, or where latency matters; narrow groups are slow on some devices.

**Reference.** Liebenwein, Maalouf, Gal, Feldman, Rus 2021, arXiv:2107.11442: section 2 (folds),
eq. 2 (Theorem 1), eq. 8. Eckart, Young 1936; the metric: Martens, Grosse 2015, arXiv:1503.05671.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch

from lamina.artifact.records import values_bytes
from lamina.errors import MethodError, SiteError
from lamina.forms import Edit, Plain
from lamina.measure.low_rank import (
    FoldBasis,
    bound_paper,
    bound_rss,
    damp,
    encoded_moments,
    factorize,
    fold_basis,
    fold_blocks,
    losses_of_ranks,
    split_folds,
)
from lamina.measure.stats import Cost, LayerStats
from lamina.methods.base import (
    Candidate,
    Choice,
    Leaf,
    Settings,
    Stage,
    Step,
    Weights,
    weights_of,
)
from lamina.network.sites import STRUCTURAL, Site, as_matrix
from lamina.network.source import Network

MOST_FOLDS = 8
RANKS = 12  # points of the geometric grid of ranks, per number of folds
EXACT_SIZE = 1 << 18  # larger layers: the exact error only of what the tails leave on the front
SCORES = ("exact", "rss", "paper")


@dataclass(frozen=True)
class Alds:
    """The method; see the card above.

    Args:
        score: data-free error: `"exact"`, or the certificates `"rss"` and `"paper"` (cheaper).
    """

    score: str = "exact"
    name: str = "alds"
    stage: Stage = Stage.FACTOR
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset({"input_gram", "output_gram"})
    reference: str = "Liebenwein et al. 2021, arXiv:2107.11442"
    final: bool = False

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise MethodError("unknown score", repr(self.score), "", f"choose from {SCORES}")

    def refuse(self, site: Site) -> str:
        """Return why the layer cannot become a pair, or `""`."""
        if site.kind not in self.kinds:
            return f"it is a {site.kind}, not one layer"
        if site.op not in STRUCTURAL:
            return f"there is no low rank pair of layers for the operation {site.op}"
        if site.rigid:
            return site.rigid
        if site.groups != 1:
            return f"it has {site.groups} groups, and only an ungrouped layer can be folded"
        if site.aliases:
            return f"its weight is tied to {', '.join(site.aliases)}"
        if not site.module:
            return "it is the whole network, and a pair needs a module to be put into"
        return ""

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer folds and ranks that save parameters, cheapest first; no better one is cheaper.

        Raises:
            SiteError: the weights are not finite.
        """
        if self.refuse(site) or not weights["weight"].numel():
            return ()
        matrix = _matrix(site, weights["weight"])
        H, G = _metric(stats)
        f, n = matrix.shape
        bias = weights["bias"].numel() if "bias" in weights else 0
        bases = {}
        offers = []  # (parameters of the weight, error, folds, rank); at first a proxy of the error
        for folds in _folds(site):
            ranks = rank_grid(f, n, folds)
            if not ranks:
                continue
            bases[folds] = basis = fold_basis(matrix, H, G, folds)
            tail = basis.tail if stats is not None else partial(bound_rss, basis.spectra, 1.0)
            offers += [(j * (folds * f + n), tail(j), folds, j) for j in ranks]
        if matrix.numel() > EXACT_SIZE:
            offers = _front(offers)
        exact = []
        for folds, basis in bases.items():
            ranks = [offer[3] for offer in offers if offer[2] == folds]
            errors = self._errors(matrix, stats, H, basis, ranks, float(bases[1].spectra[0, 0]))
            exact += [
                (j * (folds * f + n), e, folds, j) for j, e in zip(ranks, errors, strict=True)
            ]
        weight = weights["weight"]
        # factors are floats as the weight itself: the same share of their bits is noise
        width = 8 * values_bytes(weight) / weight.numel()
        rest = 8 * values_bytes(weights["bias"]) if bias else 0.0
        return tuple(
            Candidate(
                site.name,
                (Step(self.name, site.name, {"folds": folds, "rank": rank}),),
                Cost(params + bias, params * width + rest, params * site.positions),
                error,
            )
            for params, error, folds, rank in _front(exact)
        )

    def _errors(
        self,
        matrix: torch.Tensor,
        stats: LayerStats | None,
        H: torch.Tensor | None,
        basis: FoldBasis,
        ranks: list[int],
        largest: float,
    ) -> list[float]:
        """Return the error of several ranks of one number of folds, by the score."""
        if stats is not None or (self.score == "exact" and len(basis.spectra) > 1):
            return losses_of_ranks(matrix, stats, H, basis, ranks)
        # Without folds both bounds are the exact error.
        bound = bound_paper if self.score == "paper" else bound_rss
        return [bound(basis.spectra, largest, j) for j in ranks]

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return the encoding and the decoding layer, with the statistics that follow from B and A.

        Raises:
            SiteError: the weights are not finite.
            MethodError: the settings do not fit the layer.
        """
        folds, rank = _read(site, settings)
        encode, decode = _factors(site, weights["weight"], stats, folds, rank)
        first, second = leaf_sites(site, folds, rank, bool(site.bias))
        inside = {"weight": encode.reshape(first.shape)}
        outside = {"weight": decode.reshape(second.shape)}
        if "bias" in weights:
            outside["bias"] = weights["bias"]
        before, after = leaf_stats(stats, encode, decode)
        return Leaf(first, inside, before), Leaf(second, outside, after)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return the edit that puts the pair in the layer's place.

        Raises:
            MethodError: the settings do not fit the layer.
        """
        folds, rank = _read(site, settings)
        return (Edit(site.module, "low_rank", {"folds": folds, "rank": rank}),)

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the structural edit, then the values of the new layers.

        Raises:
            SiteError: the site cannot be served.
            MethodError: the settings do not fit the layer.
        """
        site = choice.site
        if why := self.refuse(site):
            raise SiteError(f"{self.name} cannot serve this site", site.name, why)
        leaves = self.leave(site, weights_of(network, site), stats, choice.settings)
        edits = list(self.structure(site, choice.settings))
        for leaf in leaves:
            names = {"weight": leaf.site.weight, "bias": leaf.site.bias}
            edits += [Edit(names[k], "values", values=Plain(t)) for k, t in leaf.weights.items()]
        return edits


def rank_grid(outputs: int, inputs: int, folds: int) -> list[int]:
    """Return a geometric grid of the ranks that save parameters: `j (k f + n) < f n`.

    Example:
        >>> rank_grid(8, 8, folds=1), rank_grid(8, 8, folds=2)
        ([1, 2, 3], [1, 2])
    """
    most = (outputs * inputs - 1) // (folds * outputs + inputs)
    return sorted({round(most ** (i / (RANKS - 1))) for i in range(RANKS)}) if most else []


def leaf_sites(site: Site, folds: int, rank: int, bias: bool) -> tuple[Site, Site]:
    """Describe the two layers of the pair, as discovery would."""
    f = site.matrix_shape[1]
    ones = (1,) * len(site.kernel)
    conv = site.op == "conv"
    first = replace(
        site,
        name=f"{site.name}.0",
        module=f"{site.module}.0",
        weight=f"{site.module}.0.weight",
        bias="",
        shape=(folds * rank, _channels(site) // folds, *(site.kernel if conv else ())),
        groups=folds,
        transposed=False,
    )
    second = replace(
        first,
        name=f"{site.name}.1",
        module=f"{site.module}.1",
        weight=f"{site.module}.1.weight",
        bias=f"{site.module}.1.bias" if bias else "",
        shape=(f, folds * rank, *(ones if conv else ())),
        groups=1,
        kernel=ones,
        stride=ones,
        padding=(0,) * len(ones),
        dilation=ones,
    )
    return first, second


def leaf_stats(
    stats: LayerStats | None, encode: torch.Tensor, decode: torch.Tensor
) -> tuple[LayerStats | None, LayerStats | None]:
    """Return the exact statistics of the two layers of a pair, from those of the whole layer.

    The encoder sees the layer's inputs, and gradients through the decoder: `H_i`, `A_i^T G A_i`
    per fold. The decoder sees the layer's gradients, and encoded inputs: `B H B^T`, across folds.

    Args:
        stats: of the dense layer; None: data-free.
        encode: `[k, j, n/k]` as stored; decode: `[f, k j]` as stored.
    """
    if stats is None:
        return None, None
    encode, decode = encode.to(torch.float64), decode.to(torch.float64)
    folds, rank, width = encode.shape
    H, G = stats.H[0].to(torch.float64), stats.G[0].to(torch.float64)
    parts = split_folds(decode, folds)
    left = G[:, None] * parts if G.dim() == 1 else G @ parts
    _, inner = encoded_moments(decode.new_zeros(1, folds * width), H, encode)
    mean = coded = None
    if stats.mean is not None:
        mean = stats.mean[0].to(torch.float64).reshape(folds, width)
        coded = torch.einsum("kja,ka->kj", encode, mean).reshape(1, -1)
    size = folds * rank
    before = replace(stats, H=fold_blocks(H, folds), G=parts.mT @ left, mean=mean)
    after = replace(stats, H=inner.reshape(1, size, size), mean=coded)
    return before, after


# --- its parts -----------------------------------------------------------------------------------


def _factors(
    site: Site, weight: torch.Tensor, stats: LayerStats | None, folds: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    encode, decode = factorize(_matrix(site, weight), *_metric(stats), folds, rank)
    return encode.to(weight.dtype), decode.to(weight.dtype)


def _metric(stats: LayerStats | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if stats is None else (damp(stats.H[0]), damp(stats.G[0]))


def _matrix(site: Site, weight: torch.Tensor) -> torch.Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise SiteError(
            "the weights are not finite",
            site.name,
            "NaN or inf has no spectrum",
            "mend the network",
        )
    return as_matrix(site, weight)[0].to(torch.float64)


def _channels(site: Site) -> int:
    return site.shape[0] if site.transposed else site.shape[1]


def _folds(site: Site) -> list[int]:
    channels = _channels(site)
    return [k for k in range(1, min(MOST_FOLDS, channels) + 1) if channels % k == 0]


def _read(site: Site, settings: Settings) -> tuple[int, int]:
    folds, rank = settings.get("folds", 1), settings.get("rank")
    channels = _channels(site)
    f, n = site.matrix_shape[1:]
    if (
        not (isinstance(folds, int) and isinstance(rank, int))
        or folds < 1
        or channels % folds
        or not 1 <= rank <= min(f, n // folds)
    ):
        raise MethodError(
            "alds does not have these settings for this layer",
            site.name,
            repr(dict(settings)),
            f"folds divide {channels}, and rank is 1 to min({f}, {n} // folds)",
        )
    return folds, rank


def _front(offers: list[tuple[int, float, int, int]]) -> list[tuple[int, float, int, int]]:
    """Keep the offers that no cheaper one beats, cheapest first."""
    front: list[tuple[int, float, int, int]] = []
    for offer in sorted(offers):
        if not front or offer[1] < front[-1][1]:
            front.append(offer)
    return front


method = Alds()
