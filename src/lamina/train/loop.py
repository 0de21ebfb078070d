"""Recovery: a short, plain training loop that holds every decision of the plan alive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.artifact import pack
from lamina.data import Data, inputs_of, labels_of
from lamina.errors import DataError
from lamina.forms import Edit, Grid, Plain, Values, install
from lamina.network.source import Network
from lamina.plan.apply import Edited, copy_module
from lamina.train.checkpoint import read_checkpoint, write_checkpoint
from lamina.train.distill import Hidden, distillation_loss
from lamina.train.fit import estimated_bytes, fit, held_bytes
from lamina.train.hold import HeldNetwork
from lamina.train.order import count_batches, samples_of, seeded
from lamina.train.pressure import Price, rate_penalty

AUTO_WORK = 1.6e12  # multiply-accumulates that "auto" may spend: about 90 seconds of one core
AUTO_EPOCHS = 60  # and no more passes over the data than this
CHECKS = 60  # looks at the size in one training
EXACT = 6  # every so many looks code the tensors for real

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Recovery:
    """How to train after the edits.

    Args:
        epochs: passes over the training data (may be a fraction); None: as many as a fixed amount of
            work allows, which is bounded in time but the same on every machine.
        lr: peak learning rate of weights (Adam, one cycle).
        step_lr: peak learning rate of the logarithms of grid steps.
        distill: weight of distillation from the original network, 0..1; the rest is the labels'.
        temperature: of the distillation.
        hidden: weight of matching hidden outputs of the layers both networks have.
        rate: let a penalty on coded length move the size to the budget's.
        price: where the price of a bit starts [loss per bit].
        start: `"planned"`: from the values of the plan; `"wide"`: from the original values on grids no
            wider than half a standard deviation.
        seed: of data order and of dropout.
    """

    epochs: float | None = None
    lr: float = 2e-3
    step_lr: float = 1e-2
    distill: float = 0.7
    temperature: float = 2.0
    hidden: float = 0.0
    rate: bool = True
    price: float = 1e-6
    start: str = "planned"
    seed: int = 0


@dataclass(frozen=True)
class Recovered:
    """What training gave: the edited network with trained values, its history, and its last state."""

    edited: Edited
    history: tuple[Mapping[str, float], ...]
    steps: int
    state: dict[str, Any] = field(default_factory=dict, repr=False)


def recover(
    original: Network,
    edited: Edited,
    data: Data,
    recovery: Recovery | None = None,
    *,
    limit: float | None = None,
    macs: float = 0.0,
    chains: Mapping[str, str] | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Recovered:
    """Train an edited network on its own data, taught by the original.

    Args:
        original: the teacher.
        edited: from `apply`; not changed.
        data: with a `train` loader; validation and test are not touched.
        recovery: settings.
        limit: size the file must end at or under [bytes]; None: whatever comes out.
        macs: of the original per sample, for the amount of work.
        chains: what the file will say of the plan, so that the rest of the file is known exactly.
        checkpoint: a file to continue from and to write to.
        progress: called with (steps done, steps in all, text).

    Raises:
        DataError: there is no training data, or the loss is not finite.
    """
    recovery = recovery or Recovery()
    if data.train is None:
        raise DataError("recovery needs training data", "data.train", "", "use recover=None")
    with torch.random.fork_rng(devices=[]):
        return _Training(original, edited, data, recovery, limit, macs, chains or {}).run(
            checkpoint, progress
        )


class _Training:
    """One training: what stays fixed while the loop runs."""

    def __init__(
        self,
        original: Network,
        edited: Edited,
        data: Data,
        recovery: Recovery,
        limit: float | None,
        macs: float,
        chains: Mapping[str, str],
    ) -> None:
        from accelerate import Accelerator

        self.recovery, self.data, self.edited, self.chains = recovery, data, edited, chains
        self.accelerator = Accelerator()
        self.teacher = copy_module(original.module).eval().requires_grad_(False)
        self.student = copy_module(edited.network.module)
        self.loss_kind = original.loss
        edits = [*edited.edits, *rest_edits(self.student, edited.edits)]
        squeeze = recovery.rate and limit is not None
        wide = squeeze and recovery.start == "wide"
        if wide:
            edits = [start_edit(e, edited.floats) for e in edits]
        self.net = HeldNetwork(self.student, edits, edited.floats if wide else {})
        self.per_epoch = count_batches(data.train)
        self.steps = count_steps(recovery, self.per_epoch, samples_of(data), macs)
        parts = [(n, p) for n, p in self.net.named_parameters()]
        slow = [p for n, p in parts if not n.endswith("log_step")]
        fast = [p for n, p in parts if n.endswith("log_step")]
        groups = [{"params": slow, "lr": recovery.lr}, {"params": fast, "lr": recovery.step_lr}]
        groups = [g for g in groups if g["params"]]
        self.optimizer = torch.optim.Adam(groups)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, [g["lr"] for g in groups], total_steps=max(self.steps, 2)
        )
        self.hidden = Hidden(self.teacher, self.student) if recovery.hidden else None
        self.limit, self.price, self.other, self.correction = limit, None, 0.0, 1.0
        if squeeze:
            self.other = self._overhead()
            start = self._size()
            if start and limit is not None:
                target = max(0.99 * limit - self.other, 1.0)
                self.price = Price(recovery.price, max(start, 1.0), target)
        self.history: list[dict[str, float]] = []
        self.device = self.accelerator.device
        self.teacher.to(self.device)
        self.net = self.net.to(self.device)

    def _size(self, exact: bool = True) -> float:
        """Return the bytes of the held tensors; the estimate is corrected by the last exact size."""
        values = self.net.release()
        rough = estimated_bytes(values)
        if exact:
            self.correction = held_bytes(values) / max(rough, 1.0)
        return rough * self.correction

    def _overhead(self) -> float:
        """Return the bytes of the file that are not records of held tensors."""
        values = self.net.release()
        return len(self._pack(values)) - held_bytes(values)

    def _pack(self, values: Mapping[str, Values]) -> bytes:
        edits = [e for e in self.edited.edits if e.path not in values]
        edits += [Edit(n, "values", values=v) for n, v in values.items()]
        return pack(self.student, tuple(edits), self.edited.network.source, self.chains)

    def run(self, checkpoint: Path | None, progress: Progress | None) -> Recovered:
        done = self._resume(checkpoint)
        every = max(1, self.steps // CHECKS)
        self.student.train()
        for step, batch in self._batches(done):
            torch.manual_seed(self.recovery.seed * 1_000_003 + step)
            loss = self._step(batch)
            if not math.isfinite(loss):
                raise DataError("the loss is not finite", f"step {step}", "", "lower the rate: lr=")
            last = step + 1 == self.steps
            if (step + 1) % every == 0 or last:
                self._check((step + 1) / self.steps, loss, step + 1)
                if checkpoint and not last:
                    write_checkpoint(checkpoint, self._state(step + 1))
            if progress and ((step + 1) % 10 == 0 or last):
                progress(step + 1, self.steps, self._text(loss))
        return self._finish()

    def _batches(self, done: int) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch) from step `done` on; epochs are seeded, so that a resumed run agrees."""
        train: Any = self.data.train
        step = done
        while step < self.steps:
            epoch, skip = divmod(step, self.per_epoch)
            if hasattr(train, "set_epoch"):
                train.set_epoch(epoch)
            for i, batch in enumerate(seeded(train, self.recovery.seed + epoch)):
                if i < skip:
                    continue
                yield step, batch
                step += 1
                if step >= self.steps:
                    return
            if step == done:
                raise DataError("the training data gives no batches", "data.train")

    def _step(self, batch: Any) -> float:
        args, kwargs = inputs_of(batch)
        args = _to(args, self.device)
        kwargs = _to(kwargs, self.device)
        labels = _to(labels_of(batch), self.device)
        with torch.no_grad():
            taught = self.teacher(*args, **kwargs)
        output, levels = self.net(*args, **kwargs)
        r = self.recovery
        loss = distillation_loss(
            output, taught, labels, self.loss_kind, weight=r.distill, temperature=r.temperature
        )
        if self.hidden is not None:
            loss = loss + r.hidden * self.hidden.loss()
        whole = loss
        if self.price is not None and levels:
            whole = loss + self.price.value * rate_penalty(levels)
        self.accelerator.backward(whole)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return float(loss.detach())

    def _check(self, share: float, loss: float, step: int) -> None:
        row = {"step": float(step), "loss": loss}
        if self.price is not None:
            size = self._size(exact=len(self.history) % EXACT == EXACT - 1)
            row |= {"bytes": size + self.other, "price": self.price.value}
            self.price = self.price.steer(size, share)
        self.history.append(row)

    def _text(self, loss: float) -> str:
        size = self.history[-1].get("bytes") if self.history else None
        return f"loss {loss:.3f}" + (f", {size:,.0f} bytes" if size else "")

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "net": self.net.state_dict(),
            "buffers": dict(self.student.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "price": self.price.value if self.price else 0.0,
            "correction": self.correction,
            "history": [dict(row) for row in self.history],
            "steps": self.steps,
        }

    def _resume(self, checkpoint: Path | None) -> int:
        state = read_checkpoint(checkpoint) if checkpoint else None
        if not state or state["steps"] != self.steps:
            return 0
        self.net.load_state_dict(state["net"])
        for name, buffer in self.student.named_buffers():
            buffer.copy_(state["buffers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.price is not None:
            self.price = replace(self.price, value=state["price"])
        self.correction = state["correction"]
        self.history = list(state["history"])
        return int(state["step"])

    def _finish(self) -> Recovered:
        room = None if self.limit is None or self.price is None else self.limit - self.other
        values = fit(self.net, room)
        module = copy_module(self.edited.network.module)
        for name, buffer in self.student.named_buffers():
            owner, _, leaf = name.rpartition(".")
            getattr(module.get_submodule(owner), leaf).copy_(buffer)
        edits = [e for e in self.edited.edits if e.form != "values" or e.path not in values]
        trained = [Edit(name, "values", values=v) for name, v in values.items()]
        install(module, trained)
        network = replace(self.edited.network, module=module)
        return Recovered(
            Edited(network, (*edits, *trained), self.edited.floats),
            tuple(self.history),
            self.steps,
            self._state(self.steps),
        )


def rest_edits(module: nn.Module, edits: tuple[Edit, ...]) -> list[Edit]:
    """Return plain edits for the trainable parameters that no edit covers."""
    covered = {e.path for e in edits}
    return [
        Edit(name, "values", values=Plain(p.detach().clone()))
        for name, p in module.named_parameters()
        if name not in covered and p.requires_grad and p.is_floating_point()
    ]


def start_edit(edit: Edit, floats: Mapping[str, torch.Tensor]) -> Edit:
    """Start a grid that will be squeezed from a step no wider than half a standard deviation.

    A plan made for a tight budget has steps at which nearly everything is zero; from there training
    has no gradient back. The rate pressure widens the step again where that is right.
    """
    start = floats.get(edit.path)
    if not isinstance(edit.values, Grid) or start is None or start.numel() < 2:
        return edit
    spread = float(start.to(torch.float32).std())
    if spread <= 0 or edit.values.step <= spread / 2:
        return edit
    return replace(edit, values=replace(edit.values, step=spread / 2))


def count_steps(recovery: Recovery, per_epoch: int, samples: int, macs: float) -> int:
    """Return the number of optimizer steps.

    For "auto" the work of a step is 4 passes (teacher, student forward, twice backward) of `macs`.
    """
    if recovery.epochs is not None:
        return max(1, round(recovery.epochs * per_epoch))
    work = 4.0 * max(macs, 1.0) * max(samples, 1)
    epochs = min(AUTO_EPOCHS, AUTO_WORK / work)
    return max(1, round(epochs * per_epoch))


def recalibrate(module: nn.Module, batches: Any, limit: int = 50) -> int:
    """Re-estimate BatchNorm moments on data, in place; returns how many layers were recalibrated.

    Args:
        module: the network; nothing but the running moments changes.
        batches: calibration batches.
        limit: number of batches at most.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.track_running_stats and m.running_mean is not None]
    if not norms:
        return 0
    flags = {m: m.training for m in module.modules()}
    momenta = [m.momentum for m in norms]
    module.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a cumulative average
        m.train()
    try:
        with torch.no_grad():
            for i, batch in enumerate(batches):
                if i >= limit:
                    break
                args, kwargs = inputs_of(batch)
                module(*args, **kwargs)
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
        for m, flag in flags.items():
            m.training = flag
    return len(norms)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(v, device) for v in value)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return value
