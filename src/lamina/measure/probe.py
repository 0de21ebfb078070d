"""One measured perturbation per layer, to fix the scale of its predicted error.

The Kronecker form takes neighbouring positions for independent, so it under-predicts convolutions
about tenfold. The shape of its prediction is right, only the size is not: one probe mends that.
Where statistics were made of softened outputs, the probe is measured on softened outputs as well,
which tells layers apart far more steadily, and once more on the plain ones, for the unit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lamina.forms import find_tensor
from lamina.measure.forward import Batch, call
from lamina.measure.loss import Loss, divergence, relative_level
from lamina.measure.stats import LayerStats, predict_change, predict_error
from lamina.network.sites import Site, as_matrix, from_matrix
from lamina.network.source import main_output

SAMPLES, FEWEST = 250, 16
DRAWS = 4  # of noise; one alone would leave narrow layers 20 % uncertain
WIDE = 1 << 16  # weights; of more, one draw is as certain
OUTPUTS = 1 << 26  # elements of reference outputs that are kept
WORK = 1.5e12  # multiply-accumulates that all probes together may take
LOW, HIGH = 0.4, 2.5  # of the level aimed at: layers are compared at like damage


@dataclass(frozen=True)
class Probe:
    """Inputs to probe with, and what the untouched network made of them.

    Args:
        batch: the inputs.
        reference: the network's main output `[samples, ...]`.
    """

    batch: Batch
    reference: Tensor


@dataclass(frozen=True)
class Reading:
    """What one probe told.

    Args:
        scale: measured over predicted loss increase, both of the softened outputs.
        unit: measured increase of the plain loss over that of the softened one; 0 where neither
            could be told.
    """

    scale: float = 1.0
    unit: float = 0.0


def unit_of(readings: Sequence[Reading]) -> float:
    """Return the one factor from softened to plain nats: the geometric mean over all probes.

    Example:
        >>> round(unit_of([Reading(1.0, 2.0), Reading(1.0, 8.0), Reading()]), 6)
        4.0
    """
    logs = [math.log(r.unit) for r in readings if r.unit > 0 and math.isfinite(r.unit)]
    return math.exp(math.fsum(logs) / len(logs)) if logs else 1.0


def probe_size(
    layers: Sequence[Site], stats: Mapping[str, LayerStats] | None = None, predictions: float = 1.0
) -> int:
    """Return on how many samples to probe: 250, fewer where layers are many and dear.

    Args:
        layers: all of a network.
        stats: of layers that were seen: a sample of the data may be longer than the example.
        predictions: that one sample's output holds; 16 in all are the least.
    """
    known = stats or {}
    macs = 0.0
    for site in layers:
        seen = known.get(site.name) if site.op != "embedding" else None
        macs += seen.positions * math.prod(site.matrix_shape) if seen else site.macs
    runs = 1.3 * max(1, sum(draws_of(site) for site in layers))
    fewest = max(1, math.ceil(FEWEST / predictions))
    return int(min(SAMPLES, max(fewest, WORK / max(1.0, macs * runs))))


def first_of(probes: Sequence[Probe], samples: int) -> list[Probe]:
    """Return the first samples of probes."""
    found: list[Probe] = []
    for probe in probes:
        if samples > 0:
            count = min(samples, probe.batch.size)
            found.append(Probe(probe.batch.head(count), probe.reference[:count]))
            samples -= count
    return found


def draws_of(site: Site) -> int:
    """Return how often a layer is perturbed; noise on many weights averages itself out.

    Example:
        >>> draws_of(Site("a", shape=(10, 20))), draws_of(Site("b", shape=(512, 512)))
        (4, 1)
    """
    return DRAWS if math.prod(site.shape) <= WIDE else 1


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
) -> Reading:
    """Measure one perturbation of a layer: how its loss increase compares with the prediction.

    The weight gets uniform noise (four draws; one where weights are many), as rounding would give
    it, of the size that should cost 0.02 nats a prediction (features: 0.5 % of their power). Where
    the measured cost is too small to tell or too large to be second order, the noise is resized
    once and measured again.
    The weight is restored bit by bit, whatever happens.

    Args:
        module: the network, in evaluation mode; changed and restored.
        site: the layer.
        stats: its statistics; their own `scale` is left out of the prediction.
        probes: inputs and reference outputs, from `collect_probe`.
        loss: what the outputs are, at the temperature the statistics were made at.
        seed: of the noise; each layer draws its own.
        limits: the scale is clamped to these.

    Returns:
        the scale, and the plain loss in units of the softened one; a scale of 1 where nothing is
        predicted, so that nothing can be compared.
    """
    if not probes:
        return Reading()
    weight = find_tensor(module, site.weight)
    stats = stats.with_scale(1.0)
    matrix = as_matrix(site, weight.detach()).double().cpu()
    generator = torch.Generator().manual_seed(seed + zlib.crc32(site.name.encode()))
    draws = draws_of(site)
    shape = (draws, *matrix.shape)
    noises = torch.rand(shape, generator=generator, dtype=torch.float64).sub_(0.5)
    unit = math.fsum(predict_error(stats, matrix, noise) for noise in noises) / draws
    if not math.isfinite(unit) or unit <= 0 or not matrix.numel():
        return Reading()
    samples = sum(p.batch.size for p in probes)
    goal = sum(relative_level(loss, p.reference) * p.batch.size for p in probes) / samples
    step = math.sqrt(goal / unit)
    measured = predicted = plain = 0.0
    for attempt in range(2):
        measured = predicted = plain = 0.0
        for noise in noises:
            changed = from_matrix(site, torch.add(matrix, noise, alpha=step))
            changed = changed.to(weight.device, weight.dtype)
            rounded = as_matrix(site, changed).cpu()  # what is really there
            predicted += predict_change(stats, matrix, rounded)
            soft, hard = _measure(module, weight, changed, probes, loss)
            measured, plain = measured + soft, plain + hard
        level = measured / draws
        if LOW * goal <= level <= HIGH * goal or attempt:
            break
        step *= math.sqrt(goal / level) if level > 0 and math.isfinite(level) else 10.0
    if predicted <= 0:
        return Reading()
    if not (math.isfinite(measured) and math.isfinite(plain)):
        return Reading(limits[1])
    scale = min(limits[1], max(limits[0], measured / predicted))
    return Reading(scale, plain / measured if measured > 0 else 0.0)


def _measure(
    module: nn.Module, weight: Tensor, changed: Tensor, probes: Sequence[Probe], loss: Loss
) -> tuple[float, float]:
    """Return the mean divergence, softened and plain, while `weight` holds `changed`."""
    soft = plain = 0.0
    with torch.no_grad():
        before = weight.detach().clone()
        try:
            weight.copy_(changed)
            for probe in probes:
                output = main_output(call(module, probe.batch))
                pair = (probe.reference, output, probe.batch.mask)
                soft += float(divergence(loss, *pair).sum())
                if loss.temperature != 1:
                    plain += float(divergence(loss.soft(1.0), *pair).sum())
        finally:
            weight.copy_(before)
    samples = sum(p.batch.size for p in probes)
    return soft / samples, (plain if loss.temperature != 1 else soft) / samples
