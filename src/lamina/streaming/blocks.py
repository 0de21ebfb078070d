"""Running a network whose values are not there: modules get them when they run, and give them back.

The repeated blocks of a network (encoder layers, decoder layers) run one after another, each over
all batches; what comes before and after them runs as the network itself runs it, with the blocks
standing still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import DataError, NetworkError
from lamina.measure.columns import main_tensor
from lamina.measure.forward import Batch, call

FEWEST = 2  # blocks
Values = Callable[[str], Tensor]  # name to values
Around = Callable[[Batch], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Stack:
    """The repeated blocks of a network.

    Args:
        path: of their list, e.g. `"model.layers"`.
        blocks: in the order they run.
    """

    path: str
    blocks: tuple[nn.Module, ...]

    def prefix(self, i: int) -> str:
        """Return the path of one block."""
        return f"{self.path}.{i}"


@dataclass(frozen=True)
class Passing:
    """What one batch brings to a block.

    Args:
        args, kwargs: of the block's call; its main input is in one of them.
        where: the position in args, or the name in kwargs, of that input.
        mask: `[samples, tokens]`, 0 for padding, or None.
        size: samples.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    where: int | str
    mask: Tensor | None
    size: int

    @property
    def hidden(self) -> Tensor:
        """The main input."""
        given = self.args[self.where] if isinstance(self.where, int) else self.kwargs[self.where]
        assert isinstance(given, Tensor)
        return given

    def with_hidden(self, hidden: Tensor) -> Passing:
        """Return the same with another main input."""
        if isinstance(self.where, int):
            args = list(self.args)
            args[self.where] = hidden
            return replace(self, args=tuple(args))
        return replace(self, kwargs={**self.kwargs, self.where: hidden})


def alone(batch: Batch) -> AbstractContextManager[Any]:
    """Watch nothing."""
    return nullcontext()


class _Stop(Exception):
    """Ends a forward pass where the blocks begin."""


def find_blocks(root: nn.Module) -> Stack:
    """Return the longest list of modules of one class; of equally long ones that with most weights.

    Raises:
        NetworkError: there is no such list, or there are two stacks that belong together (an
            encoder and a decoder).
    """
    found: list[tuple[int, int, str, nn.ModuleList]] = []
    for path, module in root.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < FEWEST:
            continue
        within = any(path.startswith(f"{other}.") for _, _, other, _ in found)
        if not within and len({type(block) for block in module}) == 1:
            size = sum(p.numel() for p in module.parameters())
            found.append((len(module), size, path, module))
    if not found:
        raise NetworkError(
            "the network cannot be calibrated layer by layer", type(root).__name__,
            "it has no list of blocks of one class", "leave the data out: data-free it streams",
        )  # fmt: skip
    found.sort(key=lambda each: each[:2])
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        raise NetworkError(
            "the network cannot be calibrated layer by layer", type(root).__name__,
            "it has an encoder and a decoder", "leave the data out: data-free it streams",
        )  # fmt: skip
    return Stack(found[-1][2], tuple(found[-1][3]))


@contextmanager
def on_demand(root: nn.Module, values: Values, outside: str) -> Iterator[None]:
    """Give modules their own parameters while they run, all but those below one path."""
    handles, lenders = [], []
    for path, module in root.named_modules():
        inside = path == outside or path.startswith(f"{outside}.")
        if inside or not any(p is not None for p in module._parameters.values()):
            continue
        lender = _Lender(path, values)
        lenders.append((lender, module))
        handles.append(module.register_forward_pre_hook(lender.lend, prepend=True))
        handles.append(module.register_forward_hook(lender.take_back, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for lender, module in lenders:
            lender.take_back(module)


class _Lender:
    """Lends one module its own parameters."""

    def __init__(self, path: str, values: Values) -> None:
        self.path, self.values = path, values
        self.own: dict[str, Any] = {}

    def lend(self, module: nn.Module, args: Any) -> None:
        if self.own:
            return  # it is running already
        self.own = dict(module._parameters)
        for leaf, parameter in self.own.items():
            if parameter is not None:
                name = f"{self.path}.{leaf}" if self.path else leaf
                module._parameters[leaf] = nn.Parameter(self.values(name), requires_grad=False)

    def take_back(self, module: nn.Module, args: Any = None, output: Any = None) -> None:
        module._parameters.update(self.own)
        self.own = {}


@contextmanager
def whole(block: nn.Module, prefix: str, values: Values) -> Iterator[None]:
    """Give a block all its parameters; afterwards they are on `meta` again."""
    slots = []
    for path, part in block.named_modules():
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                name = ".".join(filter(None, (prefix, path, leaf)))
                slots.append((part, leaf, parameter))
                part._parameters[leaf] = nn.Parameter(values(name), requires_grad=False)
    try:
        yield
    finally:
        for part, leaf, parameter in slots:
            part._parameters[leaf] = parameter


def enter(
    root: nn.Module, stack: Stack, batches: Sequence[Batch], values: Values, around: Around = alone
) -> list[Passing]:
    """Run what comes before the blocks on every batch, and return what the first block is given.

    Args:
        around: a context for each batch, in which it is watched.

    Raises:
        DataError: the network does not take a batch.
        NetworkError: a block gets no floating tensor.
    """
    caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append((args, dict(kwargs)))
        raise _Stop

    handle = stack.blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    found = []
    try:
        with on_demand(root, values, stack.path), torch.no_grad():
            for batch in batches:
                try:
                    with around(batch):
                        call(root, batch)
                except _Stop:
                    pass
                except DataError as error:
                    if not isinstance(error.__cause__, _Stop):
                        raise
                found.append(_passing(*caught.pop(), batch))
    finally:
        handle.remove()
    return found


def _passing(args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch) -> Passing:
    for i, given in enumerate(args):
        if isinstance(given, Tensor) and given.is_floating_point():
            return Passing(args, kwargs, i, batch.mask, batch.size)
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and given.is_floating_point() and "mask" not in name:
            return Passing(args, kwargs, name, batch.mask, batch.size)
    raise NetworkError("a block gets no floating tensor", "", "it cannot be run by itself")


def run_block(block: nn.Module, passing: Passing) -> tuple[Tensor, bool]:
    """Return a block's main output, the next one's main input, and whether it was in a tuple.

    Raises:
        NetworkError: it returns no such tensor.
    """
    raw = block(*passing.args, **passing.kwargs)
    output = main_tensor(raw)
    if output is None or output.shape != passing.hidden.shape:
        raise NetworkError(
            "a block does not return what the next one takes", type(block).__name__,
            "", "leave the data out: data-free it streams",
        )  # fmt: skip
    return output, isinstance(raw, (tuple, list))


def leave(
    root: nn.Module, stack: Stack, batches: Sequence[Batch], ends: Sequence[Tensor],
    tupled: bool, values: Values, around: Around = alone,
) -> None:  # fmt: skip
    """Run what comes after the blocks on every batch.

    Args:
        ends: the last block's main output on each.
        tupled: blocks return it in a tuple.
        around: a context for each batch, in which it is watched.
    """
    with on_demand(root, values, stack.path), torch.no_grad():
        for batch, end in zip(batches, ends, strict=True):
            with _standing(stack, (end,) if tupled else end), around(batch):
                call(root, batch)


@contextmanager
def _standing(stack: Stack, end: Any) -> Iterator[None]:
    """Let all blocks return what the last one gave."""
    for block in stack.blocks:
        block.forward = lambda *args, **kwargs: end  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in stack.blocks:
            del block.forward
