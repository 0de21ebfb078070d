"""The optimizer of a recovery, and its schedule."""

from __future__ import annotations

from typing import Any

import torch

from lamina.errors import BudgetError
from lamina.train.hold import HeldNetwork
from lamina.train.recovery import Recovery

Schedule = torch.optim.lr_scheduler.OneCycleLR


def make_optimizer(
    net: HeldNetwork, recovery: Recovery, walk: float, steps: int, name: str
) -> tuple[torch.optim.Optimizer, Schedule]:
    """Return the optimizer of what is held and its one cycle.

    Args:
        net: what is trained.
        recovery: settings.
        walk: size at the beginning over size at the end.
        steps: of the optimizer.
        name: of the network, for errors.

    Raises:
        BudgetError: SGD where grid steps are trained.
    """
    parts = list(net.named_parameters())
    slow = [p for n, p in parts if not n.endswith("log_step")]
    fast = [p for n, p in parts if n.endswith("log_step")]
    if fast and recovery.optimizer == "sgd":
        raise BudgetError(
            "sgd cannot train grid steps", name, "their scale is not that of weights",
            "use optimizer='adam', or methods that leave floats",
        )  # fmt: skip
    lr, step_lr = recovery.rates(walk)
    # Decay is for matrices: a shared value must not shrink for each of its members.
    decayed = [p for p in slow if p.dim() > 1 and recovery.decay]
    groups: list[dict[str, Any]] = [{"params": decayed, "lr": lr}] if decayed else []
    if rest := [p for p in slow if p.dim() < 2 or not recovery.decay]:
        groups.append({"params": rest, "lr": lr, "weight_decay": 0.0})
    if fast:
        groups.append({"params": fast, "lr": step_lr, "weight_decay": 0.0})
    optimizer: torch.optim.Optimizer
    if recovery.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            groups, lr=lr, momentum=0.9, nesterov=True, weight_decay=recovery.decay
        )
    else:
        optimizer = torch.optim.AdamW(groups, weight_decay=recovery.decay)
    peaks = [float(g["lr"]) for g in groups]
    return optimizer, Schedule(optimizer, peaks, total_steps=max(steps, 2))
