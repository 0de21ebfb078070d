"""Training while activations are pulled to the identity: what comes before layers collapse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lamina.data import Data
from lamina.errors import DataError, MethodError
from lamina.measure.forward import batches, device_of
from lamina.network.source import Network
from lamina.plan.apply import copy_module
from lamina.train.moments import Norm
from lamina.train.order import Epochs, count_batches
from lamina.train.slope import Blend, Line, Pull, bends, pull, put_blends, snap
from lamina.train.teach import rest_norms, taught_loss

CHECKS = 60  # looks at the slopes in one training
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Straightening:
    """How to train.

    Args:
        epochs: passes over the training data.
        lr: peak learning rate (AdamW, one cycle).
        decay: of weights that are matrices; never of linearities.
        pull: how blends are drawn to the identity.
        reached: share of the training in which the pull works; then every blend is snapped, and
            the rest is training of a network that is linear there. 1: only what comes near is.
        distill: weight of the original's outputs against the labels, 0..1; at 0 the original is
            not run where labels are classes.
        temperature: of the distillation.
        clip: largest norm of the gradient; 0: none.
        warm: share of the steps in which the rate rises.
        half: compute in bfloat16 where that is safe.
        seed: of data order and of dropout.
    """

    epochs: float = 2.0
    lr: float = 1e-3
    decay: float = 0.0
    pull: Pull = field(default_factory=Pull)
    reached: float = 0.6
    distill: float = 0.7
    temperature: float = 2.0
    clip: float = 1.0
    warm: float = 0.1
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, share in {"reached": self.reached, "distill": self.distill}.items():
            if not 0 <= share <= 1:
                raise MethodError("a share is between 0 and 1", f"{name}={share!r}")


@dataclass(frozen=True)
class Straightened:
    """What training gave.

    Args:
        module: the trained network, its blends in it.
        bends: how far each blend was from linear when its pull ended, before it was snapped.
        history: step, loss, and the largest bend, at every look.
    """

    module: nn.Module
    bends: Mapping[str, float]
    history: tuple[Mapping[str, float], ...]


def straighten(
    original: Network,
    module: nn.Module,
    paths: Sequence[str],
    data: Data,
    settings: Straightening,
    progress: Progress | None = None,
    lines: Mapping[str, Line] | None = None,
) -> Straightened:
    """Train a copy of a network while some of its activations are pulled to the identity.

    With no paths it is plain training: the control of an experiment.

    Args:
        original: the teacher; its `loss` says what an output is.
        module: where to start: the original, or what an earlier training gave, blends included.
        paths: of the activations to pull, blends or not yet.
        data: with a `train` loader.
        settings: of the training.
        progress: called with (steps done, steps in all, text).
        lines: what activations are drawn to, by path; of others it is the identity.

    Raises:
        DataError: there is no training data, or the loss is not finite.
    """
    from accelerate import PartialState

    if data.train is None or not count_batches(data.train):
        raise DataError("straightening needs training data", "data.train", "", "give some")
    device = PartialState().device
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        student = copy_module(module).to(device)
        blends = put_blends(student, paths, lines)
        student.to(device)
        teacher = copy_module(original.module).eval().requires_grad_(False).to(device)
        training = _Training(student.train(), teacher, blends, data, settings, original.loss)
        result = training.run(progress)
        return replace(result, module=result.module.to(device_of(module)))


class _Training:
    """One training: what stays fixed while the loop runs."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        blends: Mapping[str, Blend],
        data: Data,
        settings: Straightening,
        loss: str,
    ) -> None:
        self.student, self.teacher, self.blends, self.loss = student, teacher, blends, loss
        self.data, self.settings = data, settings
        self.norms = [m for m in student.modules() if isinstance(m, Norm)]
        self.per_epoch = count_batches(data.train)
        self.steps = max(1, round(settings.epochs * self.per_epoch))
        self.last_pull = max(1, round(settings.reached * self.steps))
        slopes = {id(m.linearity) for m in student.modules() if isinstance(m, Blend)}
        trained = [p for p in student.parameters() if p.requires_grad]
        self.params = trained
        decayed = [p for p in trained if p.dim() > 1 and settings.decay]
        rest = [p for p in trained if not (p.dim() > 1 and settings.decay) and id(p) not in slopes]
        bare = [p for p in trained if id(p) in slopes]
        groups: list[dict[str, Any]] = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((decayed, settings.decay), (rest, 0.0), (bare, 0.0))
            if params
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr)
        steps = max(self.steps, 2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, settings.lr, total_steps=steps, pct_start=settings.warm,
        )  # fmt: skip
        self.gain = settings.pull.gain(self._rates()[: self.last_pull])
        self.bent: dict[str, float] = {}
        self.history: list[dict[str, float]] = []

    def _rates(self) -> list[float]:
        """Return the learning rates of all steps, from a schedule of their own."""
        toy = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=self.settings.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            toy, self.settings.lr, total_steps=max(self.steps, 2), pct_start=self.settings.warm,
        )  # fmt: skip
        rates = []
        for _ in range(self.steps):
            rates.append(float(schedule.get_last_lr()[0]))
            toy.step()
            schedule.step()
        return rates

    def run(self, progress: Progress | None) -> Straightened:
        every = max(1, self.steps // CHECKS)
        epochs = Epochs(self.data.train, self.settings.seed, self.per_epoch)
        for number, raw in epochs.numbered(0, self.steps):
            loss = self._step(raw)
            step = number + 1
            if not math.isfinite(loss):
                raise DataError("the loss is not finite", f"step {step}", "", "lower the rate: lr=")
            if step == self.last_pull:
                self._end_pull()
            last = step == self.steps
            if step % every == 0 or last:
                widest = max(bends(self.blends).values(), default=0.0)
                self.history.append({"step": float(step), "loss": loss, "bend": widest})
            if progress and (step % 10 == 0 or last):
                progress(step, self.steps, f"loss {loss:.3f}")
        self.optimizer.zero_grad(set_to_none=True)
        return Straightened(self.student.eval(), self.bent, tuple(self.history))

    def _step(self, raw: Any) -> float:
        s = self.settings
        batch = next(batches(self.student, [raw]))
        rest_norms(self.norms, batch)
        loss = taught_loss(
            self.student, self.teacher, batch, self.loss,
            weight=s.distill, temperature=s.temperature, half=s.half, spare=True,
        )  # fmt: skip
        free = [b for b in self.blends.values() if b.linearity.requires_grad]
        (loss + s.pull.penalty(free).to(loss)).backward()
        if s.clip:
            nn.utils.clip_grad_norm_(self.params, s.clip)
        lr = float(self.schedule.get_last_lr()[0])
        if s.pull.how == "decoupled":
            pull(free, lr, self.gain)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self._note(free)
        snap(free, s.pull.tau)
        return float(loss.detach())

    def _note(self, free: Sequence[Blend]) -> None:
        """Remember how bent blends are that are about to be snapped."""
        for path, blend in self.blends.items():
            if blend in free:
                self.bent[path] = blend.bend

    def _end_pull(self) -> None:
        """Snap every blend that is left, where the rest of the training is to be linear."""
        if self.settings.reached < 1:
            for blend in self.blends.values():
                blend.snap()
