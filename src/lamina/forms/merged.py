"""The merged form: one convolution, and perhaps an activation, where several layers were."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms.edit import builder

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ACTIVATIONS: dict[int, type[nn.Module]] = {
    1: nn.ReLU,
    2: nn.ReLU6,
    3: nn.SiLU,
    4: nn.Hardswish,
    5: nn.LeakyReLU,  # of slope 0.01, torch's default
    6: nn.ELU,
    7: nn.GELU,
    8: nn.Tanh,
    9: nn.Sigmoid,
    10: nn.PReLU,  # a slope of its own for every channel, which are values
}
LEARNED = 10
MOST_TAPS = 127  # along one axis; nobody merges so far
MOST_CHANNELS = 1 << 20
ELEMENTS = 1 << 31  # of a weight: a file must not ask for more memory than any layer has
SIZES = ("kernel", "stride", "padding")
KEYS = {"inputs", "outputs", "groups", "bias", "activation", *SIZES}


@builder("merged")
def build_merged(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build a convolution of zeros, or `Sequential(convolution, activation)`.

    Dimensions, dtype, device and what is trained are those of the module's convolutions.

    Args:
        module: a Conv1d-3d, or a block that holds at least one.
        settings: `inputs` and `outputs` in channels; `kernel`, and optionally `stride` (1) and
            `padding` (0), each for every axis unless there is a number for axis i, as in `kernel1`;
            `groups` (1), `bias` (1: there is one), `activation` (0: none, or a key of
            `ACTIVATIONS`).

    Raises:
        FileError: the module holds no convolution, or the integers do not fit it.

    Example:
        >>> build_merged(nn.Conv2d(3, 8, 3), {"inputs": 3, "outputs": 8, "kernel": 5, "padding": 2})
        Conv2d(3, 8, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2))
    """
    where = "merged " + " ".join(f"{k}={v}" for k, v in settings.items())[:200]
    held = [
        m
        for m in module.modules()
        if isinstance(m, CONVS) and m._parameters.get("weight") is not None
    ]
    dims = {len(m.kernel_size) for m in held}
    if len(dims) != 1:
        raise FileError("only convolutions can be merged", where, type(module).__name__)
    axes = dims.pop()
    known = KEYS | {f"{name}{i}" for name in SIZES for i in range(axes)}
    if unknown := [k for k in settings if k not in known]:
        raise FileError("unknown settings of merged", where, str(unknown[0])[:40])
    if any(isinstance(v, bool) or not isinstance(v, int) for v in settings.values()):
        raise FileError("a merged edit does not fit its layer", where, "settings are integers")
    inputs, outputs = settings.get("inputs", 0), settings.get("outputs", 0)
    groups, bias = settings.get("groups", 1), settings.get("bias", 1)
    activation = settings.get("activation", 0)
    kernel, stride, padding = (
        per_axis(settings, name, axes, d) for name, d in zip(SIZES, (0, 1, 0), strict=True)
    )
    fits = (
        all(1 <= k <= MOST_TAPS for k in kernel)
        and all(1 <= s <= MOST_TAPS for s in stride)
        and all(0 <= p < MOST_TAPS for p in padding)
        and 1 <= inputs <= MOST_CHANNELS and 1 <= outputs <= MOST_CHANNELS
        and 1 <= groups <= inputs and inputs % groups == 0 and outputs % groups == 0
        and bias in (0, 1) and activation in (0, *ACTIVATIONS)
    )  # fmt: skip
    if not fits:
        raise FileError("a merged edit does not fit its layer", where, "a number is out of range")
    if inputs // groups * outputs * math.prod(kernel) > ELEMENTS:
        why = "the weight is too large to be true"
        raise FileError("a merged edit does not fit its layer", where, why)
    like = held[0].weight
    with torch.device("meta"):
        kind: Any = CONVS[axes - 1]
        conv: nn.Module = kind(
            inputs, outputs, kernel, stride=stride, padding=padding, groups=groups, bias=bool(bias)
        )
        act = made_of(activation, outputs)
    trained = any(p.requires_grad for m in held for p in m.parameters())
    for part in (conv, act):
        for name, tensor in part._parameters.items():
            if tensor is not None:
                zeros = torch.zeros(tensor.shape, dtype=like.dtype, device=like.device)
                part._parameters[name] = nn.Parameter(zeros, trained)
    return nn.Sequential(conv, act) if activation else conv


def made_of(code: int, channels: int = 1) -> nn.Module:
    """Return the activation of a number, for so many channels; 0: the identity.

    A learned one begins as the identity.

    Example:
        >>> made_of(2), made_of(10, 4)
        (ReLU6(), PReLU(num_parameters=4))
    """
    if code == LEARNED:
        return nn.PReLU(channels, init=1.0)
    return ACTIVATIONS[code]() if code else nn.Identity()


def per_axis(settings: Mapping[str, int], name: str, axes: int, default: int) -> tuple[int, ...]:
    """Return one number per axis: the axis's own, else that of all.

    Example:
        >>> per_axis({"kernel": 3, "kernel1": 5}, "kernel", 2, 0)
        (3, 5)
    """
    return tuple(settings.get(f"{name}{i}", settings.get(name, default)) for i in range(axes))


def spelled(name: str, values: tuple[int, ...]) -> dict[str, int]:
    """Undo `per_axis`, in as few words as can be.

    Example:
        >>> spelled("kernel", (3, 3)), spelled("kernel", (1, 7))
        ({'kernel': 3}, {'kernel': 1, 'kernel1': 7})
    """
    rest = {f"{name}{i}": v for i, v in enumerate(values) if v != values[0]}
    return {name: values[0], **rest}
