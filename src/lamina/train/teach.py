"""One lesson: a batch goes through the original and through what learns from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lamina.measure.forward import Batch, call, device_of
from lamina.train.distill import Hidden, distillation_loss
from lamina.train.moments import Norm


def taught_loss(
    run: Callable[..., Any],
    teacher: nn.Module,
    batch: Batch,
    kind: str,
    *,
    weight: float,
    temperature: float,
    half: bool = False,
    hidden: tuple[float, Hidden] | None = None,
    spare: bool = False,
) -> torch.Tensor:
    """Return the loss of one batch for what learns, with its graph.

    Args:
        run: the network that learns, called like the original.
        teacher: the original, on the same device and in evaluation mode.
        batch: on that device.
        kind: what an output is, see `distillation_loss`.
        weight: of the original's outputs against the labels.
        temperature: of the distillation.
        half: compute both in bfloat16 where autocast holds that safe; weights stay as they are.
        hidden: weight of matching hidden outputs, and what collects them.
        spare: do not run the original where the labels are all that counts.

    Raises:
        DataError: the network does not take the batch, or a label is no class of it.
    """
    classes = batch.labels is not None and not batch.labels.is_floating_point()
    taught = None
    with torch.autocast(device_of(teacher).type, torch.bfloat16, enabled=half):
        if weight or not spare or not classes or kind in ("features", "embedding"):
            with torch.no_grad():
                taught = call(teacher, batch)
        output = run(*batch.args, **batch.kwargs)
    tokens = [v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, torch.Tensor)]
    loss = distillation_loss(
        output, output if taught is None else taught, batch.labels, kind, weight=weight,
        temperature=temperature, tokens=tokens[0] if tokens else None, mask=batch.mask,
    )  # fmt: skip
    return loss if hidden is None else loss + hidden[0] * hidden[1].loss(batch.mask)


def rest_norms(norms: list[Norm], batch: Batch) -> None:
    """Let BatchNorm layers use their running moments for a batch of one sample.

    One value per channel has no variance.
    """
    for norm in norms:
        norm.train(batch.size > 1)
