"""Contexts from the row above: how large the three nearest symbols already decoded there are.

    context = level of |up left| + 2 |up| + |up right|, with levels 0, 1, 2, 3 to 4, 5 and more

Symbols past the ends of a row, and above the first, count as zero. All of a row's contexts are
known before it is begun, so the lanes of the coder need not wait for one another.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs.frequency import Ints
from lamina.codecs.kernels import compiled
from lamina.codecs.segments import check_end, fill_all, plain_view
from lamina.codecs.symbols import Symbols

LEVELS = np.array([0, 1, 2, 3, 3, 4], dtype=np.int64)
CONTEXTS = 5


def contexts_above(grid: Symbols) -> Ints:
    """Return the context of every symbol [rows, cols].

    Example:
        >>> contexts_above(np.array([[0, 3, 0, 0], [0, 0, 0, 0]])).tolist()
        [[0, 0, 0, 0], [3, 4, 3, 0]]
    """
    size = np.minimum(np.abs(grid[:-1].astype(np.int64)), 5)
    near = 2 * size
    near[:, 1:] += size[:, :-1]
    near[:, :-1] += size[:, 1:]
    found = np.zeros(grid.shape, dtype=np.int64)
    found[1:] = LEVELS[np.minimum(near, 5)]
    return found


def pull_above(
    words: Any, states: Any, packed: Any, entry: Any, tables: Any, shift: Any, levels: Any,
    above: Any, here: Any, half: Any, low: Any, out: Any,
) -> Any:  # fmt: skip
    """Kernel: decode rows; return how many words were read, or -1 where they end too early.

    `tables` is each row's first table, `shift` the bits of a table, `above` and `here` room for
    magnitudes [cols + 2]; the rest is as in `segments.pull_lanes`.
    """
    lanes, limit = len(states), len(words) - len(states)
    cols, place, k, at = len(above) - 2, 0, 0, 0
    mask = (half // half << shift) - half // half
    for r in range(len(tables)):
        first = tables[r]
        for j in range(cols):
            near = min(above[j] + 2 * above[j + 1] + above[j + 2], 5)
            table = first + levels[near]
            x = states[k]
            slot = int(x & mask) + (table << int(shift))
            e = packed[slot]
            value = entry[slot]
            out[at] = value
            here[j + 1] = value  # 64 bits: in 8, the magnitude of -128 would be -128
            here[j + 1] = min(abs(here[j + 1]), 5)
            x = (e >> half) * (x >> shift) + (e & low)
            if x <= low and (lanes > 1 or place < limit):
                x = (x << half) | words[place]
                place += 1
                if place > limit:
                    return -1
            states[k] = x
            at += 1
            k = k + 1 if k + 1 < lanes else 0
        above, here = here, above
    return place


def pull_rows_above(
    words: NDArray[Any], states: NDArray[Any], freq: Ints, entry: NDArray[Any], tables: Ints,
    precision: int, cols: int, backend: str,
) -> NDArray[Any]:  # fmt: skip
    """Return the symbols of coded words [rows * cols].

    Args:
        words: with a spare for each lane at the end.
        states: of the lanes.
        freq: frequencies of all tables' entries, each adding up to 2 ** precision [entries].
        entry: the symbol of each entry [entries].
        tables: each row's first table [rows].
        precision: bits of the tables.
        cols: symbols of a row.
        backend: as in `kernels.compiled`; without numba this is plain Python, and slow.

    Raises:
        FileError: the words do not end where the symbols do.
    """
    packed, by_slot = fill_all(freq, entry, backend)
    out = np.empty(len(tables) * cols, dtype=entry.dtype)
    room = np.zeros(cols + 2, dtype=np.int64), np.zeros(cols + 2, dtype=np.int64)
    states = states.astype(np.uint32)
    arrays = (words, states, packed, by_slot, tables)
    fast = compiled(pull_above, backend)
    if fast is not None:
        read = fast(
            *arrays, np.uint32(precision), LEVELS, *room, np.uint32(16), np.uint32(65535), out
        )
    else:
        views = [plain_view(array) for array in arrays]
        wide = [plain_view(array) for array in (LEVELS, *room)]
        read = pull_above(*[*views, precision, *wide, 16, 65535, plain_view(out)])
    check_end(int(read), words, states)
    return out
