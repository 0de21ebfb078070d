"""The part of a training that every process has: its share of a step, and what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lamina.errors import RunError
from lamina.forms import Edit, install
from lamina.measure.forward import Batch
from lamina.network.source import Network
from lamina.plan.apply import Edited, copy_module
from lamina.train.crew import Crew, moved
from lamina.train.learner import Learner
from lamina.train.order import set_seed
from lamina.train.recovery import Recovery

Job = tuple[Batch, float, int]  # a batch, what it counts of its step, and a seed


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


def seeded_devices() -> list[int]:
    """Return the CUDA devices whose random state `torch.manual_seed` would change."""
    if torch.cuda.is_initialized():
        return list(range(torch.cuda.device_count()))
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


def compute(crew: Crew, learner: Learner, jobs: Sequence[Job], price: float | None) -> float:
    """Gather the gradient of a step on the leader, and return its loss there.

    Args:
        crew: the processes; each calls this.
        learner: of this process.
        jobs: its share of the step.
        price: of a bit; bits are paid for once, by the leader.

    Raises:
        RunError: another process failed.
        DataError: the network does not take a batch (where there is one process).
    """
    loss, error = 0.0, ""
    try:
        for i, (batch, share, seed) in enumerate(jobs):
            set_seed(seed)
            here = batch if crew.count == 1 else moved(batch, crew.device)
            loss += learner.learn(here, share, price if i == 0 else None)
    except Exception as wrong:  # all must know, or they would wait for this one for ever
        if crew.count == 1:
            raise
        error = f"{type(wrong).__name__}: {wrong}"
    return crew.add_up(learner.parameters, loss, error)


def follow(
    crew: Crew, original: Network, edited: Edited, recovery: Recovery, squeeze: bool,
    alone: bool = True,
) -> Recovered | None:  # fmt: skip
    """Compute this process's share of a training that the first process leads.

    Args:
        crew: the processes.
        original, edited, recovery: what the first process trains, and how.
        squeeze: the file must come down to a limit.
        alone: nobody here asks for the result.

    Returns:
        what the first process made; None where it failed, or nobody asks.
    """
    with torch.random.fork_rng(devices=seeded_devices()), torch.enable_grad():
        learner = Learner(original, edited, recovery, squeeze, crew.device)
        while True:
            what, *rest = crew.hear()
            if what == "step":
                try:
                    compute(crew, learner, rest[0], None)
                except RunError:  # the first process says what comes of it
                    continue
                for p in learner.parameters:
                    p.grad = None
            if what in ("begin", "step"):
                crew.spread(learner.parameters)
            if what == "begin":
                crew.spread(learner.student.buffers())
            if what == "even":
                crew.average(learner.moments())
            if what == "stop":
                return None
            if what == "done":
                edits, buffers, history, steps = rest
                made = None if alone else finished(edited, edits, buffers, learner.net.names)
                return None if made is None else Recovered(made, history, steps)


def finished(
    edited: Edited, edits: Sequence[Edit], buffers: Mapping[str, torch.Tensor],
    names: Iterable[str],
) -> Edited:  # fmt: skip
    """Return the edited network with what was trained in it.

    Args:
        edited: from before.
        edits: all, with the trained values.
        buffers: that training may have changed, by name.
        names: of the tensors that were trained.
    """
    module = copy_module(edited.model)
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            new = buffers.get(name, buffer)
            if new.shape == buffer.shape and not torch.equal(new.to(buffer.device), buffer):
                buffer.copy_(new)
    trained = set(names)
    install(module, [e for e in edits if e.path in trained])
    return Edited(replace(edited.network, module=module), tuple(edits), edited.floats)
