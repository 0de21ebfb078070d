from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.codecs.frequency import scale_weights
from lamina.codecs.segments import (
    Lookup,
    check_end,
    count_lanes,
    join,
    narrow,
    plain_view,
    pull,
    push,
    split,
    spread,
)
from lamina.errors import FileError

BACKENDS = ("auto", "numpy")


def draw_tables(seed: int, sizes: list[int]) -> tuple[Lookup, list[list[int]], np.ndarray]:
    """Segments of these sizes, each with a table of its own or of another, and their symbols."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(11, 15, 3)
    tables = [scale_weights(rng.integers(1, 500, rng.integers(1, 40)), int(b)) for b in bits]
    used = rng.integers(0, 3, len(sizes))
    first = np.cumsum([0, *(len(table) for table in tables)])[used]
    slots = np.cumsum([0, *(1 << int(b) for b in bits)])[used]
    start = np.concatenate([np.cumsum(table) - table for table in tables])
    freq = np.concatenate(tables)
    look = Lookup(freq, start, first, slots, bits[used], np.cumsum(sizes))
    index = [
        rng.choice(len(tables[t]), n, p=tables[t] / tables[t].sum())
        for t, n in zip(used.tolist(), sizes, strict=True)
    ]
    return look, [tables[t].tolist() for t in used.tolist()], np.concatenate(index)


def push_slowly(
    index: list[int], tables: list[list[int]], ends: list[int], lanes: int
) -> tuple[list[int], list[int]]:
    """Referee: the docstring's formula with whole numbers, from the last symbol to the first."""
    states, words = [0 if lanes == 1 else 1 << 16] * lanes, []
    for i in range(len(index) - 1, -1, -1):
        table = tables[next(g for g, end in enumerate(ends) if i < end)]
        total, f, c = sum(table), table[index[i]], sum(table[: index[i]])
        x = states[i % lanes]
        if (x // f) * total + c + x % f >= 1 << 32:  # words are moved out before
            words.append(x % 65536)
            x //= 65536
        states[i % lanes] = (x // f) * total + c + x % f
        assert states[i % lanes] < 1 << 32
    return words[::-1], states


def payload_of(index: np.ndarray, tables: list[list[int]], ends: np.ndarray) -> float:
    owner = np.searchsorted(ends, np.arange(index.size), "right")
    return sum(
        math.log2(sum(tables[g]) / tables[g][s])
        for g, s in zip(owner.tolist(), index.tolist(), strict=True)
    )


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.sampled_from([1, 8, 16]),
    st.integers(0, 999),
)
def test_words_are_those_of_whole_arithmetic(sizes: list[int], lanes: int, seed: int) -> None:
    sizes = [lanes, *sizes]
    look, tables, index = draw_tables(seed, sizes)
    payload = payload_of(index, tables, look.ends)
    slow = push_slowly(index.tolist(), tables, look.ends.tolist(), lanes)
    entry = narrow(np.arange(len(look.freq)))
    for backend in BACKENDS:
        words, states = push(index, look, lanes, payload, backend)
        assert (words.tolist(), states.tolist()) == slow
        again = split(join(words, states), lanes)
        back = pull(*again, look, entry, backend)
        assert back.dtype == entry.dtype
        np.testing.assert_array_equal(back, index + spread(look.first, look.ends))
    tail = 32 * lanes + 0.01 * index.size
    assert payload - 1 <= 16 * len(words) + tail + 1 <= payload + 2 * tail + 17 * lanes


@pytest.mark.parametrize("lanes", [1, 8, 64])
def test_many_symbols_take_what_the_tables_say(lanes: int) -> None:
    look, tables, index = draw_tables(5, [3000, 0, 5000, 1, 4000])
    payload = payload_of(index, tables, look.ends)
    coded = {backend: push(index, look, lanes, payload, backend) for backend in BACKENDS}
    data = [join(*both) for both in coded.values()]
    assert data[0] == data[1]
    assert payload / 8 - 2 <= len(data[0]) <= payload * 1.0005 / 8 + 4 * lanes
    entry = np.arange(len(look.freq), dtype=np.int16)
    for backend in BACKENDS:
        back = pull(*split(data[0], lanes), look, entry, backend)
        np.testing.assert_array_equal(back, index + spread(look.first, look.ends))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_payload_guessed_too_small_is_only_slower(backend: str) -> None:
    look, _, index = draw_tables(2, [6000])
    for lanes in (1, 8):
        low, high = (push(index, look, lanes, guess, backend) for guess in (0.0, 1e6))
        assert join(*low) == join(*high)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lanes", [1, 8])
def test_damage_shows_at_the_end(lanes: int, backend: str) -> None:
    look, tables, index = draw_tables(3, [700, 800])
    data = join(*push(index, look, lanes, payload_of(index, tables, look.ends), backend))
    entry = np.arange(len(look.freq), dtype=np.int16)
    kept = 0
    for cut in range(0, len(data), 7):
        try:
            pull(*split(data[:cut], lanes), look, entry, backend)
            kept += cut + 1
        except FileError:
            pass
    assert kept < 9 if lanes == 1 else not kept  # a byte or none may be a code of first entries
    rng, refused = np.random.default_rng(0), 0
    for bit in rng.integers(0, 8 * len(data), 60).tolist():
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        try:
            assert pull(*split(bytes(broken), lanes), look, entry, backend).shape == index.shape
        except FileError:
            refused += 1
    assert refused >= 58
    with pytest.raises(FileError, match="do not end"):
        pull(*split(data + b"\0\0", lanes), look, entry, backend)


@given(st.lists(st.integers(0, 65535), max_size=5), st.integers(0, (1 << 32) - 1))
def test_a_lone_state_is_joined_and_split(words: list[int], state: int) -> None:
    if words:
        state |= 1 << 16  # below, it would have taken a word back
    data = join(np.array(words, np.uint16), np.array([state]))
    found, states = split(data, 1)
    assert found.tolist() == [*words, 0]
    assert states.tolist() == [state]


def test_few_bytes_are_too_few_for_lanes() -> None:
    for size in (0, 31, 33):
        with pytest.raises(FileError, match="too early"):
            split(bytes(size), 8)
    words, states = split(bytes(34), 8)
    assert len(words) == 1 + 8
    with pytest.raises(FileError):
        check_end(1, words, states)


def test_lanes_grow_with_the_payload() -> None:
    lanes = [count_lanes(payload) for payload in (0, 9599, 9600, 19_200, 19_199, 1e12)]
    assert lanes == [1, 1, 8, 16, 8, 4096]


def test_narrow_takes_the_smallest_type() -> None:
    kinds = {(-128, 127): "int8", (-129, 0): "int16", (0, 128): "int16", (0, 32768): "int32"}
    for ends, kind in kinds.items():
        assert narrow(np.array(ends)).dtype == kind
        assert narrow(np.array(ends)).tolist() == list(ends)
    assert narrow(np.zeros(0, np.int64)).dtype == np.int8


def test_a_plain_view_holds_plain_integers() -> None:
    array = np.arange(4, dtype=np.uint32)
    view = plain_view(array)
    assert type(view[0]) is int
    view[1:][0] = 9
    assert array.tolist() == [0, 9, 2, 3]
