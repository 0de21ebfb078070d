"""Seconds as a cost: what runs under a candidate, its measured time, and the gate for slow ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lamina.errors import LaminaError
from lamina.measure.latency import LatencyTable, Structure, structure_key
from lamina.methods.base import Candidate, Step, get_method, weights_of
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan.chains import Candidates


def structure_of(network: Network, site: Site, steps: Sequence[Step]) -> Structure:
    """Return the structural edits of a chain at a site, without values; `()` where the layer stays.

    Raises:
        MethodError: a step names an unknown method, or its settings do not fit the layer.
    """
    here = next((step for step in steps if step.at == site.name), None)
    if here is None:
        return ()
    method = get_method(here.method)
    found = tuple(method.structure(site, here.settings))
    rest = [step for step in steps if step is not here]
    if not any(_may_reshape(step) for step in rest):
        return found
    if not found:  # it changes values only, and leaves the layer itself
        return structure_of(network, site, rest)
    leaves = method.leave(site, weights_of(network, site), None, here.settings)
    for leaf in leaves:
        inside = [s for s in rest if s.at == leaf.site.name or s.at.startswith(leaf.site.name)]
        found += structure_of(network, leaf.site, inside)
    return found


def structures_of(
    network: Network, sites: Sites, candidates: Candidates
) -> dict[str, tuple[str, list[Structure]]]:
    """Return, by site that has any, the path of its layer and what may stand there.

    Edits that reach outside the layer cannot be timed by a table, and are left out.
    """
    found: dict[str, tuple[str, list[Structure]]] = {}
    for site in sites.layers:
        given = {
            structure_key(site.module, edits): edits
            for c in candidates.get(site.name, ())
            if (edits := structure_of(network, site, c.steps)) and inside(site, edits)
        }
        if given:
            found[site.name] = (site.module, list(given.values()))
    return found


def inside(site: Site, edits: Structure) -> bool:
    """Whether edits stay within the site's layer."""
    return all(
        edit.path == site.module or edit.path.startswith(f"{site.module}.") for edit in edits
    )


def reshape_edits(
    network: Network, sites: Sites, chosen: Mapping[str, Sequence[Step]]
) -> Structure:
    """Return the structural edits of a whole choice: by site name, its chain."""
    return tuple(
        edit for name, steps in chosen.items() for edit in structure_of(network, sites[name], steps)
    )


def with_seconds(
    network: Network, sites: Sites, candidates: Candidates, table: LatencyTable
) -> tuple[dict[str, tuple[Candidate, ...]], int]:
    """Put measured seconds into candidates, and drop the structures that save no time.

    A layer that stays as it is keeps its own time; a candidate whose structure is not faster than
    the layer it replaces by more than noise, or was not measured, is dropped (the speed gate).
    Sites without structures are in the table's fixed time, so their candidates cost no seconds.

    Returns:
        the candidates by site, and how many structures were dropped.
    """
    found: dict[str, tuple[Candidate, ...]] = {}
    dropped: set[tuple[str, str]] = set()
    for site in sites.layers:
        dense, ratios = table.dense.get(site.name, 0.0), table.ratios.get(site.name, {})
        kept = []
        for c in candidates.get(site.name, ()):
            edits = structure_of(network, site, c.steps)
            if not edits:
                kept.append(replace(c, cost=replace(c.cost, seconds=dense)))
                continue
            key = structure_key(site.module, edits)
            ratio, noise = ratios.get(key, (1.0, 0.0))
            if ratio + noise < 1:
                kept.append(replace(c, cost=replace(c.cost, seconds=ratio * dense)))
            else:
                dropped.add((site.name, key))
        found[site.name] = tuple(kept)
    return found, len(dropped)


def count_structures(structures: Mapping[str, tuple[str, Iterable[Structure]]]) -> int:
    """Return how many structures there are over all sites."""
    return sum(len(list(given)) for _, given in structures.values())


def _may_reshape(step: Step) -> bool:
    """Whether a step could change a layer's form: told by a layer that is none."""
    method = get_method(step.method)
    if method.final:
        return False
    try:
        return bool(method.structure(Site(step.at, module=step.at), step.settings))
    except (LaminaError, ArithmeticError, LookupError, TypeError, ValueError):
        return True
