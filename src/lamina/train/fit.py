"""Making trained values fit their bytes exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from lamina import codecs
from lamina.artifact.records import encode, matrix_view
from lamina.forms import Grid, Values
from lamina.train.hold import HeldGrid, HeldNetwork

SMALL = 4096  # symbols; smaller tensors are simply coded
WIDEST = 8.0  # the most that levels are drawn towards zero, in steps
HEAD = 8  # bytes of a record that are not symbols
LARGE = 1 << 22  # symbols; networks with more are fitted by estimates
LOOKS = 4  # real sizes that correct those
Size = Callable[[Mapping[str, Values]], float]


def held_bytes(values: Mapping[str, Values]) -> int:
    """Return what values take in the file, record heads included [bytes]."""
    return sum(len(encode(v)) for v in values.values())


def estimated_bytes(values: Mapping[str, Values]) -> float:
    """Return a quick estimate of `held_bytes`, without coding anything large."""
    total = 0.0
    for held in values.values():
        if isinstance(held, Grid) and held.symbols.numel() > SMALL:
            total += codecs.estimate(matrix_view(held.symbols)) + HEAD
        else:
            total += len(encode(held))
    return total


def fit(net: HeldNetwork, room: float | None) -> dict[str, Values]:
    """Return the trained values, with the least widening of the zero zone that fits `room` bytes.

    Levels with `|z| < 1/2 + t` become zero, the others stay as they are (so that layers on fine
    grids, whose symbols are large, are hardly touched); t is bisected over [0, 1/2], and beyond, up
    to `WIDEST`, only where that is not enough: a poor network that fits is compared with others,
    one that does not fit is lost. With no limit, or when all fits, the values are exactly those
    that were trained.
    """
    values = net.release()
    if room is None:
        return values
    whole = held_bytes(values)
    if whole <= room:
        return values
    levels = {
        name: held.levels().detach()
        for name, held in zip(net.names, net.held, strict=True)
        if isinstance(held, HeldGrid)
    }
    if sum(z.numel() for z in levels.values()) <= LARGE:
        return _widened(values, levels, held_bytes, room)
    # Coding millions of symbols takes seconds: most looks are estimates, corrected by real ones.
    target, best = float(room), values
    for _ in range(LOOKS):
        best = _widened(values, levels, _estimate(whole / max(estimated_bytes(best), 1.0)), target)
        whole = held_bytes(best)
        if whole <= room:
            return best
        target -= 1.1 * (whole - room)
    return _widened(values, levels, held_bytes, room)


def _estimate(correction: float) -> Size:
    return lambda values: correction * estimated_bytes(values)


def _widened(
    values: Mapping[str, Values], levels: Mapping[str, torch.Tensor], size: Size, room: float
) -> dict[str, Values]:
    """Return the values with the least widening at which their size is at most `room`."""
    low, high = 0.0, 0.5
    best = _narrow(values, levels, high)
    while high < WIDEST and size(best) > room:
        low, high = high, 2 * high
        best = _narrow(values, levels, high)
    for _ in range(12):
        middle = (low + high) / 2
        trial = _narrow(values, levels, middle)
        if size(trial) <= room:
            high, best = middle, trial
        else:
            low = middle
    return best


def _narrow(
    values: Mapping[str, Values], levels: Mapping[str, torch.Tensor], by: float
) -> dict[str, Values]:
    out = dict(values)
    for name, z in levels.items():
        held = values[name]
        assert isinstance(held, Grid)
        symbols = torch.where(z.abs() < 0.5 + by, torch.zeros_like(z), z.round())
        out[name] = replace(held, symbols=symbols.to(torch.int32).cpu())
    return out
