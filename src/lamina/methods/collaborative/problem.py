"""One layer as a problem of channels and ranks: what to keep, the best values, and the error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lamina.measure.collaborative import (
    Removal,
    eliminate_channels,
    fisher,
    refit,
    removals_at,
    remove_units,
)
from lamina.measure.low_rank import (
    FoldBasis,
    balance,
    encoded_moments,
    fold_basis,
    losses_of_ranks,
    solve_decoder,
)
from lamina.measure.stats import LayerStats, predict_error

SHARES = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)  # of channels, and of parameters
RANKS = 8  # points of the geometric grid of ranks, per number of channels
LARGE, HUGE = 1 << 18, 1 << 22  # weights: above, a coarser grid; the paper's removal left out
Offer = tuple[tuple[int, ...], int | None]  # channels kept, rank (None: not cut)


@dataclass(frozen=True)
class Problem:
    """A layer as a matrix, and the moments its values are solved with.

    Args:
        matrix: `[n, c K]`, float64.
        channels: c.
        stats: as measured; None: data-free.
        H, G: damped moments; None: data-free.
    """

    matrix: torch.Tensor
    channels: int
    stats: LayerStats | None
    H: torch.Tensor | None
    G: torch.Tensor | None

    @property
    def taps(self) -> int:
        return self.matrix.shape[1] // self.channels

    def columns(self, kept: Iterable[int]) -> torch.Tensor:
        """Return the columns of the channels kept."""
        first = torch.tensor(list(kept)) * self.taps
        return (first[:, None] + torch.arange(self.taps)).flatten()

    def params(self, channels: int, rank: int | None) -> int:
        """Return the weights of a layer on so many channels, or of its pair."""
        n, inputs = len(self.matrix), channels * self.taps
        return n * inputs if rank is None else rank * (n + inputs)

    def values(self, kept: Iterable[int]) -> torch.Tensor:
        """Return the best weight on the channels kept, `[n, m K]`."""
        return refit(self.matrix, self.H, self.columns(kept))

    def basis(self, kept: Iterable[int]) -> torch.Tensor:
        """Return the encoders of all ranks on the channels kept, `[r, m K]`, best first."""
        columns = self.columns(kept)
        H = self.H
        if H is not None:
            H = H[columns] if H.dim() == 1 else H[columns][:, columns]
        return fold_basis(self.values(kept), H, self.G, 1).encode[0]

    def embed(self, rows: torch.Tensor, kept: Iterable[int]) -> torch.Tensor:
        """Return rows `[j, m K]` with zeros at the other channels, `[j, c K]`."""
        whole = rows.new_zeros(len(rows), self.matrix.shape[1])
        whole[:, self.columns(kept)] = rows
        return whole

    def pair(self, kept: Iterable[int], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return encode `[1, q, m K]` and decode `[n, q]`, balanced."""
        kept = tuple(kept)
        encode = self.basis(kept)[:rank]
        whole = self.embed(encode, kept)[None]
        return balance(encode[None], solve_decoder(*encoded_moments(self.matrix, self.H, whole)))

    def measured(self) -> Iterable[tuple[Offer, float]]:
        """Return offers and their exact errors."""
        large = self.matrix.numel() > LARGE
        shares = SHARES[1::3] if large else SHARES
        counts = [m for m in (round(s * self.channels) for s in shares) if m]
        sets = eliminate_channels(self.matrix, self.H, self.G, self.channels, counts)
        wanted: dict[tuple[int, ...], set[int]] = {kept: set() for kept in sets.values()}
        for kept, ranks in wanted.items():
            ranks.update(self.ranks(len(kept)))
        for removal in self.removals(shares):
            ranks = wanted.setdefault(removal.kept, set())
            ranks.update(r for r in (removal.rank,) if r <= self.most(len(removal.kept)))
        for kept, ranks in wanted.items():
            delta = self.embed(self.values(kept), kept) - self.matrix
            yield (kept, None), predict_error(self.stats, self.matrix[None], delta[None])
            grid = sorted(ranks)
            for rank, error in zip(grid, self.losses(kept, grid), strict=True):
                yield (kept, rank), error

    def losses(self, kept: Iterable[int], ranks: list[int]) -> list[float]:
        """Return the exact errors of the pairs of several rising ranks on the channels kept."""
        if not ranks:
            return []
        rows = self.embed(self.basis(kept), kept)[: ranks[-1]]
        if self.stats is not None:
            basis = FoldBasis(rows[None], rows.new_zeros(1, len(rows)))
            return losses_of_ranks(self.matrix, self.stats, self.H, basis, ranks)
        # The encoders are orthonormal: what is lost is `M (I - B^T B)`, of Gram `M M^T - A A^T`.
        n, N = self.matrix.shape
        if n <= N:
            whole, decode = self.matrix @ self.matrix.mT, self.matrix @ rows.mT
            grams = [whole, *(whole - decode[:, :j] @ decode[:, :j].mT for j in ranks)]
        else:
            whole, eye = self.matrix.mT @ self.matrix, torch.eye(N).to(rows)
            rests = [eye - rows[:j].mT @ rows[:j] for j in ranks]
            grams = [whole, *(rest @ whole @ rest for rest in rests)]
        top, *squares = (float(torch.linalg.eigvalsh(gram)[-1]) for gram in grams)
        return [math.sqrt(max(square, 0.0) / max(top, 1e-300)) for square in squares]

    def removals(self, shares: Iterable[float]) -> list[Removal]:
        """Return the paper's removals that first come down to the shares of the weights."""
        size = self.matrix.numel()
        if size > HUGE:
            return []
        F = fisher(self.stats, (len(self.matrix), self.matrix.shape[1]))
        steps = 24 if size > LARGE else 100
        path = remove_units(self.matrix, F, self.channels, steps=steps)

        def cost(removal: Removal) -> float:
            m = len(removal.kept)
            return min(self.params(m, None), self.params(m, removal.rank)) / size

        found = removals_at(list(path), cost, tuple(shares))
        return [removal for removal in found if len(removal.kept) < self.channels]

    def most(self, channels: int) -> int:
        """Return the highest rank that saves parameters on so many channels."""
        return (self.params(channels, None) - 1) // self.params(channels, 1)

    def ranks(self, channels: int) -> list[int]:
        """Return a geometric grid of the ranks that save parameters on so many channels."""
        most = self.most(channels)
        return sorted({round(most ** (i / (RANKS - 1))) for i in range(RANKS)}) if most else []
