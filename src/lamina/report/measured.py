"""The errors a report measures: of each layer or span alone, after the plan, after recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lamina.data import Data
from lamina.errors import FileError
from lamina.forms import Edit, install
from lamina.forms.tied import index_of
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.plan import Edited, Plan
from lamina.plan.rewrite import FORMS as REWRITING
from lamina.plan.seconds import outline
from lamina.report.compare import FEWEST, SITES, affordable, site_errors, take_reference
from lamina.report.owners import owner, owners_of, spans_of

MERGING = {"merged", "identity", "biased"}  # forms that layers share


def measure_errors(
    network: Network,
    base: Network,
    data: Data | None,
    sites: Sites,
    plan: Plan,
    edited: Edited,
    final: Edited,
    notes: list[str],
) -> tuple[dict[str, float], float | None, float | None]:
    """Return measured errors: of each site alone, after the plan, and after recovery."""
    loader = None
    if data is not None:
        loader = data.calibration if data.calibration is not None else data.validation
    if loader is None:
        notes.append("errors were not measured: there is no data")
        return {}, None, None
    count = len(sites.layers)
    each = affordable(plan.original.macs, count + 3)
    apart = count <= SITES and each >= FEWEST
    if not apart:
        why = f"there are {count} layers" if count > SITES else "the network is large"
        notes.append(f"errors were not measured layer by layer: {why}")
        each = max(FEWEST, affordable(plan.original.macs, 3))
    reference = take_reference(network, loader, each)
    spans = spans_of(plan, sites)
    own = own_edits(base, edited.edits, owners_of(sites, edited.edits, spans), sites, plan)
    if any(e.form == "narrow" for e in edited.edits):
        notes.append("errors were not measured layer by layer: layers share the channels that went")
        apart = False
    elif not (spans or plan.rewrite) and any(e.form in MERGING for e in edited.edits):
        # By a recipe, whose plan says nothing of it: alone they do not fit the original.
        notes.append("errors were not measured layer by layer: layers were merged")
        apart = False
    errors = site_errors(base, own, reference) if apart else {}
    applied = reference.error(edited.model)
    measured = applied if final is edited else reference.error(final.model)
    return errors, applied, measured


def own_edits(
    base: Network, edits: Sequence[Edit], owners: Mapping[str, str], sites: Sites, plan: Plan
) -> dict[str, tuple[Edit, ...]]:
    """Return the edits of every layer and span, as they are where they are installed alone.

    Args:
        base: the network that the sites are of.
        edits: of all sites, in order.
        owners: from `owners_of`.
        sites, plan: what was found and decided.
    """
    spans = {span.name: span for span in spans_of(plan, sites)}
    claimed = {member for span in spans.values() for member in span.members}
    found: dict[str, list[Edit]] = {name: [] for name in spans}
    found |= {site.name: [] for site in sites.layers if site.name not in claimed}
    for edit in _alone(base, edits):
        name = owner(_inside(edit), owners)
        rewriting = edit.form in REWRITING and not (name in spans and edit.form == "identity")
        if name in found and not rewriting:
            found[name].append(edit)
    return {name: tuple(own) for name, own in found.items()}


def _alone(base: Network, edits: Sequence[Edit]) -> list[Edit]:
    """Return edits whose ties name modules by their numbers in the network as it was."""
    if not any(edit.form == "tie" for edit in edits):
        return list(edits)
    made, found = outline(base.module), []
    for edit in edits:
        if edit.form == "tie":
            names = [name for name, _ in made.named_modules()]
            leader = names[edit.settings["with"]]
            try:
                number = index_of(base.module, leader)
            except FileError:  # a layer that another edit puts in
                number = edit.settings["with"]
            found.append(replace(edit, settings={**edit.settings, "with": number}))
        elif edit.form != "values":
            install(made, [edit])
            found.append(edit)
        else:
            found.append(edit)
    return found


def _inside(edit: Edit) -> str:
    """Return the name by which an edit's owner is looked up."""
    return edit.path if edit.form == "values" else f"{edit.path}."
