from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.codecs import planes, rans
from lamina.codecs.words import NONE, ROTATE
from lamina.errors import FileError

FLOATS = {"f2": 2, "f4": 4, "f8": 8}
# Zeros, ones, infinities, quiet and signalling NaNs with payloads, denormals, of either sign.
STRANGE = {
    2: [0x0000, 0x8000, 0x3C00, 0x7C00, 0xFC00, 0x7E01, 0x7D55, 0xFFFF, 0x0001, 0x83FF, 0x7F80],
    4: [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC12345, 0xFFA00001, 0x00000001],
    8: [0, 1 << 63, 0x7FF << 52, 0xFFF << 52, 0x7FF8000000012345, 0xFFF4000000000001, 1, 2**64 - 1],
    1: [0, 1, 127, 128, 255],
}


def weights(count: int, kind: str, seed: int = 0) -> np.ndarray:
    """Weights as training leaves them, as unsigned words; bf16 is the upper half of float32."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(count) * rng.choice([0.02, 0.05], count)).astype(np.float32)
    if kind == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    size = FLOATS[kind]
    return values.astype(kind).view(f"u{size}")


def check(words: np.ndarray, floating: bool) -> bytes:
    size = words.dtype.itemsize
    data = words.astype(f"<u{size}").tobytes()
    code = planes.encode(data, size, floating)
    assert planes.encode(data, size, floating, backend="numpy") == code
    for backend in ("auto", "numpy"):
        back = planes.decode(code, len(data), size, floating, backend=backend)
        assert back.dtype == np.uint8
        assert back.flags.writeable
        assert back.tobytes() == data
    return code


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_round_trip_is_exact_to_the_bit(drawn: st.DataObject, size: int, floating: bool) -> None:
    some = st.one_of(st.sampled_from(STRANGE[size]), st.integers(0, 256**size - 1))
    near = st.integers(0, 40).map(lambda k: (k * 3 + (-k % 7 << 8 * size - 4)) % 256**size)
    words = drawn.draw(st.one_of(st.lists(some, max_size=40), st.lists(near, max_size=200)))
    assert len(check(np.array(words, dtype=f"u{size}"), floating)) <= len(words) * size + 2


@pytest.mark.parametrize("kind", ["bf16", "f2", "f4", "f8"])
@pytest.mark.parametrize("count", [1, 7, 8, 20, 385, 4095, 30_011])
def test_weights_come_back_and_shrink(kind: str, count: int) -> None:
    words = weights(count, kind)
    code = check(words, True)
    most = {"bf16": 0.72, "f2": 0.92, "f4": 0.87, "f8": 0.6}[kind]  # f8 holds float32 values
    if count >= 300:
        assert len(code) <= most * words.nbytes
    if count >= (300 if kind == "f2" else 20):
        assert len(code) < words.nbytes


def test_strange_values_among_weights() -> None:
    for size, kind in ((2, "f2"), (4, "f4"), (8, "f8")):
        words = weights(5000, kind)
        words[::50] = np.resize(np.array(STRANGE[size], dtype=words.dtype), 100)
        assert len(check(words, True)) < words.nbytes


def test_noise_does_not_shrink_and_hardly_grows() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    for floating in (True, False):
        assert words.nbytes <= len(check(words, floating)) <= words.nbytes + 2


def test_length_is_near_the_entropy_of_the_cut() -> None:
    words = weights(200_000, "bf16")
    turned = (words << np.uint16(1)) | (words >> np.uint16(15))
    counts = np.unique(turned >> np.uint16(8), return_counts=True)[1]
    bits = float(-(counts * np.log2(counts / words.size)).sum()) + 8 * words.size
    assert len(planes.encode(words.tobytes(), 2, True)) < bits / 8  # a plain byte split is longer


@pytest.mark.parametrize("narrow", ["bf16", "f2"])
def test_narrow_values_in_wide_floats_cost_little_more_than_narrow_ones(narrow: str) -> None:
    values = weights(40_000, narrow)
    if narrow == "bf16":
        wide = values.astype(np.uint32) << np.uint32(16)
    else:
        wide = values.view(np.float16).astype(np.float32).view(np.uint32)
    lengths = [
        len(planes.encode(words.tobytes(), words.itemsize, True)) for words in (values, wide)
    ]
    assert lengths[1] <= 1.02 * lengths[0] + 16
    check(wide, True)


@pytest.mark.parametrize(
    ("words", "most"),
    [
        (np.arange(512, dtype=np.int64), 20),
        (np.arange(-300, 300, dtype=np.int32), 24),
        (np.full(100_000, -1, dtype=np.int64), 10),
        (np.zeros(100_000, dtype=np.float32), 6),
        (np.ones(768, dtype=np.float32), 9),
        (np.tril(np.ones((256, 256), dtype=np.uint8)), 1500),
        (np.random.default_rng(0).integers(-9, 9, 5000).astype(np.int16), 5000 * 4.3 / 8),
    ],
)
def test_plain_contents_are_nearly_free(words: np.ndarray, most: float) -> None:
    unsigned = words.reshape(-1).view(f"u{words.itemsize}")
    assert len(check(unsigned, words.dtype.kind == "f")) <= most


def test_an_empty_buffer_is_empty() -> None:
    assert planes.encode(b"", 4, True) == b""
    assert planes.decode(b"", 0, 4, True).shape == (0,)
    with pytest.raises(FileError):
        planes.decode(b"\0", 0, 4, True)


def test_blocks_are_independent_and_threads_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "BLOCK", 4096)
    words = weights(3 * 4096 + 100, "bf16")
    data = words.tobytes()
    code = planes.encode(data, 2, True)
    found = planes.blocks(code, len(data), 2, True)
    assert [block.start for block in found] == [0, 8192, 16384, 24576]
    out = np.zeros(8192, dtype=np.uint8)
    planes.read_block(found[2], out, 2)
    assert out.tobytes() == data[16384:24576]
    assert planes.decode(code, len(data), 2, True, threads=3).tobytes() == data
    with pytest.raises(FileError):
        planes.decode(code[:-3], len(data), 2, True, threads=3)


def test_the_real_block_length() -> None:
    words = np.zeros(planes.BLOCK + 1, dtype=np.uint16)
    words[-1] = 0x3F80
    code = check(words, True)
    assert planes.BLOCK == 1 << 19
    assert len(planes.blocks(code, words.nbytes, 2, True)) == 2


def test_reader_takes_cuts_the_writer_never_makes() -> None:
    for top in (8, 14, 15):
        for kind in (NONE, ROTATE):
            for words in (weights(5003, "bf16"), weights(5003, "f8")):
                code = planes._write_block(words, kind, top, True, "auto")
                for backend in ("auto", "numpy"):
                    back = planes.decode(code, words.nbytes, words.itemsize, True, backend=backend)
                    assert back.tobytes() == words.tobytes()


GOLDEN = json.loads((Path(__file__).parent / "golden_planes.json").read_text())


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_bytes_decode_forever(case: dict[str, str | int | bool]) -> None:
    data, code = bytes.fromhex(str(case["data"])), bytes.fromhex(str(case["code"]))
    size, floating = int(case["itemsize"]), bool(case["floating"])
    assert planes.decode(code, len(data), size, floating).tobytes() == data
    assert planes.encode(data, size, floating) == code


def read_plainly(code: bytes, count: int, itemsize: int) -> bytes:
    """One block, read as the module's docstring says, a bit at a time."""
    bits, head, at = 8 * itemsize, code[0], 1
    widths = [head % 8 + 8]
    if (bits - widths[0]) % 8:
        widths.append((bits - widths[0]) % 8)
    widths += [8] * ((bits - sum(widths)) // 8)
    mask = 1
    if not head & 32:
        mask, at = code[1], 2
    coded = [p for p in range(len(widths)) if mask >> p & 1]
    sizes = {p: -(-count * width // 8) for p, width in enumerate(widths) if p not in coded}
    for p in coded[:-1]:
        sizes[p], shift = 0, 0
        while True:
            sizes[p] |= (code[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if code[at - 1] < 128:
                break
    if coded:
        sizes[coded[-1]] = len(code) - at - sum(sizes.values())
    words = [0] * count
    for p, width in enumerate(widths):
        payload, at = code[at : at + sizes[p]], at + sizes[p]
        if p not in coded:
            text = "".join(format(byte, "08b") for byte in payload)
            symbols = [int(text[i * width : (i + 1) * width], 2) for i in range(count)]
        else:
            symbols = rans.decode(payload, (count,)).tolist() if payload else [0] * count
        words = [word << width | symbol for word, symbol in zip(words, symbols, strict=True)]
    before = 0
    for i, word in enumerate(words):
        if head >> 3 & 3 == 1:
            word = word >> 1 | (word & 1) << bits - 1
        elif head >> 3 & 3:
            word = word // 2 if word % 2 == 0 else -(word + 1) // 2
            word = (word + (before if head >> 3 & 3 == 3 else 0)) % 2**bits
        words[i] = before = word
    return b"".join(word.to_bytes(itemsize, "little") for word in words)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_the_docstring_is_enough_to_read_the_golden_bytes(case: dict[str, str | int]) -> None:
    data, code, size = (case[key] for key in ("data", "code", "itemsize"))
    back = read_plainly(bytes.fromhex(str(code)), len(str(data)) // 2 // int(size), int(size))
    assert back.hex() == data


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=40), st.sampled_from([1, 2, 4, 8]), st.booleans(), st.integers(0, 300))
def test_any_bytes_decode_or_are_refused(code: bytes, size: int, floating: bool, n: int) -> None:
    try:
        assert planes.decode(code, n * size, size, floating).shape == (n * size,)
    except FileError:
        pass


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_truncated_and_flipped(backend: str) -> None:
    words = weights(6000, "f4")
    data = words.tobytes()
    code = planes.encode(data, 4, True)
    for cut in [*range(12), len(code) // 2, len(code) - 1]:
        with pytest.raises(FileError):
            planes.decode(code[:cut], len(data), 4, True, backend=backend)
    with pytest.raises(FileError):
        planes.decode(code + b"\0", len(data), 4, True, backend=backend)
    refused = 0
    for bit in range(0, 400, 3):
        broken = bytearray(code)
        broken[bit // 8] ^= 1 << bit % 8
        try:
            back = planes.decode(bytes(broken), len(data), 4, True, backend=backend)
            assert back.shape == (len(data),)
        except FileError:
            refused += 1
    assert refused > 80  # the coder's states do not end where they should


def test_a_symbol_wider_than_its_plane_is_refused() -> None:
    head = bytes([NONE << 3 | planes.TOP_ONLY])
    good, bad = (rans.encode(np.array([5, top, 7, 9])) for top in (255, 256))
    assert planes.decode(head + good, 4, 1, True).tolist() == [5, 255, 7, 9]
    for symbols in (bad, rans.encode(np.array([5, -1, 7, 9]))):
        with pytest.raises(FileError, match="fit"):
            planes.decode(head + symbols, 4, 1, True)


@pytest.mark.parametrize(
    ("code", "size_bytes", "itemsize", "floating"),
    [
        (b"", 4, 4, True),  # no block
        (b"\x20", 3, 2, True),  # no whole elements
        (b"\x20", 4, 3, True),
        (b"\x20", -4, 4, True),
        (b"\x20", 1 << 60, 4, True),  # nothing that large exists
        (b"\x20", 1 << 40, 4, True),  # blocks that are not there: no memory is taken
        (b"\x60", 4, 4, True),  # reserved bits
        (b"\xa0", 4, 4, True),
        (b"\x21", 1, 1, True),  # nine bits of eight
        (b"\x30", 4, 4, True),  # floats are not folded
        (b"\x38", 4, 4, True),
        (b"\x28", 4, 4, False),  # whole numbers are not rotated
        (b"\x00", 4, 4, True),  # a mask is missing
        (b"\x00\x10\0\0\0\0", 4, 4, True),  # a fifth plane of four
        (b"\x00\x03\x80\x80\x80\x80\x80\x01", 4, 4, True),  # an endless length
        (b"\x00\x03\xff\xff\xff\x7f", 4, 4, True),  # a payload past the end
        (b"\x00\x0f\x00\x00\x00\x00", 4, 4, True),  # the last coded plane's length is not written
        (b"\x00\x00\0\0\0", 4, 4, True),  # a raw plane cut off
    ],
)
def test_what_no_writer_makes_is_refused(
    code: bytes, size_bytes: int, itemsize: int, floating: bool
) -> None:
    with pytest.raises(FileError):
        planes.decode(code, size_bytes, itemsize, floating)


def test_another_type_is_not_the_same() -> None:  # control: size and kind do matter
    code = planes.encode(weights(100, "f4").tobytes(), 4, True)
    for size_bytes, itemsize, floating in ((396, 4, True), (404, 4, True), (400, 2, True)):
        with pytest.raises(FileError):
            planes.decode(code, size_bytes, itemsize, floating)


@pytest.mark.parametrize(("data", "itemsize"), [(b"123", 2), (b"123", 3), (b"1234", 0)])
def test_bad_input_is_a_value_error(data: bytes, itemsize: int) -> None:
    with pytest.raises(ValueError, match="elements"):
        planes.encode(data, itemsize, True)


def test_other_buffers_are_accepted() -> None:
    data = weights(50, "f4").tobytes()
    code = planes.encode(memoryview(bytearray(data)), 4, True)
    assert code == planes.encode(np.frombuffer(data, np.float32), 4, True)
    assert planes.decode(memoryview(code), 200, 4, True).tobytes() == data
