"""A layer that rounds its input to a few integer levels before it is used.

`x -> clamp(round(x / step), zero, zero + levels - 1) * step`: `zero` is an integer, so that 0 stays
exactly 0 (padding, what a ReLU cut off), and every value is an integer times one step. The step is
a buffer of the layer and a tensor of the file, the integers are settings of the form.

Arithmetic is in float32 whatever the input's dtype; nothing here is faster than the layer without.
It is what the layer was trained with, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache

import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms.edit import builder

MOST_BITS = 8
STEP = "input_step"  # the buffer's name


def round_input(x: torch.Tensor, step: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Return an input on its grid, in its own dtype.

    Args:
        x: any shape.
        step: one positive float32 value.
        low, high: the smallest and the largest integer; `low <= 0 <= high`.

    Example:
        >>> round_input(torch.tensor([-9.0, 0.2, 0.6, 9.0]), torch.tensor(0.5), -2, 13).tolist()
        [-1.0, 0.0, 0.5, 6.5]
    """
    q = torch.round(x.to(torch.float32) / step).clamp(low, high)
    return (q * step).to(x.dtype)


class InputQuantized(nn.Module):
    """What the classes of this form have in common; see the module's text.

    Its step is nan until values are put in: a layer that was never given any must not look trained.
    """

    input_step: torch.Tensor
    low: int
    high: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = round_input(x, self.input_step.to(torch.float32), self.low, self.high)
        return super().forward(rounded)  # type: ignore[no-any-return,misc]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, input={self.low}..{self.high}"


class InputQuantizedLinear(InputQuantized, nn.Linear):
    """A Linear whose input is rounded."""


class InputQuantizedConv1d(InputQuantized, nn.Conv1d):
    """A Conv1d whose input is rounded."""


class InputQuantizedConv2d(InputQuantized, nn.Conv2d):
    """A Conv2d whose input is rounded."""


class InputQuantizedConv3d(InputQuantized, nn.Conv3d):
    """A Conv3d whose input is rounded."""


CLASSES: dict[type, type] = {
    nn.Linear: InputQuantizedLinear,
    nn.Conv1d: InputQuantizedConv1d,
    nn.Conv2d: InputQuantizedConv2d,
    nn.Conv3d: InputQuantizedConv3d,
}


@cache
def quantized_class(kind: type) -> type | None:
    """Return the class of this form for a class of layers; None where there is none.

    GPT-2's Conv1D gets one when it is met: its library is no dependency of this one.

    Example:
        >>> quantized_class(nn.Linear).__name__, quantized_class(nn.ReLU)
        ('InputQuantizedLinear', None)
    """
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return type("InputQuantizedConv1D", (InputQuantized, kind), {})
    return CLASSES.get(kind)


@builder("input_quantized")
def build_input_quantized(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build the layer that rounds its input; it shares the parameters of the one that does not.

    Args:
        module: a Linear, Conv1d-3d or GPT-2's Conv1D.
        settings: `bits`, 2 to 8; `zero`, the smallest integer, at most 0; optionally `levels`, at
            most `2^bits` (which is the default).

    Raises:
        FileError: the module is of another kind, or the integers do not fit.

    Example:
        >>> layer = build_input_quantized(nn.Linear(2, 1), {"bits": 4, "zero": -7, "levels": 15})
        >>> layer.low, layer.high, [name for name, _ in layer.named_buffers()]
        (-7, 7, ['input_step'])
    """
    where = f"input_quantized {dict(settings)}"[:200]
    low, high = bounds_of(settings)
    kind = quantized_class(type(module))  # type: ignore[arg-type]
    weight = module._parameters.get("weight")
    if kind is None or weight is None:
        raise FileError("no form rounds this layer's input", where, type(module).__name__)
    if "forward" in module.__dict__:
        raise FileError("no form rounds this layer's input", where, "it has a forward of its own")
    new = copy.copy(module)
    new._parameters = dict(module._parameters)
    step = torch.full((), torch.nan, dtype=torch.float32, device=weight.device)
    new._buffers = {**module._buffers, STEP: step}
    new.__class__ = kind
    new.low, new.high = low, high  # type: ignore[assignment]
    return new


def bounds_of(settings: Mapping[str, int]) -> tuple[int, int]:
    """Return the smallest and the largest integer.

    Raises:
        FileError: the settings do not fit.

    Example:
        >>> bounds_of({"bits": 4, "zero": -3})
        (-3, 12)
    """
    where = f"input_quantized {dict(settings)}"[:200]
    bits, zero = int(settings.get("bits", 0)), int(settings.get("zero", 1))
    if not 2 <= bits <= MOST_BITS or not set(settings) <= {"bits", "zero", "levels"}:
        why = f"bits are 2 to {MOST_BITS}, and there are zero and levels besides"
        raise FileError("an input_quantized edit does not fit", where, why)
    levels = int(settings.get("levels", 2**bits))
    if not 2 <= levels <= 2**bits or not 1 - levels <= zero <= 0:
        why = "at most 2^bits levels, of which 0 is one"
        raise FileError("an input_quantized edit does not fit", where, why)
    return zero, zero + levels - 1
