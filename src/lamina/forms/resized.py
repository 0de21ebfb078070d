"""The resized form: a layer of the same kind with other sizes, as merging leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms.edit import builder

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LARGEST = {"inputs": 1 << 20, "outputs": 1 << 20, "kernel": 64, "stride": 64, "padding": 256}
ELEMENTS = 1 << 31  # of a weight: a file must not ask for more memory than any layer has


@builder("resized")
def build_resized(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build a Linear (or Conv1D of Hugging Face) or Conv1d-3d of other sizes, all zero.

    dtype, device and what is trained are the module's; what is not said is as it was.

    Args:
        module: the layer; a convolution has dilation 1 and equal sides.
        settings: of `inputs`, `outputs` (channels), `bias` (0 or 1); and of convolutions `kernel`,
            `stride`, `padding` (the same in every direction) and `groups`.

    Raises:
        FileError: the module is of another kind, or the integers do not fit it.

    Example:
        >>> build_resized(nn.Conv2d(3, 8, 3, bias=False), {"kernel": 5, "padding": 2, "bias": 1})
        Conv2d(3, 8, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2))
    """
    where = f"resized {dict(settings)}"[:200]
    now = sizes_of(module)
    if now is None:
        raise FileError("this layer cannot be resized", where, type(module).__name__)
    if unknown := [key for key in settings if key not in now]:
        raise FileError("unknown settings of resized", where, f"{unknown[0]} is none of this layer")
    sizes = now | dict(settings)
    for key, value in sizes.items():
        least = 0 if key in ("padding", "bias") else 1
        most = 1 if key == "bias" else LARGEST.get(key, sizes["inputs"])
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise FileError("a resized edit does not fit", where, f"{key} is {least} to {most}")
    groups = sizes.get("groups", 1)
    if sizes["inputs"] % groups or sizes["outputs"] % groups:
        raise FileError("a resized edit does not fit", where, "groups divide the channels")
    taps = sizes.get("kernel", 1) ** (module.weight.dim() - 2)  # type: ignore[union-attr, operator]
    if sizes["inputs"] // groups * sizes["outputs"] * max(1, taps) > ELEMENTS:
        raise FileError("a resized edit does not fit", where, "the weight is too large to be true")
    return _build(module, sizes)


def sizes_of(module: nn.Module) -> dict[str, int] | None:
    """Return the integers of a layer that can be resized, or None.

    Example:
        >>> sizes_of(nn.Linear(3, 2))
        {'inputs': 3, 'outputs': 2, 'bias': 1}
    """
    layer: Any = module
    bias = int(getattr(module, "bias", None) is not None)
    if type(module) is nn.Linear:
        return {"inputs": layer.in_features, "outputs": layer.out_features, "bias": bias}
    if is_transposed(module):
        inputs, outputs = layer.weight.shape
        return {"inputs": int(inputs), "outputs": int(outputs), "bias": bias}
    if type(module) not in CONVS or isinstance(layer.padding, str):
        return None
    sides = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    if any(len(set(side)) > 1 for side in sides) or layer.dilation[0] != 1:
        return None
    return {
        "inputs": layer.in_channels,
        "outputs": layer.out_channels,
        "bias": bias,
        "kernel": layer.kernel_size[0],
        "stride": layer.stride[0],
        "padding": layer.padding[0],
        "groups": layer.groups,
    }


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is the Conv1D of Hugging Face: a linear one that holds `[in, out]`."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def _build(module: nn.Module, sizes: Mapping[str, int]) -> nn.Module:
    old = module.weight
    assert isinstance(old, torch.Tensor)
    like = {"dtype": old.dtype, "device": old.device}
    new: nn.Module
    with torch.device("meta"):  # no memory, no random numbers: values follow
        if isinstance(module, CONVS):
            new = type(module)(
                sizes["inputs"],
                sizes["outputs"],
                sizes["kernel"],
                sizes["stride"],
                sizes["padding"],
                groups=sizes["groups"],
                bias=bool(sizes["bias"]),
                padding_mode=module.padding_mode,
            )
        else:
            new = nn.Linear(sizes["inputs"], sizes["outputs"], bias=bool(sizes["bias"]))
    for name, tensor in list(new._parameters.items()):
        if tensor is not None:
            zeros = torch.zeros(tensor.shape, **like)  # type: ignore[call-overload]
            new._parameters[name] = nn.Parameter(zeros, old.requires_grad)
    return new
