"""Elements of a buffer as unsigned words: transformed, cut into planes of bits, joined again.

The layout of the bits is part of the format of codec `planes`, whose module states it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs.kernels import compiled

NONE, ROTATE, ZIGZAG, DELTA = range(4)
LONG = 4096  # words from which a compiled loop is worth its call
Words = NDArray[Any]


def plane_widths(bits: int, top: int) -> tuple[int, ...]:
    """Return the bits of each plane of an element, from high to low.

    Example:
        >>> plane_widths(32, 11)
        (11, 5, 8, 8)
    """
    odd = (bits - top) % 8
    return (top, *((odd,) if odd else ()), *([8] * ((bits - top) // 8)))


def transform(words: Words, kind: int) -> Words:
    """Return unsigned words [n] transformed, as codec `planes` says; `restore` undoes it."""
    if kind == NONE:
        return words
    bits = 8 * words.dtype.itemsize
    one, top = words.dtype.type(1), words.dtype.type(bits - 1)
    if kind == ROTATE:
        return words << one | words >> top
    if kind == DELTA:
        words = np.diff(words, prepend=words.dtype.type(0))
    signed = words.view(f"i{words.dtype.itemsize}")
    return words << one ^ (signed >> signed.dtype.type(bits - 1)).view(words.dtype)


def restore(words: Words, kind: int) -> Words:
    """Undo `transform`."""
    if kind == NONE:
        return words
    one, top = words.dtype.type(1), words.dtype.type(8 * words.dtype.itemsize - 1)
    if kind == ROTATE:
        return words >> one | words << top
    words = words >> one ^ (~(words & one) + one)
    return np.cumsum(words, dtype=words.dtype) if kind == DELTA else words


def pack(symbols: Words, width: int) -> bytes:
    """Return symbols [n] below 2 ** width as one bit string, most significant bits first.

    Example:
        >>> import numpy as np
        >>> pack(np.array([1, 2, 3]), 4).hex()
        '1230'
    """
    if width == 8:
        return symbols.astype(np.uint8).tobytes()
    packed = np.empty((-(-symbols.size // 8), width), dtype=np.uint8)
    padded = np.zeros(len(packed) * 8, dtype=np.uint64)
    padded[: symbols.size] = symbols
    total = np.zeros(len(packed), dtype=np.uint64)
    for column in padded.reshape(-1, 8).T:  # eight symbols are `width` whole bytes
        total = total << np.uint64(width) | column
    for i in range(width):
        packed[:, i] = (total >> np.uint64(8 * (width - 1 - i))).astype(np.uint8)
    return packed.tobytes()[: packed_size(symbols.size, width)]


def packed_size(count: int, width: int) -> int:
    """Return the bytes of a raw plane."""
    return -(-count * width // 8)


def join_kernel(words: Any, symbols: Any, shift: Any) -> None:
    """Kernel: add a plane to the words."""
    for i in range(len(words)):
        words[i] |= symbols[i] << shift


def join_packed_kernel(words: Any, packed: Any, width: Any, shift: Any) -> None:
    """Kernel: add a bit-packed plane to the words; groups of eight symbols are whole bytes."""
    mask = (1 << width) - 1
    whole = len(words) // 8
    for group in range(whole):
        total = 0
        for k in range(width):
            total = total << 8 | packed[group * width + k]
        for k in range(8):
            words[group * 8 + k] |= (total >> (width * (7 - k)) & mask) << shift
    for i in range(whole * 8, len(words)):
        begin = i * width
        symbol = 0
        for k in range(begin, begin + width):
            symbol = symbol << 1 | (packed[k >> 3] >> (7 - (k & 7)) & 1)
        words[i] |= symbol << shift


def join(words: Words, symbols: Words, shift: int, backend: str) -> None:
    fast = compiled(join_kernel, backend) if words.size > LONG else None
    if fast is not None:
        fast(words, symbols, shift)
    else:
        words |= symbols.astype(words.dtype) << words.dtype.type(shift)


def join_packed(words: Words, packed: Words, width: int, shift: int, backend: str) -> None:
    fast = compiled(join_packed_kernel, backend) if words.size > LONG else None
    if fast is not None:
        return fast(words, packed, width, shift)  # type: ignore[no-any-return]
    groups = np.zeros((-(-words.size // 8), width), dtype=np.uint8)
    groups.reshape(-1)[: packed.size] = packed
    total = np.zeros(len(groups), dtype=np.int64)
    for column in groups.T:
        total = total << 8 | column
    shifts = width * np.arange(7, -1, -1)
    symbols = (total[:, None] >> shifts) & ((1 << width) - 1)
    return join(words, symbols.reshape(-1)[: words.size], shift, "numpy")
