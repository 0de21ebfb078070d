"""A bit string written most significant bit first, with exp-Golomb numbers.

Table headers are a few bytes long, so plain Python is fast enough; payloads never go through here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lamina.errors import FileError

Ints = NDArray[np.int64]


def golomb_bits(value: int, order: int) -> str:
    """Return the exp-Golomb code word of `value >= 0` as a string of 0 and 1.

    Args:
        value: the number to code.
        order: the bits that are always sent verbatim; 0 is Elias gamma of value + 1.
    """
    head = (value >> order) + 1
    tail = format(value & ((1 << order) - 1), f"0{order}b") if order else ""
    return "0" * (head.bit_length() - 1) + format(head, "b") + tail


def golomb_length(values: Ints, order: int) -> int:
    """Return the bits of the exp-Golomb code words of values together."""
    head = (values >> order) + 1
    return int((2 * np.frexp(head.astype(np.float64))[1] - 1 + order).sum())


def fold_sign(value: int) -> int:
    """Map 0, -1, 1, -2, 2 ... to 0, 1, 2, 3, 4 ..."""
    return 2 * value if value >= 0 else -2 * value - 1


def fold_signs(values: Ints) -> Ints:
    """Return `fold_sign` of each."""
    return np.where(values >= 0, 2 * values, -2 * values - 1)


def unfold_sign(value: int) -> int:
    """Undo `fold_sign`."""
    return -(value + 1) // 2 if value & 1 else value // 2


def pack_bits(bits: str) -> bytes:
    """Return the bit string as bytes, filled up with zero bits."""
    size = -(-len(bits) // 8)
    return int(bits.ljust(8 * size, "0") or "0", 2).to_bytes(size, "big")


class BitReader:
    """Reads what `pack_bits` wrote; `position` counts bits.

    Raises:
        FileError: the data ends too early, or a number is longer than any writer makes it.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data
        self.position = 0
        self.text = ""  # the first bits, as 0 and 1; more are added as they are needed

    def _reach(self, end: int) -> None:
        if end > 8 * len(self.data):
            raise FileError("cannot decode a coded tensor", "", "its header ends too early")
        start = len(self.text) // 8
        chunk = self.data[start : start + max(128, end // 8 + 1 - start)]
        self.text += format(int.from_bytes(chunk, "big"), f"0{8 * len(chunk)}b")

    def take(self, width: int) -> int:
        """Read `width` bits as an unsigned number."""
        start, end = self.position, self.position + width
        if end > len(self.text):
            self._reach(end)
        self.position = end
        return int(self.text[start:end] or "0", 2)

    def golomb(self, order: int) -> int:
        """Read one exp-Golomb number."""
        # no writer codes more than 34 zeros; a longer run must not cost time or memory
        if self.position + 80 > len(self.text) < 8 * len(self.data):
            self._reach(min(self.position + 80, 8 * len(self.data)))
        one = self.text.find("1", self.position, self.position + 35)
        if one < 0:
            raise FileError("cannot decode a coded tensor", "", "a header number is too long")
        end = 2 * one - self.position + 1 + order
        if end > len(self.text):
            self._reach(end)
        self.position = end
        return int(self.text[one:end], 2) - (1 << order)

    def rest(self) -> memoryview:
        """Return the bytes after the last bit read, from the next whole byte on; no copy."""
        return memoryview(self.data)[-(-self.position // 8) :]
