"""Applying a plan: decisions to edits, edits into a copy of the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lamina.errors import PlanError
from lamina.forms import Edit, find_tensor, install
from lamina.measure.stats import LayerStats, Stats
from lamina.methods.base import (
    Choice,
    Leaf,
    Method,
    Parts,
    Spanning,
    Step,
    find_method,
    get_method,
    weights_of,
)
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan.plan import Plan
from lamina.plan.rewrite import Rewritten, copy_module, rewrite
from lamina.plan.spans import parts_of

__all__ = ["Edited", "apply", "carry_out", "check_fits", "check_made_for", "copy_module", "settle"]

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Edited:
    """A network after a plan: the edited copy, and the edits that turn the original into it.

    `floats` are the tensors as they were just before their values were put into a form (the
    factors of a pair, the weight of a layer): where training may start from, richer than the
    rounded values.
    """

    network: Network
    edits: tuple[Edit, ...]
    floats: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.network.module


def apply(
    network: Network,
    plan: Plan,
    sites: Sites,
    stats: Stats,
    *,
    inplace: bool = False,
    progress: Progress | None = None,
    rewritten: Rewritten | None = None,
) -> Edited:
    """Carry out a plan on a copy of the network.

    Args:
        network: the network the plan was made for; unchanged unless `inplace`.
        plan: the decisions.
        sites, stats: from `discover` and `measure`, as when the plan was made: of the rewritten
            network, where the plan begins with a rewriting.
        inplace: edit the user's module itself.
        progress: called with (sites done, sites in all, site name).
        rewritten: the network as the plan rewrites it, where that is known already.

    Raises:
        PlanError: the plan is for another network, or names a site that is not there.
        SiteError: a method cannot carry out a decision.
    """
    check_fits(plan, network, sites)
    edited = network if inplace else replace(network, module=copy_module(network.module))
    first = rewritten or Rewritten(network)
    if first.names != tuple(plan.rewrite):
        first = rewrite(network, plan.rewrite)
    install(edited.module, (*first.edits, *first.values, *first.last))
    if edited.box != first.network.box:
        edited = replace(edited, box=first.network.box)
    edits: list[Edit] = []
    floats: dict[str, torch.Tensor] = {}
    for i, (name, decision) in enumerate(plan.sites.items()):
        if progress:
            progress(i, len(plan.sites), name)
        steps = list(decision.steps)
        site = sites[name]
        if site.kind == "layer":
            edits += carry_out(edited, site, stats.of(name), steps, name, floats)
        else:
            parts = parts_of(edited, sites, stats, site)
            edits += _carry_out_span(edited, site, parts, steps, name, floats)
    if progress:
        progress(len(plan.sites), len(plan.sites), "")
    install(edited.module, first.last)  # the layers that came since have an order of their own
    return Edited(edited, (*first.edits, *settle(edits), *first.last), floats)


def check_fits(plan: Plan, network: Network, sites: Sites) -> None:
    """Refuse a plan that was made for another network.

    Raises:
        PlanError: the digests differ, a site is missing, or two decisions claim one layer.
    """
    check_made_for(plan, network)
    known = {site.name for site in sites.layers}
    claimed: dict[str, str] = {}
    for name in plan.sites:
        if name not in sites:
            raise PlanError(
                "the plan names a site that the network does not have",
                name,
                "",
                f"its sites are {', '.join(sorted(known))}",
            )
        for member in sites[name].members or (name,):
            if member in claimed:
                raise PlanError(
                    "the plan decides twice about a layer", member,
                    f"{claimed[member]} and {name} both claim it", "edit the plan",
                )  # fmt: skip
            claimed[member] = name


def check_made_for(plan: Plan, network: Network) -> None:
    """Refuse a plan whose digest is another network's.

    Raises:
        PlanError: the digests differ.
    """
    if plan.network != network.digest():
        raise PlanError(
            "the plan was made for another network",
            plan.network,
            f"this network is {network.digest()}",
            "plan again for this network",
        )


def carry_out(
    network: Network,
    site: Site,
    stats: LayerStats | None,
    steps: list[Step],
    name: str,
    floats: dict[str, torch.Tensor],
) -> list[Edit]:
    """Apply the first step at `site`, install its edits, then the steps at the layers it leaves."""
    here = [step for step in steps if step.at == site.name]
    if not here:
        raise PlanError("no step says what to do", site.name, "", f"add one to site {name!r}")
    step, later = here[0], [s for s in steps if s is not here[0]]
    method = get_method(step.method)
    if why := method.refuse(site):
        raise PlanError(f"{step.method} cannot serve the site", site.name, why, "edit the plan")
    weights = weights_of(network, site)
    leaves = () if method.final else method.leave(site, weights, stats, step.settings)
    _check_order(method, site, later, leaves)
    edits = method.apply(network, Choice(site, step.settings), stats)
    if method.final:
        floats.update({p: find_tensor(network.module, p).detach().clone()
                       for p in (site.weight, site.bias) if p})  # fmt: skip
    install(network.module, edits)
    return edits + _follow(network, leaves, later, name, floats)


def _carry_out_span(
    network: Network, site: Site, parts: Parts, steps: list[Step], name: str,
    floats: dict[str, torch.Tensor],
) -> list[Edit]:  # fmt: skip
    """Apply the step of a span, install its edits, then the steps at the layers it leaves."""
    here = [step for step in steps if step.at == site.name]
    if not here:
        raise PlanError("no step says what to do", site.name, "", f"add one to site {name!r}")
    step, later = here[0], [s for s in steps if s is not here[0]]
    method = find_method(step.method)
    if not isinstance(method, Spanning):
        why = f"it is a {site.kind}, and the method one of single layers"
        raise PlanError(f"{step.method} cannot serve the site", site.name, why, "edit the plan")
    if why := method.refuse(site):
        raise PlanError(f"{step.method} cannot serve the site", site.name, why, "edit the plan")
    leaves = method.leave(site, parts, step.settings)
    _check_order(method, site, later, leaves)
    edits = method.apply(network, Choice(site, step.settings), parts)
    install(network.module, edits)
    return edits + _follow(network, leaves, later, name, floats)


def _follow(
    network: Network, leaves: tuple[Leaf, ...], later: list[Step], name: str,
    floats: dict[str, torch.Tensor],
) -> list[Edit]:  # fmt: skip
    """Apply what follows at the layers that a step has left; one that nothing follows is kept."""
    edits: list[Edit] = []
    for leaf in leaves:
        inside = [
            s for s in later if s.at == leaf.site.name or s.at.startswith(f"{leaf.site.name}.")
        ]
        inside = inside or [Step("keep", leaf.site.name)]
        edits += carry_out(network, leaf.site, leaf.stats, inside, name, floats)
    return edits


def _check_order(
    method: Method | Spanning, site: Site, later: list[Step], leaves: tuple[Leaf, ...]
) -> None:
    """Refuse what follows a step if it is no chain.

    Raises:
        PlanError: a step follows a final one, comes before its stage, or has no layer to work on.
    """
    if method.final and later:
        raise PlanError(
            f"{method.name} is the end of a chain", site.name, f"but {later[0].method} follows it"
        )
    places = [leaf.site.name for leaf in leaves]
    for s in later:
        if not any(s.at == place or s.at.startswith(f"{place}.") for place in places):
            raise PlanError(
                "a step has no layer to work on", f"{s.method} at {s.at}",
                f"{method.name} leaves {', '.join(places)}", "edit the plan",
            )  # fmt: skip
        after = get_method(s.method)
        if not after.final and after.stage <= method.stage:
            raise PlanError(
                f"{s.method} cannot follow {method.name}", s.at,
                f"stage {after.stage.name} is not after {method.stage.name}", "edit the plan",
            )  # fmt: skip


def settle(edits: list[Edit]) -> list[Edit]:
    """Keep all structural edits in order, and only the last values of each tensor.

    Values of what a later edit has replaced are of no tensor any more, and are left out.
    """
    last: dict[str, int] = {}
    for i, edit in enumerate(edits):
        if edit.form == "values":
            last[edit.path] = i
        elif edit.form == "tie":
            own = ("weight", "bias")[: 1 + edit.settings.get("bias", 0)]
            for leaf in own:
                last.pop(f"{edit.path}.{leaf}", None)
        elif edit.path:
            for path in [p for p in last if p.startswith(f"{edit.path}.")]:
                del last[path]
    return [e for i, e in enumerate(edits) if e.form != "values" or last.get(e.path) == i]
