"""layer_merge: convolutions that follow each other become one, activations and all.

**What.** A row of convolutions with activations and BatchNorms between is replaced by one
convolution. What goes into each layer after the first is predicted from what the layer before sees,
by least squares on calibration moments (`Cross`), with a kernel as large as that layer's or only
the middle of it; the last layer is kept, or held to the middle of its kernel by least squares on
its own input. The product of these maps has a kernel of `k1 + s1 (k2 - 1)` taps, all padding in
one place, and a bias. Held to one tap, a layer adds nothing to the kernel: that is how a pair of
3x3 layers becomes 3x3, which in the paper takes dropping one of them.

**Where.** Parts of chains of two to four convolutions with nothing but activations, BatchNorms and
dropouts in between, each a module of its own; depthwise layers become dense beside others, and stay
depthwise among themselves. Refused, with the place: dilation, padding other than zeros, tied or
rigid layers, pooling, activations that are calls. Rows of 1x1 layers belong to `layer_collapse`.
A step of stage SHAPE: all other methods then work on the one layer that is left. It needs
calibration data: without there are no offers.

**Costs and predicts.** Weights of the merged kernel and a bias. What is larger than the layers both
in parameters and in MACs is offered only where a depthwise layer goes, which may be faster all the
same. The error is `scale/2 tr(G D R D^T)` with R the covariance of what a fit leaves and D all
that follows; what is left at neighbouring places counts as unrelated. The border is in it: there
the next layer saw zeros, and now sees the fit's bias.

**Does not help** as such where activations matter: trained, more can be merged. The recipe
`layer-merge` measures what is fast, trains with the layers apart, folds skips into kernels and
replaces whole residual blocks.

**Reference.** Kim, El Halabi, Ji, Song 2024, arXiv:2406.12837 (merging and padding, section 3); the
least squares fits and predicted errors are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lamina.artifact.records import values_bytes
from lamina.errors import MethodError, SiteError
from lamina.forms import Edit
from lamina.forms.merged import spelled
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
from lamina.methods.layer_merge.fits import Fits, supports_of
from lamina.methods.layer_merge.leaves import leaf_stats
from lamina.methods.layer_merge.merging import Conv
from lamina.methods.layer_merge.places import find_places, why_not_between, why_not_layer
from lamina.methods.layers import check_parts, edit_leaves, misfit
from lamina.methods.offers import falling
from lamina.network.sites import Site, Sites
from lamina.network.source import Network


@dataclass(frozen=True)
class LayerMerge:
    """The method; see the card above."""

    name: str = "layer_merge"
    stage: Stage = Stage.SHAPE
    kinds: tuple[str, ...] = ("chain",)
    needs: frozenset[str] = frozenset({"cross", "input_gram", "output_gram"})
    reference: str = "Kim et al. 2024, arXiv:2406.12837; least squares fits are ours"
    final: bool = False

    def places(self, sites: Sites) -> Iterator[Site]:
        """Yield the parts of chains that can become one convolution, then neighbours that cannot.

        `refuse` has the reason for these.
        """
        return find_places(sites)

    def refuse(self, site: Site) -> str:
        """Return why a part of a chain cannot become one convolution, or `""`.

        What is to be said of the layers themselves is in the sites that `places` gives.
        """
        return why_no_chain(site) or why_not_between(site)

    def propose(self, site: Site, parts: Parts) -> tuple[Candidate, ...]:
        """Offer the best fit of every kernel size, cheapest first; without statistics none.

        Raises:
            SiteError: the weights are not finite.
        """
        if self.refuse(site) or _why_not(parts):
            return ()
        check_parts(site, parts)
        before = sum(t.numel() for leaf in parts.members for t in leaf.weights.values())
        macs = math.fsum(leaf.site.macs for leaf in parts.members)
        deep = any(leaf.site.groups > 1 for leaf in parts.members)
        weight = parts.members[-1].weights["weight"]
        width = 8 * values_bytes(weight) / max(1, weight.numel())  # bits of a value
        found: dict[tuple[int, ...], Candidate] = {}
        for fit in Fits(parts).all():
            params = fit.conv.weight.numel() + fit.conv.outputs
            work = fit.conv.weight.numel() * parts.members[-1].site.positions
            if params >= before and work >= macs and not (deep and work < 2 * macs):
                continue
            settings = {"supports": list(fit.supports), **form_of(fit.conv)}
            cost = Cost(params, width * params, work)
            step = Step(self.name, site.name, settings)
            old = found.get(fit.conv.kernel)
            if old is None or fit.error < old.error:
                found[fit.conv.kernel] = Candidate(site.name, (step,), cost, fit.error)
        return tuple(falling(sorted(found.values(), key=lambda c: (c.cost.params, c.error))))

    def leave(self, site: Site, parts: Parts, settings: Settings) -> tuple[Leaf, ...]:
        """Return the one convolution that is left, where the last layer was.

        Raises:
            MethodError: the settings do not fit the layers.
            SiteError: the weights are not finite.
        """
        form = _read(site, settings)
        check_parts(site, parts)
        conv = self._merged(site, parts, settings)
        if form_of(conv) != form:
            raise _unfit(site, settings, f"these supports give {form_of(conv)}")
        first, last = parts.members[0], parts.members[-1]
        like = last.weights["weight"]
        left = replace(
            last.site, bias=f"{last.site.module}.bias", shape=tuple(conv.weight.shape),
            groups=conv.groups, kernel=conv.kernel, stride=conv.stride, padding=conv.padding,
            extent=first.site.extent,
        )  # fmt: skip
        tensors = {"weight": conv.weight.to(like), "bias": conv.bias.to(like)}
        return (Leaf(left, tensors, leaf_stats(first, last, left)),)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return the edits that leave one convolution where the last layer was.

        Raises:
            MethodError: the settings do not fit the layers.
        """
        form = _read(site, settings)
        gone = [*site.members[:-1], *(m for modules in site.through for m in modules)]
        return (
            *(Edit(path, "identity") for path in gone), Edit(site.members[-1], "merged", form),
        )  # fmt: skip

    def apply(self, network: Network, choice: Choice, parts: Parts) -> list[Edit]:
        """Return the structural edits, then the values of the convolution.

        Raises:
            SiteError: the part of the chain cannot be served.
            MethodError: the settings do not fit the layers.
        """
        site = choice.site
        if why := self.refuse(site) or _why_not(parts):
            raise SiteError(f"{self.name} cannot serve this site", site.name, why)
        edits = self.structure(site, choice.settings)
        return [*edits, *edit_leaves(self.leave(site, parts, choice.settings))]

    def _merged(self, site: Site, parts: Parts, settings: Settings) -> Conv:
        fits, supports = Fits(parts), tuple(settings["supports"])
        if fits.stats is None or any(c is None for c in parts.cross):
            why = "there are no moments of what lies between the layers: measure on data"
            raise _unfit(site, settings, why)
        known = [supports_of(leaf.site) for leaf in parts.members]
        if len(supports) != len(known) or any(
            s not in k for s, k in zip(supports, known, strict=False)
        ):
            raise _unfit(site, settings, f"supports are one each of {known}")
        if not fits.pads(supports):
            raise _unfit(site, settings, "the merged convolution would begin inside its input")
        return fits.fit(supports).conv


def form_of(conv: Conv) -> dict[str, int]:
    """Return the settings of the merged form that hold a convolution."""
    settings = {"inputs": conv.inputs, "outputs": conv.outputs}
    for name, numbers, default in (
        ("kernel", conv.kernel, 0), ("stride", conv.stride, 1), ("padding", conv.padding, 0),
    ):  # fmt: skip
        said = spelled(name, numbers)
        settings |= said if said != {name: default} else {}
    return settings | ({"groups": conv.groups} if conv.groups > 1 else {})


def _why_not(parts: Parts) -> str:
    for leaf in parts.members:
        if why := why_not_layer(leaf.site):
            return why
    return ""


def _read(site: Site, settings: Settings) -> dict[str, int]:
    """Return the settings of the merged form."""
    supports = settings.get("supports")
    form = {k: v for k, v in settings.items() if k != "supports"}
    if not isinstance(supports, (list, tuple)) or not all(map(_whole, supports)):
        raise _unfit(site, settings, "supports is a list of widths")
    if not all(map(_whole, form.values())) or not {"inputs", "outputs", "kernel"} <= form.keys():
        raise _unfit(site, settings, "inputs, outputs and kernel are whole numbers")
    return form


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unfit(site: Site, settings: Settings, why: str) -> MethodError:
    return misfit("layer_merge", settings, why, site)


method = LayerMerge()
