"""What layers see while their block runs: input moments, and what their outputs do to the block's.

The loss of the whole network cannot be asked for, since the rest of it is not there. What stands in
for it is how far a block's output moves, token by token, relative to its size:

    error = 1/2 sum over tokens of |dy|^2 / (|y|^2 tokens)

whose Gauss-Newton form needs `G = E[J^T J / |y|^2]` at every layer's output. Random signs at the
block's output, sent back through the block, have that as their second moment; only its diagonal is
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lamina.measure.columns import counted, input_columns, main_tensor, token_counts
from lamina.measure.moments import Moment, add_columns, empty_moment
from lamina.measure.stats import LayerStats
from lamina.network.sites import Site, as_matrix

COLUMNS_PER_WIDTH, FEWEST, MOST = 64, 32_000, 200_000  # as in measure/calibrate.py
CPU = torch.device("cpu")


class Watch:
    """The sums of some layers over all batches; nothing of it outlives their statistics.

    Args:
        root: the network.
        sites: the layers.
        samples: in all batches.
        seed: of what is drawn.
        gradients: whether outputs are watched too.
    """

    def __init__(
        self, root: nn.Module, sites: Sequence[Site], samples: int, seed: int, gradients: bool
    ) -> None:
        self.root, self.sites, self.samples, self.gradients = root, tuple(sites), samples, gradients
        self.draw = torch.Generator().manual_seed(seed)
        self.signs = torch.Generator().manual_seed(seed + 1)
        self.inputs: dict[str, Moment] = {}
        self.outputs: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}
        self.taps: list[tuple[Site, Tensor]] = []
        self.mask: Tensor | None = None
        self.size, self.seen = 1, 0
        for site in self.sites:
            groups, rows, columns = site.matrix_shape
            self.inputs[site.name] = empty_moment(groups, columns, CPU, site.op == "embedding")
            self.outputs[site.name] = torch.zeros(groups, rows, dtype=torch.float64)
            self.counts[site.name] = 0.0

    @contextmanager
    def looking(self, mask: Tensor | None, size: int, again: bool = False) -> Iterator[None]:
        """Watch one batch.

        Args:
            mask: `[samples, tokens]`, 0 for padding, or None.
            size: samples.
            again: it was counted before.
        """
        self.taps, self.mask, self.size = [], mask, size
        self.seen += 0 if again else size
        handles = []
        for site in self.sites:
            for path in _paths(self.root, site):
                module = self.root.get_submodule(path)
                hook = self._hook(site)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def send_back(self, output: Tensor) -> None:
        """Send signs, weighted by the size of every token, back from a block's output."""
        if not self.taps or not output.requires_grad:
            return
        size = output.detach().float().square().sum(-1, keepdim=True).clamp_min(1e-20)
        signs = torch.randint(0, 2, output.shape, generator=self.signs) * 2.0 - 1
        taps, self.taps = self.taps, []
        pull = (signs * size.rsqrt()).to(output.dtype)
        found = torch.autograd.grad([output], [y for _, y in taps], [pull], allow_unused=True)
        for (site, _), grad in zip(taps, found, strict=True):
            if grad is not None:
                self._add_power(site, counted(grad, self.mask))

    def _add_power(self, site: Site, rows: Tensor) -> None:
        flat = rows.reshape(-1, rows.shape[-1]).float()
        groups, width, _ = site.matrix_shape
        if flat.shape[1] != groups * width:
            return
        self.outputs[site.name] += flat.square().sum(0).double().reshape(groups, width)
        self.counts[site.name] += len(flat)

    def add_relative(self, site: Site, output: Tensor) -> None:
        """Let a layer outside the blocks be judged by its own output, token by token."""
        rows = counted(output, self.mask).detach().float()
        rows = rows.reshape(-1, rows.shape[-1])
        power = (1 / rows.square().sum(1).clamp_min(1e-20)).mean().double()
        self.outputs[site.name] += power * len(rows)
        self.counts[site.name] += len(rows)

    def _hook(self, site: Site) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
            if isinstance(module, nn.Embedding) and site.op != "embedding":
                return None  # a tied head is judged as the head
            self._see(site, module, args, kwargs, output)
            y = main_tensor(output)
            if y is None or not self.gradients:
                return None
            if not torch.is_grad_enabled():
                self.add_relative(site, y)
                return None
            if not isinstance(output, Tensor):
                return None
            y = y if y.requires_grad else y.detach().requires_grad_()
            self.taps.append((site, y))
            return y.clone()

        return hook

    def _see(self, site: Site, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        moment = self.inputs[site.name]
        if site.op == "embedding":
            index = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            index = counted(index, self.mask)
            counts = token_counts(site, index)
            moment.total.add_(counts)
            moment.first.add_(counts)
            self.inputs[site.name] = replace(moment, count=moment.count + index.numel())
        else:
            width = moment.first.shape[1]
            most = min(MOST, max(FEWEST, COLUMNS_PER_WIDTH * width))
            limit = max(1, most * self.size // max(self.samples, self.size))
            with torch.no_grad():
                parts = input_columns(
                    site, "direct", module, args, kwargs, output, limit, self.draw, self.mask
                )
                self.inputs[site.name] = add_columns(moment, parts)

    def stats_of(self, site: Site, G: Tensor | None = None) -> LayerStats | None:
        """Return a layer's statistics, or None where it was not seen.

        Args:
            site: the layer.
            G: what its outputs do, where that is known already.
        """
        moment = self.inputs[site.name]
        if not moment.count or not bool(moment.total.any()):
            return None
        if G is None:
            G = self.outputs[site.name] / max(1.0, self.counts[site.name])
            G = G / max(1.0, moment.count / max(1, self.seen))  # a mean over tokens
        if not bool(G.any()) or not bool(G.isfinite().all() & moment.total.isfinite().all()):
            return None
        return LayerStats(
            H=moment.total / self.seen, G=G, mean=moment.first / self.seen,
            positions=moment.count / self.seen, samples=self.seen,
        )  # fmt: skip


def blind_stats(site: Site, weight: Tensor) -> LayerStats:
    """Return statistics of a layer that nothing was seen of: its own relative change counts."""
    groups, rows, columns = site.matrix_shape
    size = float(as_matrix(site, weight).float().square().sum())
    each = 1.0 / max(size, 1e-20)
    return LayerStats(
        H=torch.ones(groups, columns, dtype=torch.float64),
        G=torch.full((groups, rows), each, dtype=torch.float64), samples=1,
    )  # fmt: skip


def _paths(root: nn.Module, site: Site) -> list[str]:
    """Return the modules that use a layer's weight: its own, and those it is tied with."""
    names = (site.weight, *site.aliases)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))
