"""A linear probe: what the embeddings of a network still tell of labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import DataError
from lamina.measure.forward import at_rest, batches, call
from lamina.measure.loss import pooled
from lamina.network.source import main_output

DECAY = 1e-3  # of the probe's weights, against the mean loss on standardised embeddings
STEPS = 100  # of L-BFGS, at most


def linear_probe(original: nn.Module, module: nn.Module, loader: Iterable[Any]) -> float:
    """Return the accuracy [points] of a linear classifier of the original's embeddings on a
    network's own.

    The samples are cut in two halves. On each a logistic regression is fitted to the original's
    embeddings (the mean over tokens, padding left out, of length 1) and judged on the other half's
    embeddings by the network: whoever has trained on the original keeps the classifier.

    Args:
        original, module: with outputs `[samples, tokens, width]` or `[samples, width]`.
        loader: batches with class labels `[samples]`.

    Raises:
        DataError: there are no such labels, fewer than four samples, or a single class.

    Example:
        >>> x = torch.tensor([[1.0, 0.1], [0.1, 1.0]]).repeat(8, 1)
        >>> linear_probe(nn.Identity(), nn.Identity(), [(x, torch.tensor([0, 1] * 8))])
        100.0
    """
    kept = list(loader)
    labels = torch.cat([_labels(b.labels) for b in batches(original, kept)]).cpu()
    classes = int(labels.max()) + 1
    if len(labels) < 4 or len(labels.unique()) < 2:
        raise DataError(
            "too few labels for a probe", "", f"{len(labels)} of one class", "give more"
        )
    with at_rest(original, module), torch.no_grad():
        ours = _embeddings(original, kept)
        theirs = ours if original is module else _embeddings(module, kept)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    right = 0
    for fit, judge in (halves, halves[::-1]):
        mean, spread = ours[fit].mean(0), ours[fit].std(0).clamp_min(1e-9)
        weight, bias = _fit((ours[fit] - mean) / spread, labels[fit], classes)
        scores = (theirs[judge] - mean) / spread @ weight + bias
        right += int((scores.argmax(1) == labels[judge]).sum())
    return 100.0 * right / len(labels)


def _labels(labels: Tensor | None) -> Tensor:
    if (
        labels is None
        or labels.dim() != 1
        or labels.is_floating_point()
        or bool((labels < 0).any())
    ):
        raise DataError(
            "no labels for a probe", "metric 'probe'", "it needs one class a sample",
            "give them, or a label-free metric such as 'embedding'",
        )  # fmt: skip
    return labels


def _embeddings(module: nn.Module, loader: Iterable[Any]) -> Tensor:
    found = [
        pooled(main_output(call(module, batch)).float(), batch.mask).flatten(1)
        for batch in batches(module, loader)
    ]
    return torch.cat(found).double().cpu()


def _fit(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a logistic regression."""
    with torch.enable_grad():
        weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
        bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
        made = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            made.zero_grad()
            error = nn.functional.cross_entropy(x @ weight + bias, labels)
            error = error + DECAY * weight.square().sum()
            error.backward()
            return error

        made.step(loss)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()
