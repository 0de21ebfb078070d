from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina import codecs
from lamina.codecs import blocks, context, rans
from lamina.codecs.blocks import cuts
from lamina.codecs.fields import FieldReader, varint
from lamina.errors import FileError

BACKENDS = ("auto", "numpy")
SHAPES = st.lists(st.integers(0, 9), max_size=4)


def rows_that_differ(rows: int = 300, cols: int = 100) -> np.ndarray:
    rng = np.random.default_rng(0)
    density = np.array([0.03, 0.6])[rng.integers(0, 2, (rows, 1))]
    values = rng.integers(-2, 3, (rows, cols))
    return np.where(rng.random((rows, cols)) < density, values, 0).astype(np.int32)


@given(SHAPES, st.sampled_from([1, 2, 7, 40, 10_000]), st.integers(0, 99))
def test_round_trip(shape: list[int], block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    symbols = rng.integers(-2, 3, shape).astype(np.int32) * rng.choice([1, 60, 1 << 29])
    data = blocks.encode(symbols, block=block)
    assert blocks.encode(symbols, block=block, backend="numpy") == data
    count = FieldReader(data).varint()
    assert abs(blocks.length(symbols, block=block) - len(data)) <= 4 * count
    for backend in BACKENDS:
        back = blocks.decode(data, symbols.shape, backend=backend)
        assert back.dtype in (np.int8, np.int16, np.int32)
        assert back.shape == symbols.shape
        np.testing.assert_array_equal(back, symbols)


@given(st.integers(0, 40), st.integers(0, 40), st.data())
def test_cuts_cover_everything_once_and_in_order(rows: int, cols: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, max(rows * cols, 1)))
    found, at = cuts((rows, cols), count), 0
    assert len(found) == count
    for high, wide, start in found:
        assert start == at
        at += high * wide
        assert rows < count or wide == cols  # whole rows where there are enough
    assert at == rows * cols
    sizes = [high * wide for high, wide, _ in found]
    assert sorted(sizes, reverse=True) == sizes


@pytest.mark.parametrize("shape", [(300, 100), (4, 7500), (30_000,), (30, 10, 100)])
def test_parts_alone_in_any_order_and_in_threads(shape: tuple[int, ...]) -> None:
    symbols = rows_that_differ().reshape(shape)
    data = blocks.encode(symbols, block=5000)
    whole = symbols.reshape(-1)
    parts = codecs.parts("blocks", data, shape)
    assert len(parts) == 6
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, symbols.size)
    order = np.random.default_rng(0).permutation(np.arange(6).repeat(3)).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: parts[k].read(), order))
    for k, back in zip(order, found, strict=True):
        np.testing.assert_array_equal(back, whole[parts[k].start : parts[k].stop])
        np.testing.assert_array_equal(back, parts[k].read())


def test_parts_of_other_codecs_are_one() -> None:
    symbols = rows_that_differ(20, 30)
    for name in ("rans", "adaptive", "context", "huffman"):
        (part,) = codecs.parts(name, codecs.get(name).encode(symbols), symbols.shape)
        assert (part.start, part.stop) == (0, 600)
        np.testing.assert_array_equal(part.read(), symbols.reshape(-1))


def test_each_piece_has_the_shorter_codec() -> None:
    plain = np.random.default_rng(0).integers(-9, 10, (300, 100)).astype(np.int32)
    symbols = np.concatenate([rows_that_differ(), plain])
    data = blocks.encode(symbols, block=10_000)
    assert data[0] == 6
    heads, at = [], 1
    for _ in range(6):
        end = at + 1
        while data[end] & 128:
            end += 1
        heads.append(data[at])
        at = end + 1
    assert heads == [3, 3, 3, 1, 1, 1]
    pieces = np.split(symbols, 6)
    best = [min(len(context.encode(p)), len(rans.encode(p))) for p in pieces]
    assert len(data) == at + sum(best)


def test_size_is_near_that_of_the_whole() -> None:
    symbols = np.rint(np.random.default_rng(0).normal(0, 5, (400, 500))).astype(np.int32)
    whole = len(rans.encode(symbols))
    assert len(blocks.encode(symbols, block=50_000)) <= 1.002 * whole + 4 * 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_and_flips(backend: str) -> None:
    symbols = rows_that_differ(60, 100)
    data, refused = blocks.encode(symbols, block=4500), 0
    rng = np.random.default_rng(0)
    for cut in [*range(20), *rng.integers(20, len(data), 20).tolist()]:
        with pytest.raises(FileError):
            blocks.decode(data[:cut], symbols.shape, backend=backend)
    bits = [*range(60), *rng.integers(0, 8 * len(data), 40).tolist()]
    for bit in bits:
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        try:
            assert blocks.decode(bytes(broken), symbols.shape, backend=backend).shape == (60, 100)
        except FileError:
            refused += 1
    assert refused > 70  # of those in a table, some are of another law


@given(st.binary(max_size=60), st.sampled_from([(), (0,), (1,), (3, 5), (300,), (9, 2, 3)]))
def test_any_bytes_decode_or_are_refused(data: bytes, shape: tuple[int, ...]) -> None:
    try:
        assert blocks.decode(data, shape).shape == shape
    except FileError:
        pass


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\0", "more pieces"),
        (varint(1 << 60) + bytes(50), "more pieces"),
        (b"\x02\x01\x00\x01", "ends too early"),
        (b"\x01\x01" + varint(1 << 60), "not as long"),
        (b"\x01\x01\x01\x50\x00", "not as long"),
        (b"\x01\x04\x01\x50", "codec 4"),
        (b"\x0d" + b"\x01\x00" * 13, "more pieces"),
    ],
)
def test_what_does_not_fit_is_refused_for_little(data: bytes, why: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match=why):
            blocks.decode(data, (3, 4))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
