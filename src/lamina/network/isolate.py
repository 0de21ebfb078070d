"""Run a network without leaving a trace on it: a copy, in evaluation mode, with its own inputs."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from lamina.network.source import Network

NO_INPUTS = "there are no example inputs, so positions are taken as 1 per sample"


@contextmanager
def isolated(network: Network) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Yield a module in evaluation mode, positional and keyword inputs: safe to run and to hook.

    The module is a deep copy. Where it cannot be copied (it caches a tensor with a gradient, say)
    it is the user's own, and training flags and buffers are put back afterwards. The random state
    is kept.

    Example:
        >>> net = Network(nn.Linear(3, 2), (torch.zeros(1, 3),))
        >>> with isolated(net) as (module, args, kwargs):
        ...     (module is net.module, module.training, module(*args).shape)
        (False, False, torch.Size([1, 2]))
    """
    args = tuple(clone(value) for value in network.example_inputs)
    kwargs = {key: clone(value) for key, value in network.example_kwargs.items()}
    cuda = {p.device.index or 0 for p in network.module.parameters() if p.device.type == "cuda"}
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=sorted(cuda)),
        # Compiled parts cannot be hooked or exported. Asking for it imports the compiler, which is
        # slow, so it is asked for only where something has been compiled.
        torch.compiler.set_stance("force_eager")
        if "torch._dynamo" in sys.modules
        else nullcontext(),
    ):
        warnings.simplefilter("ignore")  # of the user's own code; it warns again when they run it
        module = _copy(network.module)
        with nullcontext() if module is not None else _restored(network.module):
            yield (network.module if module is None else module).eval(), args, kwargs


def _copy(module: nn.Module) -> nn.Module | None:
    try:
        return copy.deepcopy(module)
    except Exception:  # any user class may fail to copy, in any way
        return None


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    flags = [(m, m.training) for m in module.modules()]
    buffers = [
        (m, name, tensor, None if tensor is None else tensor.detach().clone())
        for m in module.modules()
        for name, tensor in m._buffers.items()
    ]
    try:
        yield
    finally:
        for m, training in flags:
            m.training = training
        with torch.no_grad():
            for m, name, tensor, before in buffers:
                m._buffers[name] = tensor
                if tensor is not None and before is not None:
                    tensor.copy_(before)


def clone(value: Any) -> Any:
    """Copy the tensors of an input, through tuples, lists and dicts: networks may write to them."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(clone(item) for item in value)
    if type(value) is dict:
        return {key: clone(item) for key, item in value.items()}
    return value


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Return the length of dimension 0 of the first tensor among the inputs, at least 1."""
    queue = [*args, *kwargs.values()]
    while queue:
        value = queue.pop(0)
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return max(1, value.shape[0])
        if isinstance(value, (tuple, list)):
            queue[:0] = value
        elif isinstance(value, Mapping):
            queue[:0] = value.values()
    return 1


def one_line(error: BaseException, limit: int = 160) -> str:
    """Return an exception as one short line: its type, and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
