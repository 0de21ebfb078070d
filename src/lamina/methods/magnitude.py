"""magnitude: set the least important weights to zero, one by one.

**What.** Unstructured pruning. Every weight gets an importance, the least important ones become
exact zeros, the others stay. The importance (setting `score`) is `|w|`, or, where there are
statistics, `obd`: `w_ij^2 G_ii H_jj`, the diagonal of the error currency. No training here:
masks are held by the recovery step.

**Where.** The weight of every layer; biases are untouched. A step of stage VALUES that is followed
by a final method: `kmeans` and `rdoq` keep zeros zero and code them in a fraction of a bit.

**Costs and predicts.** The error is `1/2 tr(G dW H dW^T)` of the very weights that are cut.
The cost is that of the sparse tensor as it is (coded pattern plus non-zeros); parameters and MACs
are those of the dense layer, for zeros inside a tensor save no arithmetic in dense kernels.

**Does not help** latency. Nor bytes, much, where `rdoq` follows: its own dead zone prunes with
the rate in mind. `|w|` alone is poor where inputs differ in size; prefer `obd`.

**Reference.** Han, Pool, Tran, Dally 2015, arXiv:1506.02626 (`|w|`); LeCun, Denker, Solla 1990,
"Optimal Brain Damage", eq. 4-5: saliency `h_kk u_k^2 / 2`, here with the Kronecker diagonal as `h`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamina import codecs
from lamina.artifact.records import values_bytes
from lamina.codecs.alike import Curve, corrected
from lamina.errors import MethodError
from lamina.forms import Edit, Sparse
from lamina.measure.stats import LayerStats, diagonal_of, predict_error
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Weights
from lamina.methods.layers import apply_weight, finite_weight, misfit
from lamina.methods.offers import front, offer_values, sparse_bytes
from lamina.network.sites import Site, as_matrix, from_matrix
from lamina.network.source import Network

KEEP = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SCORES = ("magnitude", "obd")
EXACT_SIZE = 1 << 12  # values up to which every version of a tensor is coded


def diagonal_importance(site: Site, weight: torch.Tensor, stats: LayerStats) -> torch.Tensor:
    """Return `w_ij^2 G_ii H_jj` in the weight's stored shape, float64 (Optimal Brain Damage)."""
    h, g = diagonal_of(stats.H), diagonal_of(stats.G)
    matrix = as_matrix(site, weight).to(torch.float64)
    return from_matrix(site, matrix**2 * g[:, :, None] * h[:, None, :])


def prune(weight: torch.Tensor, importance: torch.Tensor, keep: float) -> torch.Tensor:
    """Return the weight with all but its most important entries set to zero.

    Args:
        weight: any shape.
        importance: same shape; ties go to the earlier entry, so that the result is one.
        keep: share of all entries to keep, in (0, 1]; at least one entry stays.

    Example:
        >>> prune(torch.tensor([3.0, -1.0, 2.0]), torch.tensor([3.0, 1.0, 2.0]), 0.67)
        tensor([3., 0., 2.])
    """
    return _pruned(weight, _order(importance), keep)


def _order(importance: torch.Tensor) -> torch.Tensor:
    return torch.argsort(importance.reshape(-1), descending=True, stable=True)


def _pruned(weight: torch.Tensor, order: torch.Tensor, keep: float) -> torch.Tensor:
    """Do what `prune` does, with the weights in order of their importance [weights]."""
    count = min(weight.numel(), max(1, round(keep * weight.numel())))
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[order[:count]] = True
    mask = mask.reshape(weight.shape) & (weight != 0)  # -0.0 would not survive a sparse file
    return torch.where(mask, weight, torch.zeros_like(weight))


def _bytes(tensor: torch.Tensor) -> float:
    return sparse_bytes(tensor, codecs.estimate)


def _quick_bytes(tensor: torch.Tensor) -> float:
    """Return about what `_bytes` says, with non-zeros of full width."""
    mask = (tensor != 0).reshape(tensor.shape[0], -1)
    pattern = codecs.estimate(mask.to(torch.int32).cpu().numpy())
    return pattern + int(mask.sum()) * tensor.element_size()


def _sizes(shares: list[float], versions: list[torch.Tensor]) -> list[float]:
    """Return what versions of one tensor take [bytes], rising shares kept.

    Bytes per non-zero change slowly with the share, so that of a longer tensor few are coded.
    """
    if not versions or versions[0].numel() <= EXACT_SIZE:
        return [_bytes(pruned) for pruned in versions]
    return corrected([Curve.of(shares, versions, _quick_bytes, _bytes)])[0]


@dataclass(frozen=True)
class Magnitude:
    """The method; see the card above."""

    name: str = "magnitude"
    stage: Stage = Stage.VALUES
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset()
    reference: str = "Han et al. 2015, arXiv:1506.02626; LeCun, Denker, Solla 1990"
    final: bool = False

    def refuse(self, site: Site) -> str:
        """Return why the site cannot be pruned, or `""`."""
        return "" if site.kind in self.kinds else f"it is a {site.kind}, not one layer"

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer every share kept, by the better score, cheapest first.

        Raises:
            SiteError: the weights are not finite.
        """
        weight = finite_weight(site, weights)
        if not weight.numel():
            return ()
        matrix = as_matrix(site, weight)
        other = {key: t for key, t in weights.items() if key != "weight"}
        # What `keep` makes of the other tensors: a bias of zeros takes next to nothing.
        extra = sum(min(values_bytes(t), _bytes(t)) for t in other.values())
        offers = []
        for score in SCORES if stats is not None else SCORES[:1]:
            order = _order(_importance(site, weight, stats, score))  # once for all shares
            shares, versions = [], []
            for keep in KEEP:
                pruned = _pruned(weight, order, keep)
                if not torch.equal(pruned, weight):  # else already as sparse as that
                    shares.append(keep)
                    versions.append(pruned)
            for keep, pruned, size in zip(shares, versions, _sizes(shares, versions), strict=True):
                error = predict_error(stats, matrix, as_matrix(site, pruned - weight))
                settings = {"keep": keep, "score": score}
                size += extra
                offers.append(offer_values(self.name, site, weights, settings, size, error))
        return front(offers)

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return the same layer with its pruned weight."""
        keep, score = _read(settings)
        weight = finite_weight(site, weights)
        pruned = prune(weight, _importance(site, weight, stats, score), keep)
        return (Leaf(site, {**weights, "weight": pruned}, stats),)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return nothing: the layer's form stays."""
        return ()

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the pruned weight as sparse values.

        Raises:
            SiteError: the site is not a layer, or its weights are not finite.
            MethodError: the settings do not fit.
        """
        return apply_weight(self, network, choice, stats, Sparse)


def _importance(
    site: Site, weight: torch.Tensor, stats: LayerStats | None, score: str
) -> torch.Tensor:
    if score == "magnitude":
        return weight.abs()
    if stats is None:
        raise MethodError(
            "the score 'obd' needs statistics",
            site.name,
            "this run has none",
            "give calibration data, or use score='magnitude'",
        )
    return diagonal_importance(site, weight, stats)


def _read(settings: Settings) -> tuple[float, str]:
    keep, score = settings.get("keep"), settings.get("score", "magnitude")
    if not isinstance(keep, (int, float)) or not 0 < keep <= 1 or score not in SCORES:
        fix = f"give keep in (0, 1] and score of {', '.join(SCORES)}"
        raise misfit("magnitude", settings, fix)
    return float(keep), str(score)


method = Magnitude()
