from __future__ import annotations

import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.codecs import bloomier
from lamina.errors import FileError

BACKENDS = ("numba", "numpy")
WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def ask_slowly(data: bytes, size: int) -> list[int]:
    """Referee: the second reader, in plain Python integers, from the text of the module alone."""
    if not data:
        return [0] * size
    text = "".join(format(byte, "08b") for byte in data)
    place = 0

    def take(width: int) -> int:
        nonlocal place
        place += width
        return int(text[place - width : place] or "0", 2)

    def golomb(order: int) -> int:
        zeros = 0
        while not take(1):
            zeros += 1
        return ((1 << zeros | take(zeros)) - 1) << order | take(order)

    hashes, bits = take(1) + 3, take(5) + 1
    k, seed = golomb(3) + 1, golomb(1)
    segments, segment = golomb(2) + hashes, golomb(6) + 1
    assert take(-place % 8) == 0
    table = [take(bits) for _ in range(segments * segment)]
    assert int(text[place:] or "0", 2) == 0 and len(text) - place < 8
    flat = []
    for i in range(size):
        first = mix((mix((seed + GOLDEN) & WORD) + i * GOLDEN) & WORD)
        more = [mix((first + (j + 1) * GOLDEN) & WORD) for j in range(2)]
        parts = [half for word in more for half in (word >> 32, word & 0xFFFFFFFF)]
        start = (first >> 32) * (segments - hashes + 1) >> 32
        value = first & ((1 << bits) - 1)
        for j in range(hashes):
            value ^= table[(start + j) * segment + (parts[j] * segment >> 32)]
        flat.append(value + 1 if value < k else 0)
    return flat


def make_sparse(keys: int, size: int, k: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    symbols = np.zeros(size, dtype=np.int32)
    places = rng.choice(size, keys, replace=False)
    symbols[places] = rng.integers(1, k + 1, keys)
    if keys:
        symbols[places[0]] = k
    return symbols


def check(symbols: np.ndarray, bits: int, seed: int = 0) -> tuple[bytes, np.ndarray]:
    data = bloomier.encode(symbols, bits=bits, seed=seed, backend="numba")
    assert data == bloomier.encode(symbols, bits=bits, seed=seed, backend="numpy")
    back = bloomier.decode(data, symbols.shape, backend="numba")
    np.testing.assert_array_equal(back, bloomier.decode(data, symbols.shape, backend="numpy"))
    np.testing.assert_array_equal(back[symbols > 0], symbols[symbols > 0])
    assert back.min(initial=0) >= 0 and back.max(initial=0) == symbols.max(initial=0)
    return data, back


@pytest.mark.parametrize("keys", [0, 1, 2, 10, 300, 3000, 10_000])
def test_every_key_comes_back(keys: int) -> None:
    for seed in (0, 1, 99, (1 << 32) - 1):
        symbols = make_sparse(keys, 12 * keys + 5, 13, seed & 7)
        data, back = check(symbols, 6, seed)
        if keys <= 300:
            assert ask_slowly(data, symbols.size) == back.tolist()
    if keys > 2000:  # segments of four cells a key, whose ends the referee must find as well
        assert bloomier.describe(data, symbols.shape)["hashes"] == 4
        assert ask_slowly(data, symbols.size)[:5000] == back.tolist()[:5000]


@pytest.mark.parametrize(("k", "bits"), [(1, 3), (5, 5), (15, 8), (16, 8), (15, 10), (9, 4)])
def test_false_positives_come_at_the_stated_rate(k: int, bits: int) -> None:
    symbols = make_sparse(4000, 120_000, k, bits)
    _, back = check(symbols, bits)
    wrong, zeros = int((back[symbols == 0] > 0).sum()), int((symbols == 0).sum())
    rate = bloomier.false_positive_rate(k, bits)
    assert rate == k / 2**bits
    assert abs(wrong - zeros * rate) < 4 * np.sqrt(zeros * rate * (1 - rate))
    counts = np.bincount(back[symbols == 0], minlength=k + 1)[1:]  # each symbol as often
    assert (np.abs(counts - wrong / k) < 5 * np.sqrt(wrong / k) + 1).all()


def test_wide_cells_make_no_mistakes() -> None:
    for bits in (28, 32):
        symbols = make_sparse(500, 20_000, 15).reshape(100, 200)
        np.testing.assert_array_equal(check(symbols, bits)[1], symbols)


def test_as_many_symbols_as_a_cell_holds() -> None:
    symbols = make_sparse(50, 200, 16)
    assert (check(symbols, 4)[1] > 0).all()  # every answer is a symbol
    assert bloomier.false_positive_rate(16, 4) == 1.0 == bloomier.false_positive_rate(99, 4)
    ones = make_sparse(50, 200, 1)
    assert 0 < (check(ones, 1)[1] > 0).mean() < 1
    large = make_sparse(40, 100, (1 << 31) - 1)
    assert bloomier.decode(check(large, 31)[0], large.shape).dtype == np.int32
    assert check(make_sparse(40, 100, 200), 9)[1].dtype == np.int16


def test_size_is_that_of_the_cells_and_not_of_the_tensor() -> None:
    symbols = make_sparse(2000, 30_000, 15)
    data, back = check(symbols, 9)
    figures = bloomier.describe(data, symbols.shape)
    assert len(data) == figures["head_bytes"] + -(-figures["cells"] * 9 // 8)
    assert figures["head_bytes"] < 9 and figures["cells"] < 1.24 * 2000
    assert figures["nonzeros"] == np.count_nonzero(back)
    assert bloomier.encode(np.append(symbols, np.zeros(50_000, np.int32)), bits=9) == data
    assert bloomier.length(symbols, bits=9) == len(data)
    assert len(bloomier.encode(symbols, bits=10)) > len(data)


def test_segments_save_cells_in_large_tables() -> None:
    sizes = {3000: 1.23, 18_816: 1.16, 100_000: 1.11}
    for keys, most in sizes.items():
        symbols = make_sparse(keys, keys * 12, 15)
        data = bloomier.encode(symbols, bits=8)
        assert 1.02 < bloomier.describe(data, symbols.shape)["cells"] / keys < most


def test_a_fresh_process_answers_the_same() -> None:
    symbols = make_sparse(200, 3000, 7)
    data, back = check(symbols, 5)
    script = (
        "import sys, zlib; from lamina.codecs import bloomier;"
        f"a = bloomier.decode(bytes.fromhex('{data.hex()}'), (3000,), backend='numpy');"
        "print(zlib.crc32(a.astype('<i4').tobytes()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert int(done.stdout) == zlib.crc32(back.astype("<i4").tobytes())


def test_a_table_too_small_is_refused_and_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = make_sparse(1000, 5000, 15)
    places = np.flatnonzero(symbols)
    values = symbols[places].astype(np.int64) - 1
    for segment in (100, 334, 360, 395):
        for seed in range(5):
            tried = bloomier.Filter(3, 8, 15, seed, 3, segment)
            for backend in BACKENDS:
                assert bloomier._build(tried, places, values, backend) is None
    fits = bloomier.Filter(3, 8, 15, 0, 3, 500)
    assert bloomier._build(fits, places, values, "numpy") is not None
    monkeypatch.setattr(bloomier, "_least_table", lambda keys: (3, 3, 300))
    data, _ = check(symbols, 8)
    assert bloomier.describe(data, symbols.shape)["cells"] > 1150


def test_another_seed_gives_other_mistakes() -> None:
    symbols = make_sparse(400, 9000, 15)
    first, second = check(symbols, 7, 1)[1], check(symbols, 7, 1000)[1]
    both = int(((first > 0) & (second > 0) & (symbols == 0)).sum())
    assert (first != second).any() and both < 3 * 8600 * (15 / 128) ** 2


def test_bad_arguments() -> None:
    for bits, seed in ((0, 0), (33, 0), (8, -1), (8, 1 << 32)):
        with pytest.raises(ValueError, match="32"):
            bloomier.encode(np.array([1]), bits=bits, seed=seed)
    with pytest.raises(ValueError, match="fit"):
        bloomier.encode(np.array([17]), bits=4)
    with pytest.raises(ValueError, match="absent"):
        bloomier.encode(np.array([3, -1]), bits=4)


def test_nothing() -> None:
    for shape in [(0,), (), (3, 0), (7, 7)]:
        assert check(np.zeros(shape, dtype=np.int32), 8)[0] == b""
    assert set(bloomier.describe(b"", (4,)).values()) == {0}
    some = bloomier.encode(np.array([1]), bits=3)
    assert set(bloomier.describe(b"", (4,))) == set(bloomier.describe(some, (1,)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 60)), max_size=80),
    st.integers(6, 32),
    st.integers(0, (1 << 32) - 1),
)
def test_any_list(numbers: list[int], bits: int, seed: int) -> None:
    data, back = check(np.array(numbers, dtype=np.int32), bits, seed)
    assert ask_slowly(data, len(numbers)) == back.tolist()


def test_bytes_are_frozen() -> None:
    symbols = np.where(np.arange(60) % 7 == 3, np.arange(60) % 5 + 1, 0)
    assert bloomier.encode(symbols, bits=7).hex() == FROZEN[0]
    many = np.where(np.arange(9000) % 3 == 1, 1 + np.arange(9000) // 3000, 0)
    data = bloomier.encode(many, bits=4, seed=5)
    assert (data[:24].hex(), len(data)) == FROZEN[1]


FROZEN = (
    "1b290cd801e5c2a03e7534340540",
    ("8e9c48a404a1f000050c68f010000d70c3806200c9e00500", 1822),
)


def test_damage_is_refused_or_of_the_right_shape() -> None:
    symbols = make_sparse(120, 900, 15)
    data = bloomier.encode(symbols, bits=9)
    for end in range(1, len(data)):
        with pytest.raises(FileError):
            bloomier.decode(data[:end], symbols.shape)
    with pytest.raises(FileError):
        bloomier.decode(data + b"\0", symbols.shape)
    damaged = [b"\xff" * 40, b"\0" * 40, b"\x01" * 9]
    rng = np.random.default_rng(5)
    for _ in range(400):
        flipped = bytearray(data)
        for place in rng.integers(0, 8 * (len(data) if rng.random() < 0.5 else 6), 2):
            flipped[place >> 3] ^= 1 << (place & 7)
        damaged.append(bytes(flipped))
    damaged += [rng.bytes(int(n)) for n in rng.integers(1, 60, 300)]
    read = 0
    for bad in damaged:
        try:
            answers = [bloomier.decode(bad, symbols.shape, backend=name) for name in BACKENDS]
        except FileError:
            continue
        read += 1
        assert answers[0].shape == symbols.shape
        np.testing.assert_array_equal(*answers)
    assert 0 < read < len(damaged)
    with pytest.raises(FileError, match="empty"):
        bloomier.decode(data, (0,))
    with pytest.raises(FileError, match="cells"):
        bloomier.decode(bloomier.encode(make_sparse(4000, 9000, 15), bits=9), (50,))
