"""alds: replace a layer by two thinner ones, with k folds of the input channels.

**What.** The weight `W [f, c K]` (f outputs, c input channels, K kernel taps) is cut along its
input channels into k folds, and each fold is approximated with rank j: an encoding layer
`c -> k j` with k groups that keeps kernel, stride, padding and dilation, and a decoding 1x1 layer
`k j -> f` with the bias. With statistics each fold is truncated in the metric of the error
currency, and the decoder is then solved again over all folds together, which is exact least
squares; for k = 1 the pair is the best rank j layer for the predicted loss (beyond ALDS, which is
data-free). Without data the metric is the identity and this is ALDS's own decomposition. Where the
layer has a bias, it takes up the mean of what is lost, and only the rest of the loss counts.
In a Conv2d the decoder may also own the taps of one axis, so that the pair is separable: then the
encoder's directions are approximate, the decoder and the error are not (`measure/schemes.py`).

**Where.** Linear and Conv1d-3d layers with one group whose form may be replaced. Grouped and
transposed convolutions, embeddings and recurrent layers are refused, and so are tied weights.
A step of stage FACTOR: other methods then shape the values of the two layers it leaves.

**Costs and predicts.** `j (k f + c K)` parameters and the bias; as many MACs per output position;
ranks of which this saves nothing are not offered, large ones in steps of 4 and 8. The error is that
of the difference between the product of the two factors and W: exact, not the bound of Theorem 1,
unless `Alds(score="paper")` or `"rss"` is asked for (certificates without data; `"repo"`, the score
of the authors' code, is none).

**Does not help** layers of flat spectrum (small convolutions, square projections of good
transformers), and bytes alone, where entropy-coded quantization is nearly always the better
offer. It earns its place where MACs or milliseconds count. k > 1 pays where the folds have
low rank of their own, or where latency matters; narrow groups are slow on some devices.

**Reference.** Liebenwein, Maalouf, Gal, Feldman, Rus 2021, arXiv:2107.11442: section 2 (folds),
eq. 2 (Theorem 1), eq. 8. Eckart, Young 1936; the metric: Martens, Grosse 2015, arXiv:1503.05671.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from lamina.artifact.records import values_bytes
from lamina.errors import MethodError
from lamina.forms import Edit
from lamina.measure.certificates import bound_paper, bound_rss, score_repo, unfolded_bound
from lamina.measure.low_rank import damp, fold_basis, losses_of_ranks
from lamina.measure.schemes import Scheme, distinct_schemes, fold
from lamina.measure.spectra import fold_spectra
from lamina.measure.stats import Cost, LayerStats
from lamina.methods.alds.leaves import about_mean, leaf_sites, leaf_stats
from lamina.methods.alds.metrics import factors_of, read_metric, with_bias
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Step, Weights
from lamina.methods.layers import (
    apply_leaves,
    channels_of,
    misfit,
    only_matrix,
    why_no_form,
    why_tied,
)
from lamina.methods.offers import falling
from lamina.network.sites import STRUCTURAL, Site
from lamina.network.source import Network

__all__ = ["Alds", "leaf_sites", "leaf_stats", "method", "rank_grid"]

RANKS = 32  # points of the grid of ranks, per number of folds
STEPS = ((16, 1), (64, 4))  # up to a rank, every so many: small layers need them all,
LAST_STEP = 8  # and round ones run faster
EXACT_SIZE = 1 << 18  # larger layers: the exact error only of what the tails leave on the front
MOST_FOLDS = 8  # of larger layers; small ones are tried with every divisor of their channels
SCORES = {"exact": bound_rss, "rss": bound_rss, "paper": bound_paper, "repo": score_repo}

Way = tuple[int, int]  # scheme, folds


@dataclass(frozen=True)
class Offer:
    """A pair before it is a candidate; offers sort by parameters, and then by error."""

    params: int
    error: float
    scheme: int
    folds: int
    rank: int

    @property
    def key(self) -> tuple[float, ...]:
        return (self.params, self.error, self.scheme, self.folds)


@dataclass(frozen=True)
class Alds:
    """The method; see the card above.

    Args:
        score: data-free error: `"exact"`, or from the spectra alone the certificates `"rss"` and
            `"paper"`, or `"repo"` (no certificate: to reproduce published plans).
        schemes: who owns the taps of a Conv2d (`measure/schemes.py`), where its input sizes are
            known; other layers have scheme 0 only.
    """

    score: str = "exact"
    schemes: tuple[int, ...] = (0, 1, 2)
    name: str = "alds"
    stage: Stage = Stage.FACTOR
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset({"input_gram", "output_gram"})
    reference: str = "Liebenwein et al. 2021, arXiv:2107.11442"
    final: bool = False

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise MethodError("unknown score", repr(self.score), "", f"choose from {[*SCORES]}")
        if not self.schemes or not set(self.schemes) <= {0, 1, 2, 3}:
            raise MethodError("unknown scheme", repr(self.schemes), "", "there are 0 to 3")

    def refuse(self, site: Site) -> str:
        """Return why the layer cannot become a pair, or `""`."""
        return why_no_form(site, "low rank pair", STRUCTURAL) or why_tied(site)

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer folds and ranks that save parameters, cheapest first; no better one is cheaper.

        Raises:
            SiteError: the weights are not finite.
        """
        if self.refuse(site) or not weights["weight"].numel():
            return ()
        matrix = only_matrix(site, weights)
        stats, mean = _seen(site, stats)
        grids = self._grids(site)
        offers = self._without_data(matrix, grids, site) if stats is None else []
        if stats is not None:
            offers = self._with_data(matrix, stats, grids, site)
        weight, bias = weights["weight"], weights["bias"].numel() if "bias" in weights else 0
        # factors are floats as the weight itself: the same share of their bits is noise
        width = 8 * values_bytes(weight) / weight.numel()
        rest = bias * width  # a bias that moves is a float like any other
        if bias and mean is None:
            rest = 8 * values_bytes(weights["bias"])
        candidates = []
        for offer in _front(offers):
            settings = {"folds": offer.folds, "rank": offer.rank}
            settings |= {"scheme": offer.scheme} if offer.scheme else {}
            macs = sum(
                leaf.macs for leaf in leaf_sites(site, offer.folds, offer.rank, scheme=offer.scheme)
            )
            step = Step(self.name, site.name, settings)
            edit = _edit_bits(self.structure(site, settings))
            cost = Cost(offer.params + bias, offer.params * width + rest + edit, macs)
            candidates.append(Candidate(site.name, (step,), cost, offer.error))
        # The edit itself has a length: of two offers with nearly the same parameters the one that
        # names a scheme can be the dearer.
        return tuple(falling(sorted(candidates, key=lambda c: (c.cost.bits, c.cost.params))))

    def _grids(self, site: Site) -> dict[Way, list[int]]:
        """Return the ranks to look at, by scheme and folds."""
        f, n = site.matrix_shape[1:]
        channels, large = channels_of(site), f * n > EXACT_SIZE
        most = min(MOST_FOLDS, channels) if large else channels
        schemes = distinct_schemes(site.kernel if site.op == "conv" else ())
        found = {}
        for number in schemes:
            # Where the input size is not known, nor is what an encoder at input resolution costs.
            if number in self.schemes and (number == 0 or site.extent):
                after = Scheme(number, site.kernel).after
                for folds in (k for k in range(1, most + 1) if channels % k == 0):
                    if ranks := rank_grid(f * after, n // after, folds):
                        found[number, folds] = ranks
        return found

    def _without_data(
        self, matrix: torch.Tensor, grids: dict[Way, list[int]], site: Site
    ) -> list[Offer]:
        largest = float(fold_spectra(matrix, [1])[1][0, 0])
        score, offers = SCORES[self.score], []
        for number in sorted({number for number, _ in grids}):
            scheme = Scheme(number, site.kernel)
            folded = fold(matrix, 1, scheme)[0]  # its columns are channels first: folds are slices
            for folds, spectra in fold_spectra(
                folded, [k for s, k in grids if s == number]
            ).items():
                bound = partial(score, spectra, largest)
                for j in grids[number, folds]:
                    error = unfolded_bound(bound(j), spectra, largest, j, scheme.after)
                    offers.append(_offer(matrix, error, scheme, folds, j))
        if self.score != "exact":
            return offers
        if matrix.numel() > EXACT_SIZE:
            offers = _front(offers)
        exact = []
        for (number, folds), ranks in _by_way(offers).items():
            scheme = Scheme(number, site.kernel)
            if number == 0 and folds == 1:  # the bound is exact
                exact += [o for o in offers if (o.scheme, o.folds) == (0, 1)]
                continue
            basis = fold_basis(matrix, None, None, folds, scheme)
            errors = losses_of_ranks(matrix, None, None, basis, ranks, largest)
            pairs = zip(ranks, errors, strict=True)
            exact += [_offer(matrix, e, scheme, folds, j) for j, e in pairs]
        return exact

    def _with_data(
        self, matrix: torch.Tensor, stats: LayerStats, grids: dict[Way, list[int]], site: Site
    ) -> list[Offer]:
        H, G = _metric(stats)
        bases, offers = {}, []
        for (number, folds), ranks in grids.items():
            scheme = Scheme(number, site.kernel)
            bases[number, folds] = basis = fold_basis(matrix, H, G, folds, scheme)
            offers += [_offer(matrix, basis.tail(j), scheme, folds, j) for j in ranks]
        if matrix.numel() > EXACT_SIZE:
            offers = _front(offers)
        exact = []
        for (number, folds), ranks in _by_way(offers).items():
            basis = bases[number, folds]
            pairs = zip(ranks, losses_of_ranks(matrix, stats, H, basis, ranks), strict=True)
            exact += [_offer(matrix, e, basis.scheme, folds, j) for j, e in pairs]
        return exact

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return the encoding and the decoding layer, with the statistics that follow from B and A.

        Raises:
            SiteError: the weights are not finite.
            MethodError: the settings do not fit the layer.
        """
        folds, rank, scheme = _read(site, settings)
        metric, added = read_metric(site, settings)
        weight, matrix = weights["weight"], only_matrix(site, weights)
        encode, decode, bias = factors_of(
            matrix, weights.get("bias"), stats, metric, folds, rank, scheme, weight.dtype, added
        )
        whole = with_bias(site) if added else site
        first, second = leaf_sites(whole, folds, rank, scheme.number)
        inside = {"weight": encode.reshape(first.shape)}
        outside = {"weight": decode.reshape(second.shape)}
        if bias is not None:
            outside["bias"] = bias
        before, after = leaf_stats(stats, encode, decode, scheme)
        edit = _edit_bits(self.structure(site, settings))
        return Leaf(first, inside, before), Leaf(second, outside, after, edit)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return the edit that puts the pair in the layer's place.

        Raises:
            MethodError: the settings do not fit the layer.
        """
        folds, rank, scheme = _read(site, settings)
        numbers = {"folds": folds, "rank": rank}
        numbers |= {"scheme": scheme.number} if scheme.number else {}
        numbers |= {"bias": 1} if read_metric(site, settings)[1] else {}
        return (Edit(site.module, "low_rank", numbers),)

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the structural edit, then the values of the new layers.

        Raises:
            SiteError: the site cannot be served.
            MethodError: the settings do not fit the layer.
        """
        return apply_leaves(self, network, choice, stats)


def rank_grid(rows: int, columns: int, folds: int) -> list[int]:
    """Return ranks that save parameters, `j (k rows + columns) < rows columns`.

    All small ones, and of the others round ones, evenly spread over their logarithms.

    Example:
        >>> rank_grid(8, 8, folds=1), rank_grid(8, 8, folds=2), rank_grid(64, 64, folds=1)[-4:]
        ([1, 2, 3], [1, 2], [16, 20, 24, 28])
    """
    most = (rows * columns - 1) // (folds * rows + columns)
    allowed = [j for j in range(1, most + 1) if j % _step(j) == 0]
    if len(allowed) <= RANKS:
        return allowed
    wanted = (allowed[-1] ** (i / (RANKS - 1)) for i in range(RANKS))
    return sorted({min(allowed, key=lambda j: (abs(j - w), j)) for w in wanted})


def _step(rank: int) -> int:
    return next((step for most, step in STEPS if rank <= most), LAST_STEP)


# --- its parts -----------------------------------------------------------------------------------


def _seen(site: Site, stats: LayerStats | None) -> tuple[LayerStats | None, torch.Tensor | None]:
    """Return the statistics that count, about the mean input where a bias can take that up."""
    return about_mean(stats) if stats is not None and site.bias else (stats, None)


def _metric(stats: LayerStats | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if stats is None else (damp(stats.H[0]), damp(stats.G[0]))


def _read(site: Site, settings: Settings) -> tuple[int, int, Scheme]:
    folds, rank, number = (
        settings.get(k, v) for k, v in (("folds", 1), ("rank", 0), ("scheme", 0))
    )
    channels = channels_of(site)
    f, n = site.matrix_shape[1:]
    kernel = site.kernel if site.op == "conv" else ()
    wrong = not all(type(v) is int for v in (folds, rank, number)) or folds < 1 or channels % folds
    wrong = wrong or number not in ((0, 1, 2, 3) if len(kernel) == 2 else (0,))
    scheme = Scheme(0 if wrong else number, kernel)
    if wrong or not 1 <= rank <= min(f * scheme.after, n // folds // scheme.after):
        fix = f"folds divide {channels}, and rank is at least 1 and at most that of a fold"
        raise misfit("alds", settings, fix, site)
    return folds, rank, scheme


def _offer(matrix: torch.Tensor, error: float, scheme: Scheme, folds: int, rank: int) -> Offer:
    f, n = matrix.shape
    params = rank * (folds * f * scheme.after + n // scheme.after)
    return Offer(params, error, scheme.number, folds, rank)


def _edit_bits(edits: tuple[Edit, ...]) -> float:
    """Return what structural edits take in the file's header [bits]."""
    import json

    lists = [[e.path, e.form, dict(e.settings)] for e in edits]
    return 8.0 * len(json.dumps(lists, separators=(",", ":")))


def _by_way(offers: list[Offer]) -> dict[Way, list[int]]:
    """Return the ranks of offers, rising, by scheme and folds."""
    found: dict[Way, list[int]] = {}
    for offer in sorted(offers, key=lambda o: o.rank):
        found.setdefault((offer.scheme, offer.folds), []).append(offer.rank)
    return found


def _front(offers: list[Offer]) -> list[Offer]:
    """Keep the offers that no cheaper one beats, cheapest first."""
    return falling(sorted(offers, key=lambda o: o.key))


method = Alds()
