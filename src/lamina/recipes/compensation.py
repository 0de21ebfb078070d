"""What stands in for a channel that went: its mean, or what the others say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lamina.errors import DataError
from lamina.forms import find_tensor
from lamina.measure.stats import LayerStats, Stats
from lamina.network.source import Network
from lamina.recipes.saliency import covariance, with_ridge
from lamina.recipes.widths import ACTIVATIONS, Width

FILLS = ("auto", "none", "constant", "mean", "regress")
NODES = 31  # of the normal distribution that a BatchNorm gives


@dataclass(frozen=True)
class Fill:
    """What a width's next layer gets for the inputs that went.

    Args:
        offset: what it adds to its output [outputs].
        weight: its new weight as a matrix [outputs, inputs], columns that went included.
    """

    offset: torch.Tensor
    weight: torch.Tensor | None = None


def compensated(
    network: Network,
    found: Sequence[Width],
    kept: Mapping[str, torch.Tensor],
    stats: Stats,
    how: str,
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Return the tensors that hold other values afterwards, at full size; the original stays.

    An offset is added to the consumer's bias, or taken from the running mean of the BatchNorm that
    reads it.

    Args:
        network: the original.
        found, kept: the widths, and the channels that stay.
        stats: of calibration, for `"mean"` and `"regress"`.
        how: one of `FILLS`.

    Returns:
        new values by name, and the widths whose offset could be put nowhere.

    Raises:
        DataError: what was asked needs statistics.
    """
    changed: dict[str, torch.Tensor] = {}
    alone: list[str] = []
    for width in found if how != "none" else ():
        gone = torch.ones(width.channels, dtype=torch.bool)
        gone[kept[width.name]] = False
        if not gone.any():
            continue
        fill = _fill(network, width, gone, stats.of(width.consumer.name), how)
        site = width.consumer
        if fill is None:
            alone.append(width.name)
            continue
        if fill.weight is not None:
            changed[site.weight] = fill.weight.reshape(site.shape)
        where = site.bias or (f"{width.after}.running_mean" if width.after else "")
        norm = network.module.get_submodule(width.after) if width.after else None
        if not site.bias and norm is not None and norm._buffers.get("running_mean") is None:
            continue  # it takes the mean of every batch itself
        if not where:
            alone.append(width.name)
            continue
        old = find_tensor(network.module, where).detach()
        sign = 1.0 if site.bias else -1.0
        changed[where] = old.double() + sign * fill.offset.to(old.device)
    return changed, tuple(alone)


def _fill(
    network: Network, width: Width, gone: torch.Tensor, stats: LayerStats | None, how: str
) -> Fill | None:
    if how == "auto":
        how = "constant" if stats is None or stats.mean is None else "regress"
    weight = find_tensor(network.module, width.consumer.weight).detach().double().cpu()
    matrix = weight.flatten(1)
    columns = width.inputs(gone.nonzero().flatten())
    taps = matrix.shape[1] // weight.shape[1]
    columns = (columns[:, None] * taps + torch.arange(taps)).flatten()
    if how == "constant":
        constant = constants(network, width)
        if constant is None:
            return None
        each = constant.repeat_interleave(matrix.shape[1] // width.channels)
        return Fill(matrix[:, columns] @ each[columns])
    if stats is None or stats.mean is None:
        raise DataError(
            f"compensate={how!r} needs calibration data", width.consumer.name, "",
            "give data, or compensate='constant'",
        )  # fmt: skip
    mean = stats.mean[0].cpu() / stats.positions
    spread = covariance(stats)
    if how == "mean" or spread.dim() == 1:
        return Fill(matrix[:, columns] @ mean[columns])
    return regress(matrix, spread / stats.positions, mean, columns)


def regress(
    matrix: torch.Tensor, covariance: torch.Tensor, mean: torch.Tensor, gone: torch.Tensor
) -> Fill:
    """Let the inputs that stay give their least squares estimate of those that go.

    `x_R ~ E x_R + A (x_K - E x_K)` with `A = C_RK C_KK^-1`, so `W_K + W_R A` replaces `W_K`.

    Args:
        matrix: weight [outputs, inputs].
        covariance: of the inputs [inputs, inputs].
        mean: of the inputs [inputs].
        gone: which of them go.

    Reference: He, Zhang, Sun 2017, arXiv:1707.06168, section 3.1 (reconstruction).
    """
    stays = torch.ones(matrix.shape[1], dtype=torch.bool)
    stays[gone] = False
    inner = with_ridge(covariance)[stays][:, stays]
    guess = torch.linalg.solve(inner, covariance[stays][:, gone]).T
    new = matrix.clone()
    new[:, stays] += matrix[:, gone] @ guess
    return Fill(matrix[:, gone] @ (mean[gone] - guess @ mean[stays]), new)


def constants(network: Network, width: Width) -> torch.Tensor | None:
    """Return what every channel gives on average, from weights alone [channels]; None: not known.

    A filter that is zero gives a constant: the bias, through what lies between. (Zeros that the
    next layer pads with are not that constant: at its border this is not exact.) Of any other
    filter a BatchNorm says the mean and the spread, taken as a normal distribution; pooling by
    maximum is passed over. Without a BatchNorm nothing is known, and the answer is 0.
    """
    root = network.module
    weight = find_tensor(root, width.producer.weight).detach().double().flatten(1).cpu()
    silent = (weight == 0).all(1)
    points, chances = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(NODES))
    value = torch.zeros(NODES, width.channels, dtype=torch.float64)
    if width.producer.bias:
        value += find_tensor(root, width.producer.bias).detach().double().cpu()
    known = silent.clone()
    for target, path in width.between:
        module = root.get_submodule(path)
        if target == "batch_norm":
            if module._buffers.get("running_mean") is None:
                return None
            spread = torch.where(known, _normed(value, module), _drawn(points, module))
            value, known = spread, torch.ones_like(known)
        elif target == "relu":
            value = value.relu()
        elif target in ACTIVATIONS:
            if type(module).__module__ != "torch.nn.modules.activation":
                return None  # a function was called: its settings are not known
            with torch.no_grad():
                value = module(value)
    mean = (chances / chances.sum()) @ value
    return torch.where(known, mean, torch.zeros_like(mean))


def _state(norm: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().double().cpu() for name, t in norm.state_dict().items()}


def _normed(value: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    state = _state(norm)
    value = (value - state["running_mean"]) / (state["running_var"] + norm.eps).sqrt()  # type: ignore[operator]
    return value * state["weight"] + state["bias"] if "weight" in state else value


def _drawn(points: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    state = _state(norm)
    if "weight" not in state:
        return points[:, None].expand(-1, len(state["running_mean"]))
    return points[:, None] * state["weight"] + state["bias"]
