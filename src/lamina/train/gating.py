"""Training with gates: the ranks of all convolutions at once, down to a count of operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lamina.data import Data
from lamina.errors import DataError
from lamina.measure.forward import batches
from lamina.measure.stats import Stats
from lamina.methods.tucker import macs_of
from lamina.network.sites import Site
from lamina.network.source import Network
from lamina.plan.apply import copy_module
from lamina.train.funnel import Cut, Gated, close, cut, funnel, gated_macs, shrink
from lamina.train.moments import Norm
from lamina.train.order import Epochs, count_batches
from lamina.train.pressure import REACHED, Price
from lamina.train.teach import rest_norms, taught_loss

CHECKS = 60  # looks at the operations in one training
BEGIN = 1.0  # least price of a gate: what pulls at it, over the steady pull of the loss on it
WAY = 10.0  # way that a gate could go in one training
FASTEST = 0.02  # learning rate of gates at most
FIRMER = 12.0  # the price may grow by exp(FIRMER) in one training
CLOSE = 0.97  # of the operations wanted: one step closes no more gates than this allows
HALVINGS = 10
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Gating:
    """How to train with gates.

    Args:
        limit: multiply-accumulates per sample that the gated layers may cost in the end.
        epochs: passes over the training data.
        lr: peak learning rate of weights (Adam, one cycle).
        decay: of weights that are matrices, gates and fixed factors aside.
        widest, narrowest: c of the penalty at the start and in the end.
        distill: weight of distillation from the original, 0..1; the rest is the labels'.
        temperature: of the distillation.
        seed: of data order and of dropout.
    """

    limit: float
    epochs: float = 10.0
    lr: float = 1e-3
    decay: float = 0.0
    widest: float = 1.0
    narrowest: float = 0.01
    distill: float = 0.7
    temperature: float = 2.0
    seed: int = 0

    def sharpness(self, progress: float) -> float:
        """Return c at `progress` in [0, 1]: it falls geometrically until the limit is due.

        Example:
            >>> Gating(1.0).sharpness(0.0), round(Gating(1.0).sharpness(1.0), 9)
            (1.0, 0.01)
        """
        share = min(1.0, progress / REACHED)
        return self.widest * float(self.narrowest / self.widest) ** share


@dataclass(frozen=True)
class Learned:
    """What training with gates gave.

    Args:
        cuts: every gated layer, by site name.
        tensors: all other trained tensors and the buffers, by name in the original network; a gated
            layer's bias is among them.
        macs: of the gated layers [per sample].
        history: step, loss, macs, price, and c, at every look.
    """

    cuts: Mapping[str, Cut]
    tensors: Mapping[str, torch.Tensor]
    macs: float
    history: tuple[Mapping[str, float], ...]


def train_gates(
    original: Network,
    sites: Sequence[Site],
    stats: Stats,
    data: Data,
    gating: Gating,
    progress: Progress | None = None,
) -> Learned:
    """Train a copy of a network with gates on all these convolutions, and close them to a limit.

    The price of a gate rises while the operations are above a path that leads down to the limit
    (`Price.wanted`), and nothing pulls while they are below it; where training leaves more than
    the limit, the narrowest gates are closed until it is met, or all layers are down to a channel.

    Args:
        original: the network, also the teacher; not changed.
        sites: convolutions that the method `tucker` does not refuse.
        stats: of the network; data-free: channels are sorted by the weights alone.
        data: with a `train` loader.
        gating: settings.
        progress: called with (steps done, steps in all, text).

    Raises:
        DataError: there is no training data, or the loss is not finite.
    """
    from accelerate import PartialState

    if data.train is None or not count_batches(data.train):
        raise DataError("gates need training data", "data.train", "", "give some")
    device = PartialState().device
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        teacher = copy_module(original.module).eval().requires_grad_(False).to(device)
        student = copy_module(original.module)
        layers = {}
        for site in sites:
            layers[site.name] = put_gates(student, site, stats)
        student.to(device).train()
        return _Training(student, teacher, sites, layers, data, gating, original.loss).run(progress)


def put_gates(module: nn.Module, site: Site, stats: Stats) -> Gated:
    """Replace a convolution by its gated form, in place, and return that."""
    parent = module.get_submodule(site.module.rpartition(".")[0])
    gated = Gated(module.get_submodule(site.module), stats.of(site.name))
    setattr(parent, site.module.rpartition(".")[2], gated)
    return gated


class _Training:
    """One training: what stays fixed while the loop runs."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        sites: Sequence[Site],
        layers: Mapping[str, Gated],
        data: Data,
        gating: Gating,
        loss: str,
    ) -> None:
        self.student, self.teacher, self.loss = student, teacher, loss
        self.sites, self.layers, self.data, self.gating = sites, layers, data, gating
        self.norms = [m for m in student.modules() if isinstance(m, Norm)]
        self.per_epoch = count_batches(data.train)
        self.steps = max(1, round(gating.epochs * self.per_epoch))
        self.gates = [g for layer in layers.values() for g in layer.gates]
        own = {id(g) for g in self.gates}
        rest = [p for p in student.parameters() if p.requires_grad and id(p) not in own]
        # A core's scale counts as its gates', and decay must not close those.
        cores = {id(layer.core.weight) for layer in layers.values()}
        decayed = [p for p in rest if p.dim() > 1 and id(p) not in cores]
        flat = [p for p in rest if p.dim() < 2 or id(p) in cores]
        groups: list[dict[str, Any]] = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((decayed, gating.decay), (flat, 0.0))
            if params
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=gating.lr)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, gating.lr, total_steps=max(self.steps, 2)
        )
        self.gate_lr = min(FASTEST, WAY / self.steps)
        self.opener = torch.optim.Adam(self.gates, lr=self.gate_lr)
        start = max(self.work(), 1.0)
        self.path = Price(1.0, start, max(min(gating.limit, start), 1.0))
        self.price = BEGIN
        self.history: list[dict[str, float]] = []

    def run(self, progress: Progress | None) -> Learned:
        every = max(1, self.steps // CHECKS)
        epochs = Epochs(self.data.train, self.gating.seed, self.per_epoch)
        for number, raw in epochs.numbered(0, self.steps):
            loss = self._step(raw, number / self.steps)
            step = number + 1
            if not math.isfinite(loss):
                raise DataError("the loss is not finite", f"step {step}", "", "lower the rate: lr=")
            last = step == self.steps
            if step % every == 0 or last:
                self._check(step, loss)
            if progress and (step % 10 == 0 or last):
                share = self.macs() / max(sum(site.macs for site in self.sites), 1.0)
                progress(step, self.steps, f"loss {loss:.3f}, {share:.0%} of the operations")
        return self._finish()

    def _step(self, raw: Any, progress: float) -> float:
        batch = next(batches(self.student, [raw]))
        rest_norms(self.norms, batch)
        g = self.gating
        loss = taught_loss(
            self.student, self.teacher, batch, self.loss,
            weight=g.distill, temperature=g.temperature,
        )  # fmt: skip
        loss.backward()
        self.optimizer.step()
        self.opener.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.opener.zero_grad(set_to_none=True)
        self.schedule.step()
        self._narrow(progress)
        return float(loss.detach())

    @torch.no_grad()
    def _narrow(self, progress: float) -> None:
        """Take the proximal step, as far as the path allows, and steer the price."""
        for layer in self.layers.values():
            layer.settle()
        fading = min(1.0, (1 - progress) / (1 - REACHED))
        for group in self.opener.param_groups:
            group["lr"] = self.gate_lr * fading
        wanted, change = self.path.wanted(progress), math.exp(FIRMER / self.steps)
        if self.macs() <= self.gating.limit or self.work() <= wanted:
            self.price = max(self.price / change, BEGIN)
            return
        self.price *= change
        before = [gates.clone() for gates in self.gates]
        step = self.gate_lr * fading * self.price
        for _ in range(HALVINGS):  # gates of about one width would close all at once
            for gates, was in zip(self.gates, before, strict=True):
                gates.copy_(shrink(was, step, self.gating.sharpness(progress)))
            if self.work() >= CLOSE * wanted:
                return
            step /= 2
            self.price = max(self.price / change, BEGIN)
        for gates, was in zip(self.gates, before, strict=True):
            gates.copy_(was)

    def macs(self) -> float:
        """Return the operations of all gated layers as they are now."""
        return sum(gated_macs(site, self.layers[site.name].open()) for site in self.sites)

    def work(self) -> float:
        """Return the same as if no layer could go back to dense: it falls with the first gate."""
        masks = {name: layer.open() for name, layer in self.layers.items()}
        return sum(
            macs_of(site, int(masks[site.name][0].sum()), int(masks[site.name][1].sum()))
            for site in self.sites
        )

    def _check(self, step: int, loss: float) -> None:
        progress = step / self.steps
        c = self.gating.sharpness(progress)
        with torch.no_grad():
            count = float(sum(funnel(gates, c) for gates in self.gates))
        row = {"step": float(step), "loss": loss, "macs": self.macs(), "price": self.price}
        self.history.append({**row, "c": c, "gates": count})

    def _finish(self) -> Learned:
        masks, macs = close(self.sites, self.layers, self.gating.limit)
        cuts = {
            site.name: cut(site, self.layers[site.name], masks[site.name]) for site in self.sites
        }
        inside = {site.module for site in self.sites}
        tensors = {}
        for name, tensor in self.student.state_dict().items():
            owner = next((m for m in inside if name.startswith(f"{m}.")), None)
            if owner is None:
                tensors[name] = tensor.detach().clone().cpu()
            elif name == f"{owner}.last.bias":
                tensors[f"{owner}.bias"] = tensor.detach().clone().cpu()
        return Learned(cuts, tensors, macs, tuple(self.history))
