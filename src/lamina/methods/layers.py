"""What methods do with layers alike: refuse them, check and describe them, carry a choice out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

import torch

from lamina.errors import MethodError, SiteError
from lamina.forms import Edit, Plain
from lamina.forms.values import Values
from lamina.measure.stats import LayerStats
from lamina.methods.base import Choice, Leaf, Parts, Settings, Weights, weights_of
from lamina.network.sites import Site, as_matrix
from lamina.network.source import Network

CONV1D = "no form replaces a Conv1D"  # says discovery of Hugging Face's; a few forms do


class Serving(Protocol):
    """What is needed of a method to ask whether it serves a site."""

    @property
    def name(self) -> str: ...

    def refuse(self, site: Site) -> str: ...


class Structural(Serving, Protocol):
    """What is needed of a method that leaves other layers behind."""

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]: ...

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]: ...


# --- refusals and checks -------------------------------------------------------------------------


def why_no_form(site: Site, form: str, ops: Collection[str], unless: str = "") -> str:
    """Return why a site is no layer that another form can replace, or `""`.

    Args:
        site: any.
        form: the other form, as one would call it after "a".
        ops: the operations that have it.
        unless: a reason to be rigid that is none here.

    Example:
        >>> why_no_form(Site("c", op="conv", groups=2, module="c"), "form", ("conv",))
        'it has 2 groups already: its blocks are multiplied one by one'
    """
    if site.kind != "layer":
        return f"it is a {site.kind}, not one layer"
    if site.op not in ops:
        return f"there is no {form} for the operation {site.op}"
    if site.rigid not in ("", unless):
        return site.rigid
    if site.groups != 1:
        return f"it has {site.groups} groups already: its blocks are multiplied one by one"
    return "" if site.module else f"it is the whole network, and a {form} needs a module to be in"


def why_tied(site: Site) -> str:
    """Return what a layer's weight is tied to, as a reason to refuse it, or `""`."""
    return f"its weight is tied to {', '.join(site.aliases)}" if site.aliases else ""


def check_served(method: Serving, site: Site) -> None:
    """Check that a method does not refuse a site.

    Raises:
        SiteError: it does; names the site and the reason.
    """
    if why := method.refuse(site):
        raise SiteError(f"{method.name} cannot serve this site", site.name, why)


def check_finite(where: str, *tensors: torch.Tensor) -> None:
    """Check that tensors hold numbers only.

    Raises:
        SiteError: one does not; names the place.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        why = "NaN or inf goes with nothing"
        raise SiteError("the weights are not finite", where, why, "mend the network")


def check_parts(site: Site, parts: Parts) -> None:
    """Check that every tensor of a span's layers is finite.

    Raises:
        SiteError: one is not; names the layer and the span.
    """
    for leaf in parts.members:
        check_finite(f"{leaf.site.name} in {site.name}", *leaf.weights.values())


def finite_weight(site: Site, weights: Weights) -> torch.Tensor:
    """Return a layer's weight.

    Raises:
        SiteError: it is not finite.
    """
    check_finite(site.name, weights["weight"])
    return weights["weight"]


def only_matrix(site: Site, weights: Weights) -> torch.Tensor:
    """Return the weight of an ungrouped layer as `[out, in]`, float64.

    Raises:
        SiteError: it is not finite.
    """
    return as_matrix(site, finite_weight(site, weights))[0].to(torch.float64)


def channels_of(site: Site) -> int:
    """Return the input channels of a linear layer or a convolution, of one of its groups."""
    return site.shape[0] if site.transposed else site.shape[1]


def site_inside(whole: Site, place: int, like: Site | None = None, **other: Any) -> Site:
    """Describe a layer at a place of the module that another layer becomes.

    Args:
        whole: the layer before; its inner ones are `whole.module.0`, `.1` and so on.
        like: where the new one's other fields are from; default: `whole`.
        other: fields that differ, such as its `shape`.

    Example:
        >>> site_inside(Site("fc", module="fc", bias="fc.bias"), 1, groups=2).bias
        'fc.1.bias'
    """
    path = f"{whole.module}.{place}"
    names = {"name": f"{whole.name}.{place}", "module": path, "weight": f"{path}.weight"}
    bias = f"{path}.bias" if whole.bias else ""
    return replace(like or whole, **{**names, "bias": bias, "transposed": False, **other})


def why_stuck(chain: Site, passable: Collection[str], lacking: str) -> str:
    """Return why what lies between the layers of a chain cannot be taken out, or `""`.

    Args:
        chain: or a part of one.
        passable: the operations that a method does without.
        lacking: what is to be said of another.
    """
    through = chain.through or tuple(tuple("" for _ in ops) for ops in chain.between)
    for (a, b), ops, modules in zip(pairwise(chain.members), chain.between, through, strict=True):
        for op, module in zip(ops, modules, strict=True):
            where = f"between {a} and {b}"
            if op not in passable:
                return f"{module or op} {where} is a {op}{lacking}"
            if not module:
                return (
                    f"{op} {where} is a call in a forward, or a module used elsewhere too: it "
                    "cannot be taken out (make it a module of its own)"
                )
    return ""


def misfit(method: str, settings: Settings, fix: str, site: Site | None = None) -> MethodError:
    """Return the error of settings that a method does not have, for a site or for any."""
    what, given = f"{method} does not have these settings", repr(dict(settings))
    if site is None:
        return MethodError(what, given, "", fix)
    return MethodError(f"{what} for this {site.kind}", site.name, given, fix)


# --- carrying out --------------------------------------------------------------------------------


def edit_values(site: Site, values: Mapping[str, Values]) -> list[Edit]:
    """Return the edits that put values into the tensors of a layer.

    Example:
        >>> site = Site("fc", weight="fc.weight", bias="fc.bias")
        >>> [edit.path for edit in edit_values(site, {"bias": Plain(torch.ones(2))})]
        ['fc.bias']
    """
    names = {"weight": site.weight, "bias": site.bias}
    return [Edit(names[kind], "values", values=form) for kind, form in values.items()]


def keep_values(tensors: Weights) -> dict[str, Values]:
    """Return tensors as values that are kept as they are."""
    return {kind: Plain(tensor) for kind, tensor in tensors.items()}


def edit_leaves(leaves: Iterable[Leaf]) -> list[Edit]:
    """Return the edits that put the tensors of layers in as they are."""
    return [e for leaf in leaves for e in edit_values(leaf.site, keep_values(leaf.weights))]


def apply_leaves(
    method: Structural, network: Network, choice: Choice, stats: LayerStats | None,
    indices: Mapping[str, torch.Tensor] | None = None, leaves: Sequence[Leaf] | None = None,
) -> list[Edit]:  # fmt: skip
    """Return the structural edits of a choice, then the values of the layers it leaves.

    Args:
        method: which the choice is of.
        network: which is not changed.
        choice: a site and settings.
        stats: of the site.
        indices: values of what the structure holds besides, by name (a gather's index).
        leaves: what `leave` says, where that is known already.

    Raises:
        SiteError: the method refuses the site.
        MethodError: the settings do not fit the layer.
    """
    site = choice.site
    check_served(method, site)
    if leaves is None:
        leaves = method.leave(site, weights_of(network, site), stats, choice.settings)
    edits = list(method.structure(site, choice.settings))
    edits += [Edit(name, "values", values=Plain(t)) for name, t in (indices or {}).items()]
    return edits + edit_leaves(leaves)


def apply_weight(
    method: Structural, network: Network, choice: Choice, stats: LayerStats | None,
    hold: Callable[[torch.Tensor], Values],
) -> list[Edit]:  # fmt: skip
    """Return the structural edits of a choice, then the one tensor it changes: the weight.

    Args:
        method, network, choice, stats: as for `apply_leaves`.
        hold: gives the form of the weight.

    Raises:
        SiteError: the method refuses the site.
        MethodError: the settings do not fit the layer.
    """
    site = choice.site
    check_served(method, site)
    (leaf,) = method.leave(site, weights_of(network, site), stats, choice.settings)
    edits = method.structure(site, choice.settings)
    return [*edits, *edit_values(site, {"weight": hold(leaf.weights["weight"])})]
