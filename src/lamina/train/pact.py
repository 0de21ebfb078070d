"""Quantizers of a training: of weights by statistics, of activations in learned ranges.

Both round in the forward pass and let gradients through in the backward one (straight-through).

Reference: Choi et al. 2018 (PACT), arXiv:1805.06085, eq. 1-3; the gradient of a range through the
rounding inside of it ("plus") follows from the same surrogate that passes the input's gradient: `x
-> x + step r` with a fixed residual r, so that `d/d step = r`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import MethodError
from lamina.forms.input_quantized import MOST_BITS, round_input

KINDS = ("one-sided", "asymmetric", "symmetric")
LEAST = 1e-5  # of a range; it must not turn over


class RoundWeight(torch.autograd.Function):
    """`clamp(round(w / step), -n, n) step`; its gradient is the one that comes in.

    Everywhere (`plus`), or only where `|w| <= n step`.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, n: int, plus: bool) -> Tensor:
        ctx.plus, ctx.n = plus, n
        ctx.save_for_backward(weight, step)
        scaled = weight / torch.where(step > 0, step, 1.0)
        return scaled.round_().clamp_(-n, n).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        weight, step = ctx.saved_tensors
        grad = grads[0]
        return grad if ctx.plus else grad * (weight.abs() <= ctx.n * step), None, None, None


class RoundInput(torch.autograd.Function):
    """An input rounded in a range, and what that does to the range's ends; see `InputQuantizer`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, high: Tensor, low: Tensor, kind: str, bits: int, plus: bool
    ) -> Tensor:
        step, zero, levels = grid_of(kind, bits, high, low)
        y = round_input(x, step, zero, zero + levels - 1)
        ctx.kind, ctx.plus, ctx.count = kind, plus, levels - 1
        ctx.save_for_backward(x, y, high, low, step)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, high, low, step = ctx.saved_tensors
        grad = grads[0].to(torch.float32)
        if ctx.kind == "symmetric":
            low = -high
        elif ctx.kind == "one-sided":
            low = torch.zeros_like(high)
        x, zero = x.to(torch.float32), torch.zeros_like(step)
        above, below = x >= high, x <= low
        up, down = torch.where(above, grad, zero).sum(), torch.where(below, grad, zero).sum()
        inside = grad.masked_fill(above | below, 0.0)
        through = zero
        if ctx.plus:
            off = y.to(torch.float32) - x
            through = torch.dot(inside.flatten(), off.flatten()) / (step * ctx.count)
        passed = inside.to(grads[0].dtype)
        if ctx.kind == "symmetric":
            return passed, up - down + 2 * through, None, None, None, None
        low_grad = down - through if ctx.kind == "asymmetric" else None
        return passed, up + through, low_grad, None, None, None


def grid_of(kind: str, bits: int, high: Tensor, low: Tensor) -> tuple[Tensor, int, int]:
    """Return the step (float32), the smallest integer, and the number of levels of a range.

    Example:
        >>> step, zero, levels = grid_of("asymmetric", 4, torch.tensor(2.6), torch.tensor(-0.4))
        >>> round(float(step), 3), zero, levels
        (0.2, -2, 16)
    """
    high, low = high.detach().to(torch.float32), low.detach().to(torch.float32)
    if kind == "symmetric":
        n = 2 ** (bits - 1) - 1
        return high / n, -n, 2 * n + 1
    count = 2**bits - 1
    if kind == "one-sided":
        return high / count, 0, count + 1
    step = (high - low) / count
    return step, int(max(-count, min(0, round(float(low / step))))), count + 1


class InputQuantizer(nn.Module):
    """Rounds what a layer is given to `2^bits` levels (`2^bits - 1` of a symmetric range).

    The ends of the range are trained: through what lies beyond them and, with `plus`, through the
    rounding of what lies between.

    Args:
        kind: `"one-sided"` (0 to `high`), `"asymmetric"` (`low` to `high`, 0 on the grid: its
            integer is `round(low / step)`) or `"symmetric"` (`-high` to `high`).
        bits: 2 to 8.
        high, low: the range to begin with.
        plus: PACT+ instead of PACT.

    Raises:
        MethodError: there is no such quantizer.

    Example:
        >>> InputQuantizer("symmetric", 4, 1.75)(torch.tensor([-9.0, 0.0, 0.3])).tolist()
        [-1.75, 0.0, 0.25]
    """

    low: Tensor

    def __init__(
        self, kind: str, bits: int, high: float, low: float = 0.0, plus: bool = True
    ) -> None:
        super().__init__()
        if kind not in KINDS or not 2 <= bits <= MOST_BITS:
            why = f"kinds are {', '.join(KINDS)}, bits 2 to {MOST_BITS}"
            raise MethodError("unknown quantizer of activations", f"{kind!r}, {bits} bits", why)
        self.kind, self.bits, self.plus = kind, bits, plus
        self.high = nn.Parameter(torch.tensor(max(float(high), LEAST)))
        if kind == "asymmetric":
            self.low = nn.Parameter(torch.tensor(min(float(low), -LEAST)))
        else:
            self.register_buffer("low", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return RoundInput.apply(x, self.high, self.low, self.kind, self.bits, self.plus)  # type: ignore[no-any-return,no-untyped-call]

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the range one: its upper end over 0, its lower one under."""
        self.high.clamp_(min=LEAST)
        if self.kind == "asymmetric":
            self.low.clamp_(max=-LEAST)

    def grid(self) -> tuple[Tensor, int, int]:
        """Return step, smallest integer and number of levels, as they are now."""
        return grid_of(self.kind, self.bits, self.high, self.low)

    def settings(self) -> dict[str, int]:
        """Return the integers of the form that does the same without training."""
        _, zero, levels = self.grid()
        whole = {"bits": self.bits, "zero": zero}
        return whole if levels == 2**self.bits else {**whole, "levels": levels}

    def extra_repr(self) -> str:
        return f"{self.kind}, bits={self.bits}, plus={self.plus}"
