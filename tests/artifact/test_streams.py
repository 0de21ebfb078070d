"""Streams: tensors written part by part are, to the bit, what `dense` of their values gives."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina import codecs
from lamina.artifact import records, streams
from lamina.errors import FileError
from lamina.forms import Affine, Codebook, Grid, Plain, Sparse

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = st.lists(st.integers(1, 7), max_size=4).map(tuple)


def record_of(values, shape=None, dtype=None):
    data = memoryview(records.encode(values))
    length, at = records.read_varint(data, 0)
    assert length == len(data) - at
    dense = values.dense()
    return records.parse(data[at:], shape or tuple(dense.shape), dtype or dense.dtype, "w")


def bits(tensor):
    flat = tensor.detach().clone().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and bits(a) == bits(b)


def cut(cuts):
    """Return a `codecs.parts` that cuts a tensor at these shares of its length."""
    whole = codecs.parts

    def parts(name, data, shape):
        flat = np.concatenate([part.read() for part in whole(name, data, shape)])
        edges = [0, *sorted(int(c * flat.size) for c in cuts), flat.size]
        return tuple(codecs.Part(a, b, lambda a=a, b=b: flat[a:b]) for a, b in pairwise(edges))

    return parts


def example(kind, shape, dtype, seed):
    rng = np.random.default_rng(seed)

    def integers(low, high, size=shape):
        return torch.from_numpy(np.array(rng.integers(low, high, size), dtype=np.int32))

    floats = torch.from_numpy(np.array(rng.normal(size=shape))).to(dtype)
    if kind == "plain":
        return Plain(floats)
    if kind == "sparse":
        return Sparse(torch.where(integers(0, 3) == 0, floats, torch.zeros((), dtype=dtype)))
    if kind == "codebook":
        return Codebook(integers(0, 9), torch.from_numpy(rng.normal(size=9)).float(), dtype)
    symbols = integers(-(10**seed), 10**seed + 1)
    step = float(np.float32(rng.random()))
    if kind == "grid" or not shape:
        return Grid(symbols, step, dtype=dtype)
    if kind.startswith("affine"):
        columns = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
        block = max(b for b in range(1, 6) if columns % b == 0)
        half = torch.float16 if seed % 2 else torch.float32
        count = (int(np.prod(shape)) // columns, columns // block)
        steps, leasts = torch.from_numpy(rng.normal(size=(2, *count))).to(half)
        return Affine(symbols, steps, leasts if kind[-1] == "s" else None, block, dtype)
    axis = int(kind[-1])
    rows, columns = shape[0], int(np.prod(shape[1:]))
    count = (rows, columns, rows + columns)[axis]
    return Grid(symbols, step, integers(-9, 9, count), axis, dtype)


KINDS = ("plain", "sparse", "codebook", "grid", "grid by 0", "grid by 1", "grid by 2")
KINDS += ("affine", "affine, leasts")


@given(
    st.sampled_from(KINDS), SHAPES, st.sampled_from(FLOATS), st.integers(0, 8),
    st.lists(st.floats(0, 1), max_size=4), st.sampled_from([1, 3]),
)  # fmt: skip
def test_a_tensor_written_in_parts_is_the_dense_one(kind, shape, dtype, seed, cuts, threads):
    values = example(kind, shape, dtype, seed)
    record = record_of(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams.codecs, "parts", cut(cuts))
        patch.setattr(streams, "WRITTEN", 5)
        patch.setattr(streams, "CONVERTED", 3)
        patch.setattr(streams, "COPIED", 8)
        assert same(streams.dense(record, threads), values.dense())
        assert same(streams.decode(record).dense(), values.dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_longer_tensor_too(kind, dtype):
    """Longer than what is converted at a time, and than a block of planes."""
    values = example(kind, (811, 700), dtype, 1)
    record = record_of(values)
    assert same(streams.dense(record, 2), values.dense())


@pytest.mark.parametrize("largest", [100, 30_000, 2_000_000_000])
def test_symbols_beyond_what_a_float_holds_are_rounded_as_dense_rounds_them(largest):
    symbols = torch.randint(-largest, largest, (40, 50), dtype=torch.int32)
    values = Grid(symbols, 0.3)
    assert same(streams.dense(record_of(values)), values.dense())
    assert torch.equal(streams.decode(record_of(values)).symbols.int(), symbols)


@pytest.mark.parametrize("step", [float("inf"), float("nan"), 0.0, -1.0, 1e-45])
def test_odd_steps_are_no_crash_and_no_warning(step):
    values = Grid(torch.arange(-6, 6, dtype=torch.int32).reshape(3, 4), step)
    wanted = values.dense()
    assert torch.equal(streams.dense(record_of(values)).isnan(), wanted.isnan())
    assert torch.equal(streams.dense(record_of(values)).nan_to_num(), wanted.nan_to_num())


def test_exact_dtypes_that_only_move():
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.complex64, torch.complex128):
        tensor = (torch.arange(600).reshape(20, 30) % 7 == 0).to(dtype)
        for values in (Plain(tensor), Sparse(tensor)):
            assert same(streams.dense(record_of(values)), tensor), dtype


def test_a_codebook_of_bfloat16_holds_its_rounded_centroids():
    values = Codebook(
        torch.arange(12).reshape(3, 4) % 3, torch.tensor([0.1, -0.2, 1e-40]), FLOATS[2]
    )
    assert same(streams.dense(record_of(values)), values.dense())


def test_the_first_damage_names_its_tensor():
    body = (
        bytes([2, 1]) + np.array([0, 1], "<f4").tobytes() + np.array([0, 1, 2, 0], "<i4").tobytes()
    )
    record = records.parse(memoryview(body), (4,), torch.float32, "net.lamina: fc.weight")
    for work in (streams.dense, streams.decode):
        with pytest.raises(FileError, match=r"^a codebook index.* at net\.lamina: fc\.weight: "):
            work(record)
    damaged = Grid(torch.randint(-9, 9, (300, 300), dtype=torch.int32), 1.0)
    whole = record_of(damaged)
    short = records.Record(
        "grid", whole.codec, whole.shape, whole.dtype, "here", whole.payload[:99]
    )
    with pytest.raises(FileError, match="at here"):
        streams.dense(short)


def test_the_first_error_ends_the_work_and_nothing_hangs():
    done = []
    gate = threading.Event()

    def fail():
        gate.wait(5)
        raise FileError("first")

    def late():
        gate.set()
        raise FileError("second")

    tasks = [fail, late, *(lambda i=i: done.append(i) for i in range(2000))]
    with pytest.raises(FileError, match="first"):
        streams.run(tasks, 2)
    before = len(done)
    streams.run([], 2)
    assert len(done) == before, "threads are gone when it returns"
    with pytest.raises(FileError, match="second"):
        streams.run([late, fail], 1)


def test_threads_follow_torch_and_the_environment(monkeypatch):
    monkeypatch.delenv("LAMINA_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert streams.thread_count() == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert 1 <= streams.thread_count() <= 4
    monkeypatch.setenv("LAMINA_THREADS", "3")
    assert streams.thread_count() == 3
    for odd in ("0", "-1", "many", ""):
        monkeypatch.setenv("LAMINA_THREADS", odd)
        assert 1 <= streams.thread_count() <= 4
