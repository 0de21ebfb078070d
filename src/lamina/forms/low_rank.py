"""The low rank form: an encoding layer (grouped by folds) and a decoding layer.

A convolution's taps are on one side or the other, axis by axis, and so are its stride, padding and
dilation: the four schemes. In scheme 0 the decoding layer is 1x1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms.edit import builder

# Axes of a Conv2d that the encoding layer owns, by scheme: encode, split1, split2, decode.
ENCODER_AXES = ((0, 1), (1,), (0,), ())


class GroupedLinear(nn.Module):
    """A block-diagonal linear layer: `groups` independent maps of consecutive input slices.

    Args:
        in_features: inputs, a multiple of `groups`.
        out_features: outputs, a multiple of `groups`.
        groups: number of blocks.
        bias: with a bias, `[out_features]`.

    `weight` is `[out_features, in_features // groups]`, as in a grouped 1x1 convolution.

    Example:
        >>> GroupedLinear(6, 4, 2)(torch.zeros(3, 6)).shape
        torch.Size([3, 4])
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, groups: int, bias: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.groups = in_features, out_features, groups
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // groups))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks = self.weight.view(self.groups, self.out_features // self.groups, -1)
        split = x.unflatten(-1, (self.groups, -1))
        y = torch.einsum("...gi,goi->...go", split, blocks).flatten(-2)
        return y if self.bias is None else y + self.bias


@builder("low_rank")
def build_low_rank(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build `Sequential(encode, decode)` for a Linear, Conv1d-3d or GPT-2's Conv1D.

    Args:
        module: the dense layer; its geometry is shared out, its bias moves to the decoding layer.
        settings: `folds` k (a divisor of the input channels) and `rank` j per fold; optional
            `scheme` (see `ENCODER_AXES`; not 0 for Conv2d only) and `bias` 1 (the decoding layer
            has one, which starts at zero where the dense layer had none).

    Raises:
        FileError: the module is of another kind, or the integers do not fit it.
    """
    folds, rank = int(settings.get("folds", 1)), int(settings.get("rank", 0))
    scheme, more = int(settings.get("scheme", 0)), int(settings.get("bias", 0))
    where = f"low_rank folds={folds} rank={rank}" + (f" scheme={scheme}" if scheme else "")
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    sizes = _sizes(module) if isinstance(weight, torch.Tensor) else None
    if sizes is None or not isinstance(weight, torch.Tensor):
        raise FileError("this layer has no low rank pair", where, type(module).__name__)
    channels, kernel, outputs = sizes
    if scheme and (not 0 < scheme < len(ENCODER_AXES) or not isinstance(module, nn.Conv2d)):
        why = f"a {type(module).__name__} has none but scheme 0"
        why = why if not isinstance(module, nn.Conv2d) else "there are schemes 0 to 3"
        raise FileError("a low rank edit does not fit its layer", where, why)
    if more not in (0, 1):
        raise FileError("a low rank edit does not fit its layer", where, f"bias={more}, not 0 or 1")
    before, after = split_axes(kernel, scheme, 1)
    # The bound on the rank also bounds memory: a pair is at most twice the layer it replaces.
    most = (
        min(outputs * math.prod(after), channels // folds * math.prod(before)) if folds > 0 else 0
    )
    if folds < 1 or channels % folds or not 1 <= rank <= most:
        why = f"{channels} channels, {math.prod(kernel)} taps, {outputs} outputs"
        raise FileError("a low rank edit does not fit its layer", where, why)
    # No memory and no random numbers are spent on values that are replaced anyway.
    with torch.device("meta"):
        pair = _pair(module, channels, outputs, folds, rank, scheme, bool(more) or bias is not None)
    pair = pair.to(weight.dtype).to_empty(device=weight.device)
    with torch.no_grad():
        for p in pair.parameters():
            p.zero_().requires_grad_(weight.requires_grad)
        if bias is not None:
            pair[1].bias.copy_(bias).requires_grad_(bias.requires_grad)  # type: ignore[operator,union-attr]
    return pair


def split_axes(values: tuple[Any, ...], scheme: int, rest: Any) -> tuple[Any, Any]:
    """Return a convolution's values per axis as (encoder's, decoder's); `rest` where not owned.

    Example:
        >>> split_axes((3, 5), 1, 1)
        ((1, 5), (3, 1))
    """
    own = ENCODER_AXES[scheme]
    mine = [i in own or scheme == 0 for i in range(len(values))]
    encode = tuple(v if m else rest for v, m in zip(values, mine, strict=True))
    decode = tuple(rest if m else v for v, m in zip(values, mine, strict=True))
    return encode, decode


def _sizes(module: nn.Module) -> tuple[int, tuple[int, ...], int] | None:
    """Return (input channels, kernel, outputs) of a layer that can become a pair."""
    if isinstance(module, nn.Linear):
        return module.in_features, (), module.out_features
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
        return module.in_channels, tuple(module.kernel_size), module.out_channels
    if any(c.__name__ == "Conv1D" for c in type(module).__mro__) and hasattr(module, "nf"):
        # Hugging Face's, known by its name as the package may be absent; stored [in, out]
        inputs, outputs = module.weight.shape  # type: ignore[union-attr,misc]
        return inputs, (), outputs
    return None


def _pair(
    module: nn.Module, channels: int, outputs: int, folds: int, rank: int, scheme: int, bias: bool
) -> nn.Sequential:
    inside = folds * rank
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if isinstance(module, kind):
            encode, decode = _geometry(module, scheme)
            # Where an axis is not padded, its mode does not matter; a decoder of one tap has none.
            mode = module.padding_mode
            first = kind(channels, inside, groups=folds, bias=False, padding_mode=mode, **encode)
            mode = mode if scheme else "zeros"
            return nn.Sequential(
                first, kind(inside, outputs, bias=bias, padding_mode=mode, **decode)
            )
    if folds == 1:
        return nn.Sequential(
            nn.Linear(channels, inside, bias=False), nn.Linear(inside, outputs, bias=bias)
        )
    return nn.Sequential(
        GroupedLinear(channels, inside, folds), nn.Linear(inside, outputs, bias=bias)
    )


def _geometry(module: Any, scheme: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the geometry of the two convolutions: each axis on the side that owns its taps."""
    if scheme == 0:
        names = ("kernel_size", "stride", "padding", "dilation")
        return {name: getattr(module, name) for name in names}, {"kernel_size": 1}
    encode, decode = {}, {}
    for name, rest in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        value = getattr(module, name)
        if isinstance(value, str):  # "same" pads an axis of one tap by nothing
            encode[name], decode[name] = value, value
        else:
            encode[name], decode[name] = split_axes(tuple(value), scheme, rest)
    return encode, decode
