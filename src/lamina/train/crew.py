"""Several processes that train together: the first leads, the others compute their share.

Only the first process reads data, decides (sizes, prices, steps of the optimizer), and writes
files. In every step it hands each process a share of the samples, adds up what they say of the
gradient, takes the step, and gives the new values to all. So every process holds the very same bits
whatever machine it runs on, and a training on any number of processes is the same training.

`torchrun` and `accelerate launch` say in the environment how many processes there are; nothing is
set up where there is one.
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pickle import PicklingError
from typing import Any, TypeVar

import torch
from torch import nn

from lamina.errors import RunError
from lamina.measure.forward import Batch

PATIENCE = timedelta(days=30)  # the others wait as long as the first one measures and plans
Made = TypeVar("Made")
Work = TypeVar("Work", bound=Callable[..., Any])


def _connected() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def _disconnect() -> None:
    import torch.distributed as dist

    if _connected():
        dist.destroy_process_group()


def process_number() -> tuple[int, int]:
    """Return this process's number, and how many there are, without setting anything up."""
    import torch.distributed as dist

    if _connected():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Crew:
    """The processes of this training; one that is alone has nobody to talk to.

    Attributes:
        rank: number of this process; 0 leads.
        count: number of processes.
        device: where this process computes.
    """

    def __init__(self) -> None:
        # Not Accelerator(): it would fix the precision of any that the user makes later.
        from accelerate import PartialState

        before = _connected()
        self.device = PartialState().device
        self.rank, self.count = process_number()
        self.talk: Any = None
        if self.count > 1:
            import torch.distributed as dist

            if not _connected():
                raise RunError(
                    "the processes cannot find each other", f"{self.count} of them",
                    "RANK and WORLD_SIZE are set, but no process group is",
                    "start them with torchrun or accelerate launch",
                )  # fmt: skip
            if not before:  # its threads must not outlive the interpreter
                atexit.register(_disconnect)
            # Orders go over gloo, on the CPU, also where gradients go from GPU to GPU.
            self.talk = dist.new_group(backend="gloo", timeout=PATIENCE)

    def hand_out(self, things: Sequence[Any]) -> None:
        """Give each process its own of these (leader only); `hear` takes it."""
        import torch.distributed as dist

        if self.count == 1:
            return
        try:
            dist.scatter_object_list([None], list(things), src=0, group=self.talk)
        except (PicklingError, AttributeError, TypeError) as error:  # before anything is sent
            raise RunError(
                "something cannot be sent to the other processes", "", str(error)[:200],
                "define its class at the top of a file, or use one process",
            ) from None  # fmt: skip

    def tell(self, *thing: Any) -> None:
        """Tell all others the same (leader only)."""
        self.hand_out([thing] * self.count)

    def hear(self) -> Any:
        """Wait for what the leader hands out."""
        import torch.distributed as dist

        got: list[Any] = [None]
        dist.scatter_object_list(got, None, src=0, group=self.talk)
        return got[0]

    def add_up(self, parameters: Sequence[nn.Parameter], loss: float, error: str) -> float:
        """Sum the gradients of all processes into the leader's, and return the sum of losses.

        Raises:
            RunError: one of them has failed, on all of them.
        """
        if self.count == 1:
            return loss
        import torch.distributed as dist

        said: list[Any] = [None] * self.count
        dist.all_gather_object(said, (loss, error), group=self.talk)
        for rank, (_, wrong) in enumerate(said):
            if wrong:
                raise RunError("a process could not train its share", f"process {rank}", wrong)
        for group in _alike(parameters):
            # A parameter that no batch reached has no gradient, and must not be decayed for it.
            flags = [torch.full((1,), float(p.grad is not None)) for p in group]
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
            flat = torch.cat([t.to(p) for t, p in zip(flags, group, strict=True)]
                             + [t.reshape(-1) for t in parts])  # fmt: skip
            dist.reduce(flat, 0)
            if self.rank == 0:
                sums = flat[len(group) :].split([p.numel() for p in group])
                for p, met, total in zip(group, flat.tolist(), sums, strict=False):
                    p.grad = total.view_as(p) if met else None
        return float(sum(part for part, _ in said))

    def spread(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give the leader's values of these tensors to all."""
        if self.count == 1:
            return
        import torch.distributed as dist

        with torch.no_grad():
            for group in _alike(tensors):
                flat = torch.cat([t.reshape(-1) for t in group])
                dist.broadcast(flat, 0)
                if self.rank:
                    for t, new in zip(group, flat.split([t.numel() for t in group]), strict=True):
                        t.copy_(new.view_as(t))

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace the values of these tensors by their means over all processes."""
        if self.count == 1:
            return
        import torch.distributed as dist

        with torch.no_grad():
            for t in tensors:
                dist.all_reduce(t)
                t.div_(self.count)


def _alike(tensors: Iterable[Any]) -> list[list[Any]]:
    """Group tensors by dtype, in order."""
    groups: dict[torch.dtype, list[Any]] = {}
    for t in tensors:
        groups.setdefault(t.dtype, []).append(t)
    return list(groups.values())


def shares(batch: Batch, count: int) -> list[Batch | None]:
    """Return a batch in `count` parts of neighbouring samples; None where there are too few.

    Example:
        >>> parts = shares(Batch((torch.arange(3),), {}, None, 3), 2)
        >>> [part.args[0].tolist() for part in parts]
        [[0, 1], [2]]
    """
    if count == 1:
        return [batch]
    parts: list[Batch | None] = []
    start = 0
    for i in range(count):
        end = start + batch.size // count + (i < batch.size % count)
        parts.append(_cut(batch, start, end) if end > start else None)
        start = end
    return parts


def _cut(batch: Batch, start: int, end: int) -> Batch:
    def cut(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            of_samples = value.dim() and len(value) == batch.size
            return value[start:end].clone() if of_samples else value
        if isinstance(value, dict):
            return {k: cut(v) for k, v in value.items()}
        return tuple(cut(v) for v in value) if isinstance(value, (tuple, list)) else value

    kwargs = {name: cut(value) for name, value in batch.kwargs.items()}
    return Batch(cut(batch.args), kwargs, cut(batch.labels), end - start)


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return a batch on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, dict):
            return {k: move(v) for k, v in value.items()}
        return tuple(move(v) for v in value) if isinstance(value, (tuple, list)) else value

    kwargs = {name: move(value) for name, value in batch.kwargs.items()}
    return Batch(move(batch.args), kwargs, move(batch.labels), batch.size)


def weight_of(batch: Batch) -> float:
    """Return how much a batch counts: its tokens, where a mask says which; else its samples."""
    counted = int(batch.mask.sum()) if batch.mask is not None else 0
    return float(counted or batch.size)


LED: list[Crew] = []  # the crew that waits for this process, while a led function runs


def led(work: Work) -> Work:
    """Let the first process alone run a function; the others train with it until it is done.

    Called on every process, it returns the same on each: what the first one made. Where there is
    one process, or the function is called by one that is led, it is just the function.

    Raises:
        RunError: on the others, where the first one failed.
    """

    @functools.wraps(work)
    def run(*args: Any, **kwargs: Any) -> Any:
        if process_number()[1] == 1 or LED:
            return work(*args, **kwargs)
        crew = Crew()
        if crew.rank:
            return assist(crew)
        LED.append(crew)
        try:
            made = work(*args, **kwargs)
        except Exception as error:
            crew.tell("failed", str(error))
            raise
        finally:
            LED.clear()
        try:
            crew.tell("made", made)
        except RunError as error:
            crew.tell("failed", str(error))
        return made

    return run  # type: ignore[return-value]


def assist(crew: Crew) -> Any:
    """Help the first process with every training it begins, and return what it makes in the end."""
    from lamina.train.following import follow

    while True:
        what, *rest = crew.hear()
        if what == "made":
            return rest[0]
        if what == "failed":
            raise RunError("the first process has failed", "", rest[0])
        follow(crew, *rest)
