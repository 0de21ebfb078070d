"""layer_collapse: two or more layers and the activations between them become one linear layer.

**What.** Where the activation between two linear maps hardly bends what goes through it, or where
the loss hardly feels it, one affine map stands in for both layers and all that is between them:
`W = W2 A`, `b = W2 c + b2`, where `A x + c` is a fit to what goes into the second layer. There are
three fits. `slope` takes the activation for the identity, and folds a BatchNorm: exact for a PReLU
of slope 1. `units` has a line for every hidden unit, by least squares. `full` is least squares over
all affine maps, with a ridge towards `units` by generalised cross-validation. They come from
calibration moments (`Cross`), for any activation; longer parts have a fit for each link. Where the
map would be larger than the layers, or where cheaper points are wanted, it is a low rank pair.

**Where.** Parts of chains of linear layers (Hugging Face's Conv1D too) or of 1x1 convolutions of
stride 1 without padding and groups, with nothing but activations, BatchNorms and dropouts in
between, each a module of its own. Refused, with the place: kernels, pooling, a flattening, norms
over channels, activations that are calls. A gated MLP (`act(gate(x)) * up(x)`) is no chain: the
product of two branches is quadratic in x, and no slope makes it linear. A step of stage SHAPE: all
other methods then work on the one layer, or the pair, that is left.

**Costs and predicts.** Weights `in * out` and a bias, or `r (in + out)` and a bias. The error is
`scale/2 tr(G W2 R W2^T)` with R the second moment of what the fit leaves, exact on the calibration
data for one link (then times the factor of cross-validation), and exactly 0 where nothing bends.
Data-free, inputs are taken for standard normal, and the error is the share of the hidden output's
spectral norm that is lost.

**Does not help** blocks whose activation is what they are there for (often the first of a network);
the predicted error tells. What is lost without training adds up over blocks: the recipe
`layer-collapse` trains activations towards the identity first. Nor does it help bottlenecks with a
small hidden width, where only low ranks save anything.

**Reference.** LayerCollapse (regularised linearity of activations, then the product of the two
weights); least squares, ranks and predicted errors are ours. Golub, Heath, Wahba 1979,
doi:10.1080/00401706.1979.10489751 (generalised cross-validation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lamina.artifact.records import values_bytes
from lamina.errors import MethodError, SiteError
from lamina.forms import Edit
from lamina.measure.stats import Cost
from lamina.methods.base import (
    Candidate,
    Choice,
    Leaf,
    Parts,
    Settings,
    Stage,
    Step,
    why_no_chain,
)
from lamina.methods.layer_collapse.merging import (
    FITS,
    Merged,
    dense_site,
    dense_stats,
    fits_of,
    merge,
    pair_sites,
    pair_stats,
    rank_grid,
)
from lamina.methods.layer_collapse.places import (
    find_places,
    find_refused,
    why_not_between,
    why_not_layer,
)
from lamina.methods.layers import check_parts, edit_leaves, misfit
from lamina.methods.offers import falling
from lamina.network.sites import Site, Sites, from_matrix
from lamina.network.source import Network


@dataclass(frozen=True)
class LayerCollapse:
    """The method; see the card above."""

    name: str = "layer_collapse"
    stage: Stage = Stage.SHAPE
    kinds: tuple[str, ...] = ("chain",)
    needs: frozenset[str] = frozenset({"cross", "output_gram"})
    reference: str = "LayerCollapse; least squares and ranks are ours"
    final: bool = False

    def places(self, sites: Sites) -> Iterator[Site]:
        """Yield the parts of chains that become one layer, those near the output first.

        Then the neighbours that do not, which `refuse` has a reason for.
        """
        yield from find_places(sites)
        yield from find_refused(sites)

    def refuse(self, site: Site) -> str:
        """Return why a part of a chain cannot become one layer, or `""`.

        What is to be said of the layers themselves is in the sites that `places` gives.
        """
        return why_no_chain(site) or why_not_between(site)

    def propose(self, site: Site, parts: Parts) -> tuple[Candidate, ...]:
        """Offer the best fit, as one layer and at lower ranks, cheapest first.

        What does not save parameters is not offered.

        Raises:
            SiteError: the weights are not finite.
        """
        if self.refuse(site) or _why_not(parts):
            return ()
        check_parts(site, parts)
        members = [leaf.site for leaf in parts.members]
        before = sum(t.numel() for leaf in parts.members for t in leaf.weights.values())
        fits = {fit: merge(parts, fit) for fit in fits_of(parts)}
        if not fits:
            return ()
        fit = min(fits, key=lambda name: (fits[name].error, FITS.index(name)))
        best, last = fits[fit], members[-1]
        outputs, inputs = best.map.weight.shape
        bias = int(_has_bias(parts, fit))
        weight = parts.members[-1].weights["weight"]
        width = 8 * values_bytes(weight) / max(1, weight.numel())  # bits of a value
        dense = outputs * inputs + bias * outputs
        settings = {"fit": fit, "inputs": inputs, "bias": bias}
        found = []
        most = min(outputs, inputs, *(m.matrix_shape[1] for m in members[:-1]))
        limit = min(dense, before) if dense else 0
        ranks = [
            r for r in rank_grid(most)
            if r * (outputs + inputs) + bias * outputs < limit
        ] if most else []  # fmt: skip
        for rank, pair in zip(ranks, best.truncations(ranks) if ranks else [], strict=True):
            size = rank * (outputs + inputs)
            cost = Cost(size + bias * outputs, width * (size + bias * outputs),
                        size * last.positions)  # fmt: skip
            step = Step(self.name, site.name, settings | {"rank": rank})
            found.append(Candidate(site.name, (step,), cost, pair.error))
        if dense < before:
            cost = Cost(dense, width * dense, outputs * inputs * last.positions)
            found.append(
                Candidate(site.name, (Step(self.name, site.name, settings),), cost, best.error)
            )
        return tuple(falling(found))

    def leave(self, site: Site, parts: Parts, settings: Settings) -> tuple[Leaf, ...]:
        """Return the one layer, or the pair, that is left where the last layer was.

        Raises:
            MethodError: the settings do not fit the layers.
            SiteError: the weights are not finite.
        """
        fit, inputs, bias, rank = _read(site, settings)
        if why := _misfit(parts, fit, inputs, bias, rank):
            raise _unfit(site, settings, why)
        check_parts(site, parts)
        merged = merge(parts, fit)
        last, like = parts.members[-1], parts.members[-1].weights["weight"]
        dense = dense_site(last.site, inputs, bool(bias))
        stats = dense_stats(parts.members[0].stats, last.stats)
        if not rank:
            return (_leaf(dense, merged.map.weight, merged.map.bias, like, stats),)
        return _pair(merged, dense, rank, like, stats)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return the edits that leave one layer, or a pair, where the last layer was.

        Raises:
            MethodError: the settings do not fit the layers.
        """
        _, inputs, bias, rank = _read(site, settings)
        last = site.members[-1]
        gone = [*site.members[:-1], *(m for modules in site.through for m in modules)]
        edits = [Edit(path, "identity") for path in gone]
        edits.append(Edit(last, "resized", {"inputs": inputs, "bias": bias}))
        if rank:
            edits.append(Edit(last, "low_rank", {"folds": 1, "rank": rank}))
        return tuple(edits)

    def apply(self, network: Network, choice: Choice, parts: Parts) -> list[Edit]:
        """Return the structural edits, then the values of the layers that are left.

        Raises:
            SiteError: the part of the chain cannot be served.
            MethodError: the settings do not fit the layers.
        """
        site = choice.site
        if why := self.refuse(site) or _why_not(parts):
            raise SiteError(f"{self.name} cannot serve this site", site.name, why)
        leaves = self.leave(site, parts, choice.settings)
        return [*self.structure(site, choice.settings), *edit_leaves(leaves)]


def _pair(
    merged: Merged, dense: Site, rank: int, like: torch.Tensor, stats: object
) -> tuple[Leaf, ...]:
    pair = merged.truncated(rank)
    first, second = pair_sites(dense, rank)
    before, after = pair_stats(stats, pair.encode, pair.decode)  # type: ignore[arg-type]
    return (
        _leaf(first, pair.encode, None, like, before),
        _leaf(second, pair.decode, pair.bias if dense.bias else None, like, after),
    )


def _leaf(
    site: Site, weight: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor, stats: object
) -> Leaf:
    tensors = {"weight": from_matrix(site, weight[None]).to(like)}
    if site.bias and bias is not None:
        tensors["bias"] = bias.to(like)
    return Leaf(site, tensors, stats)  # type: ignore[arg-type]


def _has_bias(parts: Parts, fit: str) -> bool:
    """Whether the one layer needs a bias."""
    normed = any(p.op == "batch_norm" for between in parts.passages for p in between)
    return fit != "slope" or normed or any("bias" in leaf.weights for leaf in parts.members)


def _why_not(parts: Parts) -> str:
    for leaf in parts.members:
        if why := why_not_layer(leaf.site):
            return why
    for passage in (p for between in parts.passages for p in between):
        if passage.op == "batch_norm" and "scale" not in passage.tensors:
            return f"the batch_norm {passage.module} has no moments of its own to fold"
    return ""


# --- settings ------------------------------------------------------------------------------------


def _read(site: Site, settings: Settings) -> tuple[str, int, int, int]:
    """Return fit, inputs, bias and rank (0: dense)."""
    fit, inputs = settings.get("fit"), settings.get("inputs")
    bias, rank = settings.get("bias", 1), settings.get("rank", 0)
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (inputs, bias, rank))
    if fit not in FITS or not whole or inputs < 1 or bias not in (0, 1) or rank < 0:  # type: ignore[operator]
        raise _unfit(site, settings, f"fit is one of {', '.join(FITS)}, the others whole numbers")
    return str(fit), int(inputs), int(bias), int(rank)  # type: ignore[arg-type]


def _misfit(parts: Parts, fit: str, inputs: int, bias: int, rank: int) -> str:
    """Return why settings do not fit these layers, or `""`."""
    first, last = parts.members[0].site.matrix_shape, parts.members[-1].site.matrix_shape
    if inputs != first[2]:
        return f"the first layer has {first[2]} inputs"
    if rank > min(first[2], last[1]):
        return f"rank is at most {min(first[2], last[1])}"
    if not bias and _has_bias(parts, fit):
        return "the one layer needs a bias"
    if fit != "slope" and fit not in fits_of(parts):
        return "there are no moments of what lies between the layers: measure, or use fit=slope"
    return ""


def _unfit(site: Site, settings: Settings, why: str) -> MethodError:
    return misfit("layer_collapse", settings, why, site)


method = LayerCollapse()
