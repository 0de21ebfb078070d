"""Applying a plan: decisions to edits, edits into a copy of the network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lamina.errors import NetworkError, PlanError
from lamina.forms import Edit, find_tensor, install
from lamina.measure.stats import LayerStats, Stats
from lamina.methods.base import Choice, Leaf, Step, get_method, weights_of
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan.plan import Plan

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
) -> Edited:
    """Carry out a plan on a copy of the network.

    Args:
        network: the network the plan was made for; unchanged unless `inplace`.
        plan: the decisions.
        sites, stats: from `discover` and `measure`, as when the plan was made.
        inplace: edit the user's module itself.
        progress: called with (sites done, sites in all, site name).

    Raises:
        PlanError: the plan is for another network, or names a site that is not there.
        SiteError: a method cannot carry out a decision.
    """
    check_fits(plan, network, sites)
    edited = network if inplace else replace(network, module=copy_module(network.module))
    edits: list[Edit] = []
    floats: dict[str, torch.Tensor] = {}
    for i, (name, decision) in enumerate(plan.sites.items()):
        if progress:
            progress(i, len(plan.sites), name)
        steps = list(decision.steps)
        edits += _carry_out(edited, sites[name], stats.of(name), steps, name, floats)
    if progress:
        progress(len(plan.sites), len(plan.sites), "")
    return Edited(edited, tuple(settle(edits)), floats)


def check_fits(plan: Plan, network: Network, sites: Sites) -> None:
    """Refuse a plan that was made for another network.

    Raises:
        PlanError: the digests differ, or a site is missing.
    """
    if plan.network != network.digest():
        raise PlanError(
            "the plan was made for another network",
            plan.network,
            f"this network is {network.digest()}",
            "plan again for this network",
        )
    known = {site.name for site in sites.layers}
    for name in plan.sites:
        if name not in known:
            raise PlanError(
                "the plan names a site that the network does not have",
                name,
                "",
                f"its sites are {', '.join(sorted(known))}",
            )


def copy_module(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module.

    Raises:
        NetworkError: the module cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise NetworkError(
            "the network cannot be copied", type(module).__name__, str(error), "use inplace=True"
        ) from error


def _carry_out(
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
    _check_order(site, step, later, leaves)
    edits = method.apply(network, Choice(site, step.settings), stats)
    if method.final:
        floats.update({p: find_tensor(network.module, p).detach().clone()
                       for p in (site.weight, site.bias) if p})  # fmt: skip
    install(network.module, edits)
    for leaf in leaves:
        inside = [s for s in later if s.at == leaf.site.name]
        if not inside:
            inside = [Step("keep", leaf.site.name)]
        edits += _carry_out(network, leaf.site, leaf.stats, inside, name, floats)
    return edits


def _check_order(site: Site, step: Step, later: list[Step], leaves: tuple[Leaf, ...]) -> None:
    """Refuse what follows a step if it is no chain.

    Raises:
        PlanError: a step follows a final one, comes before its stage, or has no layer to work on.
    """
    method = get_method(step.method)
    if method.final and later:
        raise PlanError(
            f"{step.method} is the end of a chain", site.name, f"but {later[0].method} follows it"
        )
    places = [leaf.site.name for leaf in leaves]
    for s in later:
        if not any(s.at == place or s.at.startswith(f"{place}.") for place in places):
            raise PlanError(
                "a step has no layer to work on", f"{s.method} at {s.at}",
                f"{step.method} leaves {', '.join(places)}", "edit the plan",
            )  # fmt: skip
        after = get_method(s.method)
        if not after.final and after.stage <= method.stage:
            raise PlanError(
                f"{s.method} cannot follow {step.method}", s.at,
                f"stage {after.stage.name} is not after {method.stage.name}", "edit the plan",
            )  # fmt: skip


def settle(edits: list[Edit]) -> list[Edit]:
    """Keep all structural edits in order, and only the last values of each tensor."""
    last = {edit.path: i for i, edit in enumerate(edits) if edit.form == "values"}
    return [e for i, e in enumerate(edits) if e.form != "values" or last[e.path] == i]
