"""Constants, tables and fresh memory of the mixing model: exact integers on every machine."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

CONTEXTS = 6  # adaptive counters asked for each decision
RATES = 8  # multiplying rates: row twice, column twice, neighbours, near, block, previous row
INPUTS = CONTEXTS + RATES + 2  # and the overall density, and a constant
SETS = 96  # weight sets: 3 kinds of decision x 32
SLOTS = 512  # counters a context
REACH = 3071  # largest log odds
UNARY = 12  # steps of the magnitude before exp-Golomb

SETTINGS = (  # found by random search over trained and synthetic tensors; a change breaks old files
    3,  # 0 prior of the first row rate, 2^-8
    3665,  # 1 prior of the second row rate
    3,  # 2 prior of the first column rate
    1337,  # 3 prior of the second column rate
    169,  # 4 prior of the neighbour columns' rate
    54,  # 5 prior of the near rate
    9,  # 6 prior of the block's rate
    919,  # 7 prior of the last row's rate
    723,  # 8 weight of the near expectation, 1/16
    8787,  # 9 first guess of the density, 2^-16
    19,  # 10 weight of that guess, symbols
    68,  # 11 width of a step of expected log odds
    292,  # 12 final learning rate of the mixers
    586,  # 13 extra learning rate at first
    5,  # 14 first step of a counter: 2 / this
    2784,  # 15 slowest step of a counter: 1 / this
    5,  # 16 first step of a plain probability: 2 / this
    60,  # 17 slowest step of it: 1 / this
)
# first weights, 65536 = 1: each context; density, row twice, column twice, neighbours, near, block,
# last row, constant
ZERO_WEIGHTS = (2488, 46441, 6598, 4521, 10302, 2455, 1673, 779, 18600, 0, 0)
OTHER_WEIGHTS = (9438, 908)


@cache
def make_tables() -> tuple[NDArray[np.int64], ...]:
    """Return squash [2 * REACH + 1], stretch [65536], stretch of rates [65536], bit lengths [4096].

    Squash maps log odds + REACH to a probability; stretch is its inverse; the last two serve
    probabilities below 1/64 in 2^-22, and contexts.

    Made by integer arithmetic from the series of exp(1/256), never from a float library.
    """
    one = 1 << 96
    base, term, k = 0, one, 0
    while term:
        base += term
        k += 1
        term //= 256 * k
    squash, power = [32768], one
    odds = [one]
    for _ in range(REACH):
        power = power * base // one
        odds.append(power)
        squash.append(min((power << 16) // (power + one), 65535))
    curve = np.array([65536 - p for p in squash[:0:-1]] + squash, dtype=np.int64).clip(1, 65535)
    stretch = np.searchsorted(curve, np.arange(32769)).clip(0, 2 * REACH) - REACH
    stretch = np.concatenate([stretch, -stretch[32767:0:-1]])
    # Below 1/64 a probability in 2^-22 has its own table: 22 bits / odds is where it steps.
    edges = [(1 << 22) * one // (one + power) for power in odds[::-1]]
    small = np.searchsorted(np.array(edges, dtype=np.int64), np.arange(65536)).clip(0, REACH)
    lengths = np.array([k.bit_length() for k in range(4096)], dtype=np.int64)
    return curve, stretch.astype(np.int64), (small - REACH).astype(np.int64), lengths


def make_memory(cols: int, blocks: int) -> tuple[NDArray[np.int64], ...]:
    """Return fresh counters, weights and statistics, in the order `code_symbols` takes them."""

    def zeros(size: int) -> NDArray[np.int64]:
        return np.zeros(size, dtype=np.int64)

    weights = np.zeros((2, SETS, INPUTS), dtype=np.int64)
    weights[:, :32] = [ZERO_WEIGHTS[0]] * CONTEXTS + list(ZERO_WEIGHTS[1:])
    weights[:, 32:, :CONTEXTS] = OTHER_WEIGHTS[0]
    weights[:, 32:, CONTEXTS] = OTHER_WEIGHTS[1]
    priors = np.array(SETTINGS[:RATES], dtype=np.int64) << 14
    slots = np.full(3 * CONTEXTS * SLOTS, -1, dtype=np.int64)
    plain = np.full(3 * 32, 32768, dtype=np.int64)
    memory: tuple[NDArray[np.int64], ...] = (
        slots,
        zeros(len(slots)),
        weights.reshape(-1),
        zeros(2 * SETS),
        plain,
    )
    memory += (zeros(len(plain)), zeros(cols), zeros(cols), zeros(cols), zeros(cols))
    return (*memory, zeros(blocks), zeros(CONTEXTS), zeros(INPUTS), zeros(8), zeros(8), priors)
