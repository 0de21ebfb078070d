"""The lossless structure of a run: proven once, kept in the run folder, and named by the plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lamina.data import inputs_of
from lamina.errors import BudgetError, PlanError
from lamina.network.discover import discover
from lamina.plan import Plan
from lamina.plan.costs import original_cost
from lamina.plan.rewrite import STABLE, Rewritten, compose, rewrite
from lamina.plan.stable import Box, Structure, find_structure
from lamina.run import key_of
from lamina.stages import Way

LOG = "structure.json"  # of the run folder: the proofs
LOOKED = 2048  # data samples whose units are looked at before anything is proven


def box_for(way: Way, asked: Any) -> Box:
    """Return the box that was asked for, or the range of the data, and note which.

    Args:
        way: the run.
        asked: True, or what `Box.parse` reads.

    Raises:
        BudgetError: it is no box, or there is no data to take it from.
    """
    if asked is not True:
        return Box.parse(asked)
    box = Box.around(_inputs(way, ("train", "calibration", "validation")))
    if box is None:
        raise BudgetError(
            "lossless_structure needs the range of the inputs", "", "there is no data",
            "give it as LOW,HIGH: lossless_structure='0,1', or --box 0,1",
        )  # fmt: skip
    way.notes.append(
        f"The box {box.show()} is the range of the data's inputs (train, calibration and "
        "validation): inputs outside may give other outputs; give a box to say otherwise."
    )
    return box


def restructure(way: Way, box: Box) -> Structure:
    """Remove what is proven to do nothing of its own from a run's network.

    Args:
        way: the run; its `rewritten` and `structure` are set, and a note is added.
        box: of the inputs.

    Raises:
        NetworkError: it is no feed-forward ReLU network.
    """
    with way.timed("structure") as note:
        key = key_of("structure", way.network.digest(), repr(way.network.module), box.text())
        fresh: list[Structure] = []

        def make() -> bytes:
            points = list(_inputs(way, ("calibration",)))
            fresh.append(
                find_structure(
                    way.network, box, progress=way.say("structure"),
                    points=torch.cat(points)[:LOOKED] if points else None,
                )
            )  # fmt: skip
            return json.dumps(fresh[0].log, indent=1).encode()

        log = way.stored("structure", key, ".json", make, note)
        found = fresh[0] if fresh else None
        if found is None:
            found = find_structure(way.network, box, proven=json.loads(log)["rounds"])
        if way.folder is not None:
            way.folder.write(way.folder.path / LOG, log + b"\n")
    way.structure = found.log
    way.notes += [found.describe(), *found.log["notes"]]
    if found.rewritten is not None:
        way.rewritten = found.rewritten
    return found


def carry(way: Way, names: tuple[str, ...]) -> None:
    """Rewrite a run's network as a plan says, whose names hold a lossless structure.

    Raises:
        PlanError: it comes out another one.
    """
    name = next(name for name in names if name.startswith(STABLE))
    found = restructure(way, Box.parse(name.removeprefix(STABLE)))
    done = found.rewritten or Rewritten(way.network)
    rest = names[len(done.names) :]
    if names[: len(done.names)] != done.names or not done.names:
        raise PlanError(
            "the plan's lossless structure was not found again", name,
            "there was less time for the proofs, or the network is another",
            "carry the plan out in the run folder it was made in",
        )  # fmt: skip
    way.rewritten = compose(done, rewrite(done.network, rest)) if rest else done


def of_whole(chosen: Plan, way: Way) -> Plan:
    """Return a plan of the rewritten network as one of the network as given."""
    original = original_cost(way.network, discover(way.network))
    return replace(chosen, network=way.network.digest(), original=original, rewrite=way.rewriting)


def refuse_with(**others: Any) -> None:
    """Refuse what a lossless structure cannot go with.

    Raises:
        BudgetError: one of them was given.
    """
    fixes = {
        "recipe": "write the smaller file first, then follow the recipe on it",
        "plan": "leave it out: the plan says what is done",
        "lossless": "leave lossless out: without a budget the file is lossless",
    }
    for name, given in others.items():
        if given:
            raise BudgetError(f"{name} does not go with lossless_structure", "", "", fixes[name])


def _inputs(way: Way, splits: tuple[str, ...]) -> Iterator[torch.Tensor]:
    """Yield the inputs of a run's data; a loader's epoch is put back."""
    for split in splits:
        loader: Any = getattr(way.data, split, None) if way.data else None
        epoch = getattr(loader, "epoch", None)
        for batch in loader or ():
            args, kwargs = inputs_of(batch)
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            if tensors:
                yield tensors[0].detach().cpu()
        if epoch is not None and hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
