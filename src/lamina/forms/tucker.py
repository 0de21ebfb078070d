"""The Tucker-2 form: a 1x1 convolution, the kernel on fewer channels, and a 1x1 back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms.edit import builder


@builder("tucker")
def build_tucker(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build `Sequential(inputs 1x1, core, outputs 1x1)` for an ungrouped Conv1d-3d.

    The core keeps kernel, stride, padding, dilation and padding mode, the last layer the bias. No
    layer before the padding has a bias, so that it pads with what the dense layer pads with.

    Args:
        module: the dense layer.
        settings: `outputs` r1 and `inputs` r2, the channels between the three layers.

    Raises:
        FileError: the module is of another kind, or the integers do not fit it.

    Example:
        >>> layers = build_tucker(nn.Conv2d(8, 6, 3, padding=1), {"outputs": 3, "inputs": 2})
        >>> [tuple(layer.weight.shape) for layer in layers]
        [(2, 8, 1, 1), (3, 2, 3, 3), (6, 3, 1, 1)]
    """
    r1, r2 = int(settings.get("outputs", 0)), int(settings.get("inputs", 0))
    where = f"tucker outputs={r1} inputs={r2}"
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or module.groups != 1:
        raise FileError("this layer has no tucker form", where, type(module).__name__)
    taps = math.prod(module.kernel_size)
    # No tensor has larger ranks than these; the bound on them also bounds memory: each of the three
    # layers is at most as large as the one they replace.
    if not (
        1 <= r1 <= min(module.out_channels, taps * r2)
        and 1 <= r2 <= min(module.in_channels, taps * r1)
    ):
        why = f"{module.in_channels} channels, {taps} taps, {module.out_channels} outputs"
        raise FileError("a tucker edit does not fit its layer", where, why)
    weight, bias = module.weight, module.bias
    # No memory and no random numbers are spent on values that are replaced anyway.
    with torch.device("meta"):
        layers = _layers(module, r1, r2)
    layers = layers.to(weight.dtype).to_empty(device=weight.device)
    with torch.no_grad():
        for p in layers.parameters():
            p.zero_().requires_grad_(weight.requires_grad)
        if bias is not None:
            layers[2].bias.copy_(bias).requires_grad_(bias.requires_grad)  # type: ignore[operator,union-attr]
    return layers


def _layers(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, r1: int, r2: int) -> nn.Sequential:
    kind = next(k for k in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, k))
    core = kind(
        r2,
        r1,
        module.kernel_size,  # type: ignore[arg-type]
        stride=module.stride,  # type: ignore[arg-type]
        padding=module.padding,  # type: ignore[arg-type]
        dilation=module.dilation,  # type: ignore[arg-type]
        bias=False,
        padding_mode=module.padding_mode,
    )
    return nn.Sequential(
        kind(module.in_channels, r2, 1, bias=False),
        core,
        kind(r1, module.out_channels, 1, bias=module.bias is not None),
    )
