"""The lossless start of a latency budget: rewrite the network where that is measured to be faster.

What a BatchNorm costs, and what the order of a weight costs, can be had for nothing: the rewritten
network computes the same, to rounding. So it is tried before anything is given up, and planning
begins with the fastest form. The budget stays relative to the network as it was given.
"""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

from lamina.errors import LaminaError
from lamina.measure.clock import check_timed
from lamina.measure.latency import measure_ratios
from lamina.plan.rewrite import (
    NAMES,
    STABLE,
    Rewritten,
    compose,
    find_folds,
    orders,
    rewrite,
    same,
)
from lamina.run import key_of
from lamina.stages import Way, clock_key
from lamina.structure import box_for, carry, restructure

SECONDS = 12.0  # that measuring all forms may take, about
ALIKE = 0.02  # of the time: a form that does less is taken where it is no slower than this


def begin(way: Way, names: tuple[str, ...] | None = None, structure: Any = None) -> None:
    """Rewrite a run's network: as a plan says, or where a latency is asked for, by measuring.

    A lossless structure comes first where it is asked for.

    Args:
        way: the run; its `rewritten` and `share` are set, and a round and a note are added.
        names: of a plan that is there already; None: choose.
        structure: a box, True for the range of the data, or None (`lossless_structure`).

    Raises:
        PlanError: the plan's rewriting does not fit the network.
        BudgetError: a latency without example inputs.
    """
    if structure is not None and structure is not False:
        restructure(way, box_for(way, structure))
    if names:
        if any(name.startswith(STABLE) for name in names):
            carry(way, names)
        else:
            way.rewritten = rewrite(way.network, names)
    elif names is None and way.budget.latency is not None:
        check_timed(way.network)
        with way.timed("rewrite") as note:
            _choose(way, note)


def forms_of(way: Way) -> dict[str, Rewritten]:
    """Return the rewritten forms of a network that compute the same, by their names joined."""
    network = way.base
    folds = find_folds(network)
    can = [name for name, fits in zip(NAMES, (bool(folds), orders(network.module)), strict=True)
           if fits]  # fmt: skip
    found = {"structure": way.rewritten} if way.rewritten else {}
    for count in range(1, len(can) + 1):
        for names in combinations(can, count):
            try:
                made = rewrite(network, names, folds)
            except LaminaError as error:
                way.notes.append(f"Not rewritten ({', '.join(names)}): {error}.")
                continue
            if same(network, made.network):
                found["+".join(names)] = compose(way.rewritten, made) if way.rewritten else made
            else:
                way.notes.append(f"Not rewritten ({', '.join(names)}): the outputs would differ.")
    return found


def _choose(way: Way, note: dict[str, Any]) -> None:
    forms = forms_of(way)
    if not forms:
        return

    def make() -> bytes:
        modules = [made.network.module for made in forms.values()]
        found, _ = measure_ratios(way.network, modules, way.threads, SECONDS, way.timer)
        return json.dumps(dict(zip(forms, found, strict=True))).encode()

    key = key_of("rewrite", *clock_key(way), list(forms))
    times = json.loads(way.stored("rewritten", key, ".json", make, note))
    fastest = min(times[name][0] for name in forms)
    best = next(name for name in forms if times[name][0] <= fastest + ALIKE)
    ratio, noise = times[best]
    pays = ratio + noise < 1
    if pays or way.rewritten is not None:  # a lossless structure stays in any case
        way.rewritten, way.share = forms[best], ratio
        way.notes.append(f"{describe(forms[best])}: {ratio:.2f}x of the time, nothing lost.")
        if way.recovery is not None and forms[best].folds:
            way.notes.append("Training, where there is any, trains without the folded BatchNorms.")
    said = ", ".join(f"{name.replace('+', ' and ')} {r:.3f}" for name, (r, _) in times.items())
    way.rounds.append({
        "round": len(way.rounds) + 1, "why": "latency", "asked": "lossless rewriting",
        "predicted": {}, "measured": {"ratio": ratio}, "kept": pays,
        "note": f"of the original's time: {said} (+- {noise:.3f})"
        + ("" if pays else "; none is faster by more than noise"),
    })  # fmt: skip


def describe(made: Rewritten) -> str:
    """Return what a rewriting did, as text."""
    parts = []
    if made.folds:
        count = len(made.folds)
        parts.append(f"BatchNorm folded into {count} layer{'s' * (count > 1)}")
    if "channels_last" in made.names:
        parts.append("weights in channels-last order")
    if any(name.startswith(STABLE) for name in made.names):
        parts.append("stable units removed")
    text = ", ".join(parts)
    return text[:1].upper() + text[1:]
