"""Distillation: what the edited network learns from the original."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lamina.errors import DataError
from lamina.measure.loss import decide_loss, pooled
from lamina.network.source import main_output

IGNORED = -100  # torch's label that does not count


def distillation_loss(
    output: Any,
    taught: Any,
    labels: torch.Tensor | None,
    kind: str,
    *,
    weight: float = 0.7,
    temperature: float = 2.0,
    tokens: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of one batch [nats per prediction for logits].

    Args:
        output, taught: what the edited and the original network gave.
        labels: class indices of the outputs' shape without the class dimension, or None.
        kind: `"logits"`, `"features"`, `"embedding"` (the loss is twice one minus the cosine) or
            `"auto"`, decided as when the network was measured.
        weight: of distillation against the labels' cross-entropy; without labels it is all.
        temperature: softens both distributions; the loss is scaled by its square.
        tokens: what a language model was given `[N, T]`; labels that are these very tokens mean
            the next one, as in Hugging Face models.
        mask: `[N, T]`, 0 where a token does not count.

    Raises:
        DataError: a label is no class of the outputs.

    Reference: Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2.
    """
    ours, theirs = main_output(output).float(), main_output(taught).float()
    loss = decide_loss(kind, output, ours, labels)
    if loss.kind == "embedding":
        return _away(pooled(ours, mask), pooled(theirs, mask))
    if loss.kind == "features":
        return _away(counted(ours, mask), counted(theirs, mask))
    ours, theirs = ours.movedim(loss.axis, -1), theirs.movedim(loss.axis, -1)
    hard = _cross_entropy(ours, labels, tokens)
    if mask is not None and mask.shape == ours.shape[:-1] and bool(mask.any()):
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    soft = F.kl_div(
        F.log_softmax(ours.flatten(0, -2) / temperature, -1),
        F.log_softmax(theirs.flatten(0, -2) / temperature, -1),
        log_target=True,
        reduction="batchmean",
    ) * (temperature**2)
    return soft if hard is None else weight * soft + (1 - weight) * hard


def counted(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the values `[N, T, ...]` of the tokens that count; all, where there is no mask."""
    if mask is None or values.dim() < 3 or mask.shape != values.shape[:2] or not bool(mask.any()):
        return values
    return values[mask.bool()]


def _away(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return the mean squared difference, relative to what the original gives."""
    return F.mse_loss(ours, theirs) / theirs.pow(2).mean().clamp_min(1e-12)


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor | None, tokens: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the labels' loss of logits `[..., classes]`, or None where no label counts."""
    if labels is None or labels.is_floating_point():
        return None
    if labels.shape == (*logits.shape[:-1], 1):
        labels = labels.squeeze(-1)
    if labels.shape != logits.shape[:-1]:
        return None
    if tokens is not None and tokens.shape == labels.shape and labels.dim() == 2:
        kept = labels != IGNORED
        if not tokens.is_floating_point() and bool((tokens == labels)[kept].all()):
            logits, labels = logits[:, :-1], labels[:, 1:]  # the label of a token is the next one
    rows, classes = logits.flatten(0, -2), labels.flatten().long()
    counted = classes[classes != IGNORED]
    if not len(counted):
        return None
    if int(counted.min()) < 0 or int(counted.max()) >= rows.shape[-1]:
        raise DataError(
            "a label is no class of the network",
            f"labels {int(counted.min())}..{int(counted.max())}",
            f"it has {rows.shape[-1]} classes",
            f"give class indices, {IGNORED} where none counts",
        )
    return F.cross_entropy(rows, classes, ignore_index=IGNORED)


class Hidden:
    """Matching hidden outputs: collects the outputs of layers that both networks have by name.

    Its hooks stay on the two modules: give it copies.
    """

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

    def loss(self, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the mean relative squared difference over layers of equal shape.

        Args:
            mask: `[N, T]`, 0 where a token does not count, of outputs `[N, T, C]`.
        """
        terms = [
            _away(counted(self.ours[n].float(), mask), counted(t.float(), mask))
            for n, t in self.theirs.items()
            if n in self.ours and self.ours[n].shape == t.shape
        ]
        self.theirs.clear()
        self.ours.clear()
        return torch.stack(terms).mean() if terms else torch.zeros(())
