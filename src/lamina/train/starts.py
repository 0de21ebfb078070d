"""Where training starts: which values are held, on which grids, and for how many steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn

from lamina.artifact.exact import exact
from lamina.errors import NetworkError
from lamina.forms import Edit, Grid, find_tensor

AUTO_WORK = 1.6e12  # multiply-accumulates that "auto" may spend: about 90 seconds of one core
AUTO_EPOCHS = 60  # and no more passes over the data than this


def check_values(module: nn.Module) -> None:
    """Refuse a network whose tensors hold no values.

    Raises:
        NetworkError: a tensor is on the meta device; names it.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            why = "it is on the meta device"
            raise NetworkError("a tensor has no values", name, why, "load the weights first")


def held_edits(module: nn.Module, edits: Iterable[Edit]) -> list[Edit]:
    """Return edits with one values edit per tensor: the last that was given, else an exact one.

    Tied weights are one tensor under several names, and it is trained once.
    """
    given = list(edits)
    last = {id(find_tensor(module, e.path)): i for i, e in enumerate(given) if e.form == "values"}
    rest = [
        Edit(name, "values", values=exact(p.detach().clone()))
        for name, p in module.named_parameters()
        if id(p) not in last and p.requires_grad and p.is_floating_point()
    ]
    kept = set(last.values())
    return [e for i, e in enumerate(given) if e.form != "values" or i in kept] + rest


def start_edit(edit: Edit, floats: Mapping[str, torch.Tensor]) -> Edit:
    """Start a grid that will be squeezed from a step no wider than half a standard deviation.

    A plan made for a tight budget has steps at which nearly everything is zero; from there training
    has no gradient back. The rate pressure widens the step again where that is right.
    """
    start = floats.get(edit.path)
    if not isinstance(edit.values, Grid) or start is None or start.numel() < 2:
        return edit
    spread = float(start.to(torch.float32).std())
    if spread <= 0 or edit.values.step <= spread / 2:
        return edit
    return replace(edit, values=replace(edit.values, step=spread / 2))


def count_steps(epochs: float | None, per_epoch: int, samples: int, macs: float) -> int:
    """Return the number of optimizer steps.

    Args:
        epochs: passes over the data; None: as many as `AUTO_WORK` allows, where the work of a step
            is 4 passes (teacher, student forward, twice backward).
        per_epoch: batches.
        samples: in one epoch.
        macs: of the original network per sample.
    """
    if epochs is not None:
        return max(1, round(epochs * per_epoch))
    work = 4.0 * max(macs, 1.0) * max(samples, 1)
    return max(1, round(min(AUTO_EPOCHS, AUTO_WORK / work) * per_epoch))
