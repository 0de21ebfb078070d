"""Holding a decision alive while training: how each form of values becomes trainable and comes back.

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

from lamina.forms import Codebook, Edit, Grid, Plain, Sparse, Values, find_tensor
from lamina.forms.values import exponent_scale


class HeldGrid(nn.Module):
    """A tensor on a uniform grid: `w = step * round(latent / step)`, both trained.

    Rounding passes gradients straight through (Bengio et al. 2013); the step is learned as its
    logarithm (LSQ, Esser et al. 2020, in log form).
    """

    def __init__(self, values: Grid, start: torch.Tensor) -> None:
        super().__init__()
        self.values = values
        self.latent = nn.Parameter(start.detach().to(torch.float32).clone())
        self.log_step = nn.Parameter(torch.tensor(math.log(values.step)))
        scale = torch.ones(())
        if values.exponents is not None:
            scale = exponent_scale(values.exponents)
            shape = [1] * start.dim()
            if values.axis == 0:
                shape[0] = -1
                scale = scale.reshape(shape)
            else:
                scale = scale.reshape(1, *start.shape[1:])
        self.register_buffer("scale", scale)

    def levels(self) -> torch.Tensor:
        """Return the tensor in units of its step, before rounding."""
        return self.latent / (self.log_step.exp() * self.scale)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the dense tensor and its levels (straight-through)."""
        z = self.levels()
        rounded = z + (z.round() - z).detach()
        return rounded * (self.log_step.exp() * self.scale), z

    def release(self) -> Values:
        step = float(self.log_step.detach().exp().to(torch.float32))
        symbols = self.levels().detach().round().to(torch.int32)
        v = self.values
        return Grid(symbols.cpu(), step, v.exponents, v.axis, v.dtype)


class HeldCodebook(nn.Module):
    """Shared values: the index is fixed, the centroids are trained (their gradients sum up)."""

    def __init__(self, values: Codebook) -> None:
        super().__init__()
        self.values = values
        self.centroids = nn.Parameter(values.centroids.detach().clone())
        self.register_buffer("index", values.index.long())
        self.register_buffer("nonzero", (values.centroids != 0).to(torch.float32))

    def forward(self) -> tuple[torch.Tensor, None]:
        return (self.centroids * self.nonzero)[self.index], None

    def release(self) -> Values:
        centroids = (self.centroids * self.nonzero).detach().cpu()
        return Codebook(self.values.index, centroids, self.values.dtype)


class HeldSparse(nn.Module):
    """A pruned tensor: zeros stay zero, the rest is trained."""

    def __init__(self, values: Sparse) -> None:
        super().__init__()
        self.values = values
        self.latent = nn.Parameter(values.tensor.detach().to(torch.float32).clone())
        self.register_buffer("mask", (values.tensor != 0).to(torch.float32))

    def forward(self) -> tuple[torch.Tensor, None]:
        return self.latent * self.mask, None

    def release(self) -> Values:
        return Sparse((self.latent * self.mask).detach().cpu().to(self.values.tensor.dtype))


class HeldPlain(nn.Module):
    """An ordinary tensor."""

    def __init__(self, values: Plain) -> None:
        super().__init__()
        self.values = values
        self.latent = nn.Parameter(values.tensor.detach().to(torch.float32).clone())

    def forward(self) -> tuple[torch.Tensor, None]:
        return self.latent, None

    def release(self) -> Values:
        return Plain(self.latent.detach().cpu().to(self.values.tensor.dtype))


Held = HeldGrid | HeldCodebook | HeldSparse | HeldPlain


def hold(values: Values, start: torch.Tensor) -> Held:
    """Make a tensor's values trainable; `start` is where the latent values of a grid begin."""
    if isinstance(values, Grid):
        return HeldGrid(values, start)
    if isinstance(values, Codebook):
        return HeldCodebook(values)
    if isinstance(values, Sparse):
        return HeldSparse(values)
    return HeldPlain(values)


class HeldNetwork(nn.Module):
    """A network whose tensors are computed from held values in every forward pass.

    Args:
        module: the edited network; its own parameters are not touched while training.
        edits: its values edits.
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
            if not target.requires_grad:
                continue
            dense = edit.values.dense()
            held.append(hold(edit.values, starts.get(edit.path, dense)).to(target.device))
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
