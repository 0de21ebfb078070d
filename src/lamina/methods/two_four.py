"""two_four: two weights of every four along the input become zero.

**What.** 2:4 structured sparsity. The inputs of a layer are taken in fours, and of the four weights
that one output has for them the two least important become exact zeros. What is important (setting
`score`): `"magnitude"`, `|w|`; with statistics also `"obd"`, `w^2 H_jj`; and `"obs"`, which goes
through the inputs from first to last, prunes by `w^2 / [H^-1]_jj` of what is left, and lets the
weights to come take up the error (one Cholesky factor serves all outputs). Ties go to the earlier
weight, so that the mask is one.

**Where.** Layers whose number of inputs in each group is divisible by 4: linear ones (GPT-2's
Conv1D too), convolutions (four input channels at one tap), recurrent ones. Not embeddings. A step
of stage VALUES that a final one follows; `sawb`, `kmeans` and `rdoq` keep zeros zero. Asked for by
name only: for bytes, zeros that are free to be anywhere cost less.

**Costs and predicts.** The error is `1/2 tr(G dW H dW^T)` of the very change. The cost is that of
the sparse tensor: coded pattern plus non-zeros. Parameters and MACs are the dense layer's.

**Does not help** latency on CPUs: kernels that skip the zeros exist for CUDA tensor cores only.
Half the weights is much without training, except where layers are far too wide.

**Reference.** Mishra et al. 2021, arXiv:2104.08378 (2:4); Frantar and Alistarh 2023 (SparseGPT),
arXiv:2301.00774, section 3.3, and Hassibi and Stork 1993, eq. 5 (the correction).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lamina import codecs
from lamina.errors import MethodError
from lamina.forms import Edit, Sparse
from lamina.measure.stats import LayerStats, diagonal_of, predict_error
from lamina.methods.base import Candidate, Choice, Leaf, Settings, Stage, Weights
from lamina.methods.layers import apply_weight, finite_weight, misfit
from lamina.methods.offers import front, offer_values, other_bytes, sparse_bytes
from lamina.network.sites import Site, as_matrix, from_matrix
from lamina.network.source import Network

SCORES = ("magnitude", "obd", "obs")
GROUP, KEPT = 4, 2
DAMPING = 0.01  # of the mean diagonal, as in SparseGPT
LARGE = 1 << 16  # weights above which a pattern's bytes are estimated


def keep_mask(importance: torch.Tensor, keep: int = KEPT) -> torch.Tensor:
    """Return which entries stay: of every four along the last axis the `keep` most important.

    Args:
        importance: `[..., 4 m]`; ties go to the earlier entry.
        keep: 0 to 4.

    Example:
        >>> keep_mask(torch.tensor([[1.0, 3.0, 3.0, 3.0]])).tolist()
        [[False, True, True, False]]
    """
    four = importance.reshape(*importance.shape[:-1], -1, GROUP)
    order = torch.argsort(four, dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(four, dtype=torch.bool)
    mask.scatter_(-1, order[..., :keep], True)
    return mask.reshape(importance.shape)


def in_fours(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as `[groups, out, 4 m]` with the four that belong together side by side.

    That is `as_matrix`, except that a convolution's columns go by four channels, tap, channel.
    """
    matrix = as_matrix(site, weight)
    taps = _taps(site)
    if taps == 1:
        return matrix
    g, out, _ = matrix.shape
    return matrix.reshape(g, out, -1, GROUP, taps).transpose(3, 4).reshape(g, out, -1)


def from_fours(site: Site, matrix: torch.Tensor) -> torch.Tensor:
    """Undo `in_fours`."""
    taps = _taps(site)
    if taps > 1:
        g, out, _ = matrix.shape
        matrix = matrix.reshape(g, out, -1, taps, GROUP).transpose(3, 4).reshape(g, out, -1)
    return from_matrix(site, matrix)


def _taps(site: Site) -> int:
    return math.prod(site.shape[2:]) if site.op == "conv" else 1


def mask_of(site: Site, importance: torch.Tensor, keep: int = KEPT) -> torch.Tensor:
    """Return which of a layer's weights stay, in the stored shape.

    Args:
        site: the layer.
        importance: of each weight, in the stored shape.
        keep: of every four.
    """
    return from_fours(site, keep_mask(in_fours(site, importance), keep))


def prune(
    site: Site, weight: torch.Tensor, stats: LayerStats | None, score: str = "magnitude"
) -> torch.Tensor:
    """Return the weight with two of every four at zero; by `"obs"` the others change too.

    Args:
        site: a layer that `refuse` does not refuse.
        weight: in its stored shape.
        stats: of the layer; for `"obd"` and `"obs"`.
        score: see the card.

    Raises:
        MethodError: the score needs statistics, and there are none.
    """
    if score == "magnitude":
        left = weight.masked_fill(~mask_of(site, weight.abs()), 0)
        return torch.where(left == 0, torch.zeros_like(left), left)  # a file knows no -0 in these
    if stats is None:
        raise MethodError(
            f"the score {score!r} needs statistics", site.name, "this run has none",
            "give calibration data, or use score='magnitude'",
        )  # fmt: skip
    matrix = as_matrix(site, weight).to(torch.float64)
    H = stats.H.to(matrix)
    if score == "obd" or H.dim() == 2:
        importance = from_matrix(site, matrix.square() * diagonal_of(H)[:, None, :])
        left = weight.masked_fill(~mask_of(site, importance), 0)
    else:
        fours, order = in_fours(site, weight).to(torch.float64), _order(site, H.shape[-1])
        pruned = [
            prune_in_order(w, h[order][:, order]) for w, h in zip(fours, H, strict=True)
        ]  # fmt: skip
        left = from_fours(site, torch.stack(pruned)).to(weight.dtype)
    return torch.where(left == 0, torch.zeros_like(left), left)


def _order(site: Site, columns: int) -> torch.Tensor:
    """Return which column of `as_matrix` each column of `in_fours` is."""
    index = torch.arange(columns)
    taps = _taps(site)
    return index if taps == 1 else index.reshape(-1, GROUP, taps).transpose(1, 2).reshape(-1)


def prune_in_order(weight: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    """Return `[out, in]` pruned from the first input to the last, the rest making up for it.

    Args:
        weight: `[out, in]`, float64.
        H: `[in, in]` second moment of the inputs.

    With `H^-1 = U^T U` (U upper), dropping `w_j` once the inputs before j are fixed costs
    `(w_j / U_jj)^2`, and the best change of those after j is `-w_j / U_jj U_j,j+1:`.
    """
    W = weight.clone()
    damping = DAMPING * H.diagonal().mean().clamp_min(1e-30)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H + damping * torch.eye(len(H)).to(H)))
    U = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)
    for start in range(0, W.shape[1], GROUP):
        stop = start + GROUP
        mask = keep_mask((W[:, start:stop] / U.diagonal()[start:stop]).square())
        errors = torch.zeros(len(W), GROUP).to(W)
        for i, j in enumerate(range(start, stop)):
            kept = torch.where(mask[:, i], W[:, j], 0.0)
            errors[:, i] = (W[:, j] - kept) / U[j, j]
            W[:, j] = kept
            W[:, j + 1 : stop] -= errors[:, i : i + 1] * U[j, j + 1 : stop]
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W


@dataclass(frozen=True)
class TwoFour:
    """The method; see the card above."""

    name: str = "two_four"
    stage: Stage = Stage.VALUES
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset()
    reference: str = "Mishra et al. 2021, arXiv:2104.08378; arXiv:2301.00774"
    final: bool = False
    asked: bool = False  # only where it is named

    def refuse(self, site: Site) -> str:
        """Return why the site cannot be pruned in fours, or `""`."""
        if site.kind not in self.kinds:
            return f"it is a {site.kind}, not one layer"
        if site.op == "embedding":
            return "an embedding has no inputs to take in fours"
        _, _, columns = site.matrix_shape
        inputs = columns // _taps(site)
        if inputs % GROUP or not inputs:
            return f"its {inputs} inputs are not divisible by {GROUP}"
        return ""

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> tuple[Candidate, ...]:
        """Offer the mask of each score, cheapest first.

        Raises:
            SiteError: the weights are not finite.
        """
        weight = finite_weight(site, weights)
        if not weight.numel():
            return ()
        matrix = as_matrix(site, weight)
        extra = other_bytes(weights)
        count = codecs.estimate if weight.numel() > LARGE else codecs.length
        offers = []
        for score in SCORES if stats is not None else SCORES[:1]:
            pruned = prune(site, weight, stats, score)
            error = predict_error(stats, matrix, as_matrix(site, pruned - weight))
            size = sparse_bytes(pruned, count) + extra
            offers.append(offer_values(self.name, site, weights, {"score": score}, size, error))
        return front(offers)

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Return the same layer with its pruned weight."""
        score = _read(settings)
        pruned = prune(site, finite_weight(site, weights), stats, score)
        return (Leaf(site, {**weights, "weight": pruned}, stats),)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return nothing: the layer's form stays."""
        return ()

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the pruned weight as sparse values.

        Raises:
            SiteError: the site is refused, or its weights are not finite.
            MethodError: the settings do not fit.
        """
        return apply_weight(self, network, choice, stats, Sparse)


def _read(settings: Settings) -> str:
    score = settings.get("score")
    if score not in SCORES:
        raise misfit("two_four", settings, f"give score of {', '.join(SCORES)}")
    return str(score)


method = TwoFour()
