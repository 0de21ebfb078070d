"""Fine-tuning of a network that is masked and quantized as it trains, with labels or without."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lamina.data import Data
from lamina.errors import DataError, MethodError
from lamina.measure.forward import Batch, batches, call
from lamina.methods.two_four import GROUP, KEPT
from lamina.train.distill import Hidden, distillation_loss
from lamina.train.dropout import Dropout, dropout_follows
from lamina.train.moments import Norm
from lamina.train.order import count_batches, seeded, set_seed
from lamina.train.quantized import SR_STE, QuantizedNetwork

MASKS = ("static", "gradual", "sr-ste")
CHECKS = 60  # rows of history
UPDATES = 100  # of gradual masks
WARM = 0.1  # of the steps, while rates rise

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Tuning:
    """How to train.

    Args:
        epochs: passes over the training data.
        lr: peak learning rate (AdamW; up over a tenth of the steps, then linearly down).
        range_lr: of the ends of activation ranges, which have no decay.
        decay: of matrices.
        norm: of all gradients together, clipped; 0: they are not.
        masks: `"static"`, chosen before; `"gradual"`, zeros added along a cubic over the share
            `ramp` of the steps; `"sr-ste"`, chosen anew in every step, what is pruned is trained
            too.
        ramp: see above.
        dropout: its schedule; None: as the network has it.
        distill: weight of the teacher's outputs against the labels, 0..1; without labels it is all.
        temperature: of the teacher's outputs.
        hidden: weight of matching hidden outputs.
        half: compute in bfloat16 where that is safe; quantizers compute in float32 all the same.
        seed: of data order and dropout.

    Raises:
        MethodError: a setting that cannot be used.

    Example:
        >>> Tuning(epochs=2.0, masks="gradual").ramp
        0.5
    """

    epochs: float = 2.0
    lr: float = 3e-5
    range_lr: float = 1e-2
    decay: float = 0.0
    norm: float = 1.0
    masks: str = "static"
    ramp: float = 0.5
    dropout: Dropout | None = field(default_factory=Dropout)
    distill: float = 0.0
    temperature: float = 2.0
    hidden: float = 0.0
    half: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.masks not in MASKS:
            why = f"choose from {', '.join(MASKS)}"
            raise MethodError("unknown schedule of masks", repr(self.masks), "", why)
        for name in ("epochs", "lr", "range_lr", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise MethodError(f"{name} is over 0", f"{name}={value!r}")
        for name in ("decay", "norm", "hidden"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise MethodError(f"{name} is 0 or more", f"{name}={value!r}")
        for name in ("ramp", "distill"):
            if not 0 <= getattr(self, name) <= 1:
                raise MethodError("a share is 0 to 1", f"{name}={getattr(self, name)!r}")


def tune(
    net: QuantizedNetwork,
    teacher: nn.Module | None,
    data: Data,
    tuning: Tuning,
    loss: str = "auto",
    *,
    sparse: bool = False,
    progress: Progress | None = None,
) -> list[Mapping[str, float]]:
    """Train a network in place; it is in evaluation mode afterwards. Return the history.

    Args:
        net: what is trained, with the masks and quantizers it has.
        teacher: for distillation, and for data without labels; it is not changed.
        data: with a `train` loader.
        tuning: settings.
        loss: what the outputs are, see `Network.loss`.
        sparse: the masks are to be 2:4; `tuning.masks` says how they get there.
        progress: called with (steps done, steps in all, text).

    Raises:
        DataError: there is no training data, or neither labels nor a teacher; or the loss is not
            finite.
    """
    if data.train is None or not count_batches(data.train):
        raise DataError("quantized training needs training data", "data.train", "", "give some")
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        return _Training(net, teacher, data, tuning, loss, sparse).run(progress)


def zeros_at(share: float) -> float:
    """Return how many of every four are zero once `share` of the ramp is done (cubic, to two).

    Example:
        >>> zeros_at(0.0), zeros_at(0.5), zeros_at(1.0)
        (0.0, 1.75, 2.0)
    """
    return float((GROUP - KEPT) * (1 - (1 - min(max(share, 0.0), 1.0)) ** 3))


class _Training:
    """One training: what stays fixed while the loop runs."""

    def __init__(
        self, net: QuantizedNetwork, teacher: nn.Module | None, data: Data, tuning: Tuning,
        loss: str, sparse: bool,
    ) -> None:  # fmt: skip
        self.net, self.data, self.tuning, self.kind, self.sparse = net, data, tuning, loss, sparse
        self.teacher = teacher
        self.norms = [m for m in net.modules() if isinstance(m, Norm)]
        self.per_epoch = count_batches(data.train)
        self.steps = max(1, round(tuning.epochs * self.per_epoch))
        ranges = net.ranges()
        mine = {id(p) for p in ranges}
        self.params = [p for p in net.parameters() if p.requires_grad and id(p) not in mine]
        decayed = [p for p in self.params if p.dim() > 1 and tuning.decay]
        rest = [p for p in self.params if not (p.dim() > 1 and tuning.decay)]
        groups: list[dict[str, Any]] = [
            {"params": params, "lr": lr, "weight_decay": decay}
            for params, lr, decay in (
                (decayed, tuning.lr, tuning.decay),
                (rest, tuning.lr, 0.0),
                (ranges, tuning.range_lr, 0.0),
            )
            if params
        ]
        fused = {p.device.type for p in net.parameters()} <= {"cpu", "cuda"}
        self.optimizer = torch.optim.AdamW(groups, lr=tuning.lr, weight_decay=0.0, fused=fused)
        warm = max(1, round(WARM * self.steps))
        left = max(1, self.steps - warm)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: min((i + 1) / warm, max(self.steps - i, 1) / left)
        )
        self.hidden, self.hooked = None, _hooks_of(net.body, teacher)
        if tuning.hidden and teacher is not None:
            self.hidden = Hidden(teacher, net.body)
        self.history: list[Mapping[str, float]] = []

    def run(self, progress: Progress | None) -> list[Mapping[str, float]]:
        t = self.tuning
        train: Any = self.data.train
        every = max(1, self.steps // CHECKS)
        dropout = t.dropout or Dropout("constant", 0.0)
        step = 0
        self.net.train()
        with dropout_follows(self.net.body, dropout) as follow:
            while step < self.steps:
                epoch, before = step // self.per_epoch, step
                if hasattr(train, "set_epoch"):
                    train.set_epoch(epoch + 1000 * t.seed)
                for raw in seeded(train, t.seed + epoch):
                    set_seed(t.seed * 1_000_003 + step)
                    if t.dropout is not None:
                        follow(step / max(1, self.steps - 1))
                    self._mask(step)
                    loss = self._step(next(batches(self.net.body, [raw])))
                    step += 1
                    if not math.isfinite(loss):
                        fix = "lower the rate: lr="
                        raise DataError("the loss is not finite", f"step {step}", "", fix)
                    last = step == self.steps
                    if step % every == 0 or last:
                        self.history.append({"step": float(step), "loss": loss})
                    if progress and (step % 10 == 0 or last):
                        progress(step, self.steps, f"loss {loss:.3f}")
                    if last:
                        break
                if step == before:
                    why = "the training data gives no batches"
                    raise DataError(why, "data.train", "", "give some")
        if self.sparse:
            if t.masks == "sr-ste":
                self.net.prune()
            for weight in self.net.weights:
                weight.regrow = 0.0  # type: ignore[assignment]
        self.optimizer.zero_grad(set_to_none=True)
        for hooks, known in self.hooked:
            for key in hooks.keys() - known:
                del hooks[key]
        self.net.eval()
        return self.history

    def _mask(self, step: int) -> None:
        """Choose masks anew where this step is one that does."""
        if not self.sparse or self.tuning.masks == "static":
            return
        if self.tuning.masks == "sr-ste":
            self.net.prune(regrow=SR_STE)
            return
        end = max(1, round(self.tuning.ramp * self.steps))
        every = max(1, end // UPDATES)
        if step <= end and (step % every == 0 or step == end):
            # What is pruned has no gradient, but comes back where others have become smaller.
            self.net.prune(zeros_at(step / end))

    def _step(self, batch: Batch) -> float:
        for norm in self.norms:
            norm.train(batch.size > 1)  # one value per channel has no variance
        t = self.tuning
        labels = batch.labels
        classes = labels is not None and not labels.is_floating_point()
        device = next(self.net.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=t.half):
            taught = None
            if t.distill or not classes or self.hidden is not None:
                if self.teacher is None:
                    raise DataError(
                        "there is nothing to learn from", "data.train",
                        "it has no labels, and there is no teacher", "give labels",
                    )  # fmt: skip
                with torch.no_grad():
                    taught = call(self.teacher, batch)
            output = self.net(*batch.args, **batch.kwargs)
        tokens = [v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, torch.Tensor)]
        loss = distillation_loss(
            output, output if taught is None else taught, labels, self.kind,
            weight=t.distill, temperature=t.temperature, mask=batch.mask,
            tokens=tokens[0] if tokens else None,
        )  # fmt: skip
        if self.hidden is not None:
            loss = loss + t.hidden * self.hidden.loss(batch.mask)
        loss.backward()
        if t.norm:
            nn.utils.clip_grad_norm_(self.params, t.norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.net.clamp()
        return float(loss.detach())


def _hooks_of(*modules: nn.Module | None) -> list[tuple[Any, set[Any]]]:
    """Return all forward hooks there are, to take away those that come."""
    parts = [part for module in modules if module is not None for part in module.modules()]
    return [(part._forward_hooks, set(part._forward_hooks)) for part in parts]
