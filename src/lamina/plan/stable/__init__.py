"""Lossless structure: a ReLU network without the units that do nothing of their own on a box.

    network -> chain (read) -> proofs (measure.bounds) -> smaller chain (shrink) -> edits (carry)

until nothing more is found. Every proof is logged; what was proven can be given instead of being
proven again. The result computes the same on the box, to rounding, which is measured on points.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lamina.errors import NetworkError
from lamina.measure.bounds import Limits, Verdict, decide, run
from lamina.measure.bounds.ladder import Progress
from lamina.measure.bounds.witness import points_of
from lamina.network.source import Network
from lamina.plan.rewrite import Rewritten, find_folds, rewrite
from lamina.plan.stable.box import Box
from lamina.plan.stable.carry import carried
from lamina.plan.stable.read import Chain, read_chain, shapes, widths
from lamina.plan.stable.shrink import ACTIVE, INACTIVE, Shrunk, shrink

__all__ = ["Box", "Structure", "find_structure"]

CLOSE = 1e-5  # what outputs may differ by, times their largest magnitude where that is above 1
POINTS, VALUES, BLOCK = 2000, 1 << 24, 64  # points; values of one step at all of them; at once
ROUNDS = 10
WHAT = "cannot find lossless structure"
STATES = {"inactive": INACTIVE, "active": ACTIVE}


@dataclass(frozen=True)
class Structure:
    """What was found of a network.

    Args:
        rewritten: the network without what was removed, or None where nothing was.
        log: the proof log as JSON values: `box`, `network`, `units` (before and after of each
            layer), `rounds` (per layer and unit: which rung, and the bound), `removed`,
            `differences`, `notes`.
    """

    rewritten: Rewritten | None
    log: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> str:
        """Return what was removed, as a sentence or two."""
        before, after = (sum(pair[i] for pair in self.log["units"].values()) for i in (0, 1))
        box = Box.parse(self.log["box"]).show()
        counts: dict[str, int] = {}
        for entry in self.log["removed"]:
            counts[entry["what"]] = counts.get(entry["what"], 0) + 1
        said = self.log["rounds"][-1]["layers"].values() if self.log["rounds"] else ()
        left = sum(len(entry["open"]) for entry in said)
        more = f" {left} could not be decided with the time there was." if left else ""
        if not counts:
            return f"Lossless structure: none of {before} units can be removed on {box}.{more}"
        kinds = ", ".join(f"{n} {what}" for what, n in counts.items())
        apart = self.log["differences"]
        return (
            f"Lossless structure: {before - after} of {before} units removed ({kinds}); for inputs "
            f"in {box} the outputs are the same (within {apart['outputs']:.1e} at "
            f"{apart['points']} points), outside they may differ.{more}"
        )


def find_structure(
    network: Network,
    box: Box,
    limits: Limits | None = None,
    *,
    points: Tensor | None = None,
    proven: Sequence[Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> Structure:
    """Return a network without its stable and dependent units, with the proofs.

    Args:
        network: feed-forward with ReLUs, and with an example input; unchanged.
        box: of its inputs.
        limits: of the proofs.
        points: inputs to look at first, `[n, *shape]`; those outside the box are moved into it.
        proven: `rounds` of an earlier log: nothing is proven anew.
        progress: called with (done, in all, text).

    Raises:
        NetworkError: it is no feed-forward ReLU network (the reason is said), or the box does not
            fit it.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> _ = nn.init.constant_(net[0].bias, 0.1)
        >>> net[0].bias.data[1] = -1e3
        >>> found = find_structure(Network(net, (torch.zeros(1, 2),)), Box((0.0,), (1.0,)))
        >>> found.rewritten.network.module[0].out_features < 3
        True
    """
    limits = limits or Limits()
    folds = find_folds(network)
    first = rewrite(network, ("fold",), folds) if folds else Rewritten(network)
    chain = read_chain(first.network)
    if isinstance(chain, str):
        raise NetworkError(WHAT, network.name, chain, "leave lossless_structure out")
    bounds = box.bounds(chain.shape)
    started = time.monotonic()
    for merge in (True, False):
        rounds, made = _rounds(chain, box, limits, points, proven, progress, started, merge)
        log: dict[str, Any] = {
            "box": box.text(),
            "network": network.digest(),
            "seconds": round(time.monotonic() - started, 3),
            "units": {
                path: [count, _left(made.chain, path)] for path, count in widths(chain).items()
            },
            "rounds": rounds,
            "removed": made.removed,
            "differences": {},
            "notes": list(made.notes),
        }
        if not made.removed and not made.gone:
            return Structure(None, log)
        done = carried(network, first, chain, made, box)
        count = max(64, min(POINTS, VALUES // max(s.numel() for s in shapes(chain))))
        spots = points_of(bounds, count, limits.seed + 1)
        apart = differences(network, done.network, spots)
        wide = max(
            float((run(chain.steps(), block) - run(made.chain.steps(), block)).abs().max())
            for block in spots.split(BLOCK)
        )
        log["differences"] = {"outputs": apart[0], "float64": wide, "points": count}
        if apart[0] <= CLOSE * max(1.0, apart[1]):
            if not merge:
                log["notes"].append("Nothing was merged: rounding would have shown.")
            return Structure(done, log)
        proven = rounds  # the same proofs, and only what needs no sums
    log["notes"].append(f"Nothing is removed: the outputs would differ by {apart[0]:.1e}.")
    log["units"] = {path: [count, count] for path, count in widths(chain).items()}
    return Structure(None, {**log, "removed": []})


def _rounds(
    chain: Chain, box: Box, limits: Limits, points: Tensor | None,
    proven: Sequence[Mapping[str, Any]] | None, progress: Progress | None, started: float,
    merge: bool,
) -> tuple[list[dict[str, Any]], Shrunk]:  # fmt: skip
    """Prove and remove in turns, until nothing more can be removed."""
    rounds: list[dict[str, Any]] = []
    whole = Shrunk(chain, {})
    for number in range(ROUNDS):
        if proven is not None:
            if number >= len(proven):
                break
            entry = dict(proven[number])
            states = _states_in(whole.chain, entry)
        else:
            entry, states = _proofs(whole.chain, box, limits, points, progress, started)
        rounds.append(entry)
        made = shrink(whole.chain, states, merge)
        for gone in made.removed:
            gone["rung"], gone["bound"] = _proof_of(entry, gone)
        changed = bool(made.removed or made.gone)
        made.gone[:0], made.removed[:0] = whole.gone, whole.removed
        made.notes = list(dict.fromkeys([*whole.notes, *made.notes]))
        whole = made
        if not changed:
            break
    return rounds, whole


def _proofs(
    chain: Chain, box: Box, limits: Limits, points: Tensor | None, progress: Progress | None,
    started: float,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """Decide the units of a chain; return the log of it, and the states by layer."""
    at = {
        number: place
        for number, layer in enumerate(chain.layers[:-1])
        if not layer.why and (place := chain.relu_of(number)) is not None
    }
    left = max(0.0, limits.seconds - (time.monotonic() - started))
    found = decide(
        chain.steps(), box.bounds(chain.shape), replace(limits, seconds=left), points,
        only=set(at.values()), progress=progress,
    )  # fmt: skip
    verdicts = {verdict.step: verdict for verdict in found}
    layers, states = {}, {}
    for number, place in at.items():
        layer = chain.layers[number]
        entry, states[layer.path] = _logged(verdicts[place], layer.units)
        layers[layer.origin] = entry
    return {"layers": layers}, states


def _logged(verdict: Verdict, units: Sequence[int]) -> tuple[dict[str, Any], Tensor]:
    """Return a verdict by the units' own numbers, and the state of each output of the layer."""
    places = len(verdict.state) // len(units)  # positions that were flattened before the ReLU
    each = verdict.state.reshape(len(units), places)
    state = torch.full((len(units),), 2)
    state[(each == 0).any(1)] = 0
    state[(each == INACTIVE).all(1)] = INACTIVE
    if places == 1:
        state[each[:, 0] == ACTIVE] = ACTIVE
    low = verdict.low.reshape(len(units), places).min(1).values
    high = verdict.high.reshape(len(units), places).max(1).values
    order = {"": 9, "points": 0, "interval": 1, "relaxed": 2, "lp": 3, "milp": 4}
    entry: dict[str, Any] = {"inactive": {}, "active": {}, "both": {}, "open": []}
    for i, unit in enumerate(units):
        rungs = verdict.rung[i * places : (i + 1) * places]
        rung = max(rungs, key=lambda name: order.get(name, 9))
        if int(state[i]) == INACTIVE:
            entry["inactive"][str(unit)] = [rung, float(high[i])]
        elif int(state[i]) == ACTIVE:
            entry["active"][str(unit)] = [rung, float(low[i])]
        elif int(state[i]) == 0:
            entry["both"][rung] = entry["both"].get(rung, 0) + 1
        else:
            entry["open"].append(unit)
    return entry, state


def _states_in(chain: Chain, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the states of a chain's layers as a log says them."""
    found = {}
    for layer in chain.layers[:-1]:
        said = entry["layers"].get(layer.origin)
        if said is None or layer.why:
            continue
        state = torch.full((len(layer.units),), 2)
        for name, value in STATES.items():
            for i, unit in enumerate(layer.units):
                if str(unit) in said[name]:
                    state[i] = value
        found[layer.path] = state
    return found


def _proof_of(entry: Mapping[str, Any], gone: Mapping[str, Any]) -> tuple[str, float | None]:
    """Return the rung that proved what a removal rests on, and the bound; some rest on none."""
    said = entry["layers"].get(gone["layer"], {})
    for name in STATES:
        if gone["what"] != "proportional" and str(gone["unit"]) in said.get(name, {}):
            rung, bound = said[name][str(gone["unit"])]
            return rung, bound
    return "algebra", None


def _left(chain: Chain, origin: str) -> int:
    return sum(len(layer.weight) for layer in chain.layers[:-1] if layer.origin == origin)


def differences(before: Network, after: Network, points: Tensor) -> tuple[float, float]:
    """Return the largest difference of two networks' outputs at points, and the largest output.

    Args:
        before, after: run in their own dtype.
        points: `[n, *shape]`.
    """
    most, size = 0.0, 0.0
    like = before.example_inputs[0]
    for block in points.split(BLOCK):
        x = block.to(like.dtype).to(like.device)
        a, b = before.forward(x).double(), after.forward(x).double()
        most, size = max(most, float((a - b).abs().max())), max(size, float(a.abs().max()))
    return most, size
