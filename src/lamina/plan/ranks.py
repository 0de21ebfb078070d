"""Folds and ranks for all layers of a network at once, within a budget of parameters.

The problem (ALDS: Liebenwein et al. 2021, arXiv:2107.11442, eq. 8): the least largest error
over all layers, where layer l takes `n_l(k, j)` parameters at k folds of rank j, or stays dense.
`algorithm_1` is the paper's search; `minimax` solves the same problem exactly. Both work on numbers
only, so that any error may stand in the curves, and both end by spending what is left.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lamina.errors import InfeasibleError

FIXED_SEEDS = (3, 5, 7, 9)  # folds of the first seeds, as published
OFFSETS = (0.5, 0.3, 0.1, -0.1, -0.3, -0.5)  # of the rounding in the local step, as published
Key = tuple[int, int]  # (scheme, folds)


@dataclass(frozen=True)
class Curve:
    """What one scheme and number of folds offers: an error for every rank.

    Args:
        folds: k, a divisor of the layer's channels.
        unit: parameters of one more rank in every fold, `k f + n` for scheme 0.
        most: largest rank r(k); its error is 0.
        error: rank 0..most to error, never rising. It is asked for often: it should remember.
        scheme: how the kernel is shared between the two layers.
        base: parameters that every rank takes beside (a bias that the layer did not have).
    """

    folds: int
    unit: int
    most: int
    error: Callable[[int], float]
    scheme: int = 0
    base: int = 0

    def params(self, rank: int) -> int:
        """Return what a rank takes."""
        return self.base + rank * self.unit

    def within(self, params: int) -> int:
        """Return the largest rank that takes at most so many parameters."""
        return min(self.most, (params - self.base) // self.unit)

    def first(self, limit: float, last: int, strictly: bool = False) -> int:
        """Return the smallest rank >= 1 whose error is at most `limit`; none does: `last + 1`.

        Args:
            limit: of the error.
            last: largest rank that is looked at.
            strictly: below the limit instead.
        """
        low, high = 1, last + 1
        while low < high:
            middle = (low + high) // 2
            error = self.error(middle)
            if error < limit or (error == limit and not strictly):
                high = middle
            else:
                low = middle + 1
        return low


@dataclass(frozen=True)
class Layer:
    """What can be chosen for one layer.

    Args:
        name: of its site.
        dense: parameters of its weight as it is; what takes no fewer stays dense, at error 0.
        curves: by (scheme, folds).
    """

    name: str
    dense: int
    curves: Mapping[Key, Curve]

    def saving(self, curve: Curve) -> int:
        """Return the largest rank that takes fewer parameters than the dense layer."""
        return curve.within(self.dense - 1)


@dataclass(frozen=True)
class Pick:
    """What one layer takes; rank 0: it stays dense.

    Args:
        rank, folds, scheme: of the pair.
        params: of the weight.
        error: on its curve.
    """

    rank: int
    folds: int
    scheme: int
    params: int
    error: float


@dataclass(frozen=True)
class Picks:
    """One pick per layer, in the order of the layers.

    Args:
        layers: the picks.
        params: of all weights together, at most the budget.
        error: the largest.
    """

    layers: tuple[Pick, ...]
    params: int
    error: float


def minimax(layers: Sequence[Layer], budget: float) -> Picks:
    """Return the picks of least largest error within the budget, over all folds and ranks.

    For one threshold every layer takes its smallest option on its own, so that the problem is a
    search of the smallest threshold that fits, which is one of the curves' values: exact. What is
    left is spent on the layers of largest error, one step after the other.

    Args:
        layers: with all their curves.
        budget: parameters that the weights of these layers may take together.

    Raises:
        InfeasibleError: the smallest options take more; `nearest` says what they take.

    Example:
        >>> curve = Curve(1, unit=10, most=4, error=[1.0, 0.5, 0.2, 0.1, 0.0].__getitem__)
        >>> picks = minimax([Layer("a", 40, {(0, 1): curve}), Layer("b", 40, {(0, 1): curve})], 50)
        >>> [pick.rank for pick in picks.layers], picks.error
        ([3, 2], 0.2)
    """
    return fill(layers, by_threshold(layers, budget), budget)


def by_threshold(layers: Sequence[Layer], budget: float) -> Picks:
    """Return the smallest options below the smallest threshold that fits, and spend no rest.

    Raises:
        InfeasibleError: as `minimax`.
    """
    smallest = [smallest_option(layer, float("inf")) for layer in layers]
    least = sum(pick.params for pick in smallest)
    if least > budget:
        raise InfeasibleError(
            "no ranks fit the budget", f"{budget:,.0f} parameters",
            f"rank 1 in every layer takes {least:,}", f"allow {least:,} parameters or more",
            {"params": float(least)},
        )  # fmt: skip

    def fits(threshold: float) -> bool:
        return sum(smallest_option(layer, threshold).params for layer in layers) <= budget

    if fits(0.0):
        return together(smallest_option(layer, 0.0) for layer in layers)
    threshold = least_threshold(layers, fits)
    return together(smallest_option(layer, threshold) for layer in layers)


def smallest_option(layer: Layer, limit: float, strictly: bool = False) -> Pick:
    """Return what takes the fewest parameters at an error of at most `limit`; dense always does.

    Among equals the one of least error, then of fewest folds.
    """
    found = (layer.dense, 0.0, 0, 0, 0)  # params, error, folds, scheme, rank
    for (scheme, folds), curve in layer.curves.items():
        last = min(layer.saving(curve), curve.within(found[0]))  # more cannot win
        rank = curve.first(limit, last, strictly)
        if rank <= last:
            found = min(found, (curve.params(rank), curve.error(rank), folds, scheme, rank))
    params, error, folds, scheme, rank = found
    return Pick(rank, folds, scheme, params, error)


def least_threshold(layers: Sequence[Layer], fits: Callable[[float], bool]) -> float:
    """Return the smallest value on any curve that fits; infinity where none does.

    A search over sorted lists without merging them: each round looks at the weighted median of the
    lists' middles, which settles at least a quarter of all values. So few values are asked for.

    Args:
        layers: their curves, up to the ranks that save parameters.
        fits: whether a threshold fits; once it does, every larger one does.
    """
    best = float("inf")
    spans = [
        (curve, 1, layer.saving(curve) + 1) for layer in layers for curve in layer.curves.values()
    ]
    while spans := [span for span in spans if span[1] < span[2]]:
        middles = sorted((c.error((low + high) // 2), high - low) for c, low, high in spans)
        half = sum(width for _, width in middles) / 2
        for value, width in middles:
            pivot = value
            half -= width
            if half <= 0:
                break
        if fits(pivot):
            best = pivot
            spans = [
                (c, max(low, min(high, c.first(pivot, high - 1, strictly=True))), high)
                for c, low, high in spans
            ]
        else:
            spans = [(c, low, min(high, c.first(pivot, high - 1))) for c, low, high in spans]
    return best


def fill(layers: Sequence[Layer], picks: Picks, budget: float) -> Picks:
    """Spend the rest of a budget: the layer of largest error takes its next option that is better.

    A layer whose next option does not fit is done, for the rest only shrinks.

    Args:
        layers: with the curves that may be chosen from.
        picks: to start from.
        budget: parameters of all layers.
    """
    chosen = list(picks.layers)
    rest = budget - picks.params
    open_ = {i for i, pick in enumerate(chosen) if pick.error > 0}
    while open_:
        i = max(open_, key=lambda i: (chosen[i].error, -i))
        better = smallest_option(layers[i], chosen[i].error, strictly=True)
        if better.params - chosen[i].params > rest:
            open_.discard(i)
            continue
        rest -= better.params - chosen[i].params
        chosen[i] = better
        if better.error <= 0:
            open_.discard(i)
    return together(chosen)


def together(picks: Iterable[Pick]) -> Picks:
    """Add picks up."""
    listed = tuple(picks)
    params = sum(pick.params for pick in listed)
    return Picks(listed, params, max((pick.error for pick in listed), default=0.0))


# --- Algorithm 1 ---------------------------------------------------------------------------------


def algorithm_1(
    layers: Sequence[Layer],
    budget: float,
    *,
    seeds: int = 15,
    iterations: int = 4,
    seed: int = 0,
    repo: bool = False,
) -> Picks:
    """Return the best picks that ALDS's alternating search finds from several starts.

    Each start fixes the folds of every layer. The GLOBAL step then finds the ranks (one threshold
    for all layers, exact over the sorted errors); the LOCAL step finds, for each layer, the folds
    of least error at the size that it has got. A start whose folds do not fit the budget is tried
    with half of them. The best state of all is kept, so more seeds or iterations never hurt.

    Args:
        layers, budget: as in `minimax`.
        seeds: starts; the first four have 3, 5, 7, 9 folds (the nearest divisors), the others are
            drawn.
        iterations: of both steps, per start.
        seed: of the drawn folds.
        repo: as the published code: the local step reads the error of one rank less than it gives
            (off by one), and nothing is filled. Its score goes into the curves.

    Raises:
        InfeasibleError: as `minimax`.

    Reference: Liebenwein et al. 2021, arXiv:2107.11442, Algorithm 1.
    """
    smallest = by_threshold(layers, budget) if not seeds else None
    draw = random.Random(seed)
    best = smallest
    best_folds: list[Key] = []
    for number in range(seeds):
        keys = [_start(layer, number, draw) for layer in layers]
        for _ in range(max(1, iterations)):
            keys, picks = _global_step(layers, keys, budget)
            if best is None or picks.error < best.error:
                best, best_folds = picks, keys
            moved = _local_step(layers, keys, picks, budget, repo)
            if moved == keys:
                break
            keys = moved
    assert best is not None
    if repo or not best_folds:
        return best
    return fill(_fixed(layers, best_folds), best, budget)


def nearest_divisor(layer: Layer, folds: float, scheme: int) -> Key:
    """Return the key of the number of folds nearest to `folds`; of two the larger."""
    keys = [key for key in layer.curves if key[0] == scheme]
    return min(keys, key=lambda key: (abs(key[1] - folds), -key[1]))


def _start(layer: Layer, number: int, draw: random.Random) -> Key:
    """Return a layer's first folds; every start draws as often, whatever came of the others."""
    scheme = draw.choice(sorted({scheme for scheme, _ in layer.curves}))
    drawn = draw.choice(sorted(key for key in layer.curves if key[0] == scheme))
    if number < len(FIXED_SEEDS):
        first = min(scheme for scheme, _ in layer.curves)
        return nearest_divisor(layer, FIXED_SEEDS[number], first)
    return drawn


def _fixed(layers: Sequence[Layer], keys: Sequence[Key]) -> list[Layer]:
    return [
        Layer(layer.name, layer.dense, {key: layer.curves[key]})
        for layer, key in zip(layers, keys, strict=True)
    ]


def _global_step(
    layers: Sequence[Layer], keys: list[Key], budget: float
) -> tuple[list[Key], Picks]:
    """Find the ranks for fixed folds; where even rank 1 does not fit, halve the folds first.

    Raises:
        InfeasibleError: it does not fit without folds.
    """
    while True:
        try:
            return keys, by_threshold(_fixed(layers, keys), budget)
        except InfeasibleError:
            halved = [
                nearest_divisor(layer, folds / 2, scheme) if folds > 1 else (scheme, folds)
                for layer, (scheme, folds) in zip(layers, keys, strict=True)
            ]
            lower = [min(a, b) for a, b in zip(halved, keys, strict=True)]
            if lower == keys:  # a divisor may be nearest to its own half
                lower = [(scheme, 1) for scheme, _ in keys]
            if lower == keys:
                first = [min(layer.curves) for layer in layers]  # scheme 0, one fold
                if first == keys:
                    raise
                lower = first
            keys = lower


def _local_step(
    layers: Sequence[Layer], keys: Sequence[Key], picks: Picks, budget: float, repo: bool
) -> list[Key]:
    """Find for each layer the folds of least error at its size, rounding ranks so that all fit."""
    found: list[Key] = []
    for offset in OFFSETS:
        found, total = [], 0
        for layer, key, pick in zip(layers, keys, picks.layers, strict=True):
            best: tuple[float, Key] | None = None
            size = layer.dense
            for other, curve in sorted(layer.curves.items()):
                rank = math.floor((pick.params - curve.base) / curve.unit + offset)
                rank = min(curve.most, rank)
                if rank < 1:
                    continue
                error = curve.error(rank - 1 if repo else rank)
                if best is None or error < best[0]:
                    best, size = (error, other), min(layer.dense, curve.params(rank))
            found.append(best[1] if best else key)
            total += size if best else pick.params
        if total <= budget:
            break
    return found
