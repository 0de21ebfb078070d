"""Forms of a rewritten network: what computes the same, to rounding, in less time.

A layer takes over the BatchNorm that follows it (`biased`, so that it has somewhere to put the
shift; the norm itself becomes an `identity`, as does any module that is merged away), and
convolutions hold their weights in the order in which the hardware reads them (`layout`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms.edit import builder

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # exactly: a class of one's own may differ
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@builder("biased")
def build_biased(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build a Linear or Conv1d-3d with a bias of zeros; it shares the weight of the one without.

    Args:
        module: the layer.
        settings: none.

    Raises:
        FileError: the module is of another kind, or has a bias; or there are settings.

    Example:
        >>> build_biased(nn.Linear(3, 2, bias=False), {}).bias
        Parameter containing:
        tensor([0., 0.], requires_grad=True)
    """
    _check_none(settings, "biased")
    weight = module._parameters.get("weight")
    if type(module) not in KINDS or weight is None:
        raise FileError("no form gives this layer a bias", "biased", type(module).__name__)
    if module._parameters.get("bias") is not None:
        raise FileError("a biased edit does not fit its layer", "biased", "it has a bias")
    new = copy.copy(module)
    zeros = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    bias = nn.Parameter(zeros, weight.requires_grad)
    new._parameters = {**module._parameters, "bias": bias}
    return new


@builder("identity")
def build_identity(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build what stands where a module became nothing: it gives what it is given.

    Raises:
        FileError: there are settings.

    Example:
        >>> build_identity(nn.ReLU(), {})
        Identity()
    """
    _check_none(settings, "identity")
    return nn.Identity()


@builder("layout")
def build_layout(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Put the weights of all 2-D convolutions in channels-last order, in place; return the module.

    Values, shapes and ties stay; what follows such a convolution sees that order too.

    Args:
        module: a whole network.
        settings: `channels_last` 1.

    Raises:
        FileError: the settings are other ones.
    """
    if dict(settings) != {"channels_last": 1}:
        raise FileError("unknown layout", f"layout {dict(settings)}"[:200], "channels_last is 1")
    made: dict[object, torch.Tensor] = {}
    for weight in conv_weights(module):
        if is_channels_last(weight):
            continue
        # By address: two parameters may be one tensor. On the meta device there is none.
        key = (weight.data_ptr(), weight.shape, weight.stride()) if not weight.is_meta else weight
        if key not in made:
            made[key] = weight.detach().contiguous(memory_format=torch.channels_last)
            if not is_channels_last(made[key]):  # one channel, or one tap: torch sees no difference
                made[key] = torch.empty_like(weight, memory_format=torch.channels_last)
                made[key].copy_(weight.detach())
        weight.data = made[key]
    return module


def conv_weights(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all 2-D convolutions of a module, transposed ones included."""
    convs = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    weights = (m._parameters.get("weight") for m in convs)
    return [w for w in weights if w is not None and w.dim() == 4]


def is_channels_last(weight: torch.Tensor) -> bool:
    """Whether a 4-D tensor is in channels-last order by its strides, as torch tells it.

    Example:
        >>> x = torch.zeros(4, 3, 1, 1)
        >>> is_channels_last(x), is_channels_last(x.to(memory_format=torch.channels_last))
        (False, True)
    """
    _, channels, rows, columns = weight.shape
    wanted = (channels * rows * columns, 1, channels * columns, channels)
    return weight.stride() == wanted


def _check_none(settings: Mapping[str, int], form: str) -> None:
    if settings:
        raise FileError(f"unknown settings of {form}", f"{dict(settings)}"[:200], "it has none")
