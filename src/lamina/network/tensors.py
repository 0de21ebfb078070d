"""The tensors of a module by name: which are the same memory, and which cannot be compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import is_lazy

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Tensors:
    """Every parameter and persistent buffer of a module, in `state_dict` order.

    Args:
        by_name: name -> tensor; tied tensors under each of their names.
        first: name -> the first name of the very same memory (itself, if it is not tied).
        names: first name -> all names of that memory, in order.
        overlaps: name -> another tensor whose memory it shares only in part.
    """

    by_name: Mapping[str, torch.Tensor]
    first: Mapping[str, str]
    names: Mapping[str, tuple[str, ...]]
    overlaps: Mapping[str, str]

    def aliases(self, name: str) -> tuple[str, ...]:
        """The other names of the same tensor, in order."""
        return tuple(n for n in self.names[self.first[name]] if n != name)


def join(path: str, leaf: str) -> str:
    """Return the dotted name of something inside a module; the root has the empty path."""
    return f"{path}.{leaf}" if path else leaf


def named_tensors(module: nn.Module) -> Tensors:
    """List a module's parameters and persistent buffers with their ties, by storage identity.

    Example:
        >>> pair = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        >>> pair[1].weight = pair[0].weight
        >>> named_tensors(pair).first["1.weight"]
        '0.weight'
    """
    by_name: dict[str, torch.Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for leaf, parameter in part._parameters.items():
            if parameter is not None:
                by_name[join(path, leaf)] = parameter
        passing = getattr(part, "_non_persistent_buffers_set", ())
        for leaf, buffer in part._buffers.items():
            if buffer is not None and leaf not in passing:
                by_name[join(path, leaf)] = buffer
    seen: dict[object, str] = {}
    first = {name: seen.setdefault(_identity(tensor), name) for name, tensor in by_name.items()}
    names: dict[str, tuple[str, ...]] = {}
    for name, same in first.items():
        names[same] = (*names.get(same, ()), name)
    return Tensors(by_name, first, names, _overlaps(by_name, first))


def unfit(tensor: torch.Tensor, meta: bool = False) -> str:
    """Return why a tensor's values cannot be compressed, or `""`.

    Args:
        tensor: it.
        meta: values that are elsewhere are welcome.
    """
    if is_lazy(tensor):
        return "it is uninitialised; run the network once first"
    if type(tensor) not in (nn.Parameter, torch.Tensor, nn.Buffer):
        return f"it is a tensor subclass ({type(tensor).__name__})"
    if tensor.layout != torch.strided:
        return f"its layout is {str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_quantized:
        return "it is quantized already"
    if tensor.dtype not in FLOATS:
        return f"its dtype is {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.is_meta and not meta:
        return "it is on the meta device and has no values"
    if any(s == 0 and n > 1 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        return "its elements share memory (an expanded tensor)"
    return ""


def _has_memory(tensor: torch.Tensor) -> bool:
    if is_lazy(tensor) or tensor.layout != torch.strided:
        return False
    try:
        return not tensor.is_meta and tensor.numel() > 0 and tensor.data_ptr() != 0
    except RuntimeError:  # subclasses without storage
        return False


def _identity(tensor: torch.Tensor) -> object:
    if not _has_memory(tensor):
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _overlaps(by_name: Mapping[str, torch.Tensor], first: Mapping[str, str]) -> dict[str, str]:
    spans = []
    for name, tensor in by_name.items():
        if first[name] == name and _has_memory(tensor):
            reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            end = start + (reach + 1) * tensor.element_size()
            spans.append((str(tensor.device), start, end, name))
    spans.sort()
    found: dict[str, str] = {}
    widest = ("", 0, 0, "")
    for span in spans:
        if span[0] == widest[0] and span[1] < widest[2]:
            found.setdefault(span[3], widest[3])
            found.setdefault(widest[3], span[3])
        if span[0] != widest[0] or span[2] > widest[2]:
            widest = span
    return {name: found[first[name]] for name in by_name if first[name] in found}
