from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.codecs import context, rans
from lamina.codecs.classes import ENTRY_BITS
from lamina.codecs.context import ABOVE, BURSTS, GAPS, ROWS, Layout, choose
from lamina.codecs.fields import varint
from lamina.errors import FileError

BACKENDS = ("auto", "numpy")
WAYS = (ROWS, GAPS, ABOVE, BURSTS)
LOWS = (-(2**31), -32768, -129, -128, -7, -1, 0, 1, 100, 2**31 - 512)


class Bytes:
    """Referee: fields read from the docstrings, with plain loops and whole numbers."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        byte = self.byte()
        return byte & 127 | (self.varint() << 7 if byte & 128 else 0)

    def part(self, shape: tuple[int, int] | tuple[int]) -> list[int]:
        size = self.varint()
        self.at += size
        return rans.decode(self.data[self.at - size : self.at], shape).tolist()  # another format


class Lanes:
    """Referee: the state of each lane, and the words they share."""

    def __init__(self, data: bytes, lanes: int, total: int) -> None:
        if lanes > 1:
            self.states = [int.from_bytes(data[4 * k : 4 * k + 4], "little") for k in range(lanes)]
            data = data[4 * lanes :]
        else:
            tail = len(data) if len(data) < 5 else 4 - len(data) % 2
            self.states = [int.from_bytes(data[len(data) - tail :], "little")]
            data = data[: len(data) - tail]
        self.words = [int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2)]
        self.turn, self.total = 0, total

    def pull(self, table: list[int]) -> int:
        x = self.states[self.turn]
        slot, entry = x % self.total, 0
        while slot >= table[entry]:
            slot -= table[entry]
            entry += 1
        x = table[entry] * (x // self.total) + slot
        if x < 65536 and (len(self.states) > 1 or self.words):
            x = x << 16 | self.words.pop(0)
        self.states[self.turn] = x
        self.turn = (self.turn + 1) % len(self.states)
        return entry


def share(weights: list[int], total: int) -> list[int]:
    spare = total - sum(1 for w in weights if w)
    found = [(1 if w else 0) + w * spare // sum(weights) for w in weights]
    found[weights.index(max(weights))] += total - sum(found)
    return found


def weight(exponent: int, steps: int) -> int:
    """The whole part of 2^(15 + exponent / steps): a float's, set right by whole powers."""
    power = 1 << 15 * steps + exponent
    root = int(2.0 ** (15 + exponent / steps))
    while root**steps > power:
        root -= 1
    while (root + 1) ** steps <= power:
        root += 1
    return root


def gap_table(size: int, nonzeros: int, total: int) -> list[int]:
    zero, left, weights = ((size - nonzeros) << 20) // max(size, 1), 1 << 30, []
    while not weights or (len(weights) < 255 and left * 64 > 1 << 30):
        keep = max(left * zero >> 20, 1)
        weights.append(max(left - keep, 1))
        left = keep
    return share([*weights, left], total)


def read_tables(reader: Bytes, tables: int, count: int, steps: int, total: int) -> list[list[int]]:
    found: list[list[int]] = []
    last = [0] * count
    for t, line in enumerate(reader.part((tables, count)) if tables else []):
        last = list(
            itertools.accumulate(line) if t == 0 else map(sum, zip(last, line, strict=True))
        )
        weights = [weight(e, steps) if e else 0 for e in last]
        found.append(share(weights if any(weights) else [1] + weights[1:], total))
    return found


def decode_slowly(data: bytes, rows: int, cols: int) -> list[list[int]]:
    reader = Bytes(data)
    head, most = reader.byte(), reader.byte() + 1
    way, across, steps, total = head & 3, head >> 2 & 1, 4 << (head >> 3 & 3), 2048 << (head >> 5)
    if across:
        rows, cols = cols, rows
    lanes = max(8 * reader.varint(), 1)
    classes = reader.part((rows,)) if most > 1 else [0] * rows
    folded = reader.varint()
    low, count = -(folded + 1) // 2 if folded % 2 else folded // 2, reader.varint() + 1
    found = [
        (reader.varint(), reader.varint()) for _ in range(most if way in (GAPS, BURSTS) else 0)
    ]
    tables = read_tables(reader, most * (5 if way == ABOVE else 1), count, steps, total)
    counted = read_tables(reader, most if way == BURSTS else 0, 256, steps, total)
    stream = Lanes(data[reader.at :], lanes, total)
    out = [[0] * cols for _ in range(rows)]
    if way in (GAPS, BURSTS):
        for k, (nonzeros, fillers) in enumerate(found):
            mine = [r for r in range(rows) if classes[r] == k]
            table = counted[k] if counted else gap_table(len(mine) * cols, nonzeros, total)
            gaps = [stream.pull(table) for _ in range(nonzeros + fillers)]
            values = [low + stream.pull(tables[k]) for _ in range(nonzeros)]
            place = 0
            for gap in gaps:
                place += gap
                if gap < len(table) - 1:
                    out[mine[place // cols]][place % cols] = values.pop(0)
                    place += 1
    else:
        for r, c in itertools.product(range(rows), range(cols)):
            table = classes[r]
            if way == ABOVE:
                near = [abs(v) for v in [0, *out[r - 1], 0][c : c + 3]] if r else [0, 0, 0]
                size = near[0] + 2 * near[1] + near[2]
                table = 5 * table + (size if size < 3 else 3 if size < 5 else 4)
            out[r][c] = low + stream.pull(tables[table])
    assert not stream.words
    assert set(stream.states) == {0 if lanes == 1 else 1 << 16}
    return [list(line) for line in zip(*out, strict=True)] if across else out


def draw_grid(rows: int, cols: int, low: int, count: int, seed: int) -> np.ndarray:
    """Integers of `count` values from `low` on, often sparse, some rows denser than others."""
    rng = np.random.default_rng(seed)
    values = rng.integers(low, low + count, (rows, cols))
    values[rng.integers(rows), rng.integers(cols)] = low + count - 1
    still = 0 if low <= 0 < low + count else low
    dense = rng.random((rows, cols)) < rng.random((rows, 1)) * rng.choice([0.1, 1, 9])
    return np.where(dense, values, still).astype(np.int32)


def force(grid: np.ndarray, way: int, across: bool, classes: int, backend: str = "auto") -> bytes:
    """Code a matrix in this way, whether it is a good one or not."""
    turned = np.ascontiguousarray(grid.T if across else grid)
    low, high = int(grid.min()), int(grid.max())
    ids = np.random.default_rng(classes).integers(0, min(classes, len(turned)), len(turned))
    layout = Layout(way, across, ids, low, high - low + 1)
    return context._encode_rows(turned, layout, backend)


def planted(rows: int = 256, cols: int = 320, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of four densities in random order, and the kind of each."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.arange(rows) % 4)
    density = np.array([0.02, 0.1, 0.3, 0.8])[kinds, None]
    values = rng.choice([-2, -1, 1, 2, 3], (rows, cols), p=[0.1, 0.3, 0.3, 0.2, 0.1])
    return np.where(rng.random((rows, cols)) < density, values, 0).astype(np.int32), kinds


def blobs(rows: int = 160, cols: int = 240) -> np.ndarray:
    """Symbols that are large where those above are."""
    rng = np.random.default_rng(0)
    size = np.repeat(rng.choice([0.5, 4.0], (rows // 20, cols)), 20, 0)
    return np.rint(rng.normal(0, size)).astype(np.int32)


def entropy_bits(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / symbols.size)).sum())


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 11)),
    st.sampled_from(LOWS),
    st.sampled_from([1, 2, 3, 40, 256, 512]),
    st.sampled_from(WAYS),
    st.booleans(),
    st.integers(1, 3),
    st.integers(0, 999),
)
def test_every_way_round_trips_and_agrees_with_the_docstring(
    sides: tuple[int, int], low: int, count: int, way: int, across: bool, classes: int, seed: int
) -> None:
    grid = draw_grid(*sides, low, count, seed)
    data = force(grid, way, across, classes)
    assert force(grid, way, across, classes, "numpy") == data
    assert data[0] & 7 == way | across << 2
    for backend in BACKENDS:
        back = context.decode(data, grid.shape, backend=backend)
        assert back.dtype in (np.int8, np.int16, np.int32)
        assert back.flags.c_contiguous
        np.testing.assert_array_equal(back, grid)
    assert decode_slowly(data, *sides) == grid.tolist()


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_many_lanes(way: int, across: bool) -> None:
    grid = draw_grid(150, 170, -40, 81, 6)
    data = force(grid, way, across, 4)
    assert data[2] > 0
    assert force(grid, way, across, 4, "numpy") == data
    for backend in BACKENDS:
        np.testing.assert_array_equal(context.decode(data, grid.shape, backend=backend), grid)
    assert decode_slowly(data, *grid.shape) == grid.tolist()


@given(
    st.lists(st.integers(0, 6), max_size=4),
    st.sampled_from(LOWS),
    st.sampled_from([1, 2, 512]),
    st.integers(0, 99),
)
def test_any_shape_round_trips(shape: list[int], low: int, count: int, seed: int) -> None:
    symbols = np.random.default_rng(seed).integers(low, low + count, shape).astype(np.int32)
    data = context.encode(symbols)
    assert context.encode(symbols, backend="numpy") == data
    assert len(data) == context.length(symbols)
    for backend in BACKENDS:
        back = context.decode(data, symbols.shape, backend=backend)
        assert back.shape == symbols.shape
        np.testing.assert_array_equal(back, symbols)


def test_values_too_far_apart_are_a_value_error() -> None:
    for low in (-(2**31), -1, 2**31 - 513):
        apart = np.array([[low, low + 511]])
        np.testing.assert_array_equal(context.decode(context.encode(apart), (1, 2)), apart)
        with pytest.raises(ValueError, match="512 apart"):
            context.encode(np.array([[low, low + 512]]))
    for bad in (np.array([[0.5]]), np.array([[2**31]])):
        with pytest.raises(ValueError):
            context.encode(bad)


@pytest.mark.parametrize("across", [False, True])
def test_planted_rows_are_near_their_conditional_entropy(across: bool) -> None:
    grid, kinds = planted()
    matrix = grid.T if across else grid
    data = context.encode(matrix)
    assert data[0] >> 2 & 1 == across
    ideal = sum(entropy_bits(grid[kinds == k]) for k in range(4))
    table = entropy_bits(kinds) + 4 * 6 * 2 * ENTRY_BITS + 8 * (40 + 3 * 8 * data[2])
    assert ideal - 8 <= 8 * len(data) <= 1.02 * ideal + table
    assert len(data) <= 0.95 * len(rans.encode(matrix))
    np.testing.assert_array_equal(context.decode(data, matrix.shape), matrix)


def test_gaps_cost_no_more_than_rows_and_are_taken_where_sparse() -> None:
    rng = np.random.default_rng(0)
    density = np.array([0.01, 0.2])[np.arange(200) % 2, None]
    grid = np.where(rng.random((200, 300)) < density, rng.integers(1, 6, (200, 300)), 0)
    data = context.encode(grid)
    assert data[0] & 3 == GAPS
    layout = Layout(ROWS, False, np.arange(200) % 2, 0, 6)
    rows = context._encode_rows(grid.astype(np.int32), layout, "auto")
    assert 0.97 * len(rows) <= len(data) <= 1.02 * len(rows)


def test_what_stands_above_is_taken_where_it_helps() -> None:
    grid = blobs()
    data = context.encode(grid)
    assert data[0] & 3 == ABOVE
    assert len(data) <= 0.985 * len(rans.encode(grid))
    shuffled = np.random.default_rng(0).permutation(grid.reshape(-1)).reshape(grid.shape)
    plain = context.encode(shuffled)
    assert plain[0] & 3 != ABOVE
    assert len(plain) > 1.015 * len(data)


def test_counted_gaps_are_taken_where_zeros_come_in_bursts() -> None:
    rng = np.random.default_rng(0)
    live = np.repeat(rng.random((150, 40)) < 0.1, 8, 1)
    grid = np.where(live, rng.integers(1, 4, (150, 320)), 0).astype(np.int32)
    grid = rng.permutation(grid)  # nothing to be had from above
    data = context.encode(grid)
    assert data[0] & 7 == BURSTS
    assert len(data) <= 0.9 * len(force(grid, GAPS, False, 1))
    shuffled = rng.permutation(grid.reshape(-1)).reshape(grid.shape)
    assert len(force(shuffled, GAPS, False, 1)) <= 1.005 * len(force(shuffled, BURSTS, False, 1))


@pytest.mark.parametrize("source", ["planted", "dense", "ternary"])
def test_alike_symbols_are_worth_no_classes(source: str) -> None:
    """Negative control: independent symbols of one law; nothing is to be had, and little lost."""
    rng = np.random.default_rng(0)
    grid = {
        "planted": lambda: rng.permutation(planted()[0].reshape(-1)).reshape(256, 320),
        "dense": lambda: np.rint(rng.normal(0, 9, (200, 200))),
        "ternary": lambda: rng.choice([-1, 0, 1], (200, 200), p=[0.1, 0.8, 0.1]),
    }[source]()
    size = len(rans.encode(grid.astype(np.int32)))
    layout, guess = choose(grid.astype(np.int32))
    assert layout.classes.max() == 0
    assert abs(len(context.encode(grid.astype(np.int32))) - size) <= 0.01 * size + 8
    assert abs(guess - size) <= 0.02 * size + 32


def test_what_is_chosen_is_about_the_shortest_way() -> None:
    for grid in (planted()[0], blobs(), draw_grid(90, 110, -3, 7, 1)):
        layout, guess = choose(grid)
        data = context.encode(grid)
        assert abs(len(data) - guess) <= 0.03 * guess + 40
        sparse = np.count_nonzero(grid) <= context.SPARSE * grid.size  # denser, gaps are not tried
        ways = WAYS if sparse else (ROWS, ABOVE)
        for way, across in itertools.product(ways, (False, True)):
            assert len(data) <= 1.03 * len(force(grid, way, across, 1)) + 16
        assert layout.classes.shape == (grid.shape[layout.across],)


def test_long_sides_are_not_split_into_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = planted()[0].T.copy()  # its columns differ, but are fewer than its rows
    assert choose(grid)[0].across
    monkeypatch.setattr(context, "MOST_COUNTS", 1500)
    assert choose(grid)[0].across  # the shorter side is always looked at
    assert not choose(grid.T.copy())[0].across
    flat = np.random.default_rng(0).integers(0, 2, (8, 9000)).astype(np.int32)
    assert choose(flat)[0].classes.shape == (8,)


def small_codes() -> list[tuple[bytes, tuple[int, int]]]:
    grid = draw_grid(9, 13, -3, 7, 4)
    return [(force(grid, way, way == GAPS, 2), grid.shape) for way in WAYS]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_truncation_anywhere(way: int, backend: str) -> None:
    data, shape = small_codes()[way]
    refused = 0
    for cut in range(len(data)):
        try:
            assert context.decode(data[:cut], shape, backend=backend).shape == shape
        except FileError:
            refused += 1
    assert refused >= len(data) - 1  # of no bytes, a stream may be one of first entries alone


@pytest.mark.parametrize("way", WAYS)
def test_flips_give_an_error_or_the_shape(way: int) -> None:
    data, shape = small_codes()[way]
    kept, tries = 0, 8 * len(data)
    for bit in range(tries):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        outcome = []
        for backend in BACKENDS:
            try:
                outcome.append(context.decode(bytes(broken), shape, backend=backend).tolist())
            except FileError:
                outcome.append(None)
        assert outcome[0] == outcome[1]
        kept += outcome[0] is not None
        assert outcome[0] is None or np.shape(outcome[0]) == shape
    assert kept < 0.1 * tries


@given(st.binary(max_size=60), st.sampled_from([(0,), (1,), (3, 5), (300,), (16, 300)]))
def test_any_bytes_decode_or_are_refused(data: bytes, shape: tuple[int, ...]) -> None:
    verdicts = []
    for backend in BACKENDS:
        try:
            verdicts.append(context.decode(data, shape, backend=backend).tolist())
        except FileError:
            verdicts.append(None)
    assert verdicts[0] == verdicts[1]
    assert verdicts[0] is None or np.shape(verdicts[0]) == shape


def refuse(data: bytes, shape: tuple[int, ...]) -> tuple[str, int]:
    """Return why it is refused, and the most bytes that took."""
    tracemalloc.start()
    try:
        with pytest.raises(FileError) as caught:
            context.decode(data, shape)
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_bombs_are_refused_before_they_cost() -> None:
    context.decode(*small_codes()[0])  # what is compiled, is compiled now
    top = 3 << 5  # precision 14
    why, peak = refuse(bytes([top | ROWS, 255]) + bytes(40), (256, 1))
    assert "more tables" in why and peak < 1 << 20
    why, peak = refuse(bytes([top | ABOVE, 1]) + bytes(40), (2, 1))
    assert "more tables" in why and peak < 1 << 20
    why, peak = refuse(bytes([ROWS, 0]) + varint(1 << 40) + bytes(40), (9, 9))
    assert "more lanes" in why and peak < 1 << 20
    why, peak = refuse(bytes([ROWS, 9]) + bytes(40), (9, 9))
    assert "more classes" in why and peak < 1 << 20
    why, peak = refuse(bytes([ROWS, 0, 0, 0]) + varint(512) + bytes(40), (9, 9))
    assert "out of range" in why and peak < 1 << 20
    for low in ((1 << 32), (1 << 62) + 1):
        why, _ = refuse(bytes([ROWS, 0, 0]) + varint(low) + varint(1) + bytes(40), (9, 9))
        assert "out of range" in why
    many = varint(1 << 60)
    for found in (many + varint(0), varint(0) + many):
        why, peak = refuse(bytes([GAPS, 0, 0, 0, 1]) + found + bytes(40), (9, 9))
        assert "more non-zeros" in why and peak < 1 << 20


@pytest.mark.parametrize("head", [3 << 3, 1 << 7])
def test_unknown_first_bytes(head: int) -> None:
    data, shape = small_codes()[0]
    assert "first byte" in refuse(bytes([head]) + data[1:], shape)[0]


def test_a_damaged_tensor_costs_little_memory() -> None:
    """Whatever a flip says, no more is taken than tables for so small a tensor may be."""
    peaks = []
    for (data, shape), bit in itertools.product(small_codes(), range(0, 120, 3)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        tracemalloc.start()
        try:
            context.decode(bytes(broken), shape)
        except FileError:
            pass
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert max(peaks) < 12 << 20


@pytest.mark.parametrize("shape", [(-1,), (1 << 62,), (0, 1 << 40, 1 << 40), (1,) * 70])
def test_impossible_shapes(shape: tuple[int, ...]) -> None:
    for data in (b"", bytes(9)):
        with pytest.raises(FileError):
            context.decode(data, shape)


def test_an_empty_tensor_has_no_data() -> None:
    assert context.encode(np.zeros((0, 4), np.int32)) == b""
    assert context.decode(b"", (0, 4)).shape == (0, 4)
    with pytest.raises(FileError, match="no data"):
        context.decode(b"\0", (0, 4))
    with pytest.raises(FileError):
        context.decode(b"", (1, 4))


def test_contexts_in_pieces_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    spots = np.kron(draw.integers(0, 2, (9, 7)), np.ones((10, 10)))  # what stands above tells much
    grid = np.rint(3 * spots * draw.normal(size=spots.shape)).clip(-9, 9).astype(np.int32)
    whole = context.encode(grid)
    assert whole[0] & 3 == context.ABOVE
    for piece in (1, 70, 1000):
        monkeypatch.setattr(context, "PIECE", piece)
        assert context.encode(grid) == whole
