"""A network in training whose weights are masked 2:4 and quantized, and its inputs rounded.

In every forward pass a chosen layer's weight is computed from a dense latent one: masked, then put
on its grid, whose range follows from the statistics of the *dense* latent. Inputs are rounded in
learned ranges; layers that are given the same tensor (query, key and value) share one. Gradients go
straight through; where a weight is masked they are exactly 0.

Reference: the recipe's, see `recipes/transformer.py`; masks that change: Zhu and Gupta 2017,
arXiv:1710.01878, eq. 1 (cubic), and Zhou et al. 2021, arXiv:2102.04010, eq. 8-9 (SR-STE).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lamina.forms import Edit, Grid, Plain, Sparse, find_tensor
from lamina.forms.input_quantized import STEP, quantized_class
from lamina.methods.sawb import (
    CONSTANTS,
    clip_by_search,
    clip_by_statistics,
    fill_grid,
    grid_of,
    steps_by_row,
)
from lamina.methods.two_four import GROUP, KEPT, from_fours, in_fours, mask_of
from lamina.methods.two_four import method as two_four
from lamina.network.sites import Site
from lamina.train.pact import InputQuantizer, RoundWeight

SR_STE = 2e-4  # how hard SR-STE pulls pruned weights to zero


class Decay(torch.autograd.Function):
    """`w m`; the gradient goes to all of w, and what is pruned is pulled to zero (eq. 9)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, strength: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.strength = strength
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return grads[0] + ctx.strength * (1 - mask) * weight, None, None


class QuantizedWeight(nn.Module):
    """One layer's weight in training: a dense latent, a mask, and a grid.

    Args:
        site: the layer.
        weight: where the latent begins.
        importance: of the weight's shape: a factor of `|w|` in choosing the mask.
    """

    mask: Tensor

    def __init__(self, site: Site, weight: Tensor, importance: Tensor | None = None) -> None:
        super().__init__()
        self.site, self.dtype = site, weight.dtype
        self.latent = nn.Parameter(weight.detach().to(torch.float32).clone())
        self.register_buffer("mask", torch.ones_like(self.latent))
        self.importance = importance
        self.prunes = not two_four.refuse(site)
        self.bits, self.clip, self.rows, self.plus = 0, "statistics", False, True
        self.regrow = 0.0  # strength of SR-STE's pull; 0: what is pruned gets no gradient

    def quantize(self, bits: int, clip: str, rows: bool, plus: bool) -> None:
        """Put the weight on a grid from now on; 0 bits: on none."""
        self.bits, self.clip, self.rows, self.plus = bits, clip, rows, plus

    @torch.no_grad()
    def prune(self, zeros: float = GROUP - KEPT) -> None:
        """Choose the mask anew from the latent's magnitudes.

        Args:
            zeros: of every four, on average. A fraction is given to the fours that lose least.
        """
        if not self.prunes:
            return
        size = self.latent.abs()
        if self.importance is not None:
            size = size * self.importance
        base = int(zeros)
        mask = mask_of(self.site, size, GROUP - base)
        if zeros > base:
            more = mask_of(self.site, size, GROUP - base - 1)
            lost = in_fours(self.site, size * (mask & ~more))
            four = lost.reshape(-1, GROUP).amax(1)
            count = round((zeros - base) * len(four))
            chosen = torch.zeros(len(four), dtype=torch.bool, device=four.device)
            chosen[torch.argsort(four, stable=True)[:count]] = True
            where = chosen[:, None].expand(-1, GROUP).reshape(lost.shape)
            mask = torch.where(from_fours(self.site, where), more, mask)
        self.mask.copy_(mask)

    def step(self) -> Tensor:
        """Return the grid's step, of each row or of all, from the dense latent as it is now."""
        source = self.latent.detach()
        if self.clip == "mse":
            source = source * self.mask
        if self.rows:
            return steps_by_row(source, self.bits, self.clip)
        clip = clip_by_search if self.clip == "mse" else clip_by_statistics
        return clip(source, self.bits) / CONSTANTS[self.bits][0]

    def _grid(self) -> Grid:
        source = self.latent.detach()
        if self.clip == "mse":
            source = source * self.mask
        return grid_of(source, self.bits, self.clip, self.rows)

    def forward(self) -> Tensor:
        if self.regrow:
            w: Tensor = Decay.apply(self.latent, self.mask, self.regrow)  # type: ignore[no-untyped-call]
        else:
            w = self.latent * self.mask
        if self.bits:
            w = RoundWeight.apply(w, self.step(), CONSTANTS[self.bits][0], self.plus)  # type: ignore[no-untyped-call]
        return w.to(self.dtype)

    @torch.no_grad()
    def release(self) -> Grid | Sparse | Plain:
        """Return the weight as a file holds it."""
        weight = (self.latent * self.mask).cpu()
        if not self.bits:
            held = weight.to(self.dtype)
            pruned = bool((self.mask == 0).any())
            return Sparse(torch.where(held == 0, 0, held)) if pruned else Plain(held)
        if self.rows:
            grid = self._grid()
        else:
            empty = torch.zeros(weight.shape, dtype=torch.int32)
            grid = Grid(empty, float(self.step()), None, 0, self.dtype)
        grid = Grid(grid.symbols, grid.step, grid.exponents, 0, self.dtype)
        return fill_grid(grid, weight, CONSTANTS[self.bits][0])


class QuantizedNetwork(nn.Module):
    """A network in training, see above.

    Args:
        module: a copy to train; its hooks and its other parameters become this network's.
        sites: of the layers whose weights are masked or quantized.
        importance: by site name, see `QuantizedWeight`.

    Example:
        >>> site = Site("0", module="0", weight="0.weight", shape=(2, 4))
        >>> net = QuantizedNetwork(nn.Sequential(nn.Linear(4, 2)), [site])
        >>> net.prune()
        >>> int((net.weights[0]() != 0).sum())
        4
    """

    def __init__(
        self,
        module: nn.Module,
        sites: Sequence[Site],
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        known = importance or {}
        self.body = module
        self.sites = tuple(sites)
        self.weights = nn.ModuleList(
            QuantizedWeight(s, find_tensor(module, s.weight), known.get(s.name)) for s in sites
        )
        for site in sites:  # they are computed; the module's own stay as they are
            find_tensor(module, site.weight).requires_grad_(False)
        self.quantizers = nn.ModuleList()
        self.inputs: dict[str, InputQuantizer] = {}  # by module path
        self.hooks: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = {s.weight: w() for s, w in zip(self.sites, self.weights, strict=True)}
        return functional_call(self.body, tensors, args, kwargs)

    def prune(self, zeros: float = GROUP - KEPT, regrow: float = 0.0) -> None:
        """Choose all masks anew; see `QuantizedWeight.prune`."""
        for weight in self.weights:
            weight.prune(zeros)  # type: ignore[operator]
            weight.regrow = regrow  # type: ignore[assignment]

    def quantize(self, bits: int, clip: str, rows: bool, plus: bool) -> None:
        """Put all weights on grids."""
        for weight in self.weights:
            weight.quantize(bits, clip, rows, plus)  # type: ignore[operator]

    def round_inputs(self, groups: Iterable[tuple[Sequence[str], InputQuantizer]]) -> None:
        """Round what modules are given.

        Args:
            groups: module paths that share a quantizer, and that.
        """
        for hook in self.hooks:
            hook.remove()
        self.inputs, self.hooks, held = {}, [], []
        for paths, quantizer in groups:
            held.append(quantizer)
            for path in paths:
                self.inputs[path] = quantizer
                part = self.body.get_submodule(path)
                self.hooks.append(part.register_forward_pre_hook(_rounding(quantizer)))
        self.quantizers = nn.ModuleList(held)

    def ranges(self) -> list[nn.Parameter]:
        """Return the trained ends of all ranges."""
        return [p for q in self.quantizers for p in q.parameters()]

    def clamp(self) -> None:
        """Keep every range one."""
        for quantizer in self.quantizers:
            quantizer.clamp()  # type: ignore[operator]

    @torch.no_grad()
    def release(self) -> list[Edit]:
        """Return the edits that make the original network this one: forms first, then values."""
        edits = [Edit(path, "input_quantized", q.settings()) for path, q in self.inputs.items()]
        mine = {site.weight: w for site, w in zip(self.sites, self.weights, strict=True)}
        shared = {id(find_tensor(self.body, name)) for name in mine}
        for name, weight in mine.items():
            edits.append(Edit(name, "values", values=weight.release()))  # type: ignore[operator]
        for path, q in self.inputs.items():
            step = Plain(q.grid()[0].clone().cpu())
            edits.append(Edit(f"{path}.{STEP}", "values", values=step))
        tensors = [*self.body.named_parameters(), *self.body.named_buffers()]
        saved = self.body.state_dict().keys()
        for name, tensor in tensors:
            if name in saved and id(tensor) not in shared:
                edits.append(Edit(name, "values", values=Plain(tensor.detach().clone().cpu())))
        return edits


def _rounding(quantizer: InputQuantizer) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        return (quantizer(args[0]), *args[1:])

    return hook


def roundable(module: nn.Module, sites: Iterable[Site]) -> list[str]:
    """Return the paths of the layers whose input a form can round."""
    return [
        site.module
        for site in sites
        if (not site.rigid or site.transposed)  # GPT-2's Conv1D: rigid to other forms only
        and site.weight == f"{site.module}.weight"
        and quantized_class(type(module.get_submodule(site.module))) is not None  # type: ignore[arg-type]
    ]
