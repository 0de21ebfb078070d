"""BatchNorm moments, re-estimated for a network whose weights have changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lamina.measure.forward import batches as read
from lamina.measure.quality import evaluate
from lamina.network.source import Network

Norm = nn.modules.batchnorm._BatchNorm


def recalibrate(module: nn.Module, batches: Iterable[Any], limit: int = 50) -> int:
    """Re-estimate BatchNorm moments on data, in place; returns how many layers were recalibrated.

    The new moments are the means of the batches' own. A layer that no batch reached keeps its old
    ones, and so do all where a batch fails.

    Args:
        module: the network; nothing but the running moments changes.
        batches: calibration batches.
        limit: number of batches at most.

    Raises:
        DataError: there is no batch, or one that cannot be read.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> recalibrate(norm, [torch.tensor([[1.0], [3.0]])])
        1
        >>> norm.running_mean.item(), norm.running_var.item()
        (2.0, 2.0)
    """
    norms = [m for m in module.modules() if isinstance(m, Norm)]
    norms = [m for m in norms if m.track_running_stats and m.running_mean is not None]
    if not norms:
        return 0
    flags = {m: m.training for m in module.modules()}
    before = [(m.momentum, _moments(m)) for m in norms]
    module.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a cumulative average
        m.train()
    done: list[nn.Module] = []
    try:
        with torch.no_grad():
            for batch in read(module, itertools.islice(batches, limit)):
                so_far = [_moments(m) for m in norms] if batch.size == 1 else []
                try:
                    module(*batch.args, **batch.kwargs)
                except ValueError:  # one value per channel has no variance
                    if batch.size > 1:
                        raise
                    for m, old in zip(norms, so_far, strict=True):
                        _restore(m, old)
        done = [m for m in norms if m.num_batches_tracked]
    finally:
        for m, (momentum, old) in zip(norms, before, strict=True):
            m.momentum = momentum
            if m not in done:
                _restore(m, old)
        for each, flag in flags.items():
            each.training = flag
    return len(done)


def recalibrate_if_closer(original: Network, module: nn.Module, batches: Iterable[Any]) -> bool:
    """Re-estimate BatchNorm moments, in place, and keep them if outputs come nearer the original's.

    A network's own moments may be of augmented images, and many more of them: after a small change
    of the weights they can be better than new ones.

    Args:
        original: the network whose outputs are the measure (no labels are needed).
        module: the edited network.
        batches: calibration batches; gone through several times.

    Returns:
        whether there are new moments.

    Raises:
        DataError: there is no batch, or one that cannot be read.
    """
    norms = [m for m in module.modules() if isinstance(m, Norm)]
    if not norms:
        return False
    kept = [_moments(m) for m in norms]
    before = evaluate(module, batches, "kl", original=original)
    if not recalibrate(module, batches):
        return False
    if evaluate(module, batches, "kl", original=original) <= before:
        return True
    for m, old in zip(norms, kept, strict=True):
        _restore(m, old)
    return False


def _moments(norm: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in norm.buffers(False)]


def _restore(norm: nn.Module, moments: list[torch.Tensor]) -> None:
    for buffer, value in zip(norm.buffers(False), moments, strict=True):
        buffer.copy_(value)
