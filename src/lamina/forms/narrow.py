"""The narrow form: the same layer with fewer channels, as filter pruning leaves it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms.edit import builder

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@builder("narrow")
def build_narrow(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build a Linear, Conv1d-3d (one group) or BatchNorm1d-3d with fewer channels, all zero.

    Geometry, bias, dtype, device and what is trained are the module's. Which channels are left is
    not said: their values follow as edits of values.

    Args:
        module: the layer.
        settings: `inputs` and `outputs`, both at least 1 and at most the layer's own; of a
            BatchNorm they are the same number.

    Raises:
        FileError: the module is of another kind, or the integers do not fit it.

    Example:
        >>> build_narrow(nn.Conv2d(3, 8, 5, stride=2), {"inputs": 3, "outputs": 6})
        Conv2d(3, 6, kernel_size=(5, 5), stride=(2, 2))
    """
    inputs, outputs = settings.get("inputs", 0), settings.get("outputs", 0)
    where = f"narrow inputs={inputs} outputs={outputs}"
    sizes = widths(module)
    if sizes is None:
        raise FileError("this layer cannot be made narrower", where, type(module).__name__)
    for asked, now in zip((inputs, outputs), sizes, strict=True):
        if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= now:
            why = f"it has {sizes[0]} inputs and {sizes[1]} outputs"
            raise FileError("a narrow edit does not fit its layer", where, why)
    if isinstance(module, NORMS) and inputs != outputs:
        raise FileError("a narrow edit does not fit its layer", where, "a norm has one width")
    # No memory and no random numbers are spent on values that are replaced anyway.
    with torch.device("meta"):
        new = _narrower(module, inputs, outputs)
    old = _tensors(module)
    if set(old) != set(_tensors(new)):
        raise FileError("this layer cannot be made narrower", where, f"it holds {', '.join(old)}")
    for name, tensor in _tensors(new).items():
        like = old[name]
        value = torch.zeros(tensor.shape, dtype=like.dtype, device=like.device)
        if not tensor.dim():  # the count of batches belongs to no channel
            value.copy_(like.detach())
        if name in new._parameters:
            new._parameters[name] = nn.Parameter(value, like.requires_grad)
        else:
            new._buffers[name] = value
    return new


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Return the (inputs, outputs) of a layer that can be made narrower, or None.

    Example:
        >>> widths(nn.Linear(3, 2)), widths(nn.BatchNorm2d(4)), widths(nn.Conv1d(4, 4, 1, groups=2))
        ((3, 2), (4, 4), None)
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, CONVS) and module.groups == 1:
        return module.in_channels, module.out_channels
    if isinstance(module, NORMS):
        return module.num_features, module.num_features
    return None


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that a module itself holds."""
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None}


def _narrower(module: nn.Module, inputs: int, outputs: int) -> nn.Module:
    if isinstance(module, nn.Linear):
        return nn.Linear(inputs, outputs, bias=module.bias is not None)
    for norm in NORMS:
        if isinstance(module, norm):
            return norm(
                outputs, module.eps, module.momentum, module.affine, module.track_running_stats
            )
    for conv in CONVS:
        if isinstance(module, conv):
            return conv(
                inputs,
                outputs,
                module.kernel_size,  # type: ignore[arg-type]
                stride=module.stride,  # type: ignore[arg-type]
                padding=module.padding,  # type: ignore[arg-type]
                dilation=module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
                padding_mode=module.padding_mode,
            )
    raise AssertionError(type(module).__name__)  # `widths` knows no other
