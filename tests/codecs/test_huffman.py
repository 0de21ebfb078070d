from __future__ import annotations

import heapq
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.codecs import huffman, prefix
from lamina.errors import FileError

BACKENDS = ("numba", "numpy")


def heap_cost(counts: list[int]) -> int:
    """Referee: the bits of an optimal prefix code, by Huffman's own heap."""
    heap, cost = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        both = heapq.heappop(heap) + heapq.heappop(heap)
        cost += both
        heapq.heappush(heap, both)
    return cost


def least_limited_cost(counts: list[int], limit: int) -> int:
    """Referee: try every list of lengths that fills a code."""
    falling = sorted(counts, reverse=True)
    every = itertools.combinations_with_replacement(range(1, limit + 1), len(counts))
    full = (lengths for lengths in every if sum(2.0**-n for n in lengths) == 1)
    return min(sum(c * n for c, n in zip(falling, lengths, strict=True)) for lengths in full)


class Bits:
    """Referee: a bit string read from its documentation, one character a bit."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def take(self, width: int) -> int:
        part = self.text[self.place : self.place + width]
        assert len(part) == width
        self.place += width
        return int(part or "0", 2)

    def golomb(self, order: int) -> int:
        zeros = 0
        while self.take(1) == 0:
            zeros += 1
        return ((1 << zeros | self.take(zeros)) - 1) << order | self.take(order)

    def signed(self, order: int) -> int:
        number = self.golomb(order)
        return -(number + 1) // 2 if number % 2 else number // 2


def read_words(bits: Bits) -> tuple[dict[str, int] | None, int, int]:
    """Referee: return {codeword: symbol}, or None with base and width."""
    if not bits.take(1):
        base = bits.signed(1)
        return None, base, bits.take(6)
    size = bits.golomb(4) + 2
    symbols = [bits.signed(2)]
    if bits.take(1):
        symbols += range(symbols[0] + 1, symbols[0] + size)
    else:
        order = bits.take(5)
        while len(symbols) < size:
            symbols.append(symbols[-1] + 1 + bits.golomb(order))
    order, length, pairs = bits.take(1), (size - 1).bit_length(), []
    for symbol in symbols:
        length += bits.signed(order)
        pairs.append((length, symbol))
    words, code, before = {}, -1, 0
    for length, symbol in sorted(pairs):
        code = (code + 1) << (length - before)
        before = length
        words[format(code, f"0{length}b")] = symbol
    return words, 0, 0


def next_symbol(bits: Bits, words: dict[str, int] | None, base: int, width: int) -> int:
    if words is None:
        return base + bits.take(width)
    start = bits.place
    while bits.text[start : bits.place] not in words:
        assert bits.place < len(bits.text)
        bits.place += 1
    return words[bits.text[start : bits.place]]


def read_slowly(data: bytes, size: int) -> list[int]:
    """Referee: the second reader, from the text of the module alone."""
    flat = [0] * size
    if not data:
        return flat
    text = "".join(format(byte, "08b") for byte in data)
    ahead, back = Bits(text), Bits(text[::-1])
    entries, width = ahead.take((size - 1).bit_length()) + 1, ahead.take(5)
    symbols = read_words(ahead)
    gaps = read_words(ahead) if width else (None, 0, 0)
    place = -1
    for _ in range(entries):
        place += 1 + next_symbol(back, *gaps)
        flat[place] = next_symbol(ahead, *symbols)
    left = text[ahead.place : len(text) - back.place]
    assert ahead.place + back.place <= len(text) and left in [i * "0" for i in range(8)]
    return flat


def make_pruned(size: int, density: float, clusters: int, seed: int = 0) -> np.ndarray:
    """Gaussian weights, the small ones pruned, the others in evenly spaced clusters."""
    weights = np.random.default_rng(seed).normal(size=size)
    live = np.abs(weights) >= np.quantile(np.abs(weights), 1 - density) if density else weights > 99
    low, high = weights.min(), weights.max() + 1e-9
    index = ((weights - low) / (high - low) * clusters).astype(np.int32) + 1
    return np.where(live, index, 0).astype(np.int32)


def check(symbols: np.ndarray, width: int | None = None) -> bytes:
    data = huffman.encode(symbols, width=width, backend="numba")
    assert data == huffman.encode(symbols, width=width, backend="numpy")
    assert len(data) == huffman.length(symbols, width=width)
    for backend in BACKENDS:
        back = huffman.decode(data, symbols.shape, backend=backend)
        assert back.dtype in (np.int8, np.int16, np.int32)
        np.testing.assert_array_equal(back, symbols)
    return data


@pytest.mark.parametrize("density", [0, 1e-3, 0.08, 0.5, 1])
def test_round_trip_at_every_width(density: float) -> None:
    symbols = make_pruned(6000, density, 31).reshape(60, 100)
    for width in range(17):
        data = check(symbols, width)
        assert read_slowly(data, symbols.size) == symbols.reshape(-1).tolist()
    shortest = min(huffman.length(symbols, width=width) for width in range(17))
    assert len(check(symbols)) == shortest


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_steps_at_the_edges(width: int) -> None:
    longest = 1 << width
    for step in (1, longest - 1, longest, longest + 1, 2 * longest, 2 * longest + 1):
        symbols = np.zeros(3 * step + 7, dtype=np.int32)
        symbols[[step - 1, 2 * step - 1, 3 * step - 1]] = (5, 9, 5)
        data = check(symbols, width)
        figures = huffman.describe(data, symbols.shape)
        assert figures["entries"] == 3 + 3 * ((step - 1) // longest)
        assert figures["nonzeros"] == 3
        assert read_slowly(data, symbols.size) == symbols.tolist()
    for only in (0, 40):
        symbols = np.zeros(41, dtype=np.int32)
        symbols[only] = 3
        assert huffman.describe(check(symbols, width), (41,))["entries"] == 1 + only // longest


def test_small_tensors() -> None:
    for shape in [(0,), (0, 3), (), (1,), (3, 4)]:
        assert check(np.zeros(shape, dtype=np.int32)) == b""
    for value in (1, -1, 63, (1 << 31) - 1, -(1 << 31)):
        check(np.array([value]))
        check(np.array(value))
        check(np.full((4, 5), value))
        check(np.array([0, value, -(value + 1), 0, 1, 0]))
    assert len(check(np.full(100_000, 7))) == 5  # a stream of one symbol alone has no bits
    assert len(check(np.eye(300, dtype=np.int32))) <= 300 / 8 + 9


def test_values_of_any_kind() -> None:
    rng = np.random.default_rng(3)
    check(rng.integers(-(1 << 31), 1 << 31, 500))  # falls back to a fixed width of 32
    check(rng.integers(-(1 << 31), 1 << 31, 4)[rng.integers(0, 4, 3000)])
    check(np.arange(70_000))  # more distinct symbols than any table holds
    check(rng.permutation(1 << 16).astype(np.uint16) + 1)
    check(np.round(rng.laplace(0, 200, 300_000)).astype(np.int32))  # longer than one chunk
    assert huffman.decode(huffman.encode(np.array([0, 100])), (2,)).dtype == np.int8
    assert huffman.decode(huffman.encode(np.array([0, 200])), (2,)).dtype == np.int16
    with pytest.raises(ValueError, match="int"):
        huffman.encode(np.array([0.5]))
    for width in (-1, 17):
        with pytest.raises(ValueError, match="bits"):
            huffman.encode(np.arange(3), width=width)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.just(0), st.integers(-3, 3), st.integers(-(1 << 31), (1 << 31) - 1))),
    st.one_of(st.none(), st.integers(0, 16)),
)
def test_any_list_of_integers(numbers: list[int], width: int | None) -> None:
    symbols = np.array(numbers, dtype=np.int32)
    data = check(symbols, width)
    assert read_slowly(data, len(numbers)) == numbers


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 10_000), min_size=2, max_size=60))
def test_lengths_are_optimal(counts: list[int]) -> None:
    numbers = np.array(counts)
    lengths = prefix.limited_lengths(numbers, 30)
    assert int(numbers @ lengths) == heap_cost(counts)
    mean, entropy = numbers @ lengths / numbers.sum(), prefix.entropy_bits(numbers) / numbers.sum()
    assert entropy - 1e-9 <= mean < entropy + 1
    for limit in (6, 16, 30):
        assert sum(2.0**-n for n in prefix.limited_lengths(numbers, limit).tolist()) == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=2, max_size=7), st.integers(3, 5))
def test_limited_lengths_are_optimal(counts: list[int], limit: int) -> None:
    lengths = prefix.limited_lengths(np.array(counts), limit)
    assert lengths.max() <= limit
    assert int(np.array(counts) @ lengths) == least_limited_cost(counts, limit)


def test_skewed_counts_stay_within_the_limit() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 28:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    counts = np.array(fibonacci)
    assert prefix.limited_lengths(counts, 60).max() == 27
    code, bits = prefix.choose_code(np.arange(28), counts)
    assert code.longest <= prefix.LONGEST and bits == counts @ code.lengths
    assert bits <= heap_cost(fibonacci) * 1.001
    crowd = np.append(np.ones(3500, dtype=np.int64), (40_000, 50_000))  # 12 bits are too few
    best = int(crowd @ prefix.limited_lengths(crowd, prefix.LONGEST))
    assert prefix.choose_code(np.arange(3502), crowd)[1] == best
    assert int(crowd @ prefix.limited_lengths(crowd, prefix.HANDY)) > 1.0002 * best


def test_codes_are_canonical_and_no_word_begins_another() -> None:
    lengths = prefix.limited_lengths(np.random.default_rng(1).integers(1, 999, 40), 9)
    codes = prefix.canonical_codes(lengths).tolist()
    words = [format(c, f"0{n}b") for c, n in zip(codes, lengths.tolist(), strict=True)]
    assert sorted(words, key=lambda word: (len(word), word)) == [
        words[i] for i in np.argsort(lengths, kind="stable")
    ]
    ordered = sorted(words)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))


def test_entries_follow_the_papers_rule() -> None:
    for density, width in ((0.08, 5), (0.09, 4), (0.04, 5)):
        live = np.random.default_rng(7).random(200_000) < density
        figures = huffman.describe(huffman.encode(live, width=width), live.shape)
        nonzeros, none = int(live.sum()), (1 - density) ** (1 << width)
        expected = nonzeros / (1 - none)
        spread = np.sqrt(nonzeros * none) / (1 - none)  # fillers before a non-zero are geometric
        assert abs(figures["entries"] - expected) < 4 * spread
        steps = np.diff(np.flatnonzero(live), prepend=-1)
        assert figures["entries"] == nonzeros + int(((steps - 1) // (1 << width)).sum())


def test_a_layer_of_lenet_300_100_is_as_small_as_the_papers() -> None:
    symbols = make_pruned(235_200, 0.08, 63).reshape(300, 784)
    data = check(symbols)
    assert len(data) <= 0.0232 * 4 * symbols.size  # the paper's figure for its own weights
    figures = huffman.describe(data, symbols.shape)
    assert figures["value_bits"] == 6 and figures["nonzeros"] == np.count_nonzero(symbols)
    total = figures["table_bytes"] + figures["value_bytes"] + figures["gap_bytes"]
    assert total <= len(data) < total + 1
    values, counts = np.unique(symbols[symbols > 0], return_counts=True)
    entropy = prefix.entropy_bits(counts) / counts.sum()
    assert len(values) > 32 and entropy <= figures["mean_value_bits"] < entropy + 0.1
    assert figures["mean_value_bits"] * figures["entries"] == 8 * figures["value_bytes"]
    assert len(huffman.encode(symbols, width=5)) > len(data)


def test_figures_of_nothing() -> None:
    assert set(huffman.describe(b"", (4, 4)).values()) == {0}
    one = np.array([3])
    assert set(huffman.describe(b"", (4,))) == set(huffman.describe(huffman.encode(one), (1,)))


def test_bytes_are_frozen() -> None:
    symbols = np.where(np.arange(60) % 7 == 3, np.arange(60) % 5 - 1, 0)
    assert huffman.encode(symbols).hex() == FROZEN[0]
    assert huffman.encode(np.array([5, 5, 6, 5, 5, 5, 7, 5])).hex() == FROZEN[1]
    assert huffman.encode(np.arange(9) << 20, width=3).hex() == FROZEN[2]


FROZEN = (
    "206c3101b0a16146d91db0",
    "e018102040",
    "71800002000025d020000008000020000060000100000280000600000e00000001",
)


def test_damage_is_refused_or_of_the_right_shape() -> None:
    symbols = make_pruned(900, 0.15, 15)
    data = huffman.encode(symbols)
    damaged = [data[:end] for end in range(1, len(data))]
    damaged += [data + b"\0", data + b"\x81", b"\xff" * 40, b"\0" * 40]
    rng = np.random.default_rng(5)
    for _ in range(600):
        flipped = bytearray(data)
        for place in rng.integers(0, 8 * len(data), rng.integers(1, 4)):
            flipped[place >> 3] ^= 1 << (place & 7)
        damaged.append(bytes(flipped))
    damaged += [rng.bytes(int(n)) for n in rng.integers(1, 60, 300)]
    refused = 0
    for bad in damaged:
        answers = []
        for backend in BACKENDS:
            try:
                answers.append(huffman.decode(bad, symbols.shape, backend=backend))
            except FileError:
                answers.append(None)
        if answers[0] is None or answers[1] is None:
            assert answers[0] is None and answers[1] is None
            refused += 1
            continue
        assert answers[0].shape == symbols.shape
        np.testing.assert_array_equal(answers[0], answers[1])
    assert refused > len(damaged) // 2
    fixed = huffman.encode(np.array([1, 2, 4, 3]))  # the bits between the streams are zeros
    assert fixed[-1] & 1 == 0 and huffman.decode(fixed, (4,)).tolist() == [1, 2, 4, 3]
    with pytest.raises(FileError, match="end"):
        huffman.decode(fixed[:-1] + bytes([fixed[-1] | 1]), (4,))
    for end in range(1, len(data)):
        with pytest.raises(FileError):
            huffman.decode(data[:end], symbols.shape)
    for shape in [(0,), (1,), (899,), (1 << 20,)]:
        try:
            assert huffman.decode(data, shape).shape == shape
        except FileError:
            continue
    with pytest.raises(FileError, match="empty"):
        huffman.decode(b"\0", (0, 2))


def test_the_kernels_never_leave_their_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled loops do not check an index: the same function run by Python would raise."""
    monkeypatch.setattr(huffman, "compiled", lambda kernel, backend: kernel)
    rng = np.random.default_rng(8)
    for width in (None, 0, 3):
        symbols = make_pruned(150, 0.3, 9, seed=4) * 5
        data = huffman.encode(symbols, width=width)
        np.testing.assert_array_equal(huffman.decode(data, (150,)), symbols)
        for _ in range(150):
            flipped = bytearray(data)
            for place in rng.integers(0, 8 * len(data), rng.integers(1, 3)):
                flipped[place >> 3] ^= 1 << (place & 7)
            try:
                assert huffman.decode(bytes(flipped), (150,)).shape == (150,)
            except FileError:
                continue


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_few_bytes_never_take_more_memory_than_the_tensor(backend: str) -> None:
    size = 1 << 20
    huffman.decode(huffman.encode(np.arange(9)), (9,), backend=backend)  # compiled beforehand
    bombs = [huffman.encode(np.full(size, 7)), huffman.encode(np.ones(size // 2, dtype=bool))]
    bombs += [huffman.encode(make_pruned(100, 0.5, 9)), huffman.encode(np.arange(5000))]
    for data in bombs:
        tracemalloc.start()
        try:
            huffman.decode(data, (size,), backend=backend)
        except FileError:
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12 * size + (1 << 20)
