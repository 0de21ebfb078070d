"""Steps and least values: any come back, a factor makes them short, and damage is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.forms.test_affine import random_affine

from lamina.artifact import records, steps, streams
from lamina.errors import FileError
from lamina.forms import Affine


def body_of(values):
    data = memoryview(records.encode(values))
    return bytes(data[records.read_varint(data, 0)[1] :])


def back_of(values):
    shape = tuple(values.symbols.shape)
    return streams.decode(records.parse(memoryview(body_of(values)), shape, values.dtype))


def bits(tensor):
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32).tolist()


@given(st.integers(0, 999), st.sampled_from([torch.float16, torch.float32]), st.booleans())
def test_any_numbers_come_back(seed, kind, related):
    """Signed zeros, subnormals, the largest: all that is finite."""
    draw = np.random.default_rng(seed)
    found = torch.from_numpy(draw.integers(0, 256, 4 * 60, dtype=np.uint8)).view(kind)[:40]
    found = torch.where(torch.isfinite(found), found, torch.zeros((), dtype=kind)).reshape(2, 4, 5)
    leasts = (found[0].float() * -7.5).to(kind) if related else found[1]
    leasts = torch.where(torch.isfinite(leasts), leasts, torch.ones((), dtype=kind))
    values = Affine(torch.from_numpy(draw.integers(-8, 8, (4, 20))), found[0], leasts, 4)
    back = back_of(values)
    assert isinstance(back, Affine) and back.block == 4
    assert back.leasts is not None and back.steps.dtype == back.leasts.dtype == kind
    assert bits(back.steps) == bits(values.steps) and bits(back.leasts) == bits(leasts)
    assert torch.equal(back.symbols.long(), values.symbols)


def test_least_values_are_told_by_the_steps():
    """Rows of different size: what is proportional to the step costs little beside it."""
    draw = np.random.default_rng(0)
    size = draw.lognormal(-5, 1.0, (300, 20))
    each, leasts = torch.from_numpy(size).half(), torch.from_numpy(-7.5 * size).half()
    symbols = torch.zeros(300, 640, dtype=torch.int32)
    alone = len(steps.encode(Affine(symbols, each, None, 32)))
    both = len(steps.encode(Affine(symbols, each, leasts, 32)))
    random = leasts.reshape(-1)[torch.from_numpy(draw.permutation(6000))].reshape(300, 20)
    mixed = len(steps.encode(Affine(symbols, each, random, 32)))
    assert both < 1.35 * alone < 1.8 * alone < mixed


def test_damage_is_refused():
    values = random_affine(0, torch.float16, True, 32, 16)
    shape, dtype = (12, 64), torch.float32
    body = body_of(values)

    def read(data, shape=shape, dtype=dtype):
        return streams.dense(records.parse(memoryview(data), shape, dtype))

    assert torch.equal(read(body), values.dense())
    with pytest.raises(FileError, match="no such blocks"):
        read(body[:1] + b"\x21" + body[2:])  # 33 columns
    with pytest.raises(FileError, match="no such blocks"):
        read(body[:1] + b"\0" + body[2:])
    for empty in ((), (0, 64), (12, 0)):
        with pytest.raises(FileError, match="no such blocks"):
            read(body, empty)
    with pytest.raises(FileError, match="floats only"):
        read(body, dtype=torch.int32)
    for part in range(2, len(body) - 200, 7):
        with pytest.raises(FileError):
            read(body[:part])
    at = 3 + body[2]
    assert struct.unpack("<f", body[at : at + 4])[0] < 0
    with pytest.raises(FileError, match="factor"):
        read(body[:at] + struct.pack("<f", float("nan")) + body[at + 4 :])
    endless = Affine(values.symbols, values.steps * torch.inf, None, 32)
    with pytest.raises(FileError, match="not finite"):
        read(body_of(endless))
    with pytest.raises(FileError, match="unknown form of values"):
        read(bytes([body[0] | 7]) + body[1:])
