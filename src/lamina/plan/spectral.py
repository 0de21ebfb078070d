"""The layers of a network as the rank selectors see them: sizes, spectra, and errors by score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.errors import PlanError
from lamina.measure.certificates import (
    bound_paper,
    bound_rss,
    exact_errors,
    score_repo,
    unfolded_bound,
)
from lamina.measure.schemes import Scheme, fold
from lamina.measure.spectra import fold_spectra
from lamina.plan.ranks import Curve, Key, Layer

SCORES = ("exact", "rss", "paper", "repo")
Array = NDArray[np.float64]
Ask = Callable[[int], float]  # a rank to its error


@dataclass(frozen=True)
class Spectral:
    """One layer's spectra, for every scheme and number of folds that may be chosen.

    Args:
        name: of its site.
        outputs: f.
        inputs: n, the channels times the kernel's taps.
        spectra: by (scheme, folds) singular values of the folds `[k, r]`, descending, float64.
        units: by (scheme, folds) the parameters of one rank.
        positions: output positions per sample, for multiply-accumulates.
        taps: by scheme the taps of the decoding layer; absent: 1.
        exact: by (scheme, folds) a rank's true relative spectral error, worked out when asked;
            absent where the spectra alone say it.
    """

    name: str
    outputs: int
    inputs: int
    spectra: Mapping[Key, torch.Tensor]
    units: Mapping[Key, int]
    positions: float = 1.0
    taps: Mapping[int, int] = field(default_factory=dict)
    exact: Mapping[Key, Ask] = field(default_factory=dict)

    @property
    def dense(self) -> int:
        """Parameters of the weight as it is."""
        return self.outputs * self.inputs

    @property
    def largest(self) -> float:
        """Largest singular value of the matrix `[f, c K]`."""
        return float(self.spectra[0, 1][0, 0])

    def most(self, key: Key) -> int:
        """Return the full rank r of a fold."""
        return self.spectra[key].shape[1]

    def ask(self, key: Key, score: str) -> Ask:
        """Return the relative error of ranks by a score; what was asked once is remembered."""
        spectra = self.spectra[key]
        if score == "repo":  # against the largest value of the folded matrix itself
            return cache(partial(score_repo, spectra, float(self.spectra[key[0], 1][0, 0])))
        if score == "exact" and key in self.exact:
            return self.exact[key]
        bound = bound_paper if score == "paper" else bound_rss
        taps, largest = self.taps.get(key[0], 1), self.largest

        def error(rank: int) -> float:
            return unfolded_bound(bound(spectra, largest, rank), spectra, largest, rank, taps)

        return cache(error)

    def layer(self, score: str = "exact", keys: Sequence[Key] | None = None) -> Layer:
        """Return the layer with the errors of one score on its curves.

        Args:
            score: `"exact"`; the certificates `"rss"` and `"paper"` (Theorem 1); `"repo"`: the
                published code's, which leaves the root of k out and bounds nothing for k > 1.
            keys: the curves; default: all.

        Raises:
            PlanError: there is no such score.
        """
        if score not in SCORES:
            raise PlanError("unknown score", repr(score), "", f"choose from {', '.join(SCORES)}")
        return Layer(
            self.name,
            self.dense,
            {key: self._curve(key, self.ask(key, score)) for key in keys or self.spectra},
        )

    def with_values(self, key: Key, values: Array, base: int = 0) -> Layer:
        """Return the layer with one curve of other numbers.

        Args:
            key: scheme and folds.
            values: `[r + 1]`, never rising from rank 0 to r.
            base: parameters that every rank takes beside.
        """
        curve = replace(self._curve(key, values.tolist().__getitem__), base=base)
        return Layer(self.name, self.dense, {key: curve})

    def nearest(self, folds: int) -> Key:
        """Return scheme 0's key of the number of folds nearest to `folds`; of two the larger."""
        return 0, min((k for s, k in self.spectra if not s), key=lambda k: (abs(k - folds), -k))

    def _curve(self, key: Key, error: Ask) -> Curve:
        return Curve(key[1], self.units[key], self.most(key), error, key[0])


def measure_spectra(
    name: str,
    matrix: torch.Tensor,
    channels: int,
    *,
    kernel: tuple[int, ...] = (),
    positions: float = 1.0,
    folds: Sequence[int] | None = None,
    schemes: Sequence[int] = (0,),
) -> Spectral:
    """Return a layer's spectra at all its folds.

    Args:
        name: of its site.
        matrix: `[f, c K]`, channel first.
        channels: c.
        kernel: of a convolution; it matters for schemes other than 0.
        positions: output positions per sample.
        folds: divisors of c; default: all.
        schemes: ways to share the kernel's taps out between the two layers; 0 is always there.

    Raises:
        MethodError: the weights are not finite.

    Example:
        >>> found = measure_spectra("fc", torch.eye(4), channels=4)
        >>> sorted(found.spectra), found.layer().curves[0, 2].error(1)
        ([(0, 1), (0, 2), (0, 4)], 1.0)
    """
    matrix = matrix.detach().to(torch.float64)
    outputs, inputs = matrix.shape
    chosen = sorted({1, *(folds if folds is not None else divisors(channels))})
    spectra: dict[Key, torch.Tensor] = {}
    units: dict[Key, int] = {}
    exact: dict[Key, Ask] = {}
    taps: dict[int, int] = {}
    for number in sorted({0, *schemes}):
        scheme = Scheme(number, kernel)
        folded = fold(matrix, 1, scheme)[0]  # a slice of columns is a slice of channels
        for k, values in fold_spectra(folded, chosen).items():
            spectra[number, k] = values.cpu()
            units[number, k] = k * outputs * scheme.after + inputs // scheme.after
            if k > 1 or number:
                largest = float(spectra[0, 1][0, 0])
                exact[number, k] = Tails(matrix, k, scheme, largest)
        taps[number] = scheme.after
    return Spectral(name, outputs, inputs, spectra, units, positions, taps, exact)


class Tails:
    """The true relative spectral error at a rank: what the ranks beyond it hold, worked out once.

    Args:
        matrix: `[f, c K]`, float64.
        folds: k.
        scheme: who owns which taps.
        largest: singular value of the matrix.
    """

    def __init__(self, matrix: torch.Tensor, folds: int, scheme: Scheme, largest: float) -> None:
        self.matrix, self.folds, self.scheme, self.largest = matrix, folds, scheme, largest
        self.side: torch.Tensor | None = None  # [k, f * taps, r]
        self.known: dict[int, float] = {}

    def __call__(self, rank: int) -> float:
        """Return the error of keeping `rank` values in every fold."""
        if rank not in self.known:
            if self.side is None:
                self.side = left_side(fold(self.matrix, self.folds, self.scheme))
            found = exact_errors(self.side, self.scheme.after, self.largest, [rank])
            self.known[rank] = found[0]
        return self.known[rank]


def left_side(parts: torch.Tensor) -> torch.Tensor:
    """Return `U_i S_i` `[k, rows, r]` of `[k, rows, w]`, from the Gram of the short side."""
    if parts.shape[1] <= parts.shape[2]:
        values, left = torch.linalg.eigh(parts @ parts.mT)
        return left.flip(-1) * values.flip(-1).clamp_min(0).sqrt()[:, None, :]
    _, right = torch.linalg.eigh(parts.mT @ parts)
    return parts @ right.flip(-1)


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, rising."""
    return [k for k in range(1, number + 1) if number % k == 0]
