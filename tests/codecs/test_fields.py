from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.codecs.fields import FieldReader, sized, varint
from lamina.errors import FileError


@given(st.lists(st.integers(0, (1 << 63) - 1)), st.binary(max_size=300), st.binary(max_size=9))
def test_what_is_written_is_read(numbers: list[int], part: bytes, rest: bytes) -> None:
    reader = FieldReader(b"".join(map(varint, numbers)) + sized(part) + rest)
    assert [reader.varint() for _ in numbers] == numbers
    assert reader.part() == part
    assert reader.rest() == rest
    for byte in rest:
        assert reader.byte() == byte
    with pytest.raises(FileError, match="too early"):
        reader.byte()


@pytest.mark.parametrize(
    ("number", "code"),
    [(0, "00"), (127, "7f"), (128, "8001"), (624_485, "e58e26"), ((1 << 63) - 1, "ff" * 8 + "7f")],
)
def test_numbers_are_leb128(number: int, code: str) -> None:
    assert varint(number).hex() == code


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x80" * 9, b"\xff" * 9, b"\xff" * 100])
def test_numbers_that_do_not_end(data: bytes) -> None:
    with pytest.raises(FileError):
        FieldReader(data).varint()


@given(st.binary(max_size=20))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    reader = FieldReader(memoryview(data))
    try:
        part = reader.part()
    except FileError:
        return
    assert varint(len(part)) + part + reader.rest() == data or data[0] & 0x80  # 0 as 80 00


def test_a_part_longer_than_the_data_costs_nothing() -> None:
    with pytest.raises(FileError, match="cut off"):
        FieldReader(varint((1 << 63) - 1) + b"x").part()
