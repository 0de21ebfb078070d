"""What a network takes where a structure stands in the place of several of its layers.

Such a structure runs on inputs that no layer sees alone, and what lies between the layers goes with
them, so the whole network is timed, in turn with the original. Spans that are alike get the same
structure at once: each of them saves an equal share, and the share of one drowns less in noise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from lamina.measure.clock import LEAST, ONE, Timer, check_timed
from lamina.measure.latency import Progress, Structure, measure_ratios, reshaped
from lamina.network.source import Network

CHUNK = 4  # networks that share a round with the original; each is a copy of it
FEWEST = 3  # structures of one kind that are measured even where time is short

Ratios = dict[str, dict[str, tuple[float, float]]]


def measure_spans(
    network: Network,
    structures: Mapping[str, tuple[str, Mapping[str, Structure]]],
    members: Mapping[str, Collection[str]],
    *,
    whole: float,
    threads: int = 1,
    seconds: float = 60.0,
    timer: Timer | None = None,
    progress: Progress | None = None,
    last: Structure = (),
) -> tuple[Ratios, int]:
    """Time a network with structures in the place of its spans.

    Args:
        network: the network, which is only read.
        structures: by span name, what it is like, and its structures by a key that like spans
            share.
        members: by span name the layers it takes; spans that take the same one are not changed
            together.
        whole: what one forward pass takes, about [s].
        threads: of torch while measuring.
        seconds: what measuring may take, about.
        timer: times jobs in interleaved rounds; default: `clock`.
        progress: called with (kinds of span done, kinds in all, a span's name).
        last: edits of the whole network that will follow any structure (a layout).

    Returns:
        by span and key, the time of the network with the structure in this span's place over that
        of the original, and what of that may be noise; and how many were not measured.

    Raises:
        BudgetError: the network has no example inputs.
        FileError: a structure does not fit its layers.
    """
    check_timed(network)
    kinds: dict[str, list[str]] = {}
    for name, (like, given) in structures.items():
        if given:
            kinds.setdefault(like, []).append(name)
    keys = {like: _keys([structures[n][1] for n in names]) for like, names in kinds.items()}
    count = sum(map(len, keys.values()))
    once = LEAST * max(ONE, whole) * (1 + 1 / CHUNK)
    most = {like: max(FEWEST, int(seconds * len(k) / max(1, count) / once))
            for like, k in keys.items()}  # fmt: skip
    found: Ratios = {name: {} for name in structures}
    for done, (like, names) in enumerate(kinds.items()):
        if progress:
            progress(done, len(kinds), names[0])
        kept = _spread(keys[like], most[like])
        for start in range(0, len(kept), CHUNK):
            part = kept[start : start + CHUNK]
            copies: list[nn.Module] = []
            times = []
            for key in part:
                same = _apart([n for n in names if key in structures[n][1]], members)
                edits = tuple(edit for n in same for edit in structures[n][1][key])
                copies.append(reshaped(network, (*edits, *last)))
                times.append(len(same))
            share = seconds * len(part) / max(1, count)
            ratios, _ = measure_ratios(network, copies, threads, share, timer)
            for key, many, (ratio, noise) in zip(part, times, ratios, strict=True):
                one = 1 + (ratio - 1) / many, noise / many
                for name in names:
                    if key in structures[name][1]:
                        found[name][key] = one
    if progress:
        progress(len(kinds), len(kinds), "")
    return found, count - sum(min(len(k), most[like]) for like, k in keys.items())


def _keys(given: list[Mapping[str, Structure]]) -> list[str]:
    """Return the keys of all structures, those with the most in their settings last."""
    size: dict[str, float] = {}
    for structures in given:
        for key, edits in structures.items():
            settings = [v for edit in edits for v in edit.settings.values()]
            size.setdefault(key, float(sum(v for v in settings if isinstance(v, int))))
    return sorted(size, key=lambda key: (size[key], key))


def _spread(keys: list[str], most: int) -> list[str]:
    """Return at most so many keys, evenly, ends included."""
    if len(keys) <= most:
        return keys
    step = (len(keys) - 1) / (most - 1)
    return [keys[i] for i in sorted({round(k * step) for k in range(most)})]


def _apart(names: list[str], members: Mapping[str, Collection[str]]) -> list[str]:
    """Return the first of the spans, and those that share no layer with any before."""
    taken: set[str] = set()
    found = []
    for name in names:
        if taken.isdisjoint(members[name]):
            taken.update(members[name])
            found.append(name)
    return found
