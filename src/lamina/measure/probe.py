"""One measured perturbation per layer, to fix the scale of its predicted error.

The Kronecker form takes neighbouring positions for independent, so it under-predicts convolutions
about tenfold. The shape of its prediction is right, only the size is not: one probe mends that.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamina.forms import find_tensor
from lamina.measure.forward import Batch, call
from lamina.measure.loss import Loss, divergence, relative_level
from lamina.measure.stats import LayerStats, predict_error
from lamina.network.sites import Site, as_matrix, from_matrix
from lamina.network.source import main_output

SAMPLES = 500
OUTPUTS = 1 << 26  # elements of reference outputs that are kept
WORK = 5e12  # multiply-accumulates that all probes together may take
LOW, HIGH = 1e-5 / 0.02, 0.3 / 0.02  # of the level aimed at; outside, the probe is repeated


@dataclass(frozen=True)
class Probe:
    """Inputs to probe with, and what the untouched network made of them.

    Args:
        batch: the inputs.
        reference: the network's main output `[samples, ...]`.
    """

    batch: Batch
    reference: Tensor


def probe_size(layers: Sequence[Site]) -> int:
    """Return on how many samples to probe: 500, fewer where layers are many and dear."""
    macs = sum(site.macs for site in layers)
    runs = 1.3 * max(1, len(layers))
    return int(min(SAMPLES, max(16, WORK / max(1.0, macs * runs))))


def collect_probe(batch: Batch, output: Tensor, room: int) -> list[Probe]:
    """Return up to `room` samples of a batch as a probe; empty where outputs are too large."""
    each = max(1, output[0].numel())
    count = min(room, batch.size, max(1, OUTPUTS // SAMPLES // each * 4))
    return [Probe(batch.head(count), output.detach()[:count].clone())] if count > 0 else []


def measure_scale(
    module: nn.Module,
    site: Site,
    stats: LayerStats,
    probes: Sequence[Probe],
    loss: Loss,
    *,
    seed: int = 0,
    limits: tuple[float, float] = (1e-3, 1e3),
) -> float:
    """Measure one perturbation of a layer and return measured over predicted loss increase.

    The weight gets uniform noise, as rounding would give it, of the size that should cost 0.02 nats
    a prediction (features: 0.5 % of their power). Where the measured cost is too small to tell or
    too large to be second order, the noise is resized once and measured again. The weight is
    restored bit by bit, whatever happens.

    Args:
        module: the network, in evaluation mode; changed and restored.
        site: the layer.
        stats: its statistics; their own `scale` is left out of the prediction.
        probes: inputs and reference outputs, from `collect_probe`.
        loss: what the outputs are.
        seed: of the noise; each layer draws its own.
        limits: the scale is clamped to these.

    Returns:
        the scale [1]; 1 where nothing is predicted and nothing can be compared.
    """
    if not probes:
        return 1.0
    weight = find_tensor(module, site.weight)
    stats = stats.with_scale(1.0)
    matrix = as_matrix(site, weight.detach()).double().cpu()
    generator = torch.Generator().manual_seed(seed + zlib.crc32(site.name.encode()))
    noise = torch.rand(matrix.shape, generator=generator, dtype=torch.float64) - 0.5
    unit = predict_error(stats, matrix, noise)
    if not math.isfinite(unit) or unit <= 0 or not matrix.numel():
        return 1.0
    samples = sum(p.batch.size for p in probes)
    goal = sum(relative_level(loss, p.reference) * p.batch.size for p in probes) / samples
    step = math.sqrt(goal / unit)
    measured = predicted = 0.0
    for attempt in range(2):
        changed = from_matrix(site, (matrix + step * noise)).to(weight.device, weight.dtype)
        actual = as_matrix(site, changed).double().cpu() - matrix  # rounding to the dtype included
        predicted = predict_error(stats, matrix, actual)
        measured = _measure(module, weight, changed, probes, loss) / samples
        if LOW * goal <= measured <= HIGH * goal or attempt:
            break
        step *= math.sqrt(goal / measured) if measured > 0 and math.isfinite(measured) else 10.0
    if not math.isfinite(measured):
        return limits[1]
    if predicted <= 0:
        return 1.0
    return min(limits[1], max(limits[0], measured / predicted))


def _measure(
    module: nn.Module, weight: Tensor, changed: Tensor, probes: Sequence[Probe], loss: Loss
) -> float:
    """Return the summed divergence while `weight` holds `changed`."""
    total = 0.0
    with torch.no_grad():
        before = weight.detach().clone()
        try:
            weight.copy_(changed)
            for probe in probes:
                output = main_output(call(module, probe.batch))
                total += float(divergence(loss, probe.reference, output, probe.batch.mask).sum())
        finally:
            weight.copy_(before)
    return total
