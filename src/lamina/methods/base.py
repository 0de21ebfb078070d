"""What a method is: it proposes candidates for a site, and turns a chosen one into edits."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch

from lamina.errors import MethodError
from lamina.forms import Edit
from lamina.measure.stats import Cost, Cross, LayerStats
from lamina.network.sites import Site, Sites
from lamina.network.source import Network

LONGEST = 24  # characters of a setting that are shown; a mask of channels has hundreds
Weights = Mapping[str, torch.Tensor]  # {"weight": ..., "bias": ...} (no "bias" where there is none)
Settings = Mapping[str, Any]  # JSON values only


class Stage(IntEnum):
    """The one fixed order in which methods may follow each other."""

    SHAPE = 1
    FACTOR = 2
    SHARE = 3
    VALUES = 4
    BYTES = 5


@dataclass(frozen=True)
class Step:
    """One method applied at one place: `Step("rdoq", "fc1.0", {"step": 0.03})`."""

    method: str
    at: str
    settings: Settings = field(default_factory=dict)

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={_short(v)}" for k, v in self.settings.items())
        return f"{self.method}({inside})"


@dataclass(frozen=True)
class Candidate:
    """One offer for a site: a chain of steps, what it ends up costing, and its predicted error.

    Args:
        site: the site's name.
        steps: the chain, in stage order.
        cost: what the site costs afterwards, weight and bias together.
        error: predicted increase of the loss [nats per sample]; data-free the relative spectral
            error.
    """

    site: str
    steps: tuple[Step, ...]
    cost: Cost
    error: float


@dataclass(frozen=True)
class Leaf:
    """A layer that a non-final step would leave: its site, tensors and derived statistics.

    `bits` is what belongs to it in the file and no later step can change (an index) [bits].
    """

    site: Site
    weights: Weights
    stats: LayerStats | None
    bits: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What `apply` is asked to do: a site and the settings of one step."""

    site: Site
    settings: Settings


@runtime_checkable
class Method(Protocol):
    """A compression method: one file, one small class, one instance called `method` in that file.

    A *final* method says how the values of a layer are stored (keep, kmeans, rdoq). A method that
    is not final (alds, magnitude) leaves layers behind, and `leave` describes them, so that later
    methods can propose on tensors that do not exist yet. A chain is any methods of rising stage
    that ends with exactly one final method.
    """

    name: str
    stage: Stage
    kinds: tuple[str, ...]
    needs: frozenset[str]
    reference: str
    final: bool

    def refuse(self, site: Site) -> str:
        """Return why this method cannot serve the site, or `""`."""
        ...

    def propose(
        self, site: Site, weights: Weights, stats: LayerStats | None
    ) -> Iterable[Candidate]:
        """Offer candidates; pure and deterministic; errors fall as costs rise."""
        ...

    def leave(
        self, site: Site, weights: Weights, stats: LayerStats | None, settings: Settings
    ) -> tuple[Leaf, ...]:
        """Describe the layers left by one candidate's settings (non-final methods only)."""
        ...

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return the structural edits of a choice without values; none if only values change.

        They say what will run, so that its latency can be measured before anything is computed.
        """
        ...

    def apply(self, network: Network, choice: Choice, stats: LayerStats | None) -> list[Edit]:
        """Return the edits that carry out a choice on `network`, which is not changed.

        A non-final structural method returns the structural edit first, then the values of the new
        parameters as `Plain` edits; a final one returns one values edit per tensor of the site.

        Raises:
            SiteError: the site cannot be served; names the site and the reason.
        """
        ...


@runtime_checkable
class Alike(Protocol):
    """What a final method may offer besides: proposing for a whole family of layers at once."""

    def propose_alike(
        self, leaves: Sequence[Leaf], floors: Sequence[float]
    ) -> list[tuple[Candidate, ...]]:
        """Offer for layers alike, such as those of one layer's ranks, coding only a few tensors.

        As `propose`, but with fewer candidates, whose sizes are within 2 % and 64 bytes.

        Args:
            leaves: the layers, in the order of their sizes.
            floors: the error made before each; offers far below it are not needed.
        """
        ...


@dataclass(frozen=True)
class Passage:
    """One operation between two members of a chain.

    Args:
        op: what it is, as in `Site.between`.
        module: the path of the module that does this and nothing else, as in `Site.through`.
        tensors: a batch_norm's `scale` and `shift` in evaluation mode (`y = scale * x + shift`), a
            prelu's or leaky_relu's `slope`.
    """

    op: str
    module: str = ""
    tensors: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What a spanning method sees of its site.

    Args:
        members: the layers, in order.
        passages: of a chain: what lies between two members; parallel to `Site.between`.
        cross: of a chain: how the inputs of two neighbours go together; None where that was not
            measured.
    """

    members: tuple[Leaf, ...]
    passages: tuple[tuple[Passage, ...], ...] = ()
    cross: tuple[Cross | None, ...] = ()


@runtime_checkable
class Spanning(Protocol):
    """A method whose sites span several layers: parts of chains, or families.

    It is never final. `Site.members` are the layers it claims: a plan holds a decision for the span
    or for each of its members. Settings are JSON values.
    """

    name: str
    stage: Stage
    kinds: tuple[str, ...]
    needs: frozenset[str]
    reference: str
    final: bool

    def places(self, sites: Sites) -> Iterable[Site]:
        """Return the parts of chains, or the families, that it could serve; nothing is computed."""
        ...

    def refuse(self, site: Site) -> str:
        """Return why this method cannot serve the site, or `""`."""
        ...

    def propose(self, site: Site, parts: Parts) -> Iterable[Candidate]:
        """Offer candidates of one step each, with the costs of all members together afterwards."""
        ...

    def leave(self, site: Site, parts: Parts, settings: Settings) -> tuple[Leaf, ...]:
        """Describe the layers left by one candidate's settings; what vanishes leaves none."""
        ...

    def structure(self, site: Site, settings: Settings) -> tuple[Edit, ...]:
        """Return the structural edits of a choice without values."""
        ...

    def apply(self, network: Network, choice: Choice, parts: Parts) -> list[Edit]:
        """Return the edits that carry out a choice on `network`, which is not changed.

        Structural edits first, then the values of what is left as `Plain` edits.

        Raises:
            SiteError: the site cannot be served; names the site and the reason.
        """
        ...


def why_no_chain(site: Site) -> str:
    """Return why a site is no chain of several layers that may be replaced, or `""`."""
    if site.kind != "chain":
        return f"it is a {site.kind}, not a chain of layers"
    return site.rigid if len(site.members) > 1 else "it is one layer already"


@cache
def _instances() -> dict[str, Method | Spanning]:
    import lamina.methods as package

    found: dict[str, Method | Spanning] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"lamina.methods.{info.name}")
        method = getattr(module, "method", None)
        if isinstance(method, (Spanning, Method)):
            found[method.name] = method
    return found


@cache
def registry() -> dict[str, Method]:
    """Return every method of layers by name; adding a file to this folder adds a method."""
    return {n: m for n, m in _instances().items() if not isinstance(m, Spanning)}


@cache
def spanning() -> dict[str, Spanning]:
    """Return every method that spans layers by name."""
    return {n: m for n, m in _instances().items() if isinstance(m, Spanning)}


def find_method(name: str) -> Method | Spanning:
    """Return a method by name, of either kind.

    Raises:
        MethodError: there is no such method.
    """
    methods = _instances()
    if name not in methods:
        raise MethodError("unknown method", repr(name), "", f"choose from {', '.join(methods)}")
    return methods[name]


def get_method(name: str) -> Method:
    """Return a method of layers by name.

    Raises:
        MethodError: there is no such method, or it spans layers.
    """
    method = find_method(name)
    if isinstance(method, Spanning):
        raise MethodError(f"{name} is no method of single layers", "", "it spans several")
    return method


def weights_of(network: Network, site: Site) -> dict[str, torch.Tensor]:
    """Return a site's tensors, detached: `{"weight": ..., "bias": ...}`."""
    from lamina.forms import find_tensor

    weights = {"weight": find_tensor(network.module, site.weight).detach()}
    if site.bias:
        weights["bias"] = find_tensor(network.module, site.bias).detach()
    return weights


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
