"""The loss a network is held to, made of its own outputs: no labels are needed.

Logits define a distribution, and the loss of a change is the Kullback-Leibler divergence from the
original's; anything else is a feature vector, and the loss is half the squared distance. An
embedding is the direction of the mean of a sample's tokens, padding left out, and half the squared
distance of two of them is one minus their cosine. All have the same second order form, the
Gauss-Newton matrix, which is the Fisher information for logits.

A network that is sure of everything it was trained on has next to no curvature there: the second
moment of its gradients is that of the two or three samples it doubts, and a finite change costs a
hundred times what they foretell. So the outputs of such a network are softened by a temperature
before they are differentiated and compared. That steadies the statistics from seed to seed; the
probe brings the unit back to nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements taken to float64 at a time
TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
DOUBT = 0.1  # mean probability that a softened network leaves to other classes than the first


@dataclass(frozen=True)
class Loss:
    """What the outputs are.

    Args:
        kind: `"logits"`, `"features"` or `"embedding"`.
        axis: the class dimension of logits.
        temperature: that logits are divided by.
    """

    kind: str
    axis: int = -1
    temperature: float = 1.0

    def soft(self, temperature: float) -> Loss:
        """Return the same loss at another temperature."""
        return replace(self, temperature=temperature)

    def predictions(self, output: Tensor) -> float:
        """Return how many distributions a sample's output holds (tokens, pixels; features: 1)."""
        if self.kind != "logits":
            return 1.0
        return output.numel() / max(1, output.shape[0] * output.shape[self.axis])


def decide_loss(loss: str, raw: Any, output: Tensor, labels: Tensor | None) -> Loss:
    """Decide what a network's outputs are.

    Args:
        loss: `"logits"`, `"features"`, `"embedding"` (of tokens `[samples, tokens, width]`, or
            pooled already), or `"auto"`: a Hugging Face output with `.logits`, or integer labels
            that fit the class dimension, mean logits; everything else features.
        raw: the network's output as it came.
        output: its main tensor `[samples, ...]`.
        labels: of the same batch, or None; only their shape and range are looked at.

    Example:
        >>> decide_loss("auto", None, torch.zeros(2, 10), torch.tensor([3, 9]))
        Loss(kind='logits', axis=1, temperature=1.0)
    """
    last = max(1, output.dim() - 1)
    fitting = _class_axis(output, labels)
    if output.dim() < 2 or loss == "features":
        return Loss("features")
    if loss == "embedding":
        return Loss("embedding")
    if loss == "auto" and fitting is None and not hasattr(raw, "logits"):
        return Loss("features")
    # Without labels that tell: torch keeps classes in dimension 1 of maps, language models last.
    axis = fitting if fitting is not None else (1 if output.dim() > 3 else last)
    return Loss("logits", axis) if output.shape[axis] > 1 else Loss("features")


def pooled(output: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the embeddings of samples `[samples, width]`: the mean over tokens, of length 1.

    Args:
        output: `[samples, tokens, width]`, or `[samples, width]`, which is not averaged.
        mask: `[samples, tokens]`, 0 where a token does not count.

    Example:
        >>> tokens = torch.tensor([[[3.0, 0.0], [3.0, 8.0], [100.0, 100.0]]])
        >>> pooled(tokens, torch.tensor([[1, 1, 0]]))
        tensor([[0.6000, 0.8000]])
    """
    if output.dim() > 2:
        tokens = output.reshape(len(output), -1, output.shape[-1])
        if mask is None or tuple(mask.shape) != tuple(tokens.shape[:2]):
            output = tokens.mean(1)
        else:
            counts = mask.to(output.device, output.dtype)[..., None]
            # Padding may hold anything, NaN too: it is left out, not multiplied by 0.
            tokens = torch.where(counts == 0, torch.zeros_like(tokens), tokens)
            output = (tokens * counts).sum(1) / counts.sum(1).clamp_min(1)
    return torch.nn.functional.normalize(output, dim=-1)


def _class_axis(output: Tensor, labels: Tensor | None) -> int | None:
    if labels is None or labels.is_floating_point() or labels.is_complex() or output.dim() < 2:
        return None
    for axis in (output.dim() - 1, 1):
        rest = (*output.shape[:axis], *output.shape[axis + 1 :])
        fits = tuple(labels.shape) == rest or tuple(labels.shape) == (*rest, 1)
        if fits and labels.numel() and int(labels.max()) < output.shape[axis]:
            return axis
    return None


def pick_temperature(loss: Loss, output: Tensor) -> float:
    """Return the least temperature at which outputs leave some doubt; 1 where they do anyway.

    Example:
        >>> sure = torch.tensor([[9.0, 0.0, 0.0]])
        >>> pick_temperature(Loss("logits"), sure), pick_temperature(Loss("logits"), sure / 9)
        (4.0, 1.0)
    """
    if loss.kind != "logits":
        return 1.0
    logits = output.detach().movedim(loss.axis, -1).float()
    for temperature in TEMPERATURES:
        if float(1 - (logits / temperature).softmax(-1).amax(-1).mean()) >= DOUBT:
            return temperature
    return TEMPERATURES[-1]


def pseudo_loss(
    loss: Loss, output: Tensor, generator: torch.Generator, mask: Tensor | None = None
) -> Tensor:
    """Return the scalar whose gradient has the loss's curvature as its expected second moment.

    Args:
        loss: what the outputs are.
        output: `[samples, ...]`, with its graph.
        generator: on the CPU; every output takes the same count of draws, so that the cut into
            batches changes nothing.
        mask: `[samples, tokens]`, 0 where a token does not count.

    Returns:
        features, embedding: `<output, v>` with random signs `v`, whose `E[v v^T] = I`; logits:
        `<output, u>` with `u = (diag(p)^1/2 - p (p^1/2)^T) v`, whose `E[u u^T] = diag(p) - p p^T`,
        the Fisher information of the softmax. A label sampled from `p` has the same expectation,
        but the rare sample that goes against a sure network outweighs all others.

    Reference: Martens 2020, New insights and perspectives on the natural gradient method, 5.
    """
    if loss.kind == "embedding":
        output, mask = pooled(output.float(), mask), None
    wide = output if loss.kind != "logits" else output.movedim(loss.axis, -1)
    wide = wide.float() / loss.temperature
    draws = torch.rand(wide.shape, generator=generator, dtype=torch.float64)
    v = (2.0 * (draws < 0.5) - 1.0).to(output.device)
    if loss.kind == "logits":
        p = torch.softmax(wide.detach().double(), -1)
        v = p.sqrt() * v
        v = v - p * v.sum(-1, keepdim=True)
    # A class ruled out by -inf has p = 0: keep 0 * -inf out of the sum.
    wide = torch.where(v == 0, torch.zeros_like(wide), wide)
    each = wide * v.float()
    return (each * _weights(mask, each)).sum()


def divergence(loss: Loss, reference: Tensor, output: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return how far outputs are from the original's, per sample [nats], in float64.

    Args:
        loss: what the outputs are.
        reference: outputs of the original `[samples, ...]`.
        output: outputs of the changed network, same shape.
        mask: `[samples, tokens]`, 0 where a token does not count.

    Returns:
        `[samples]`: logits: `KL(original || changed)` summed over positions; features:
        `1/2 |output - reference|^2`; embedding: one minus the cosine.

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
        if loss.kind == "embedding":
            a, b, part = pooled(a, part), pooled(b, part), None
        if loss.kind == "logits":
            log_p = torch.log_softmax(a.movedim(loss.axis, -1) / loss.temperature, -1)
            log_q = torch.log_softmax(b.movedim(loss.axis, -1) / loss.temperature, -1)
            p = log_p.exp()  # a class ruled out by -inf adds nothing, not 0 * inf
            each = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)
        else:
            each = 0.5 * (b - a).square()
        parts.append((each * _weights(part, each)).flatten(1).sum(1) if each.dim() > 1 else each)
    return torch.cat(parts)


def relative_level(loss: Loss, reference: Tensor) -> float:
    """Return the divergence per sample that a probe aims at: 0.02 nats a prediction, or features
    or embeddings changed by 0.5 % of their power."""
    if loss.kind == "embedding":
        return 0.5 * 0.005
    if loss.kind == "logits":
        return 0.02 * loss.predictions(reference)
    power = float(reference.double().square().sum()) / max(1, reference.shape[0])
    return 0.5 * 0.005 * power if math.isfinite(power) and power > 0 else 0.02


def _weights(mask: Tensor | None, like: Tensor) -> Tensor:
    if mask is None or tuple(mask.shape) != tuple(like.shape[:2]):
        return torch.ones((), device=like.device, dtype=like.dtype)
    shape = (*mask.shape, *[1] * (like.dim() - 2))
    return mask.to(like.device, like.dtype).reshape(shape)
