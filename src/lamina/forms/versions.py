"""Telling whether a tensor has changed since something was made of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def version_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes whenever a tensor is written to, moved or replaced.

    What is written behind torch's back (through `.data` or shared memory) does not show.

    Example:
        >>> import torch
        >>> weight = torch.zeros(2)
        >>> before = version_of(weight)
        >>> version_of(weight) == before, version_of(weight.add_(1)) == before
        (True, False)
    """
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device, tensor.shape
