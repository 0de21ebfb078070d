"""Words: transforms and packing against plain integers and strings, joining on both ways."""

from __future__ import annotations

import numpy as np
import pytest

from lamina.codecs.words import (
    DELTA,
    LONG,
    NONE,
    ROTATE,
    ZIGZAG,
    join,
    join_packed,
    pack,
    packed_size,
    plane_widths,
    restore,
    transform,
)


@pytest.mark.parametrize("kind", [NONE, ROTATE, ZIGZAG, DELTA])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_transforms_against_plain_integers(kind: int, size: int) -> None:
    bits, rng = 8 * size, np.random.default_rng(size)
    words = rng.integers(0, 2**bits, 50, dtype=f"u{size}")
    expected, before = [], 0
    for x in words.tolist():
        if kind == ROTATE:
            expected.append((x * 2) % 2**bits + (x >= 2 ** (bits - 1)))
        elif kind == NONE:
            expected.append(x)
        else:
            y = (x - before if kind == DELTA else x) % 2**bits
            y = y - 2**bits if y >= 2 ** (bits - 1) else y
            expected.append(2 * y if y >= 0 else -2 * y - 1)
        before = x
    turned = transform(words, kind)
    assert turned.tolist() == expected
    assert restore(turned, kind).tolist() == words.tolist()


@pytest.mark.parametrize("width", range(1, 9))
def test_packing_against_strings(width: int) -> None:
    symbols = np.random.default_rng(width).integers(0, 2**width, 37)
    text = "".join(format(s, f"0{width}b") for s in symbols)
    text += "0" * (-len(text) % 8)
    assert pack(symbols, width) == int(text, 2).to_bytes(len(text) // 8, "big")


def test_widths_add_up() -> None:
    for bits in (8, 16, 32, 64):
        for top in range(8, min(bits, 15) + 1):
            assert sum(plane_widths(bits, top)) == bits


@pytest.mark.parametrize("count", [1, 7, 8, 9, LONG, LONG + 1, LONG + 7])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_joining_undoes_cutting(count: int, size: int, backend: str) -> None:
    bits, rng = 8 * size, np.random.default_rng(count)
    words = rng.integers(0, 2**bits, count, dtype=f"u{size}")
    for top in (8, 9, 11, 12, 15):
        back, shift = np.zeros(count, dtype=f"i{size}"), bits
        for width in plane_widths(bits, top):
            shift -= width
            plane = (words >> words.dtype.type(shift)) & words.dtype.type(2**width - 1)
            if width < 8:
                packed = np.frombuffer(pack(plane, width), np.uint8)
                assert packed.size == packed_size(count, width)
                join_packed(back, packed, width, shift, backend)
            else:
                join(back, plane.astype(np.int16), shift, backend)
        assert back.view(words.dtype).tolist() == words.tolist()
