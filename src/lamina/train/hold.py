"""Holding a decision alive while training: each form of values becomes trainable and comes back.

A held tensor is computed in every forward pass from trainable parts (straight-through where it is
rounded), so what is trained is what will be stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from lamina.forms import Affine, Codebook, Edit, Grid, Plain, Sparse, Values, find_tensor
from lamina.forms.values import BOTH, exponent_scale


class HeldGrid(nn.Module):
    """A tensor on a uniform grid: `w = step * round(latent / step)`, both trained.

    Rounding passes gradients straight through (Bengio et al. 2013); the step is learned as its
    logarithm (LSQ, Esser et al. 2020, in log form), counted from where it began: `exp(0) = 1`
    gives the first step back to the bit, `exp(log(step))` would not.
    """

    base: torch.Tensor
    scale: torch.Tensor

    def __init__(self, values: Grid, start: torch.Tensor) -> None:
        super().__init__()
        self.values = values
        self.latent = nn.Parameter(start.detach().to(torch.float32).clone())
        self.log_step = nn.Parameter(torch.zeros(()))
        self.register_buffer("base", torch.tensor(values.step, dtype=torch.float32), False)
        scale = torch.ones(())
        if values.exponents is not None:
            scale = exponent_scale(values.exponents)
            down, across = [-1] + [1] * (start.dim() - 1), [1, *start.shape[1:]]
            if values.axis == BOTH:
                rows = len(start)
                scale = scale[:rows].reshape(down) * scale[rows:].reshape(across)
            else:
                scale = scale.reshape(across if values.axis else down)
        self.register_buffer("scale", scale, False)

    def step(self) -> torch.Tensor:
        """Return the grid step."""
        return self.base * self.log_step.exp()

    def levels(self) -> torch.Tensor:
        """Return the tensor in units of its step, before rounding."""
        return self.latent / (self.step() * self.scale)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the dense tensor and its levels (straight-through)."""
        z = self.levels()
        rounded = z + (z.round() - z).detach()  # exact: both sums are, for neighbours
        dense = rounded * (self.step() * self.scale)
        return dense.to(self.values.dtype), z

    def release(self) -> Values:
        symbols = self.levels().detach().round().to(torch.int32)
        v = self.values
        return Grid(symbols.cpu(), float(self.step().detach()), v.exponents, v.axis, v.dtype)


class HeldCodebook(nn.Module):
    """Shared values: the index is fixed, the centroids are trained (their gradients sum up)."""

    index: torch.Tensor
    nonzero: torch.Tensor

    def __init__(self, values: Codebook) -> None:
        super().__init__()
        self.values = values
        self.centroids = nn.Parameter(values.centroids.detach().to(torch.float32).clone())
        self.register_buffer("index", values.index.long(), False)
        self.register_buffer("nonzero", (values.centroids != 0).to(torch.float32), False)

    def forward(self) -> tuple[torch.Tensor, None]:
        return (self.centroids * self.nonzero)[self.index].to(self.values.dtype), None

    def release(self) -> Values:
        centroids = (self.centroids * self.nonzero).detach().cpu()
        return Codebook(self.values.index, centroids, self.values.dtype)


class HeldSparse(nn.Module):
    """A pruned tensor: zeros stay zero, the rest is trained."""

    mask: torch.Tensor

    def __init__(self, values: Sparse) -> None:
        super().__init__()
        self.dtype = values.tensor.dtype
        self.latent = nn.Parameter(trainable(values.tensor))
        self.register_buffer("mask", (values.tensor != 0).to(self.latent.dtype), False)

    def forward(self) -> tuple[torch.Tensor, None]:
        return (self.latent * self.mask).to(self.dtype), None

    def release(self) -> Values:
        return Sparse((self.latent * self.mask).detach().cpu().to(self.dtype))


class HeldPlain(nn.Module):
    """An ordinary tensor."""

    def __init__(self, values: Plain) -> None:
        super().__init__()
        self.dtype = values.tensor.dtype
        self.latent = nn.Parameter(trainable(values.tensor))

    def forward(self) -> tuple[torch.Tensor, None]:
        return self.latent.to(self.dtype), None

    def release(self) -> Values:
        # A copy: of a float32 tensor, `to` and `cpu` would hand out the parameter itself.
        return Plain(self.latent.detach().clone().cpu().to(self.dtype))


def trainable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy precise enough for small updates: float32, or float64 where it was that."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).clone()


Held = HeldGrid | HeldCodebook | HeldSparse | HeldPlain


def hold(values: Values, start: torch.Tensor) -> Held:
    """Make a tensor's values trainable; `start` is where the latent values of a grid begin."""
    if isinstance(values, Grid):
        return HeldGrid(values, start)
    if isinstance(values, Codebook):
        return HeldCodebook(values)
    if isinstance(values, Sparse):
        return HeldSparse(values)
    return HeldPlain(Plain(values.dense()) if isinstance(values, Affine) else values)


class HeldNetwork(nn.Module):
    """A network whose tensors are computed from held values in every forward pass.

    Args:
        module: the edited network; its own parameters are not touched while training.
        edits: its values edits, one per tensor. Buffers, frozen parameters, grids without a step
            and grids per block are not held: they stay as the module has them.
        starts: for grids, where the latent values begin, by parameter name (the values the grid was
            made from keep more information than the rounded ones); default: the rounded values.
    """

    def __init__(
        self,
        module: nn.Module,
        edits: Iterable[Edit],
        starts: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        starts = starts or {}
        self.names: list[str] = []
        held: list[nn.Module] = []
        self.dtypes: list[torch.dtype] = []
        for edit in edits:
            if edit.form != "values" or edit.values is None:
                continue
            target = find_tensor(module, edit.path)
            if not isinstance(target, nn.Parameter) or not target.is_floating_point():
                continue
            if not target.requires_grad or not _is_trainable(edit.values):
                continue
            start = starts[edit.path] if edit.path in starts else edit.values.dense()
            held.append(hold(edit.values, start).to(target.device))
            self.names.append(edit.path)
            self.dtypes.append(target.dtype)
        self.held = nn.ModuleList(held)
        self.body = [module]  # in a list: its parameters are computed, they are not ours to train

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        """Return the network's output and the levels of every grid."""
        tensors, levels = {}, {}
        for name, dtype, held in zip(self.names, self.dtypes, self.held, strict=True):
            dense, z = held()
            tensors[name] = dense.to(dtype)
            if z is not None:
                levels[name] = z
        return functional_call(self.body[0], tensors, args, kwargs), levels

    def release(self) -> dict[str, Values]:
        """Return the trained values by parameter name."""
        return {name: held.release() for name, held in zip(self.names, self.held, strict=True)}  # type: ignore[operator]


def _is_trainable(values: Values) -> bool:
    if isinstance(values, Affine):
        return False  # trained, its values would lie on no grid, and take seven times the bytes
    return not isinstance(values, Grid) or (math.isfinite(values.step) and values.step > 0)
