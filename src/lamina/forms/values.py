"""How a tensor's values are held: the exact forms a file can store.

Every form gives back the very same dense tensor on every machine: `dense()` uses only integer to
float conversion, and one or two IEEE operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lamina.forms.affine import Affine

BOTH = 2  # axes that exponents run along
QUARTER_OCTAVES = (1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429)  # 2^(0..3 / 4)


@dataclass(frozen=True)
class Plain:
    """Values kept as they are, in their own dtype; coded losslessly."""

    tensor: torch.Tensor

    def dense(self) -> torch.Tensor:
        return self.tensor


@dataclass(frozen=True)
class Sparse:
    """Values with exact zeros: the pattern is coded, the non-zeros are kept in their own dtype."""

    tensor: torch.Tensor

    def dense(self) -> torch.Tensor:
        return self.tensor


@dataclass(frozen=True)
class Codebook:
    """Shared values: `centroids[index]`.

    Args:
        index: integers of the tensor's shape.
        centroids: `[k]` float32 values.
        dtype: of the dense tensor.
        code: codec and bytes that a file stores as they are, where the code is the method's own
            (Huffman, Bloomier); None: whatever codec is shortest.
    """

    index: torch.Tensor
    centroids: torch.Tensor
    dtype: torch.dtype = torch.float32
    code: tuple[str, bytes] | None = None

    def dense(self) -> torch.Tensor:
        return self.centroids[self.index.long()].to(self.dtype)


@dataclass(frozen=True)
class Grid:
    """Values on a uniform grid: `symbols * step * 2^(exponents / 4)`.

    Args:
        symbols: int32, the tensor's shape.
        step: grid step, a float32 value.
        exponents: None, or int32 quarter-octave exponents along one axis of the 2-D view
            `[shape[0], rest]` of the tensor, or along both: those of the rows, then those of the
            columns.
        axis: the axis the exponents run along: 0 (rows), 1 (columns of the 2-D view), or `BOTH`.
        dtype: of the dense tensor.
    """

    symbols: torch.Tensor
    step: float
    exponents: torch.Tensor | None = None
    axis: int = 1
    dtype: torch.dtype = torch.float32

    def dense(self) -> torch.Tensor:
        step = torch.tensor(self.step, dtype=torch.float32)
        values = self.symbols.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if self.exponents is None:
            return values.mul_(step).to(self.dtype)
        flat = values.reshape(values.shape[0], -1)  # in place from here on: tables are large
        if self.axis == BOTH:  # two products, in this order
            rows, columns = exponent_scale(self.exponents).split(list(flat.shape))
            flat.mul_((rows * step)[:, None]).mul_(columns)
        else:
            scale = exponent_scale(self.exponents) * step
            flat.mul_(scale[:, None] if self.axis == 0 else scale[None, :])
        return flat.reshape(self.symbols.shape).to(self.dtype)


def exponent_scale(exponents: torch.Tensor) -> torch.Tensor:
    """Return `2^(e / 4)` as float32, from constants and exact powers of two only (no libm)."""
    scales = [math.ldexp(QUARTER_OCTAVES[e % 4], e // 4) for e in exponents.tolist()]
    return torch.tensor(scales, dtype=torch.float64).to(torch.float32)


Values = Plain | Sparse | Codebook | Grid | Affine
FORMS_OF_VALUES: dict[str, type] = {
    "plain": Plain,
    "sparse": Sparse,
    "codebook": Codebook,
    "grid": Grid,
    "affine": Affine,
}
