"""Recovery: a short, plain training loop that holds every decision of the plan alive."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.artifact import pack
from lamina.data import Data
from lamina.errors import DataError, RunError
from lamina.forms import Edit, Values
from lamina.measure.forward import batches
from lamina.network.source import Network
from lamina.plan.apply import Edited
from lamina.train.checkpoint import read_checkpoint, write_checkpoint
from lamina.train.crew import LED, Crew, moved, shares, weight_of
from lamina.train.fit import estimated_bytes, fit, held_bytes
from lamina.train.following import Job, Recovered, compute, finished, follow, seeded_devices
from lamina.train.learner import Learner
from lamina.train.optimize import make_optimizer
from lamina.train.order import Epochs, count_batches, no_batches, samples_of
from lamina.train.pressure import first_price
from lamina.train.recovery import Recovery
from lamina.train.starts import count_steps
from lamina.train.tuning import LEAST, MANTISSA, is_small, shortened

__all__ = ["Recovered", "recover"]

CHECKS = 60  # looks at the size in one training
EXACT = 6  # every so many looks code the tensors for real
LARGE = 1 << 22  # trained values: checkpoints of more take time, and put off the next one
CALM = 20  # times as long as they took
SLACK = 64  # bytes that the head of a file may be shorter by than foreseen
APART = 40_503_007  # between the seeds of two processes
CPU = torch.device("cpu")

Progress = Callable[[int, int, str], None]


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

    Where several processes call it (see `crew`), the first one's data, settings and files are what
    counts, and all return what it made.

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
        RunError: another process failed.
    """
    recovery = recovery or Recovery()
    if data.train is None:
        raise DataError("recovery needs training data", "data.train", "", "use recover=None")
    crew = LED[0] if LED else Crew()
    squeeze = recovery.squeezes and limit is not None
    if crew.rank:
        made = follow(crew, original, edited, recovery, squeeze, alone=False)
        if made is None:
            raise RunError("the first process could not train", "", "its error says why")
        return made
    with torch.random.fork_rng(devices=seeded_devices()), torch.enable_grad():
        learner = Learner(original, edited, recovery, squeeze, crew.device)
        training = _Training(crew, learner, edited, data, recovery, limit, macs, chains or {})
        if LED:
            bare = replace(edited, network=replace(edited.network, data=None))
            crew.tell("train", replace(original, data=None), bare, recovery, squeeze)
        try:
            return training.run(checkpoint, progress)
        except Exception:
            crew.tell("stop")
            raise


class _Training:
    """One training, on the process that leads: what stays fixed while the loop runs."""

    def __init__(
        self,
        crew: Crew,
        learner: Learner,
        edited: Edited,
        data: Data,
        recovery: Recovery,
        limit: float | None,
        macs: float,
        chains: Mapping[str, str],
    ) -> None:
        self.crew, self.learner, self.net = crew, learner, learner.net
        self.recovery, self.data, self.edited, self.chains = recovery, data, edited, chains
        count = count_batches(data.train)
        if not count:
            raise no_batches()
        self.epochs = Epochs(data.train, recovery.seed, count)
        number = count_steps(recovery.epochs, count, samples_of(data), macs)
        self.steps = math.ceil(number / recovery.accumulate)
        self.limit, self.price, self.other, self.correction = limit, None, 0.0, 1.0
        if recovery.parts == "scales" and limit is None:
            self.limit = limit = float(len(self._pack(self.net.release())))
        walk = 1.0
        if limit is not None and recovery.parts == "all":  # or what is large would be coded in vain
            self.other = self._overhead()
            start = max(self._size(), 1.0)
            if recovery.squeezes:
                target = max(0.99 * limit - self.other, 1.0)
                self.price = first_price(recovery.price, start, target)
                walk = start / target
        name = edited.network.name
        self.optimizer, self.schedule = make_optimizer(self.net, recovery, walk, self.steps, name)
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
        return pack(self.learner.student, (*network.edits, *edits), network.source, self.chains)

    def _edits(self, values: Mapping[str, Values]) -> list[Edit]:
        """Return all edits, with these values in place of what was held."""
        rest = [e for e in self.learner.edits if e.form != "values" or e.path not in values]
        return rest + [Edit(name, "values", values=v) for name, v in values.items()]

    def run(self, checkpoint: Path | None, progress: Progress | None) -> Recovered:
        done = self._resume(checkpoint)
        every = max(1, self.steps // CHECKS)
        self.crew.tell("begin")
        self.crew.spread(self.learner.parameters)
        self.crew.spread(self.learner.student.buffers())
        rest = 0.0  # when a checkpoint may be written again
        for step, raws in self._batches(done):
            loss = self._step(raws)
            if not math.isfinite(loss):
                raise DataError("the loss is not finite", f"step {step}", "", "lower the rate: lr=")
            last = step + 1 == self.steps
            if (step + 1) % every == 0 or last:
                self.crew.tell("even")
                self.crew.average(self.learner.moments())
                self._check((step + 1) / self.steps, loss, step + 1)
                if checkpoint and not last and time.monotonic() >= rest:
                    start = time.monotonic()
                    write_checkpoint(checkpoint, self._state(step + 1))
                    large = sum(p.numel() for p in self.learner.parameters) > LARGE
                    rest = start + CALM * (time.monotonic() - start) if large else 0.0
            if progress and ((step + 1) % 10 == 0 or last):
                progress(step + 1, self.steps, self._text(loss))
        return self._finish(self._state(self.steps) if checkpoint else {})

    def _batches(self, done: int) -> Iterator[tuple[int, list[tuple[int, Any]]]]:
        """Yield (step, its numbered batches) from step `done` on, as if it had not stopped."""
        size = self.recovery.accumulate
        group: list[tuple[int, Any]] = []
        for number, raw in self.epochs.numbered(done * size, self.steps * size):
            group.append((number, raw))
            if len(group) == size:
                yield number // size, group
                group = []

    def _step(self, raws: Sequence[tuple[int, Any]]) -> float:
        """Take one step of the optimizer, and return its loss."""
        jobs: list[list[Job]] = [[] for _ in range(self.crew.count)]
        whole = [next(batches(self.learner.student, [raw])) for _, raw in raws]
        total = sum(weight_of(batch) for batch in whole)
        for (number, _), batch in zip(raws, whole, strict=True):
            seed = self.recovery.seed * 1_000_003 + number
            for rank, part in enumerate(shares(batch, self.crew.count)):
                if part is not None:
                    part = part if self.crew.count == 1 else moved(part, CPU)
                    jobs[rank].append((part, weight_of(part) / total, seed + rank * APART))
        self.crew.hand_out([("step", job) for job in jobs])
        price = None if self.price is None else self.price.value
        loss = compute(self.crew, self.learner, jobs[0], price)
        if self.recovery.clip:
            nn.utils.clip_grad_norm_(self.learner.parameters, self.recovery.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.crew.spread(self.learner.parameters)
        return loss

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
            "buffers": dict(self.learner.student.named_buffers()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "price": self.price.value if self.price else 0.0,
            "correction": self.correction,
            "history": [dict(row) for row in self.history],
            "steps": self.steps,
            "per_epoch": self.epochs.per_epoch,
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
        for name, buffer in self.learner.student.named_buffers():
            if not torch.equal(buffer, state["buffers"][name].to(buffer.device)):
                buffer.copy_(state["buffers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.price is not None:
            self.price = replace(self.price, value=state["price"])
        self.correction, self.epochs.per_epoch = state["correction"], state["per_epoch"]
        self.history = list(state["history"])
        return int(state["step"])

    def _finish(self, state: dict[str, Any]) -> Recovered:
        held = {e.path for e in self.learner.edits if e.form == "values"}
        buffers = {n: b.cpu() for n, b in self.learner.student.named_buffers() if n not in held}
        edits = self._edits(self._fitted())
        history = tuple(self.history)
        self.crew.tell("done", edits, buffers, history, self.steps)
        made = finished(self.edited, edits, buffers, self.net.names)
        return Recovered(made, history, self.steps, state)

    def _fitted(self) -> dict[str, Values]:
        """Return the trained values, so that the file they make keeps to the limit."""
        if self.limit is None:
            return fit(self.net, None)
        if self.recovery.parts == "scales":
            return self._kept_short(self.limit)
        room = self.limit - self.other
        values = fit(self.net, room)
        for _ in range(3):  # the header holds the length, and is a little longer for a longer file
            over = len(self._pack(values)) - self.limit
            if over <= 0:
                break
            room -= over
            values = fit(self.net, room)
        return values

    def _kept_short(self, limit: float) -> dict[str, Values]:
        """Return tuned values that keep to the limit: vectors rounded as far as it asks.

        Where that is not enough (vectors that were all zeros are so no more), vectors stay as they
        were; and so does everything in a file that was beyond the limit before.
        """
        trained = self.net.release()
        before = {e.path: e.values for e in self.learner.edits if e.path in trained and e.values}
        vectors = {name: v for name, v in before.items() if is_small(v)}
        rest: float | None = None  # what is not vectors takes the same, however short those are
        for bits in range(MANTISSA, LEAST - 1, -4):
            values = shortened(trained, bits)
            small = held_bytes({name: values[name] for name in vectors})
            if rest is not None and bits > LEAST and rest + small > limit + SLACK:
                continue
            whole = len(self._pack(values))
            if whole <= limit:
                return values
            rest = whole - small
        values = {**trained, **vectors}
        return values if len(self._pack(values)) <= limit else before


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
