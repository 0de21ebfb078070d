"""Bytes made of fields: single bytes, variable-length numbers, and parts with their length."""

from __future__ import annotations

from lamina.errors import FileError


def varint(value: int) -> bytes:
    """Return a number >= 0 as unsigned LEB128.

    Example:
        >>> varint(300).hex()
        'ac02'
    """
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def sized(part: bytes) -> bytes:
    """Return a part with its length before it."""
    return varint(len(part)) + part


class FieldReader:
    """Reads fields one after the other.

    Raises:
        FileError: the data ends too early, or a number is longer than any writer makes it.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        self.position = 0

    def byte(self) -> int:
        """Read one byte."""
        if self.position >= len(self.data):
            raise FileError("cannot decode a tensor", "", "its code ends too early")
        self.position += 1
        return self.data[self.position - 1]

    def varint(self) -> int:
        """Read one number."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise FileError("cannot decode a tensor", "", "a number in its code is too long")

    def part(self) -> bytes:
        """Read a part and its length."""
        size = self.varint()
        if size > len(self.data) - self.position:
            raise FileError("cannot decode a tensor", "", "a part of its code is cut off")
        self.position += size
        return bytes(self.data[self.position - size : self.position])

    def rest(self) -> memoryview:
        """Return what has not been read; it is not copied."""
        return self.data[self.position :]
