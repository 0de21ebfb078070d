"""Convolutions fitted by least squares: what one layer can do of what several did.

The product of the kernels is what is left of a span when its activations go; the best one kernel
is nearer to what the span did with them. It is found from inputs and outputs of the span on
calibration data, and is where training starts. This is not in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.measure.forward import at_rest, batches, call
from lamina.methods.layer_merge.merging import Conv
from lamina.network.source import Network
from lamina.recipes.unmerged import Change

RIDGE = 1e-4  # of the mean second moment: what a direction that was never seen is held at


def patches(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Return what a convolution sees, `[positions, in * taps]`, samples one after the other.

    Example:
        >>> patches(torch.arange(3.0).reshape(1, 1, 3), (2,), (1,), (0,))
        tensor([[0., 1.],
                [1., 2.]])
    """
    axes = len(kernel)
    x = F.pad(x, [p for q in reversed(padding) for p in (q, q)])
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True)):
        x = x.unfold(2 + axis, k, s)
    # [samples, in, *positions, *taps]
    order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    return x.permute(order).reshape(x.shape[0] * x.shape[2 : 2 + axes].numel(), -1)


class Moments:
    """Sums over positions that hold the least squares fit of one convolution."""

    def __init__(self, change: Change) -> None:
        out = change.outline
        self.kernel, self.stride, self.padding = out.kernel, out.stride, out.padding
        self.inputs, self.outputs = out.inputs, out.outputs
        wide = self.inputs * math.prod(self.kernel) + 1
        self.second = torch.zeros(wide, wide, dtype=torch.float64)
        self.cross = torch.zeros(self.outputs, wide, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch: what the span takes and what it should give, `[samples, channels, *]`."""
        seen = patches(x.float(), self.kernel, self.stride, self.padding)
        seen = torch.cat((seen, seen.new_ones(len(seen), 1)), 1)
        wanted = y.float().movedim(1, -1).reshape(-1, self.outputs)
        self.second += (seen.T @ seen).double().cpu()
        self.cross += (wanted.T @ seen).double().cpu()

    def solve(self) -> tuple[Conv, Tensor, Tensor]:
        """Return the convolution, and mean and variance of its output without the bias."""
        count = self.second[-1, -1]
        ridge = RIDGE * self.second.diagonal()[:-1].mean()
        second = self.second.clone()
        second.diagonal()[:-1] += ridge
        found = torch.linalg.solve(second, self.cross.T).T
        weight, bias = found[:, :-1], found[:, -1]
        mean = weight @ self.second[:-1, -1] / count
        var = ((weight @ self.second[:-1, :-1]) * weight).sum(1) / count - mean**2
        shape = (self.outputs, self.inputs, *self.kernel)
        conv = Conv(weight.reshape(shape), bias, self.stride, self.padding)
        return conv, mean, var.clamp_min(1e-12)


def fits(change: Change) -> bool:
    """Whether a change can be fitted: it leaves a convolution of one group."""
    if not change.kept:
        return False
    groups = [change.run.links[i].site.groups for i in change.kept]
    return 1 in groups


def fit(
    network: Network,
    given: Network,
    change: Change,
    loader: Iterable[Any],
    samples: int | None = None,
) -> tuple[Conv, Tensor, Tensor]:
    """Fit what a change leaves, so that `given` comes near `network` behind it.

    Args:
        network: the original.
        given: the network as it is so far, in which this span is still as in the original. What a
            skip carries already differs, and the fit makes up for that too.
        change: one that `fits`.
        loader, samples: calibration data.
    """
    moments = Moments(change)
    for x, y in _pairs(network, given, change, loader, samples):
        moments.add(x, y)
    return moments.solve()


def fit_all(
    network: Network, changes: Mapping[int, Change], loader: Iterable[Any], samples: int | None
) -> dict[int, tuple[Conv, Tensor, Tensor]]:
    """Fit several changes of one run at once, each in the original network."""
    found = {i: Moments(change) for i, change in changes.items()}
    paths = {change.links[0].site.module for change in changes.values()}
    paths |= {_end(change) for change in changes.values()}
    seen = _Tap(network.module, paths)
    with at_rest(network.module), torch.no_grad(), seen:
        for batch in batches(network.module, loader, samples):
            call(network.module, batch)
            for i, change in changes.items():
                x = seen.given[change.links[0].site.module]
                found[i].add(x, seen.made[_end(change)])
    return {i: moments.solve() for i, moments in found.items()}


def _end(change: Change) -> str:
    return change.links[-1].norm or change.links[-1].site.module


def _pairs(
    network: Network, given: Network, change: Change, loader: Iterable[Any], samples: int | None
) -> Iterable[tuple[Tensor, Tensor]]:
    start, end = change.links[0].site.module, _end(change)
    theirs, ours = _Tap(network.module, {start, end}), _Tap(given.module, {start})
    with at_rest(network.module, given.module), torch.no_grad(), theirs, ours:
        for batch in batches(network.module, loader, samples):
            call(network.module, batch)
            call(given.module, batch)
            x, y = ours.given[start], theirs.made[end]
            if change.skip:
                y = y + theirs.given[start] - x
            yield x, y


class _Tap:
    """Keeps what modules take and give in the last call."""

    def __init__(self, root: nn.Module, paths: Iterable[str]) -> None:
        self.given: dict[str, Tensor] = {}
        self.made: dict[str, Tensor] = {}
        self.modules = {path: root.get_submodule(path) for path in paths}
        self.handles: list[Any] = []

    def __enter__(self) -> _Tap:
        for path, module in self.modules.items():

            def note(_m: nn.Module, args: Any, made: Any, path: str = path) -> None:
                # in place activations may follow
                self.given[path], self.made[path] = args[0].clone(), made.clone()

            self.handles.append(module.register_forward_hook(note))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
