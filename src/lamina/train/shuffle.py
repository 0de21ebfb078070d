"""Group pressure: an L1 penalty that makes the blocks a grouped layer behind a shuffle needs.

Structured sparsification: Zhang et al. 2021, UAI, arXiv:2002.08127. While a network trains, every
layer keeps an order of its outputs and inputs; weights that the layer's next cut would remove are
drawn to zero; an order is bettered once an epoch, and the strength follows one number: the share of
all weights that lies outside of the blocks reached. At the end the weights outside go, and
`methods.group_shuffle` finds layers that come apart into groups at no loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from lamina.measure.blocks import Order, arrange, cut_costs, reached_level, start_order, support

CUT = 0.1  # share of a layer's importance a level may lose; the paper's p
DELTA = 2e-6  # what one epoch changes the strength by
STARTS, FIRST_ROUNDS, ROUNDS = 5, 20, 10
HALVINGS, CLOSE = 10, 0.01  # of the search for the cut at the end


@dataclass(frozen=True)
class Shuffled:
    """A layer's order and level: `2^(level-1)` groups are reached.

    Args:
        order: of its outputs and input channels.
        level: 1 is the dense layer.
    """

    order: Order
    level: int = 1

    @property
    def groups(self) -> int:
        """How many groups are reached."""
        return int(2 ** (self.level - 1))


def norms(weight: torch.Tensor) -> torch.Tensor:
    """Return the L1 norm of every connection, `[out, in]`, of a weight `[out, in, *kernel]`.

    Example:
        >>> norms(torch.ones(2, 3, 5, 5))[0]
        tensor([25., 25., 25.], dtype=torch.float64)
    """
    magnitudes = weight.detach().abs().to(torch.float64).cpu()
    return magnitudes.reshape(*magnitudes.shape[:2], -1).sum(2)


def first_order(weight: torch.Tensor, cut: float = CUT, starts: int = STARTS) -> Shuffled:
    """Return the best of several orders of a layer: as it is, and seeded random ones."""
    S = norms(weight)
    n, c = S.shape
    R = cut_costs(n, c)
    found = [
        arrange(S, R, start_order(n, c, seed), FIRST_ROUNDS) for seed in (None, *range(starts))
    ]
    order, _ = min(found, key=lambda f: f[1][-1])
    return Shuffled(order, reached_level(order.of(S), cut))


def reorder(weight: torch.Tensor, layer: Shuffled, cut: float = CUT) -> Shuffled:
    """Return a layer's order, bettered from where it was, and the level it now reaches."""
    S = norms(weight)
    order, _ = arrange(S, cut_costs(*S.shape), layer.order, ROUNDS)
    return Shuffled(order, reached_level(order.of(S), cut))


def group_penalty(
    weights: Mapping[str, torch.Tensor], layers: Mapping[str, Shuffled]
) -> torch.Tensor:
    """Return the sum of `|w|` times what its place costs; its gradient is the paper's pressure.

    The costs are those of the cuts up to a layer's level: what it has reached, and the next one.

    Args:
        weights: `[out, in, *kernel]` by name; layers: by the same names.

    Example:
        >>> layer = Shuffled(start_order(2, 2))
        >>> float(group_penalty({"a": torch.ones(2, 2)}, {"a": layer}))
        2.0
    """
    total = torch.zeros(())
    for name, layer in layers.items():
        weight = weights[name]
        costs = layer.order.undo(cut_costs(weight.shape[0], weight.shape[1], layer.level))
        costs = costs.to(weight).reshape(costs.shape + (1,) * (weight.dim() - 2))
        total = total.to(weight.device) + (weight.abs() * costs).sum()
    return total


def group_mask(shape: torch.Size | tuple[int, ...], layer: Shuffled) -> torch.Tensor:
    """Return the 0/1 mask of a layer's blocks, in the layer's own order, for a weight's shape.

    Example:
        >>> group_mask((2, 2), Shuffled(start_order(2, 2), level=2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    mask = layer.order.undo(support(shape[0], shape[1], layer.groups)).to(torch.float32)
    return mask.reshape(mask.shape + (1,) * (len(shape) - 2)).expand(shape)


def group_sparsity(sizes: Mapping[str, int], layers: Mapping[str, Shuffled]) -> float:
    """Return the share of all weights outside the blocks reached.

    Example:
        >>> group_sparsity({"a": 10, "b": 10}, {"a": Shuffled(start_order(2, 2), level=2)})
        0.25
    """
    kept = sum(n / layers[name].groups if name in layers else n for name, n in sizes.items())
    return 1 - kept / max(1, sum(sizes.values()))


@dataclass(frozen=True)
class Strength:
    """The strength of the pressure, steered once an epoch so that the sparsity arrives in time.

    Args:
        goal: sparsity to end at.
        epochs: of the training under pressure, the warm-up included.
        warm: epochs without pressure.
        value: the strength now [loss per unit of weight]; never negative.
        delta: what an epoch changes it by.
        last: sparsity of the epoch before.
        epoch: epochs seen.
    """

    goal: float
    epochs: int
    warm: int = 0
    value: float = 0.0
    delta: float = DELTA
    last: float = 0.0
    epoch: int = 0

    def steer(self, sparsity: float) -> Strength:
        """Return the strength after an epoch that ended with a sparsity.

        It rises where the epoch gained less than an even share of what was missing, and falls once
        the goal is reached.
        """
        left = max(1, self.epochs - self.epoch)
        expected = (self.goal - self.last) / left
        value = self.value
        if sparsity >= self.goal:
            value -= self.delta
        elif self.epoch + 1 >= self.warm and sparsity - self.last < expected:
            value += self.delta
        return replace(self, value=max(0.0, value), last=sparsity, epoch=self.epoch + 1)


def final_levels(
    weights: Mapping[str, torch.Tensor],
    layers: Mapping[str, Shuffled],
    goal: float,
    sizes: Mapping[str, int] | None = None,
) -> tuple[dict[str, Shuffled], float]:
    """Return the layers at the levels that end at a sparsity, and the cut that gives them.

    By bisection on the cut, one for all layers: the least that reaches the goal, as far as any
    does (a cut of 1 takes every layer to its highest level).

    Args:
        weights: `[out, in, *kernel]` by name; layers: their orders.
        goal: sparsity of the network.
        sizes: weights of all layers by name; None: of these.
    """
    ordered = {name: layer.order.of(norms(weights[name])) for name, layer in layers.items()}
    counts = sizes or {name: weights[name].numel() for name in layers}

    def at(cut: float) -> dict[str, Shuffled]:
        return {
            name: replace(layer, level=reached_level(ordered[name], cut))
            for name, layer in layers.items()
        }

    low, high = 0.0, 1.0
    if group_sparsity(counts, at(low)) >= goal:
        return at(low), low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        reached = group_sparsity(counts, at(middle))
        if reached >= goal:
            high = middle
            if reached <= goal + CLOSE:
                break
        else:
            low = middle
    return at(high), high
