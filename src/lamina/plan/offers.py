"""Proposing: what every method offers, for single layers and for spans of them."""

from __future__ import annotations

from collections.abc import Sequence

from lamina.measure.stats import Stats
from lamina.methods.base import Candidate, Method, Stage, registry
from lamina.network.sites import Sites
from lamina.network.source import Network
from lamina.plan.chains import Progress, choose_methods, choose_spanning, propose_layers
from lamina.plan.spans import find_spans, propose_spans


def propose(
    network: Network,
    sites: Sites,
    stats: Stats,
    methods: Sequence[str] | None = None,
    progress: Progress | None = None,
    bytes_count: bool = True,
    seconds_count: bool = False,
) -> dict[str, tuple[Candidate, ...]]:
    """Ask every method for its offers, and chain them through the stages.

    Args:
        network: the network, which is only read.
        sites: from `discover`.
        stats: from `measure`; data-free if `stats.samples == 0`.
        methods: names of the methods to ask; default: all. `keep` is always asked.
        progress: called with (sites done, sites in all, site name).
        bytes_count: whether the budget limits bytes. Where it does not, methods that only change
            how values are stored have nothing to offer but error, and are not asked.
        seconds_count: whether the budget limits latency. Only then methods that save nothing but
            time (`saves_time`) are asked without being named.

    Returns:
        Per site name its Pareto candidates, sorted by falling cost in bits: of every layer, then of
        every span (a chain, a family) that a method has an offer for.

    Raises:
        MethodError: an unknown method.
    """
    asked = asked_methods(methods, bytes_count, seconds_count)
    spans = find_spans(sites, choose_spanning(methods))
    count = len(sites.layers)

    def told(before: int) -> Progress | None:
        if progress is None:
            return None
        return lambda done, _, name: progress(before + done, count + len(spans), name)

    found = propose_layers(network, sites, stats, asked, told(0))
    return found | propose_spans(network, sites, stats, asked, spans, told(count))


def asked_methods(
    methods: Sequence[str] | None = None, bytes_count: bool = True, seconds_count: bool = False
) -> list[Method]:
    """Return the methods of layers that `propose` asks; arguments are its own.

    Raises:
        MethodError: an unknown method.

    Example:
        >>> "int8" in {method.name for method in asked_methods()}
        False
        >>> [method.name for method in asked_methods(["rdoq", "alds"], bytes_count=False)]
        ['keep', 'alds']
    """
    asked = choose_methods(methods)
    quick = [m for m in registry().values() if seconds_count and getattr(m, "saves_time", False)]
    if methods is None:
        asked += [m for m in quick if m not in asked]
    if bytes_count:
        return asked
    return [m for m in asked if m.name == "keep" or m.stage < Stage.VALUES or m in quick]
