"""What methods offer: candidates that keep a layer's form, their bytes, and which are worth it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from numpy.typing import NDArray

from lamina import codecs
from lamina.artifact.records import values_bytes
from lamina.forms import Grid
from lamina.measure.stats import Cost
from lamina.methods.base import Candidate, Settings, Step, Weights
from lamina.network.sites import Site

STEP_BYTES = 4  # a grid's step, in float32

Count = Callable[[NDArray[Any]], float]


class Offer(Protocol):
    """What is needed of an offer to compare it with cheaper ones."""

    @property
    def error(self) -> float: ...


Offered = TypeVar("Offered", bound=Offer)


def offer_values(
    method: str, site: Site, weights: Weights, settings: Settings, size: float, error: float
) -> Candidate:
    """Return an offer that changes a layer's values: its parameters and MACs stay.

    Args:
        method: its name; settings: of the step.
        site, weights: the layer before.
        size: of all its tensors afterwards [bytes].
        error: predicted.
    """
    cost = Cost(sum(t.numel() for t in weights.values()), 8 * size, site.macs)
    return Candidate(site.name, (Step(method, site.name, settings),), cost, error)


def falling(offers: Iterable[Offered]) -> list[Offered]:
    """Keep, of offers by rising cost, those whose error is below that of all before."""
    kept: list[Offered] = []
    for offer in offers:
        if not kept or offer.error < kept[-1].error:
            kept.append(offer)
    return kept


def front(offers: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Keep the offers that no smaller one beats, smallest first."""
    return tuple(falling(sorted(offers, key=lambda c: (c.cost.bits, c.error))))


def other_bytes(weights: Weights) -> float:
    """Return what all of a layer but its weight takes, kept as it is [bytes]."""
    return sum(values_bytes(t) for kind, t in weights.items() if kind != "weight")


def grid_bytes(grid: Grid, count: Count = codecs.length) -> float:
    """Return what a grid takes [bytes]: its step, and integers and exponents by `count`."""
    size = STEP_BYTES + count(grid.symbols.numpy())
    if grid.exponents is not None:
        size += count(grid.exponents.numpy().reshape(1, -1))
    return float(size)


def sparse_bytes(tensor: torch.Tensor, count: Count = codecs.length) -> float:
    """Return what a tensor with zeros takes [bytes]: their pattern by `count`, and the rest."""
    mask = (tensor != 0).reshape(tensor.shape[0] if tensor.dim() else 1, -1)
    return count(mask.to(torch.int32).cpu().numpy()) + values_bytes(tensor[tensor != 0])
