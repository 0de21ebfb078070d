from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lamina.codecs import raw
from lamina.errors import FileError

KINDS = ["?", "i1", "u1", "<i2", ">i2", "<i4", "u4", "<i8", ">u8", "<f2", ">f4", "<f4", "<f8"]


@given(
    st.sampled_from(KINDS).flatmap(
        lambda k: hnp.arrays(k, hnp.array_shapes(min_dims=0, min_side=0))
    )
)
def test_round_trip_is_exact_to_the_bit(array: np.ndarray) -> None:
    data = raw.encode(array)
    assert len(data) == raw.length(array) == array.nbytes
    back = raw.decode(data, array.shape, array.dtype)
    assert back.shape == array.shape
    assert back.dtype.isnative
    assert back.flags.writeable
    assert back.tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes()


def test_bytes_are_little_endian_and_c_ordered() -> None:
    array = np.asfortranarray(np.array([[1, 2], [3, 4]], dtype=">i2"))
    assert raw.encode(array) == bytes([1, 0, 2, 0, 3, 0, 4, 0])


def test_not_a_number_keeps_its_payload() -> None:
    strange = np.array([0x7FC12345, 0xFFC00001], dtype="u4").view("f4")
    assert raw.decode(raw.encode(strange), (2,), "f4").tobytes() == strange.tobytes()


@pytest.mark.parametrize(
    ("data", "shape", "dtype"),
    [
        (b"12345", (2,), "i2"),
        (b"", (1 << 62,), "f8"),
        (b"", (-1,), "f8"),
        (b"\2", (1,), "?"),
        (b"12345678", (1,), "O"),
        (b"1", (), "f4"),
    ],
)
def test_damage_is_a_file_error(data: bytes, shape: tuple[int, ...], dtype: str) -> None:
    with pytest.raises(FileError):
        raw.decode(data, shape, dtype)


def test_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="numbers"):
        raw.encode(np.array([object()]))
