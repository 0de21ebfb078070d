"""The steps and least values of records on a grid per block, to bytes and back.

    steps  = planes of the steps' bits, as integers of 16 or 32 bits
    leasts = float32 factor, then planes of the bits of the least values less those of factor * step

A least value is about a factor of its step, the same in a whole tensor: what differs is small. A
factor of 0 leaves the bits as they are.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamina.codecs import planes
from lamina.codecs.fields import varint
from lamina.errors import FileError
from lamina.forms import Affine

KINDS = {torch.float16: ("<f2", "<u2"), torch.float32: ("<f4", "<u4")}  # numbers, their bits


@dataclass(frozen=True)
class Steps:
    """What a record says of steps and least values; not decoded yet.

    Args:
        block: columns that share a step.
        kind: float16 or float32.
        coded: planes of the steps.
        factor: of the step, a first guess at the least value.
        leasts: planes of what least values differ by, or None.
    """

    block: int
    kind: torch.dtype
    coded: memoryview
    factor: float = 0.0
    leasts: memoryview | None = None


def encode(values: Affine) -> bytes:
    """Return block, steps and least values as a record holds them."""
    number, word = KINDS[values.steps.dtype]
    steps = _array(values.steps)
    out = varint(values.block) + _framed(_planes(steps.view(word)))
    if values.leasts is None:
        return out
    leasts = _array(values.leasts)
    with np.errstate(all="ignore"):
        ratio = leasts.astype(np.float64) / steps.astype(np.float64)
    ratio = ratio[np.isfinite(ratio)]
    factors = [0.0, float(np.float32(np.median(ratio)))] if ratio.size else [0.0]
    coded = [
        (factor, _planes(leasts.view(word) - _guessed(steps, factor, number).view(word)))
        for factor in factors
    ]
    factor, data = min(coded, key=lambda one: len(one[1]))
    return out + struct.pack("<f", factor) + _framed(data)


def decode(steps: Steps, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return steps and least values `[count]`, of their kind.

    Raises:
        FileError: they are damaged.
    """
    number, word = KINDS[steps.kind]
    size = np.dtype(word).itemsize
    found = planes.decode(steps.coded, count * size, size, False).view(number)
    leasts = None
    if steps.leasts is not None:
        bits = planes.decode(steps.leasts, count * size, size, False).view(word)
        leasts = (bits + _guessed(found, steps.factor, number).view(word)).view(number)
    if not np.isfinite(found).all() or (leasts is not None and not np.isfinite(leasts).all()):
        raise FileError("a step or a least value is not finite", "", "the file is damaged")
    return torch.from_numpy(found), None if leasts is None else torch.from_numpy(leasts)


def _guessed(steps: NDArray[Any], factor: float, number: str) -> NDArray[Any]:
    with np.errstate(all="ignore"):  # what overflows is a wrong guess, no error
        return (steps.astype(np.float32) * np.float32(factor)).astype(number)


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    number = KINDS[tensor.dtype][0]
    return tensor.detach().cpu().contiguous().reshape(-1).numpy().astype(number, copy=False)


def _planes(words: NDArray[Any]) -> bytes:
    return planes.encode(np.ascontiguousarray(words).tobytes(), words.itemsize, False)


def _framed(data: bytes) -> bytes:
    return varint(len(data)) + data
