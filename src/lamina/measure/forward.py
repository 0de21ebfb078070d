"""Run a network over batches without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamina.data import inputs_of, labels_of
from lamina.data.batches import cut_batch
from lamina.errors import DataError, LaminaError


@dataclass(frozen=True)
class Batch:
    """One batch on the network's device.

    Args:
        args, kwargs: what the network is called with; dimension 0 of tensors is the sample.
        labels: the batch's labels, or None; on the network's device.
        size: number of samples.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Tensor | None
    size: int

    def head(self, samples: int) -> Batch:
        """Return the first `samples` samples."""
        if samples >= self.size:
            return self
        args, kwargs, labels = (
            cut_batch(v, samples, self.size) for v in (self.args, self.kwargs, self.labels)
        )
        return Batch(args, kwargs, labels, samples)

    @property
    def mask(self) -> Tensor | None:
        """The `attention_mask` of a language batch [samples, tokens], or None."""
        mask = self.kwargs.get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's first parameter or buffer (CPU where it has none)."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def batches(
    module: nn.Module, loader: Iterable[Any], samples: int | None = None
) -> Iterator[Batch]:
    """Yield the batches of a loader on the module's device, `samples` samples in all.

    Floating inputs follow the dtype of the module's parameters where these agree on one; the last
    batch is cut so that the count is exact.

    Raises:
        DataError: a batch cannot be read, holds no samples, or there is no batch at all.
    """
    device = device_of(module)
    kinds = {p.dtype for p in module.parameters() if p.is_floating_point()}
    dtype = kinds.pop() if len(kinds) == 1 else None
    seen = 0
    for raw in loader:
        if samples is not None and seen >= samples:
            break
        args, kwargs = inputs_of(raw)
        labels = labels_of(raw)
        size = _size(args, kwargs)
        batch = Batch(
            _move(args, device, dtype),
            _move(kwargs, device, dtype),
            None if labels is None else labels.to(device),
            size,
        )
        if samples is not None:
            batch = batch.head(samples - seen)
        seen += batch.size
        yield batch
    if seen == 0:
        raise DataError("no batches", "data", "it is empty", "give at least one batch")


def call(module: nn.Module, batch: Batch, example: tuple[Any, ...] = ()) -> Any:
    """Call a module on a batch and return its raw output.

    Raises:
        DataError: the module does not take the batch; names the batch's shapes and the example's.
    """
    try:
        return module(*batch.args, **batch.kwargs)
    except (LaminaError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a user's forward may raise
        takes = f", the network takes {_shapes(example, {})}" if example else ""
        raise DataError(
            "the network does not take this batch",
            f"batch {_shapes(batch.args, batch.kwargs)}{takes}",
            f"{type(error).__name__}: {str(error)[:300]}",
            "give batches of the shape and dtype the network was made for",
        ) from error


@contextmanager
def at_rest(*modules: nn.Module, seed: int = 0) -> Iterator[None]:
    """Keep modules in evaluation mode, and put every trace of running them back afterwards.

    Training flags and buffers are restored, random state is forked and seeded, and the fused
    attention path is off: it would go round the hooks of the layers inside.
    """
    flags = {m: m.training for module in modules for m in module.modules()}
    buffers = [(b, b.detach().clone()) for module in modules for b in module.buffers()]
    devices = {device_of(module) for module in modules}
    cuda = [d for d in devices if d.type == "cuda"]
    recurrent = any(isinstance(m, nn.RNNBase) for m in flags)
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        if cuda and recurrent:  # cuDNN has no backward for recurrent layers in evaluation mode
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            torch.manual_seed(seed)
            torch.backends.mha.set_fastpath_enabled(False)
            for module in modules:
                module.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for m, flag in flags.items():
                m.training = flag
            with torch.no_grad():
                for buffer, before in buffers:
                    if not _same(buffer, before):
                        buffer.copy_(before)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or bool(torch.equal(a, b)) or a.is_meta


def _size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            if len(value) == 0:
                raise DataError("an empty batch", str(list(value.shape)), "it has no samples")
            return len(value)
    raise DataError("a batch holds no tensor with a batch dimension", "data")


def _move(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {k: _move(v, device, dtype) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_move(v, device, dtype) for v in value)
    return value


def _shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    def shape(value: Any) -> str:
        return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    named = [f"{k} {shape(v)}" for k, v in kwargs.items()]
    return ", ".join([*(shape(v) for v in args), *named]) or "()"
