"""Tensor records: every form, dtype and shape comes back bit for bit; damage is a FileError."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.artifact import records, streams
from lamina.errors import FileError
from lamina.forms import Codebook, Grid, Plain, Sparse

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = st.one_of(
    st.sampled_from([(), (0,), (1,), (0, 3), (3, 0, 2), (1, 1, 1), (7,), (5, 1)]),
    st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
)


def bits(tensor):
    """A tensor's bytes by another way than the one under test: NaNs and signed zeros count."""
    flat = tensor.detach().clone().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and bits(a) == bits(b)


def body_of(record):
    length, at = records.read_varint(memoryview(record), 0)
    assert length == len(record) - at, "a record is as long as it says"
    return memoryview(record)[at:]


def read_record(body, shape, dtype):
    return streams.decode(records.parse(body, shape, dtype))


def round_trip(values):
    dense = values.dense()
    body = body_of(records.encode(values))
    return read_record(body, tuple(dense.shape), dense.dtype)


def random_bits(shape, dtype, seed):
    """Any bit pattern: NaNs with payloads, infinities, subnormals, negative zeros."""
    generator = np.random.default_rng(seed)
    if dtype == torch.bool:
        return torch.from_numpy(np.array(generator.integers(0, 2, shape), dtype=bool))
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    raw = torch.from_numpy(generator.integers(0, 256, size, dtype=np.uint8))
    return raw.view(dtype).reshape(shape).clone()


@given(SHAPES, st.sampled_from(list(records.DTYPES.values())), st.integers(0, 999))
def test_plain_keeps_every_bit_of_every_dtype(shape, dtype, seed):
    tensor = random_bits(shape, dtype, seed)
    back = round_trip(Plain(tensor))
    assert isinstance(back, Plain)
    assert same(back.tensor, tensor)


@given(SHAPES, st.sampled_from((*FLOATS, torch.int64, torch.int8)), st.integers(0, 999))
def test_sparse_keeps_every_bit_and_the_pattern(shape, dtype, seed):
    tensor = random_bits(shape, dtype, seed)
    keep = torch.from_numpy(np.array(np.random.default_rng(seed).random(shape) < 0.3))
    tensor = torch.where(keep, tensor, torch.zeros((), dtype=dtype))
    back = round_trip(Sparse(tensor))
    assert isinstance(back, Sparse)
    assert same(back.tensor, tensor)


def test_sparse_keeps_a_negative_zero():
    tensor = torch.tensor([[0.0, -0.0, 1.0], [0.0, 0.0, float("nan")]])
    assert same(round_trip(Sparse(tensor)).dense(), tensor)


@given(SHAPES, st.integers(1, 300), st.sampled_from(FLOATS), st.integers(0, 999))
def test_codebook_keeps_indices_and_centroids(shape, count, dtype, seed):
    generator = np.random.default_rng(seed)
    index = torch.from_numpy(np.array(generator.integers(0, count, shape)))
    values = Codebook(index, torch.from_numpy(generator.normal(size=count)).float(), dtype)
    back = round_trip(values)
    assert isinstance(back, Codebook)
    assert torch.equal(back.index.long(), index)
    assert same(back.centroids, values.centroids)
    assert same(back.dense(), values.dense())


@given(SHAPES, st.floats(2.0**-20, 10, width=32), st.sampled_from(FLOATS), st.integers(0, 999))
def test_grid_keeps_symbols_and_step(shape, step, dtype, seed):
    generator = np.random.default_rng(seed)
    wide = 10.0 ** int(generator.integers(0, 7))
    symbols = torch.from_numpy(np.array(np.rint(generator.normal(0, wide, shape)), dtype=np.int32))
    back = round_trip(Grid(symbols, step, dtype=dtype))
    assert isinstance(back, Grid)
    assert torch.equal(back.symbols.int(), symbols)
    assert same(back.dense(), Grid(symbols, step, dtype=dtype).dense())


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    st.sampled_from([0, 1, 2]),
    st.sampled_from(FLOATS),
    st.integers(0, 999),
)
def test_grid_with_exponents_keeps_them(shape, axis, dtype, seed):
    generator = np.random.default_rng(seed)
    rows, columns = shape[0], math.prod(shape[1:])
    count = (rows, columns, rows + columns)[axis]
    symbols = torch.from_numpy(generator.integers(-9, 10, shape, dtype=np.int32))
    exponents = torch.from_numpy(generator.integers(-6, 7, count, dtype=np.int32))
    values = Grid(symbols, 0.125, exponents, axis, dtype)
    back = round_trip(values)
    assert isinstance(back, Grid)
    assert torch.equal(back.exponents, exponents)
    assert back.axis == axis
    assert same(back.dense(), values.dense())


def test_exponents_of_two_axes_and_of_one_exclude_each_other():
    grid = Grid(torch.ones(2, 3, dtype=torch.int32), 0.5, torch.zeros(5, dtype=torch.int32), 2)
    body = bytearray(records.encode(grid)[1:])
    assert records.parse(memoryview(bytes(body)), (2, 3), torch.float32).axis == 2
    body[0] |= 0x80
    with pytest.raises(FileError, match="two axes"):
        records.parse(memoryview(bytes(body)), (2, 3), torch.float32)


@pytest.mark.parametrize("codec", range(3))
def test_every_codec_of_the_format_decodes(codec):
    """What `best` never chooses must decode all the same: the ids are part of the format."""
    from lamina import codecs

    symbols = np.arange(-6, 6, dtype=np.int32).reshape(3, 4)
    data = codecs.get(records.CODEC_IDS[codec]).encode(symbols)
    body = bytes([3 | codec << 3]) + np.float32(0.5).tobytes() + data
    back = read_record(memoryview(body), (3, 4), torch.float32)
    assert back.symbols.tolist() == symbols.tolist()
    assert records.parse(memoryview(body), (3, 4), torch.float32).codec == records.CODEC_IDS[codec]


@given(st.integers(0, 1 << 62))
def test_varint(value):
    data = records.varint(value)
    assert len(data) == max(1, -(-value.bit_length() // 7))
    assert records.read_varint(memoryview(data + b"\xff"), 0) == (value, len(data))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 9, b"\xff" * 40])
def test_a_varint_without_end_is_refused(data):
    with pytest.raises(FileError):
        records.read_varint(memoryview(data), 0)


GRID = bytes([3 | 1 << 3]) + np.float32(1).tobytes()
BAD = {
    "empty": (b"", (2,), torch.float32, "empty"),
    "unknown form": (bytes([5]), (2,), torch.float32, "unknown form"),
    "unknown codec": (bytes([3 | 7 << 3]) + b"\0" * 9, (2,), torch.float32, "unknown codec"),
    "plain too short": (bytes(8), (2,), torch.float32, "wrong length"),
    "plain too long": (bytes(10), (2,), torch.float32, "wrong length"),
    "a third truth value": (bytes([0, 1, 2]), (2,), torch.bool, "truth value"),
    "step cut off": (bytes([3, 0, 0]), (2,), torch.float32, "cut off"),
    "centroids cut off": (bytes([2, 200, 1, 0, 0]), (2,), torch.float32, "cut off"),
    "mask cut off": (bytes([1, 90, 0]), (2,), torch.float32, "cut off"),
    "a mask of twos": (bytes([1, 4, 2, 0, 0, 0, 0, 0, 0, 0]), (1,), torch.float32, "0 and 1"),
    "index past the end": (
        bytes([2, 0]) + bytes(4) + (9).to_bytes(4, "little"),
        (1,),
        torch.float32,
        "out of range",
    ),
    "index below zero": (bytes([2, 0]) + bytes(4) + b"\xff" * 4, (1,), torch.float32, "range"),
    "exponents of a scalar": (bytes([3 | 0x40]) + bytes(9), (), torch.float32, "no axes"),
    "exponent out of range": (
        bytes([3 | 0x40]) + bytes(4) + bytes([0, 4]) + (999).to_bytes(4, "little") + bytes(4),
        (1,),
        torch.float32,
        "out of range",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_record_is_refused(name):
    body, shape, dtype, words = BAD[name]
    with pytest.raises(FileError, match=words):
        read_record(memoryview(body), shape, dtype)


@given(st.binary(max_size=60), st.sampled_from([(), (3,), (4, 5), (2, 3, 2)]), st.integers(0, 11))
def test_noise_is_refused_or_has_the_declared_shape(body, shape, kind):
    """No checksum guards a record from its writer: a hostile one may still only raise FileError."""
    dtype = list(records.DTYPES.values())[kind]
    try:
        back = read_record(memoryview(body), shape, dtype)
    except FileError:
        return
    assert tuple(back.dense().shape) == shape


@given(st.data())
def test_one_wrong_byte_in_a_coded_record_is_no_crash(data):
    symbols = torch.from_numpy(np.random.default_rng(1).integers(-3, 4, (12, 9), dtype=np.int32))
    exponents = torch.arange(9, dtype=torch.int32) - 4
    values = data.draw(
        st.sampled_from(
            [
                Grid(symbols, 0.5, exponents),
                Codebook(symbols + 3, torch.arange(7.0)),
                Sparse(symbols.float()),
            ]
        )
    )
    body = bytearray(body_of(records.encode(values)))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] ^= data.draw(st.integers(1, 255))
    try:
        back = read_record(memoryview(bytes(body)), (12, 9), torch.float32)
    except FileError:
        return
    assert tuple(back.dense().shape) == (12, 9)


def test_a_record_of_nothing_is_as_short_as_can_be():
    """Every header byte counts in a small file: form, step, and no symbols at all."""
    assert len(records.encode(Grid(torch.zeros(50, 80, dtype=torch.int32), 0.1))) == 6
