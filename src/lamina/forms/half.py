"""The form "bf16": a linear layer that computes in bfloat16, inside a network of other floats.

The weight stays a parameter of the dtype it had (a file stores its upper halves, where its values
are bfloat16's); in evaluation mode it is cast once and kept until it changes. The input is cast at
every pass, sums are float32's, the output has the input's dtype again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import FileError
from lamina.forms.edit import builder
from lamina.forms.integer import is_transposed, take_over
from lamina.forms.versions import version_of

SHORT = torch.bfloat16


class Half:
    """What the linear layers in bfloat16 share; stands before the class of the layer.

    With gradients, and where it is traced, it casts the parameters themselves. What is written
    behind torch's back (`weight.data`) is seen at the next `train()` or `eval()`.
    """

    weight: Any  # the layer's own: Parameters
    bias: Any
    _cast: tuple[Tensor, Tensor | None] | None = None
    _key: tuple[Any, ...] = ()
    transposed = False  # the weight is [in, out]

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + bias`; x is `[..., in]`."""
        weight, bias = self._ready()
        with torch.autocast(x.device.type, enabled=False) if _cast_by_others(x) else nullcontext():
            return F.linear(x.to(SHORT), weight, bias).to(x.dtype)

    def train(self, mode: bool = True) -> Any:
        """Switch training; cast weights are made anew."""
        self._cast, self._key = None, ()
        return super().train(mode)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        """Leave cast weights out of copies; they are made anew."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_cast", "_key")}

    def _ready(self) -> tuple[Tensor, Tensor | None]:
        w, b = self.weight, self.bias
        plain = all(type(t) in (nn.Parameter, Tensor) for t in (w, b) if t is not None)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if torch.is_grad_enabled() or not plain or traced:
            return self._made()
        key = (*version_of(w), *(() if b is None else version_of(b)))
        if self._cast is None or key != self._key:
            self._cast, self._key = self._made(), key
        return self._cast

    def _made(self) -> tuple[Tensor, Tensor | None]:
        weight = (self.weight.T if self.transposed else self.weight).to(SHORT).contiguous()
        return weight, None if self.bias is None else self.bias.to(SHORT)


class Bf16Linear(Half, nn.Linear):
    """A Linear in bfloat16; see `Half`.

    Example:
        >>> build_bf16(nn.Linear(64, 3), {}).eval()(torch.zeros(2, 5, 64)).dtype
        torch.float32
    """


@cache
def _kind(base: Any) -> Any:
    """Return the class for a kind of layer; GPT-2's is met, not imported."""
    if base is nn.Linear:
        return Bf16Linear
    return type(f"Bf16{base.__name__}", (Half, base), {"transposed": True})


def _cast_by_others(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and torch.is_autocast_enabled(x.device.type)


@builder("bf16")
def build_bf16(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build the layer in bfloat16 that takes a Linear's (or GPT-2's Conv1D's) place.

    Args:
        module: the layer; its very parameters are used, so ties stay.
        settings: none.

    Raises:
        FileError: the module is of another kind, or there are settings.
    """
    if settings:
        raise FileError("bf16 has no settings", repr(dict(settings))[:200])
    if type(module) is not nn.Linear and not is_transposed(module):
        raise FileError(
            "this layer has no bf16 form", type(module).__name__, "only Linear and Conv1D have"
        )
    return take_over(module, _kind(type(module)))  # type: ignore[arg-type]
