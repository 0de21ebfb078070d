"""Forms that reorder channels: a layer of some of its inputs, and a grouped layer of shuffled ones.

Which channels go where is an index: a buffer of the network and a tensor of the file, like every
other value. `check_indices` looks at all of them once they are read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lamina.errors import FileError
from lamina.forms.edit import builder
from lamina.forms.low_rank import GroupedLinear, build_low_rank

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Gather(nn.Module):
    """Take channels by index: `index` is a buffer, and part of the network's state.

    Args:
        channels: how many there are.
        kept: how many are taken.
        dim: the dimension they lie along, counted from the end: -1 for features, -3 for images.

    Example:
        >>> take = Gather(3, 2, -1)
        >>> take.index.copy_(torch.tensor([2, 0]))
        tensor([2, 0])
        >>> take(torch.tensor([[5.0, 6.0, 7.0]]))
        tensor([[7., 5.]])
    """

    index: torch.Tensor

    def __init__(self, channels: int, kept: int, dim: int) -> None:
        super().__init__()
        self.channels, self.kept, self.dim = channels, kept, dim
        self.register_buffer("index", torch.zeros(kept, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        return f"{self.kept} of {self.channels}, dim={self.dim}"


def check_indices(root: nn.Module) -> None:
    """Refuse indices that point outside their channels, which a damaged file may hold.

    Raises:
        FileError: names the tensor. On an accelerator it would end the process instead.
    """
    for path, module in root.named_modules():
        if isinstance(module, Gather) and not module.index.is_meta:
            index = module.index
            if int(index.min()) < 0 or int(index.max()) >= module.channels:
                raise FileError(
                    "an index points outside its channels", f"{path}.index".lstrip("."),
                    f"{int(index.min())} to {int(index.max())} of {module.channels} channels",
                    "the file is damaged",
                )  # fmt: skip


@builder("gathered")
def build_gathered(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build `Sequential(Gather, layer)` that sees some input channels only, or a pair on them.

    Args:
        module: a Linear, ungrouped Conv1d-3d or GPT-2's Conv1D; geometry and bias are kept.
        settings: `channels` m, fewer than the layer has; and optionally `rank` q: then it is
            `Sequential(Gather, encode, decode)`, the low rank pair on m channels.

    Raises:
        FileError: the module is of another kind, or the integers do not fit it.
    """
    kept, rank = int(settings.get("channels", 0)), settings.get("rank")
    where = f"gathered channels={kept}" + ("" if rank is None else f" rank={rank}")
    channels, outputs, dim = _sizes(module, where)
    if not 1 <= kept < channels:
        why = f"it has {channels} channels"
        raise FileError("a gathered edit does not fit its layer", where, why)
    with torch.device("meta"):
        layer = _layer(module, kept, outputs, 1)
        inner: list[nn.Module] = [layer]
        if rank is not None:
            inner = list(build_low_rank(layer, {"folds": 1, "rank": rank}).children())
        built = nn.Sequential(Gather(channels, kept, dim), *inner)
    return _fill(built, module, copy_bias=True)


@builder("shuffled")
def build_shuffled(module: nn.Module, settings: Mapping[str, int]) -> nn.Module:
    """Build `Sequential(Gather, grouped layer, Gather)`: permute, map by groups, permute back.

    The bias lies inside, in the order of the grouped layer's outputs.

    Args:
        module: a Linear, ungrouped Conv1d-3d or GPT-2's Conv1D; its geometry is kept.
        settings: `groups`, at least two; they divide inputs and outputs.

    Raises:
        FileError: the module is of another kind, or the integers do not fit it.
    """
    groups = int(settings.get("groups", 0))
    where = f"shuffled groups={groups}"
    channels, outputs, dim = _sizes(module, where)
    if groups < 2 or channels % groups or outputs % groups:
        why = f"it has {channels} channels and {outputs} outputs"
        raise FileError("a shuffled edit does not fit its layer", where, why)
    with torch.device("meta"):
        built = nn.Sequential(
            Gather(channels, channels, dim),
            _layer(module, channels, outputs, groups),
            Gather(outputs, outputs, dim),
        )
    return _fill(built, module, copy_bias=False)


def _sizes(module: nn.Module, where: str) -> tuple[int, int, int]:
    """Return (input channels, outputs, dimension of the channels)."""
    if module._parameters.get("weight") is not None:
        if isinstance(module, nn.Linear):
            return module.in_features, module.out_features, -1
        if isinstance(module, CONV) and module.groups == 1:
            return module.in_channels, module.out_channels, -1 - len(module.kernel_size)
        if any(c.__name__ == "Conv1D" for c in type(module).__mro__) and hasattr(module, "nf"):
            inputs, outputs = module.weight.shape  # type: ignore[union-attr,misc]
            return inputs, outputs, -1
    raise FileError("this layer's channels cannot be gathered", where, type(module).__name__)


def _layer(module: nn.Module, channels: int, outputs: int, groups: int) -> nn.Module:
    """Return a layer of the same geometry with other channels or groups."""
    bias = module._parameters.get("bias") is not None
    for kind in CONV:
        if isinstance(module, kind):
            return kind(
                channels,
                outputs,
                module.kernel_size,  # type: ignore[arg-type]
                stride=module.stride,  # type: ignore[arg-type]
                padding=module.padding,  # type: ignore[arg-type]
                dilation=module.dilation,  # type: ignore[arg-type]
                groups=groups,
                bias=bias,
                padding_mode=module.padding_mode,
            )
    if groups == 1:
        return nn.Linear(channels, outputs, bias=bias)
    return GroupedLinear(channels, outputs, groups, bias)


def _fill(built: nn.Sequential, module: nn.Module, copy_bias: bool) -> nn.Sequential:
    """Give what was built on the meta device zeros, where and as the old layer's weight is."""
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None  # `_sizes` has seen it
    built = built.to(weight.dtype).to_empty(device=weight.device)
    with torch.no_grad():
        for tensor in built.buffers():
            tensor.zero_()
        for name, parameter in built.named_parameters():
            old = bias if name.endswith("bias") and bias is not None else weight
            parameter.zero_().requires_grad_(old.requires_grad)
            if old is bias and copy_bias:
                parameter.copy_(old)
    return built
