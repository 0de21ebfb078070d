"""Tuning what is small: norms, biases, centroids and grid steps, while the integers stay.

What fills a file, the integers of its large tensors, is not touched: the streams that code them
stay as they are to the byte, and only the few numbers around them are fitted to what the original
gives. That takes a short training, which needs no labels, and costs no bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from lamina.forms import Codebook, Edit, Grid, Plain, Sparse, Values
from lamina.train.hold import HeldGrid, HeldNetwork

MANTISSA = 23  # bits of a float32 behind its leading one
LEAST = 7  # bits kept in any case: those of bfloat16


class HeldStep(nn.Module):
    """A tensor on a grid whose integers are fixed: its step is trained, as a logarithm."""

    base: torch.Tensor
    units: torch.Tensor

    def __init__(self, values: Grid) -> None:
        super().__init__()
        self.values = values
        self.log_step = nn.Parameter(torch.zeros(()))
        self.register_buffer("base", torch.tensor(values.step, dtype=torch.float32), False)
        unit = replace(values, step=1.0, dtype=torch.float32)
        self.register_buffer("units", unit.dense(), False)

    def step(self) -> torch.Tensor:
        """Return the grid step."""
        return self.base * self.log_step.exp()

    def forward(self) -> tuple[torch.Tensor, None]:
        return (self.units * self.step()).to(self.values.dtype), None

    def release(self) -> Values:
        return replace(self.values, step=float(self.step().detach()))


def is_small(values: Values) -> bool:
    """Whether values are a vector, or one number: a bias, what a norm scales and shifts by."""
    tensor = values.index if isinstance(values, Codebook) else None
    tensor = values.symbols if isinstance(values, Grid) else tensor
    tensor = values.tensor if isinstance(values, (Plain, Sparse)) else tensor
    return tensor is not None and tensor.dim() < 2


def hold_scales(module: nn.Module, edits: Iterable[Edit]) -> HeldNetwork:
    """Return a network of which only what is small is trained.

    Vectors are trained as they are held, grids of matrices by their step, shared values by their
    centroids; matrices that are kept as they are, or pruned and not on a grid, stay.

    Args:
        module: the edited network; its own parameters are not touched while training.
        edits: its values edits, one per tensor.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> made = hold_scales(layer, [
        ...     Edit("weight", "values", values=Grid(torch.ones(2, 4, dtype=torch.int32), 0.5)),
        ...     Edit("bias", "values", values=Plain(torch.zeros(2))),
        ... ])
        >>> [name for name, _ in made.named_parameters()]
        ['held.0.log_step', 'held.1.latent']
    """
    own = [
        e
        for e in edits
        if e.values is not None and (is_small(e.values) or isinstance(e.values, (Grid, Codebook)))
    ]
    net = HeldNetwork(module, own)
    for i, held in enumerate(net.held):
        if isinstance(held, HeldGrid) and not is_small(held.values):
            net.held[i] = HeldStep(held.values).to(held.latent.device)
    return net


def shortened(values: Mapping[str, Values], bits: int) -> dict[str, Values]:
    """Return values with plain float32 vectors rounded to so many bits behind the leading one.

    Example:
        >>> made = shortened({"b": Plain(torch.tensor([1.0 + 2**-9, 3.0]))}, 7)
        >>> made["b"].tensor.tolist()
        [1.0, 3.0]
    """
    out = dict(values)
    for name, held in values.items():
        if isinstance(held, Plain) and is_small(held) and held.tensor.dtype == torch.float32:
            out[name] = Plain(_rounded(held.tensor, bits))
    return out


def _rounded(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    if bits >= MANTISSA:
        return tensor
    mantissa, exponent = torch.frexp(tensor)
    scale = 2.0 ** (bits + 1)
    return torch.ldexp((mantissa * scale).round() / scale, exponent)
