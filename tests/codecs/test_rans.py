from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lamina.codecs import rans
from lamina.codecs.frequency import scale_weights
from lamina.errors import FileError

EDGES = [-(2**31), -(2**31) + 1, -65536, -1, 0, 1, 7, 65535, 2**31 - 1]
VALUES = st.one_of(st.integers(-3, 3), st.sampled_from(EDGES), st.integers(-(2**31), 2**31 - 1))
ARRAYS = st.one_of(
    hnp.arrays(
        np.int32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9), elements=e
    )
    for e in (st.integers(-3, 3), st.sampled_from(EDGES), VALUES)
)


def entropy_bytes(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / symbols.size)).sum() / 8)


@settings(deadline=None)
@given(ARRAYS)
def test_round_trip_on_both_backends(symbols: np.ndarray) -> None:
    data = rans.encode(symbols)
    assert rans.encode(symbols, backend="numpy") == data
    for backend in ("auto", "numpy"):
        back = rans.decode(data, symbols.shape, backend=backend)
        assert back.dtype in (np.int8, np.int16, np.int32)
        np.testing.assert_array_equal(back, symbols)
    assert abs(rans.length(symbols) - len(data)) <= 4


def make_long(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    n = 60_001  # not a multiple of the lanes
    makers: dict[str, Callable[[], np.ndarray]] = {
        "gauss": lambda: np.round(rng.normal(0, 40, n)),
        "sparse": lambda: np.round(rng.normal(0, 30, n)) * (rng.random(n) < 0.1),
        "few extremes": lambda: rng.choice([-(2**31), 2**31 - 1, 0, 5], n),
        "wide": lambda: rng.integers(-(2**31), 2**31, n),
        "heavy tail": lambda: np.round(rng.standard_cauchy(n) * 5).clip(-1e9, 1e9),
        "many values": lambda: rng.integers(0, 30_000, n),
    }
    return makers[kind]().astype(np.int32)


@pytest.mark.parametrize(
    "kind", ["gauss", "sparse", "few extremes", "wide", "heavy tail", "many values"]
)
def test_long_tensors(kind: str) -> None:
    symbols = make_long(kind)
    data = rans.encode(symbols)
    assert rans.encode(symbols, backend="numpy") == data
    np.testing.assert_array_equal(rans.decode(data, symbols.shape), symbols)
    np.testing.assert_array_equal(rans.decode(data, symbols.shape, backend="numpy"), symbols)
    assert abs(rans.length(symbols) - len(data)) <= 4 + 0.001 * len(data)
    assert len(data) <= 4 * symbols.size + 16  # never much worse than the plain integers


@pytest.mark.parametrize(("kind", "table"), [("gauss", 300), ("sparse", 160), ("few extremes", 32)])
def test_size_is_near_entropy(kind: str, table: int) -> None:
    symbols = make_long(kind)
    assert (
        entropy_bytes(symbols)
        <= len(rans.encode(symbols))
        <= 1.003 * entropy_bytes(symbols) + table
    )


def test_tiny_tensors_have_tiny_headers() -> None:
    assert rans.encode(np.zeros(0, np.int32)) == b""
    assert len(rans.encode(np.zeros(1000, np.int32))) == 1
    assert len(rans.encode(np.array([5]))) == 2
    assert len(rans.encode(np.array([3, 0, -1, 2, 0, 0, 5, 1, 0, -2]))) <= 10


@given(st.lists(st.integers(1, 1 << 20), min_size=1, max_size=200), st.sampled_from([12, 14]))
def test_scaled_weights_fill_the_table_and_stay_positive(weights: list[int], bits: int) -> None:
    exact = np.array(weights) / sum(weights) * 2**bits
    scaled = scale_weights(np.array(weights, dtype=np.int64), bits)
    assert scaled.sum() == 2**bits
    assert scaled.min() >= 1
    big = exact >= 4 * len(weights)  # small ones may be raised to 1 at the cost of the others
    assert (np.abs(scaled - exact)[big] <= len(weights) + 1).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int64", "bool", ">i4"])
def test_other_integers_are_accepted(dtype: str) -> None:
    symbols = np.array([[0, 1], [1, 1]], dtype=dtype)
    np.testing.assert_array_equal(rans.decode(rans.encode(symbols), (2, 2)), symbols)


@pytest.mark.parametrize(
    "bad",
    [np.array([2**31]), np.array([-(2**31) - 1]), np.array([0.5]), np.array([2**63], np.uint64)],
)
def test_what_does_not_fit_is_a_value_error(bad: np.ndarray) -> None:
    with pytest.raises(ValueError):
        rans.encode(bad)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend"):
        rans.encode(np.arange(3), backend="cuda")


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60), st.sampled_from([(0,), (1,), (7,), (3, 5), (300,), (20_000,)]))
def test_any_bytes_decode_or_are_refused(data: bytes, shape: tuple[int, ...]) -> None:
    try:
        assert rans.decode(data, shape).shape == shape
    except FileError:
        pass


@pytest.mark.parametrize("backend", ["auto", "numpy"])
@pytest.mark.parametrize("kind", ["sparse", "heavy tail"])
def test_truncated_and_flipped(kind: str, backend: str) -> None:
    symbols = make_long(kind)[: 60_001 if kind == "sparse" else 3000]
    data = rans.encode(symbols)
    rng, refused = np.random.default_rng(0), 0
    for cut in [*range(12), *rng.integers(0, len(data), 4).tolist()]:
        with pytest.raises(FileError):
            rans.decode(data[:cut], symbols.shape, backend=backend)
    for bit in [*range(60), *rng.integers(0, 8 * len(data), 10).tolist()]:
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        try:
            back = rans.decode(bytes(broken), symbols.shape, backend=backend)
            assert back.shape == symbols.shape
        except FileError:
            refused += 1
    assert refused > 35  # the states do not end where they should


@pytest.mark.parametrize("shape", [(-1,), (1 << 62,), (0, 1 << 40, 1 << 40), (1,) * 70])
def test_impossible_shapes(shape: tuple[int, ...]) -> None:
    for data in (b"", b"\x80"):
        with pytest.raises(FileError):
            rans.decode(data, shape)


def test_wrong_shape_is_refused() -> None:
    data = rans.encode(make_long("gauss"))
    for size in (60_000, 60_002, 0, 1):
        with pytest.raises(FileError):
            rans.decode(data, (size,))
