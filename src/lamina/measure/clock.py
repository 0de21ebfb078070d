"""Timing: jobs in interleaved rounds, at the inputs that the layers of a network really see.

What is told is always a ratio to what ran in the same round: a slow spell of the machine hits both
sides. On the CPU and with one thread the clock is that of the process, so what other processes
take of the machine does not count.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import BudgetError
from lamina.measure.forward import at_rest, device_of
from lamina.network.isolate import isolated, one_line
from lamina.network.source import Network

LEAST, MOST = 5, 21  # rounds
ONE = 0.004  # what one timing takes at least, by repeating the call [s]
NOISE = 0.02  # of a ratio: nothing is told apart more finely than this


@dataclass(frozen=True)
class Call:
    """How a forward pass calls a layer: outlines of its inputs, and how often it does so."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    count: int = 1


@dataclass(frozen=True)
class Like:
    """The outline of a floating tensor: everything but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self) -> Tensor:
        """Return a tensor of this outline with normal values."""
        if 0 in self.stride:  # an expanded tensor; it cannot be written to
            return torch.randn(self.shape, dtype=self.dtype, device=self.device)
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return empty.normal_()


@dataclass(frozen=True)
class Job:
    """Something to time: a module, and the calls of it that one forward pass makes."""

    module: nn.Module
    calls: tuple[Call, ...]


Timer = Callable[[Sequence[Job], int, float], list[list[float]]]  # jobs, threads, seconds -> rounds


def machine_key(threads: int) -> list[Any]:
    """Return what a latency depends on besides networks and inputs, as JSON values."""
    settings = [torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision()]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [platform.node(), platform.machine(), _model(), str(torch.__version__), threads,
            settings, names]  # fmt: skip


def _model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith("model name")), "").strip()
    except OSError:
        return platform.processor()


def inputs_key(network: Network) -> str:
    """Return the outlines of a network's example inputs as text."""
    return repr(outline((network.example_inputs, dict(network.example_kwargs))))


def check_timed(network: Network) -> None:
    """Refuse to time a network that cannot be run.

    Raises:
        BudgetError: there are no example inputs.
    """
    if not network.example_inputs and not network.example_kwargs:
        raise BudgetError(
            "latency needs example inputs", network.name,
            "a time is that of one forward pass on them", "give example_inputs=, or data",
        )  # fmt: skip


def clock(jobs: Sequence[Job], threads: int, seconds: float) -> list[list[float]]:
    """Time jobs in turn, round by round.

    Args:
        jobs: what to time.
        threads: of torch meanwhile.
        seconds: what it may take, about; there are at least five rounds.

    Returns:
        per round the time of each job [s].
    """
    before = torch.get_num_threads()
    ready = [(job.module, [(_made(c.args), _made(c.kwargs), c.count) for c in job.calls])
             for job in jobs]  # fmt: skip
    now = _process if threads == 1 and _exact(jobs) else time.perf_counter

    def run(i: int, times: int) -> float:
        module, calls = ready[i]
        _settle(jobs[i].module)
        start = now()
        for args, kwargs, count in calls:
            for _ in range(count * times):
                module(*args, **kwargs)
        _settle(jobs[i].module)
        return (now() - start) / times

    rows: list[list[float]] = []
    try:
        torch.set_num_threads(threads)
        with at_rest(*{id(job.module): job.module for job in jobs}.values()), torch.no_grad():
            for i in range(len(jobs)):  # the first call allocates
                run(i, 1)
            once = [max(1e-7, run(i, 1)) for i in range(len(jobs))]
            times = [max(1, math.ceil(ONE / t)) for t in once]
            each = math.fsum(t * n for t, n in zip(once, times, strict=True))
            end = time.perf_counter() + seconds  # other processes stretch it beyond the estimate
            for _ in range(max(LEAST, min(MOST, int(seconds / each)))):
                if len(rows) >= LEAST and time.perf_counter() > end:
                    break
                rows.append([run(i, times[i]) for i in range(len(jobs))])
    finally:
        torch.set_num_threads(before)
    return rows


def record_calls(network: Network, paths: Sequence[str]) -> dict[str, tuple[Call, ...]]:
    """Run the example inputs once, and note how the modules at `paths` are called.

    Raises:
        BudgetError: the network fails on its example inputs.
    """
    found: dict[str, dict[str, Call]] = {path: {} for path in paths}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = outline((args, kwargs))
            key = repr(seen)
            count = found[path][key].count if key in found[path] else 0
            found[path][key] = Call(seen[0], seen[1], count + 1)

        return hook

    with isolated(network) as (module, args, kwargs), at_rest(module), torch.no_grad():
        for path in paths:
            module.get_submodule(path).register_forward_pre_hook(note(path), with_kwargs=True)
        try:
            module(*args, **kwargs)
        except Exception as error:  # whatever a user's forward may raise
            raise BudgetError(
                "latency cannot be measured", network.name,
                f"the network fails on its example inputs ({one_line(error)})",
                "give example_inputs= that it takes",
            ) from error  # fmt: skip
    return {path: tuple(calls.values()) for path, calls in found.items()}


def whole_call(network: Network) -> Call:
    """Return the one call of a forward pass: the example inputs as they are."""
    return Call(tuple(network.example_inputs), dict(network.example_kwargs))


def outline(value: Any) -> Any:
    """Return inputs with floating tensors replaced by their outlines; the rest stays."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and not value.is_sparse:
            return Like(tuple(value.shape), value.stride(), value.dtype, value.device)
        return _Kept(value.detach().clone())
    if isinstance(value, (tuple, list)):
        return tuple(outline(v) for v in value)
    if isinstance(value, Mapping):
        return {k: outline(v) for k, v in value.items()}
    return value


def middle(values: Sequence[float]) -> tuple[float, float]:
    """Return a median, and twice its standard error (from the median deviation), at least NOISE."""
    center = median(values)
    spread = 1.4826 * median(abs(v - center) for v in values)
    return center, max(NOISE * center, 2 * 1.2533 * spread / math.sqrt(len(values)))


# --- its parts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """A tensor whose values matter (indices, masks); told by its outline alone."""

    tensor: Tensor

    def __repr__(self) -> str:
        return f"{tuple(self.tensor.shape)} {self.tensor.dtype} {self.tensor.device}"


def _made(value: Any) -> Any:
    if isinstance(value, Like):
        return value.make()
    if isinstance(value, _Kept):
        return value.tensor
    if isinstance(value, tuple):
        return tuple(_made(v) for v in value)
    if isinstance(value, dict):
        return {k: _made(v) for k, v in value.items()}
    return value


def _exact(jobs: Sequence[Job]) -> bool:
    fine = time.get_clock_info("process_time").resolution <= 1e-6
    return fine and all(device_of(job.module).type == "cpu" for job in jobs)


_process = time.process_time


def _settle(module: nn.Module) -> None:
    if device_of(module).type == "cuda":
        torch.cuda.synchronize()
