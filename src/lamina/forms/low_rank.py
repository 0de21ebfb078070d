"""The low rank form: an encoding layer (grouped by folds) and a 1x1 decoding layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms.edit import builder


class GroupedLinear(nn.Module):
    """A block-diagonal linear layer: `groups` independent maps of consecutive input slices.

    Args:
        in_features: inputs, a multiple of `groups`.
        out_features: outputs, a multiple of `groups`.
        groups: number of blocks.

    `weight` is `[out_features, in_features // groups]`, as in a grouped 1x1 convolution.

    Example:
        >>> GroupedLinear(6, 4, 2)(torch.zeros(3, 6)).shape
        torch.Size([3, 4])
    """

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // groups))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = self.weight.view(self.groups, self.out_features // self.groups, -1)
        split = x.unflatten(-1, (self.groups, -1))
        return torch.einsum("...gi,goi->...go", split, blocks).flatten(-2)


@builder("low_rank")
def build_low_rank(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build `Sequential(encode, decode)` for a Linear, Conv1d-3d or GPT-2's Conv1D (ALDS "encode").

    Args:
        module: the dense layer; its geometry is kept, its bias moves to the decoding layer.
        settings: `folds` k (a divisor of the input channels) and `rank` j per fold.

    Raises:
        FileError: the module is of another kind, or the integers do not fit it.
    """
    folds, rank = int(settings.get("folds", 1)), int(settings.get("rank", 0))
    where = f"low_rank folds={folds} rank={rank}"
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    sizes = _sizes(module) if isinstance(weight, torch.Tensor) else None
    if sizes is None or not isinstance(weight, torch.Tensor):
        raise FileError("this layer has no low rank pair", where, type(module).__name__)
    channels, taps, outputs = sizes
    # The bound on the rank also bounds memory: a pair is at most twice the layer it replaces.
    if folds < 1 or channels % folds or not 1 <= rank <= min(outputs, channels // folds * taps):
        why = f"{channels} channels, {taps} taps, {outputs} outputs"
        raise FileError("a low rank edit does not fit its layer", where, why)
    # No memory and no random numbers are spent on values that are replaced anyway.
    with torch.device("meta"):
        pair = _pair(module, channels, outputs, folds, rank, bias is not None)
    pair = pair.to(weight.dtype).to_empty(device=weight.device)
    with torch.no_grad():
        for p in pair.parameters():
            p.zero_().requires_grad_(weight.requires_grad)
        if bias is not None:
            pair[1].bias.copy_(bias).requires_grad_(bias.requires_grad)  # type: ignore[operator,union-attr]
    return pair


def _sizes(module: nn.Module) -> tuple[int, int, int] | None:
    """Return (input channels, kernel taps, outputs) of a layer that can become a pair."""
    if isinstance(module, nn.Linear):
        return module.in_features, 1, module.out_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
        return module.in_channels, math.prod(module.kernel_size), module.out_channels
    if any(c.__name__ == "Conv1D" for c in type(module).__mro__) and hasattr(module, "nf"):
        # Hugging Face's, known by its name as the package may be absent; stored [in, out]
        inputs, outputs = module.weight.shape  # type: ignore[union-attr,misc]
        return inputs, 1, outputs
    return None


def _pair(
    module: nn.Module, channels: int, outputs: int, folds: int, rank: int, bias: bool
) -> nn.Sequential:
    inside = folds * rank
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, kind):
            encode = kind(
                channels,
                inside,
                module.kernel_size,  # type: ignore[arg-type]
                stride=module.stride,  # type: ignore[arg-type]
                padding=module.padding,  # type: ignore[arg-type]
                dilation=module.dilation,  # type: ignore[arg-type]
                groups=folds,
                bias=False,
                padding_mode=module.padding_mode,
            )
            return nn.Sequential(encode, kind(inside, outputs, 1, bias=bias))
    if folds == 1:
        return nn.Sequential(
            nn.Linear(channels, inside, bias=False), nn.Linear(inside, outputs, bias=bias)
        )
    return nn.Sequential(
        GroupedLinear(channels, inside, folds), nn.Linear(inside, outputs, bias=bias)
    )
