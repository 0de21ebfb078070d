"""Recovery: a short, plain training loop that holds every decision of the plan alive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lamina.artifact import pack
from lamina.data import Data
from lamina.errors import BudgetError, DataError, NetworkError
from lamina.forms import Edit, Values, install
from lamina.measure.forward import Batch, batches, call
from lamina.network.source import Network
from lamina.plan.apply import Edited, copy_module
from lamina.train.checkpoint import read_checkpoint, write_checkpoint
from lamina.train.distill import Hidden, distillation_loss
from lamina.train.fit import estimated_bytes, fit, held_bytes
from lamina.train.hold import HeldNetwork
from lamina.train.moments import Norm
from lamina.train.order import count_batches, samples_of, seeded, set_seed
from lamina.train.pressure import first_price, rate_penalty
from lamina.train.recovery import Recovery
from lamina.train.starts import check_values, count_steps, held_edits, start_edit

CHECKS = 60  # looks at the size in one training
EXACT = 6  # every so many looks code the tensors for real

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Recovered:
    """What training gave: the edited network with trained values, and its history.

    `state` is the last state of the training, to be written where it was given a checkpoint, and
    empty where it was not: it is several times as large as the network.
    """

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
        DataError: there is no training data, it does not fit, or the loss is not finite.
        NetworkError: there is nothing to train, or a tensor has no values.
        BudgetError: SGD where grid steps are trained.
    """
    recovery = recovery or Recovery()
    if data.train is None:
        raise DataError("recovery needs training data", "data.train", "", "use recover=None")
    with torch.random.fork_rng(devices=_seeded_devices()), torch.enable_grad():
        return _Training(original, edited, data, recovery, limit, macs, chains or {}).run(
            checkpoint, progress
        )


def _seeded_devices() -> list[int]:
    """Return the CUDA devices whose random state `torch.manual_seed` would change."""
    if torch.cuda.is_initialized():
        return list(range(torch.cuda.device_count()))
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


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
        # Not Accelerator(): it would fix the precision of any that the user makes later.
        from accelerate import PartialState

        check_values(original.module)
        check_values(edited.model)
        self.recovery, self.data, self.edited, self.chains = recovery, data, edited, chains
        self.device = device = PartialState().device
        self.teacher = copy_module(original.module).eval().requires_grad_(False).to(device)
        self.student = copy_module(edited.model).to(device)
        self.norms = [m for m in self.student.modules() if isinstance(m, Norm)]
        self.loss_kind = original.loss
        self.edits = held_edits(self.student, edited.edits)
        squeeze = recovery.rate and limit is not None
        wide = squeeze and recovery.start == "wide"
        starts = edited.floats if wide else {}
        begun = [start_edit(e, starts) for e in self.edits]
        self.net = HeldNetwork(self.student, begun, starts).to(device)
        self.per_epoch = count_batches(data.train)
        if not self.per_epoch:
            raise _no_batches()
        self.steps = count_steps(recovery.epochs, self.per_epoch, samples_of(data), macs)
        parts = list(self.net.named_parameters())
        slow = [p for n, p in parts if not n.endswith("log_step")]
        fast = [p for n, p in parts if n.endswith("log_step")]
        if not parts:
            raise NetworkError(
                "there is nothing to train", original.name, "every parameter is frozen",
                "use recover=None, or requires_grad_(True)",
            )  # fmt: skip
        self.limit, self.price, self.other, self.correction = limit, None, 0.0, 1.0
        walk = 1.0
        if limit is not None:
            self.other = self._overhead()
            start = max(self._size(), 1.0)
            if squeeze:
                target = max(0.99 * limit - self.other, 1.0)
                self.price = first_price(recovery.price, start, target)
                walk = start / target
        if fast and recovery.optimizer == "sgd":
            raise BudgetError(
                "sgd cannot train grid steps", original.name, "their scale is not that of weights",
                "use optimizer='adam', or methods that leave floats",
            )  # fmt: skip
        lr, step_lr = recovery.rates(walk)
        # Decay is for matrices: a shared value must not shrink for each of its members.
        decayed = [p for p in slow if p.dim() > 1 and recovery.decay]
        groups: list[dict[str, Any]] = [{"params": decayed, "lr": lr}] if decayed else []
        if rest := [p for p in slow if p.dim() < 2 or not recovery.decay]:
            groups.append({"params": rest, "lr": lr, "weight_decay": 0.0})
        if fast:
            groups.append({"params": fast, "lr": step_lr, "weight_decay": 0.0})
        self.optimizer: torch.optim.Optimizer
        if recovery.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                groups, lr=lr, momentum=0.9, nesterov=True, weight_decay=recovery.decay
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, weight_decay=recovery.decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, [float(g["lr"]) for g in groups], total_steps=max(self.steps, 2)
        )
        self.hidden = Hidden(self.teacher, self.student) if recovery.hidden else None
        self.history: list[dict[str, float]] = []

    def _size(self, exact: bool = True) -> float:
        """Return the bytes of the held tensors; an estimate is corrected by the last exact size."""
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
        edits = self._edits(values)
        network = self.edited.network
        return pack(self.student, (*network.edits, *edits), network.source, self.chains)

    def _edits(self, values: Mapping[str, Values]) -> list[Edit]:
        """Return all edits, with these values in place of what was held."""
        rest = [e for e in self.edits if e.form != "values" or e.path not in values]
        return rest + [Edit(name, "values", values=v) for name, v in values.items()]

    def run(self, checkpoint: Path | None, progress: Progress | None) -> Recovered:
        done = self._resume(checkpoint)
        every = max(1, self.steps // CHECKS)
        self.student.train()
        for step, batch in self._batches(done):
            set_seed(self.recovery.seed * 1_000_003 + step)
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
        return self._finish(self._state(self.steps) if checkpoint else {})

    def _batches(self, done: int) -> Iterator[tuple[int, Batch]]:
        """Yield (step, batch) from step `done` on; epochs are seeded, so a resumed run agrees."""
        train: Any = self.data.train
        step = done
        while step < self.steps:
            epoch, skip = divmod(step, self.per_epoch)
            if hasattr(train, "set_epoch"):
                train.set_epoch(epoch)
            seen = 0
            for raw in seeded(train, self.recovery.seed + epoch):
                seen += 1
                if seen > skip:
                    yield step, next(batches(self.student, [raw]))
                    step += 1
                if step >= self.steps:
                    return
                if seen == self.per_epoch:
                    break
            if not seen:
                raise _no_batches()
            self.per_epoch = seen  # a loader may give fewer than its length says

    def _step(self, batch: Batch) -> float:
        for norm in self.norms:
            norm.train(batch.size > 1)  # one value per channel has no variance
        r = self.recovery
        with torch.autocast(self.device.type, torch.bfloat16, enabled=r.half):
            with torch.no_grad():
                taught = call(self.teacher, batch)
            output, levels = self.net(*batch.args, **batch.kwargs)
        tokens = [v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, torch.Tensor)]
        loss = distillation_loss(
            output, taught, batch.labels, self.loss_kind, weight=r.distill,
            temperature=r.temperature, tokens=tokens[0] if tokens else None, mask=batch.mask,
        )  # fmt: skip
        if self.hidden is not None:
            loss = loss + r.hidden * self.hidden.loss()
        whole = loss
        if self.price is not None and levels:
            whole = loss + self.price.value * rate_penalty(levels)
        whole.backward()
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
            "per_epoch": self.per_epoch,
            "settings": repr((self.recovery, self.limit)),
        }

    def _resume(self, checkpoint: Path | None) -> int:
        """Continue from a checkpoint, if it is one of this very training; return the steps done."""
        state = read_checkpoint(checkpoint) if checkpoint else None
        now = self._state(0)
        if state is None or state.keys() != now.keys():
            return 0
        same = all(state[k] == now[k] for k in ("steps", "settings"))
        if not same or any(_shapes(state[k]) != _shapes(now[k]) for k in ("net", "buffers")):
            return 0
        self.net.load_state_dict(state["net"])
        for name, buffer in self.student.named_buffers():
            if not torch.equal(buffer, state["buffers"][name].to(buffer.device)):
                buffer.copy_(state["buffers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.price is not None:
            self.price = replace(self.price, value=state["price"])
        self.correction, self.per_epoch = state["correction"], state["per_epoch"]
        self.history = list(state["history"])
        return int(state["step"])

    def _finish(self, state: dict[str, Any]) -> Recovered:
        module = copy_module(self.edited.model)
        fixed = {e.path for e in self.edits if e.form == "values"}
        trained = {n: b for n, b in self.student.named_buffers() if n not in fixed}
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                new = trained.get(name, buffer)
                if new.shape == buffer.shape and not torch.equal(new.to(buffer.device), buffer):
                    buffer.copy_(new)
        edits = self._edits(self._fitted())
        install(module, [e for e in edits if e.path in self.net.names])
        network = replace(self.edited.network, module=module)
        edited = Edited(network, tuple(edits), self.edited.floats)
        return Recovered(edited, tuple(self.history), self.steps, state)

    def _fitted(self) -> dict[str, Values]:
        """Return the trained values, so that the file they make keeps to the limit."""
        if self.limit is None:
            return fit(self.net, None)
        room = self.limit - self.other
        values = fit(self.net, room)
        for _ in range(3):  # the header holds the length, and is a little longer for a longer file
            over = len(self._pack(values)) - self.limit
            if over <= 0:
                break
            room -= over
            values = fit(self.net, room)
        return values


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _no_batches() -> DataError:
    return DataError("the training data gives no batches", "data.train", "", "give some")
