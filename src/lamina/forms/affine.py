"""Values on a grid per block of columns, as quantized files hold them, and telling that they are.

Files of 4- to 8-bit integers (GGUF) are opened as float32: `w = step * q + least` with a step and
a least value for every 16 or 32 columns of a row. The integers and the few bits of the steps can be
found again from the values alone, and give them back bit for bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS = (32, 16)  # columns that share a step, in the files there are
MOST = 128  # of a symbol's magnitude, without least values
SPAN = 31  # of the symbols of a block, with least values
HALF = 11  # bits that steps of float16 have
BITS = 18  # that steps of float32 have: those of a float16 times an integer of 7 bits
AT_ONCE = 1 << 19  # elements
FEW = 64  # blocks that are tried with every guess at once
UP, DOWN, AGAINST = range(3)  # the step is positive, negative, or of the other sign than the peak
Guess = tuple[int, int]  # with least values: symbols of the least and range; else: most and sign
Found = tuple[Tensor, Tensor, Tensor, Tensor]  # symbols, steps, leasts, whether it fits


@dataclass(frozen=True)
class Affine:
    """Values on a grid per block of columns: `symbols * step + least`, in float32.

    Args:
        symbols: integers of the tensor's shape.
        steps: float16 or float32 `[rows, columns / block]` of the 2-D view `[shape[0], rest]`.
        leasts: of the same shape and dtype, added to the rounded product; None: nothing is added.
        block: columns that share a step; the columns of the 2-D view are a multiple.
        dtype: of the dense tensor.

    Example:
        >>> halves = torch.full((1, 1), 0.5, dtype=torch.float16)
        >>> Affine(torch.tensor([[0, 3]]), halves, -halves, 2).dense().tolist()
        [[-0.5, 1.0]]
    """

    symbols: Tensor
    steps: Tensor
    leasts: Tensor | None
    block: int
    dtype: torch.dtype = torch.float32

    def dense(self) -> Tensor:
        # Two operations, each rounded: one fused into the other would give other bits.
        values = self.symbols.to(torch.float32).reshape(-1, self.block)
        values = values * self.steps.reshape(-1, 1).to(torch.float32)
        if self.leasts is not None:
            values = values + self.leasts.reshape(-1, 1).to(torch.float32)
        return values.reshape(self.symbols.shape).to(self.dtype)


@dataclass(frozen=True)
class Way:
    """One way that a file may have made its values: what a block is, and what its steps are."""

    block: int
    kind: torch.dtype  # of steps and least values
    least: bool

    def guesses(self) -> list[Guess]:
        """Return all that may hold of a block, the coarser steps first."""
        if self.least:
            return [(low, span) for span in range(1, SPAN + 1) for low in range(SPAN + 1 - span)]
        return [(most, sign) for most in range(1, MOST + 1) for sign in (UP, AGAINST, DOWN)]

    def bits(self, symbols: Tensor) -> float:
        """Return about how many bits a value takes whose symbols are like these."""
        wide = float(symbols.max() - symbols.min()) + 1
        each = (BITS if self.kind == torch.float32 else HALF) * (1 + self.least)
        return math.log2(wide) + each / self.block


WAYS = [
    Way(block, kind, least)
    for kind in (torch.float16, torch.float32)
    for block in BLOCKS
    for least in (False, True)
]


def find_affine(tensor: Tensor) -> Affine | None:
    """Return the integers, steps and least values that give a matrix back bit for bit, or None.

    Most matrices are told by their first block, so that asking costs next to nothing. Constant ones
    have none.

    Args:
        tensor: float32 `[rows, columns]`; anything else has none.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> weight = torch.randn(8, 64, generator=draw)
        >>> steps = torch.rand(8, 2, generator=draw).half()
        >>> symbols = torch.randint(0, 16, (8, 64), generator=draw)
        >>> grid = find_affine(Affine(symbols, steps, -steps, 32).dense())
        >>> grid.block, torch.equal(grid.steps, steps), find_affine(weight)
        (32, True, None)
    """
    if tensor.dim() != 2 or tensor.dtype != torch.float32 or not tensor.numel() or tensor.is_meta:
        return None
    values = tensor.detach().cpu().contiguous()
    # Steps of so few bits leave the last bit of a float32 to nothing else than chance.
    if bool((values[0, : BLOCKS[0]].view(torch.int32) & 1).any()):
        return None
    if torch.equal(values, values[:1, :1].expand_as(values)):
        return None  # no file of integers has made it
    likely = []
    for way in WAYS:
        first = None
        if not values.shape[1] % way.block and _every(values[:1, : way.block], way) is not None:
            first = _every(values[0, : FEW * way.block].reshape(-1, way.block), way)
        if first is not None:
            likely.append((way.bits(first[0][0]), way, first[1]))
    for _, way, chosen in sorted(likely, key=lambda one: one[0]):
        found = _solve(values.reshape(-1, way.block), way, Counter(chosen.tolist()))
        if found is None:
            continue
        symbols, steps, leasts = found
        if int(symbols.min()) >= -MOST and int(symbols.max()) < MOST:
            symbols = symbols.to(torch.int8)
        across = (values.shape[0], -1)
        return Affine(
            symbols.reshape(values.shape),
            steps.reshape(across),
            leasts.reshape(across) if way.least else None,
            way.block,
        )
    return None


def _solve(rows: Tensor, way: Way, likely: Counter[int]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return symbols `[blocks, block]`, steps and leasts `[blocks]`, or None.

    Args:
        rows: float32 `[blocks, block]`.
        way: in which they are told.
        likely: numbers of the guesses that hold of some blocks, by how many; they are tried first.
    """
    guesses = way.guesses()
    symbols = torch.empty(rows.shape, dtype=torch.int8 if way.least else torch.int16)
    steps = torch.empty(len(rows), dtype=way.kind)
    leasts = torch.empty(len(rows), dtype=way.kind)
    many = AT_ONCE // way.block

    def put(where: Tensor, found: Sequence[Tensor]) -> None:
        symbols[where] = found[0].to(symbols.dtype)
        steps[where], leasts[where] = found[1].to(way.kind), found[2].to(way.kind)

    for at in range(0, len(rows), many):
        left = torch.arange(at, min(at + many, len(rows)))
        for number, _ in likely.most_common():
            some = rows[left]
            tried = _fit(some, way, torch.tensor(guesses[number]).expand(len(some), 2))
            put(left[tried[3]], [part[tried[3]] for part in tried[:3]])
            left = left[~tried[3]]
            if not len(left):
                break
        for few in left.split(FEW):
            found = _every(rows[few], way)
            if found is None:
                return None
            put(few, found[0])
    return symbols, steps, leasts


def _every(rows: Tensor, way: Way) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None:
    """Return what fits blocks under the guess that fits most of them, and its number.

    None: a block fits no guess.
    """
    guesses = torch.tensor(way.guesses())
    count = len(guesses)
    fits, kept = [], []
    for some in rows.split(FEW):
        wide = some[:, None].expand(-1, count, -1).reshape(-1, way.block)
        tried = _fit(wide, way, guesses.repeat(len(some), 1))
        fits.append(tried[3].reshape(-1, count))
        if not bool(fits[-1].any(1).all()):
            return None
        kept.append(tried[:3])
    fit = torch.cat(fits)
    votes = fit.sum(0)
    chosen = torch.where(fit, votes, -1).argmax(1)  # the first of equals: the coarsest
    parts = []
    for i in range(3):
        whole = torch.cat([part[i].reshape(-1, count, *part[i].shape[1:]) for part in kept])
        parts.append(whole[torch.arange(len(whole)), chosen])
    return (parts[0], parts[1], parts[2]), chosen


def _fit(rows: Tensor, way: Way, guesses: Tensor) -> Found:
    """Return what a guess makes of each block: float32 symbols, steps, leasts, and whether it fits.

    Args:
        rows: float32 `[blocks, block]`.
        guesses: `[blocks, 2]`.
    """
    low, high = (x.double() for x in rows.aminmax(dim=1))
    if way.least:
        step = _snapped((high - low) / guesses[:, 1], way.kind)
        least = _snapped(low - step.double() * guesses[:, 0], way.kind)
        shifted = rows - least[:, None]
    else:
        top = torch.maximum(-low, high)
        negative = (guesses[:, 1] == DOWN) | ((guesses[:, 1] == AGAINST) & (high > -low))
        step = _snapped(torch.where(negative, -top, top) / guesses[:, 0], way.kind)
        least = torch.zeros_like(step)
        shifted = rows
    symbols = torch.round(shifted / step[:, None]) + 0.0  # no integer is a negative zero
    still = step == 0
    if bool(still.any()):
        # Steps that are too small for a float16 leave zeros of both signs.
        symbols[still] = torch.where(torch.signbit(rows[still]) & (not way.least), -1.0, 0.0)
        step = torch.where(still, 0.0, step)
    back = symbols * step[:, None]
    if way.least:
        back = back + least[:, None]
    same = (back.view(torch.int32) == rows.view(torch.int32)).all(1)
    return symbols, step, least, same & torch.isfinite(low) & torch.isfinite(high)


def _snapped(values: Tensor, kind: torch.dtype) -> Tensor:
    """Return the nearest number that a step can be, as float32."""
    if kind == torch.float16:
        return values.to(torch.float16).float()
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(torch.round(mantissa * 2.0**BITS) / 2.0**BITS, exponent).float()
