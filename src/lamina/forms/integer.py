"""The form "int8": a linear layer that computes with 8-bit integers (A8W8, dynamic).

The weight stays a float parameter, which any form of values can be written to; at the first forward
pass in evaluation mode it is rounded, packed, and kept packed until it changes. Its values may lie
on a grid already (a step per row, or one of all, with integers up to 127): then nothing is rounded.
The input is rounded row by row (token by token), to 255 levels between its least and its largest
value, so that no sample depends on those beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import FileError
from lamina.forms.edit import builder
from lamina.forms.integer_product import Packed, multiply, pack
from lamina.forms.integer_rows import range_of
from lamina.forms.values import QUARTER_OCTAVES, Grid
from lamina.forms.versions import version_of

MOST = 127  # of an integer weight
LEAST_EXPONENT, MOST_EXPONENT = -400, 400  # quarter octaves: scales are 2^-100 to 2^100
# Rows fit below this. It and what is 2^(1/4) below it round to integers that lie on the right side
# of either by 0.3 %, so that a rounded row, even one in bfloat16, gets its scale again.
FULL = 124.4
NEAR = 1e-3  # of an integer: a row is on a grid
GLANCE = 64  # columns that tell whether a look for grids is worth it


def exponents_of(weight: Tensor) -> Tensor:
    """Return for each row the least scale, as quarter octaves, by which it fits `FULL`.

    Args:
        weight: `[out, in]`.

    Rounded rows get the scale again that they were rounded with.
    """
    if not weight.shape[1]:
        return torch.zeros(len(weight), dtype=torch.int32)
    top = weight.abs().amax(1).double()
    ideal = torch.ceil(4 * torch.log2(top / FULL))
    return ideal.nan_to_num(0.0).clamp(LEAST_EXPONENT, MOST_EXPONENT).to(torch.int32)


def scales_of(exponents: Tensor) -> Tensor:
    """Return `2^(e / 4)` in float32, the same numbers that a `Grid` holds."""
    table = torch.tensor(QUARTER_OCTAVES, dtype=torch.float64, device=exponents.device)
    whole = torch.div(exponents, 4, rounding_mode="floor")
    return (table[(exponents % 4).long()] * torch.pow(2.0, whole.double())).float()


def round_weight(weight: Tensor, search: bool = True) -> tuple[Tensor, Tensor]:
    """Return a weight as integers -127..127 and one scale per row.

    Args:
        weight: `[out, in]`, finite.
        search: look whether rows are on a grid; else every row gets a power of 2^(1/4).

    Returns:
        integers, float32 `[out, in]`, and scales, float32 `[out]`.

    Example:
        >>> integers, scale = round_weight(torch.tensor([[0.3, -0.6, 1.2]]))
        >>> integers.int().tolist(), round(scale.item(), 6)
        ([[1, -2, 4]], 0.3)
    """
    weight = weight.detach().float()
    scale = scales_of(exponents_of(weight))
    if search and weight.numel():
        scale = _on_grid(weight, scale)
    return torch.round(weight / scale[:, None]).clamp(-MOST, MOST), scale


def _on_grid(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the scales, with the exact step in rows whose values are multiples of one."""
    sizes = torch.where(weight == 0, torch.inf, weight.abs()).amin(1)
    for unit in (sizes.amin().expand_as(sizes), sizes):
        fits = _fits(weight[:, :GLANCE], unit)
        if bool(fits.any()):
            scale = torch.where(fits & _fits(weight, unit), unit, scale)
    return scale


def _fits(weight: Tensor, unit: Tensor) -> Tensor:
    ratio = weight / unit[:, None]
    near = (ratio - ratio.round()).abs().amax(1) < NEAR
    return near & (ratio.abs().amax(1) < MOST + 0.5) & unit.isfinite()


def grid_of(weight: Tensor, transposed: bool = False) -> Grid:
    """Return a weight rounded as the form would round it, one scale per output.

    Args:
        weight: `[out, in]`, or `[in, out]` where `transposed`.
    """
    matrix = (weight.T if transposed else weight).detach().float()
    exponents = exponents_of(matrix)
    integers, _ = round_weight(matrix, search=False)
    symbols = (integers.T if transposed else integers).to(torch.int32).contiguous()
    return Grid(symbols.cpu(), 1.0, exponents.cpu(), int(transposed), weight.dtype)


def find_grid(tensor: Tensor) -> Grid | None:
    """Return the grid that gives a matrix back bit for bit, if `grid_of` made it; else None.

    Example:
        >>> weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
        >>> find_grid(weight) is None, find_grid(grid_of(weight).dense()) is None
        (True, False)
    """
    if tensor.dim() != 2 or not tensor.numel() or not tensor.is_floating_point():
        return None
    tensor = tensor.detach().cpu()
    if not bool(torch.isfinite(tensor).all()):
        return None
    for transposed in (False, True):
        part = tensor[:, :1] if transposed else tensor[:1]  # most weights are told by one row
        if _same(grid_of(part, transposed), part):
            grid = grid_of(tensor, transposed)
            if _same(grid, tensor):
                return grid
    return None


def _same(grid: Grid, tensor: Tensor) -> bool:
    return torch.equal(grid.dense(), tensor) and not bool(
        (torch.signbit(tensor) & (tensor == 0)).any()  # a negative zero would not come back
    )


class Integer:
    """What the linear layers of 8-bit integers share; stands before the class of the layer.

    Training, evaluation where gradients are asked for, and what is traced, exported or compiled
    computes the same by floats, at the speed of floats, with straight-through gradients. A change
    of the weight is seen through its version; what is written behind torch's back (`weight.data`)
    is seen at the next `train()` or `eval()`.
    """

    weight: Any  # the layer's own: Parameters
    bias: Any
    training: bool
    _packed: Packed | None = None
    _key: tuple[Any, ...] = ()
    transposed = False  # the weight is [in, out]
    released = False

    def matrix(self) -> Tensor:
        """Return the weight as `[out, in]`."""
        return self.weight.T if self.transposed else self.weight

    def integers(self) -> tuple[Tensor, Tensor]:
        """Return what is computed with: int8 `[out, in]` and float32 scales `[out]`."""
        if self.released and self._packed is not None:
            return self._packed.integers, self._packed.scale
        integers, scale = round_weight(self.matrix())
        return integers.to(torch.int8), scale

    def exportable(self) -> PlainInteger:
        """Return the layer in operations that every exporter knows; see `PlainInteger`."""
        integers, scale = self.integers()
        bias = None if self.bias is None else self.bias.detach()
        return PlainInteger(integers, scale, bias, self.weight.dtype)

    def release(self) -> None:
        """Give the float weight back: 1 byte per weight (and 1 packed) instead of 4 more.

        The layer is for inference only from then on: it cannot be saved, trained or moved.
        """
        self._ready()
        if self._packed is not None:
            self.released = True
            self.weight = nn.Parameter(self.weight.detach().to("meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + bias`; x is `[..., in]`."""
        graph = torch.is_grad_enabled() and (
            x.requires_grad or self.weight.requires_grad or self.training
        )
        if not self.released and (graph or self._is_traced(x)):
            return self._by_floats(x)
        packed = self._ready()
        if packed is None:  # not finite, or no numbers: let it show
            return F.linear(x, self.matrix(), self.bias)
        flat = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
        if not flat.numel():
            return x.new_zeros((*x.shape[:-1], len(packed.scale)))
        bias = self.bias if self.bias is None else self.bias.detach().float()
        y = multiply(flat, packed, bias)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def train(self, mode: bool = True) -> Any:
        """Switch training; packed weights are made anew."""
        if not self.released:
            self._packed, self._key = None, ()
        return super().train(mode)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        """Leave packed weights out of copies; they are made anew."""
        state = dict(self.__dict__)
        if not self.released:
            state.pop("_packed", None)
            state.pop("_key", None)
        return state

    def _is_traced(self, x: Tensor) -> bool:
        plain = type(self.weight) in (nn.Parameter, Tensor) and type(x) in (nn.Parameter, Tensor)
        return not plain or torch.compiler.is_compiling() or torch.jit.is_tracing()

    def _ready(self) -> Packed | None:
        """Return the packed weight, made anew where the weight has changed."""
        if self.released:
            return self._packed
        w, key = self.weight, version_of(self.weight)
        if key != self._key:
            finite = w.numel() > 0 and not w.is_meta and bool(torch.isfinite(w).all())
            self._packed = pack(*self.integers()) if finite else None
            self._key = key
        return self._packed

    def _by_floats(self, x: Tensor) -> Tensor:
        """Compute with rounded floats; gradients pass the rounding by."""
        if not x.numel() or not self.weight.numel():
            return F.linear(x, self.matrix(), self.bias)
        if not torch.compiler.is_compiling():
            with torch.autocast(x.device.type, enabled=False):
                return self._rounded(x)
        return self._rounded(x)

    def _rounded(self, x: Tensor) -> Tensor:
        matrix, wide = self.matrix().float(), x.float()
        integers, scale = round_weight(matrix, search=not torch.compiler.is_compiling())
        weight = matrix + (integers * scale[:, None] - matrix).detach()
        rounded = wide + (dequantized(wide.detach()) - wide).detach()
        bias = self.bias if self.bias is None else self.bias.float()
        return F.linear(rounded, weight, bias).to(x.dtype)


def dequantized(x: Tensor) -> Tensor:
    """Return an input as its rows are rounded, `[..., in]`."""
    step, center = range_of(x)
    return torch.round((x - center) * step.reciprocal()) * step + center


class Int8Linear(Integer, nn.Linear):
    """A Linear of 8-bit integers; see `Integer`.

    Example:
        >>> layer = build_int8(nn.Linear(64, 3), {}).eval()
        >>> with torch.no_grad():
        ...     layer(torch.zeros(2, 5, 64)).shape
        torch.Size([2, 5, 3])
    """


class PlainInteger(nn.Module):
    """A layer of integers in plain operations, for exporters.

    Buffers: `integers` int8 `[out, in]`, `scale` float32 `[out]`, `bias` or None. `forward` rounds
    each row of the input as `Int8Linear` does and multiplies floats. A target with integer products
    takes the buffers, quantizes the input dynamically to 8 bits (per row, or per tensor, which
    loses more) and multiplies by `integers`, then by both scales.
    """

    integers: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self, integers: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + bias`; x is `[..., in]`."""
        weight = self.integers.float() * self.scale[:, None]
        bias = None if self.bias is None else self.bias.float()
        return F.linear(dequantized(x.float()), weight, bias).to(x.dtype)


@cache
def _kind(base: Any) -> Any:
    """Return the class of integers for a kind of layer; GPT-2's is met, not imported."""
    if base is nn.Linear:
        return Int8Linear
    return type(f"Int8{base.__name__}", (Integer, base), {"transposed": True})


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is GPT-2's Conv1D: a linear one that holds `[in, out]`."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and hasattr(module, "nf")


@builder("int8")
def build_int8(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build the layer of 8-bit integers that takes a Linear's (or GPT-2's Conv1D's) place.

    Args:
        module: the layer; its very parameters are used, so ties stay.
        settings: `bits`, 8 (which is the default).

    Raises:
        FileError: the module is of another kind, or the integers do not fit.
    """
    if set(settings) - {"bits"} or settings.get("bits", 8) != 8:
        raise FileError("int8 has no such settings", repr(dict(settings))[:200], "bits is 8")
    if type(module) is not nn.Linear and not is_transposed(module):
        why = "its blocks are multiplied apart" if hasattr(module, "groups") else ""
        name = type(module).__name__
        raise FileError("this layer has no int8 form", name, why or "only Linear and Conv1D have")
    return take_over(module, _kind(type(module)))  # type: ignore[arg-type]


def take_over(module: nn.Module, kind: Any) -> nn.Module:
    """Return a linear layer of another class with the very parameters of one."""
    new: nn.Module = object.__new__(kind)
    nn.Module.__init__(new)
    for name in ("in_features", "out_features", "nf", "nx"):
        if name in module.__dict__:
            setattr(new, name, module.__dict__[name])
    new._parameters.update(module._parameters)
    return new
