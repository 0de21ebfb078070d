"""A toy method that spans layers, with offers that are known by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from lamina.errors import MethodError, SiteError
from lamina.forms import Edit, Plain
from lamina.measure.stats import Cost
from lamina.methods.base import Candidate, Choice, Leaf, Parts, Settings, Stage, Step
from lamina.network.sites import Site, Sites, cut
from lamina.network.source import Network


@dataclass(frozen=True)
class Glue:
    """Neighbours of linear layers become their product, what lies between them nothing."""

    name: str = "glue"
    stage: Stage = Stage.SHAPE
    kinds: tuple[str, ...] = ("chain",)
    needs: frozenset[str] = frozenset()
    reference: str = "a toy of the tests"
    final: bool = False
    error: float = 0.25

    def places(self, sites: Sites) -> Iterable[Site]:
        for chain in sites.chains:
            for i in range(len(chain.members) - 1):
                yield cut(chain, i, i + 1)

    def refuse(self, site: Site) -> str:
        if site.kind not in self.kinds:
            return f"it is a {site.kind}, not a chain"
        if any("softplus" in ops for ops in site.between):
            return "nobody glues over a softplus"
        return ""

    def propose(self, site: Site, parts: Parts) -> Iterable[Candidate]:
        settings = {"inputs": parts.members[0].weights["weight"].shape[1]}
        (leaf,) = self.leave(site, parts, settings)
        size = sum(t.numel() for t in leaf.weights.values())
        cost = Cost(size, 32.0 * size, leaf.weights["weight"].numel())
        yield Candidate(site.name, (Step(self.name, site.name, settings),), cost, self.error)

    def leave(self, site: Site, parts: Parts, settings: Settings) -> tuple[Leaf, ...]:
        a, b = parts.members
        if settings.get("inputs") != a.weights["weight"].shape[1]:
            raise MethodError("glue does not have these settings", site.name, repr(dict(settings)))
        weight = b.weights["weight"] @ a.weights["weight"]
        bias = b.weights["weight"] @ a.weights["bias"] + b.weights["bias"]
        left = replace(b.site, shape=tuple(weight.shape))
        return (Leaf(left, {"weight": weight, "bias": bias}, b.stats and _no_stats(b, weight)),)

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        gone = [site.members[0], *(path for paths in site.through for path in paths if path)]
        edits = [Edit(path, "identity") for path in gone]
        return (*edits, Edit(site.members[-1], "resized", {"inputs": settings["inputs"]}))

    def apply(self, network: Network, choice: Choice, parts: Parts) -> list[Edit]:
        site = choice.site
        if why := self.refuse(site):
            raise SiteError("glue cannot serve this site", site.name, why)
        (leaf,) = self.leave(site, parts, choice.settings)
        edits = list(self.structure(site, choice.settings))
        for kind, name in (("weight", leaf.site.weight), ("bias", leaf.site.bias)):
            edits.append(Edit(name, "values", values=Plain(leaf.weights[kind])))
        return edits


def _no_stats(leaf: Leaf, weight: torch.Tensor):
    """Statistics of the right width: white inputs."""
    stats = leaf.stats
    assert stats is not None
    eye = torch.eye(weight.shape[1], dtype=torch.float64)[None]
    return replace(stats, H=eye, mean=None)
