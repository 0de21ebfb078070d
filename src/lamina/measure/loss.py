"""The loss a network is held to, made of its own outputs: no labels are needed.

Logits define a distribution, and the loss of a change is the Kullback-Leibler divergence from the
original's; anything else is a feature vector, and the loss is half the squared distance. Both have
the same second order form: the Fisher information of sampled labels, the Gauss-Newton matrix of
random projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import os
EXPERIMENT=os.environ.get('EXP','label')
TEMP=1.0
CHUNK = 1 << 22  # elements taken to float64 at a time


@dataclass(frozen=True)
class Loss:
    """What the outputs are.

    Args:
        kind: `"logits"` or `"features"`.
        axis: the class dimension of logits.
    """

    kind: str
    axis: int = -1

    def predictions(self, output: Tensor) -> float:
        """Return how many distributions a sample's output holds (tokens, pixels; features: 1)."""
        if self.kind != "logits":
            return 1.0
        return output.numel() / max(1, output.shape[0] * output.shape[self.axis])


def decide_loss(loss: str, raw: Any, output: Tensor, labels: Tensor | None) -> Loss:
    """Decide what a network's outputs are.

    Args:
        loss: `"logits"`, `"features"` or `"auto"`: a Hugging Face output with `.logits`, or integer
            labels that fit the class dimension, mean logits; everything else features.
        raw: the network's output as it came.
        output: its main tensor `[samples, ...]`.
        labels: of the same batch, or None; only their shape and range are looked at.

    Example:
        >>> decide_loss("auto", None, torch.zeros(2, 10), torch.tensor([3, 9]))
        Loss(kind='logits', axis=1)
    """
    last = max(1, output.dim() - 1)
    fitting = _class_axis(output, labels)
    if output.dim() < 2 or loss == "features":
        return Loss("features")
    if loss == "auto" and fitting is None and not hasattr(raw, "logits"):
        return Loss("features")
    # Without labels that tell: torch keeps classes in dimension 1 of maps, language models last.
    axis = fitting if fitting is not None else (1 if output.dim() > 3 else last)
    return Loss("logits", axis) if output.shape[axis] > 1 else Loss("features")


def _class_axis(output: Tensor, labels: Tensor | None) -> int | None:
    if labels is None or labels.is_floating_point() or labels.is_complex() or output.dim() < 2:
        return None
    for axis in (output.dim() - 1, 1):
        rest = (*output.shape[:axis], *output.shape[axis + 1 :])
        fits = tuple(labels.shape) == rest or tuple(labels.shape) == (*rest, 1)
        if fits and labels.numel() and int(labels.max()) < output.shape[axis]:
            return axis
    return None


def pseudo_loss(
    loss: Loss, output: Tensor, generator: torch.Generator, mask: Tensor | None = None
) -> Tensor:
    """Return the scalar whose gradient has the loss's curvature as its second moment.

    Args:
        loss: what the outputs are.
        output: `[samples, ...]`, with its graph.
        generator: on the CPU; every sample uses the same count of draws, so that the cut into
            batches changes nothing.
        mask: `[samples, tokens]`, 0 where a token does not count.

    Returns:
        logits: cross-entropy against labels sampled from the output's own softmax, summed (the true
        Fisher information); features: `<output, v>` with `v ~ N(0, I)` (Gauss-Newton).

    Reference: Martens 2020, New insights and perspectives on the natural gradient method, section 5.
    """
    if loss.kind == "logits":
        logits = output.movedim(loss.axis, -1).float()
        if EXPERIMENT == "label":
            log_p = torch.log_softmax(logits.float(), -1)
            draws = torch.rand(logits.shape[:-1], generator=generator, dtype=torch.float64)
            with torch.no_grad():
                cumulative = log_p.exp().double().cumsum(-1)
                target = draws.to(output.device).unsqueeze(-1) * cumulative[..., -1:]
                label = torch.searchsorted(cumulative, target, right=True)
                label = label.clamp_max(logits.shape[-1] - 1)
            picked = log_p.gather(-1, label).squeeze(-1)
            return -(picked * _weights(mask, picked)).sum()
        with torch.no_grad():
            p = torch.softmax(logits.double() / TEMP, -1)
            draws = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
            v = torch.special.ndtri(draws.clamp(1e-15, 1 - 1e-15)).to(output.device)
            if EXPERIMENT == "sign": v = v.sign()
            v = p.sqrt() * v
            v = (v - p * v.sum(-1, keepdim=True)).float()
        picked = (logits * v).sum(-1)
        return (picked * _weights(mask, picked)).sum()
    # The inverse distribution function turns one uniform draw into one normal draw; `randn` draws
    # in blocks, whose borders would depend on the batch.
    draws = torch.rand(output.shape, generator=generator, dtype=torch.float64)
    v = torch.special.ndtri(draws.clamp(1e-15, 1 - 1e-15)).to(output.device, torch.float32)
    return (output.float() * v * _weights(mask, output)).sum()


def divergence(
    loss: Loss, reference: Tensor, output: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return how far outputs are from the original's, per sample [nats], in float64.

    Args:
        loss: what the outputs are.
        reference: outputs of the original `[samples, ...]`.
        output: outputs of the changed network, same shape.
        mask: `[samples, tokens]`, 0 where a token does not count.

    Returns:
        `[samples]`: logits: `KL(original || changed)` summed over positions; features:
        `1/2 |output - reference|^2`.

    Example:
        >>> a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> round(float(divergence(Loss("logits"), a, b)), 4)
        0.1201
    """
    rows = max(1, CHUNK * output.shape[0] // max(1, output.numel()))
    parts = []
    for start in range(0, output.shape[0], rows):
        a = reference[start : start + rows].double()
        b = output[start : start + rows].double()
        part = None if mask is None else mask[start : start + rows]
        if loss.kind == "logits":
            log_p = torch.log_softmax(a.movedim(loss.axis, -1), -1)
            log_q = torch.log_softmax(b.movedim(loss.axis, -1), -1)
            p = log_p.exp()  # a class ruled out by -inf adds nothing, not 0 * inf
            each = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)
        else:
            each = 0.5 * (b - a).square()
        parts.append((each * _weights(part, each)).flatten(1).sum(1) if each.dim() > 1 else each)
    return torch.cat(parts)


def relative_level(loss: Loss, reference: Tensor) -> float:
    """Return the divergence per sample that a probe aims at: 0.02 nats a prediction, or features
    changed by 0.5 % of their power."""
    if loss.kind == "logits":
        return 0.02 * loss.predictions(reference)
    power = float(reference.double().square().sum()) / max(1, reference.shape[0])
    return 0.5 * 0.005 * power if math.isfinite(power) and power > 0 else 0.02


def _weights(mask: Tensor | None, like: Tensor) -> Tensor:
    if mask is None or tuple(mask.shape) != tuple(like.shape[:2]):
        return torch.ones((), device=like.device, dtype=like.dtype)
    shape = (*mask.shape, *[1] * (like.dim() - 2))
    return mask.to(like.device, like.dtype).reshape(shape)
