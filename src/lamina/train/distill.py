"""Distillation: what the edited network learns from the original."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lamina.network.source import main_output


def distillation_loss(
    output: Any,
    taught: Any,
    labels: torch.Tensor | None,
    kind: str,
    *,
    weight: float = 0.7,
    temperature: float = 2.0,
) -> torch.Tensor:
    """Return the loss of one batch [nats per sample for logits].

    Args:
        output, taught: what the edited and the original network gave.
        labels: class indices `[N]` (or `[N, T]`), or None.
        kind: `"logits"`, `"features"` or `"auto"` (logits where integer labels fit the last dimension).
        weight: of distillation against the labels' cross-entropy; without labels it is all.
        temperature: softens both distributions; the loss is scaled by its square.

    Reference: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """
    ours, theirs = main_output(output).float(), main_output(taught).float()
    fits = labels is not None and not labels.is_floating_point() and labels.shape == ours.shape[:-1]
    if kind == "auto":
        kind = "logits" if fits or hasattr(output, "logits") else "features"
    if kind == "features":
        return F.mse_loss(ours, theirs) / theirs.pow(2).mean().clamp_min(1e-12)
    ours, theirs = ours.flatten(0, -2), theirs.flatten(0, -2)
    soft = F.kl_div(
        F.log_softmax(ours / temperature, -1),
        F.log_softmax(theirs / temperature, -1),
        log_target=True,
        reduction="batchmean",
    ) * (temperature**2)
    if not fits or labels is None:
        return soft
    hard = F.cross_entropy(ours, labels.flatten(), ignore_index=-100)
    return weight * soft + (1 - weight) * hard


class Hidden:
    """Matching hidden outputs: collects the outputs of layers that both networks have by name."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        self.theirs: dict[str, torch.Tensor] = {}
        self.ours: dict[str, torch.Tensor] = {}
        names = {
            n for n, m in teacher.named_modules() if n and any(True for _ in m.parameters(False))
        }
        known = dict(student.named_modules())
        for name, module in teacher.named_modules():
            if name in names and name in known:
                module.register_forward_hook(self._keep(self.theirs, name))
                known[name].register_forward_hook(self._keep(self.ours, name))

    def _keep(self, store: dict[str, torch.Tensor], name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                store[name] = output

        return hook

    def loss(self) -> torch.Tensor:
        """Return the mean relative squared difference over layers of equal shape."""
        terms = [
            F.mse_loss(self.ours[n].float(), t.float()) / t.float().pow(2).mean().clamp_min(1e-12)
            for n, t in self.theirs.items()
            if n in self.ours and self.ours[n].shape == t.shape
        ]
        self.theirs.clear()
        self.ours.clear()
        return torch.stack(terms).mean() if terms else torch.zeros(())
