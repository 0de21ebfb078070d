"""What a layer's weight matrix acts on: input columns, and the gradients at its output.

Every layer is seen as `as_matrix` sees it, `[groups, out, in]`, acting on columns. A column is a
token of a linear layer, a patch of a convolution, a pixel of a transposed convolution, a one-hot
vector of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from lamina.network.sites import Site

CHUNK = 1 << 23  # elements of unfolded patches alive at a time
PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate"}


@dataclass(frozen=True)
class Columns:
    """Columns of one call, or of a part of it.

    Args:
        values: `[groups, n, width]`.
        weight: how many columns each one stands for (others were left out at random).
        exact: False where `values` only tell the power of columns that cannot be seen.
    """

    values: Tensor
    weight: float = 1.0
    exact: bool = True


def role_of(root: nn.Module, site: Site) -> tuple[str, str]:
    """Return the path of the module whose calls show a layer, and what the layer is to it.

    Returns:
        the module path and `"direct"`; for weights that a larger module uses raw, its path and
        `"in_proj"`, `"out_proj"` (attention), `"input"`, `"state"`, `"cell_state"` or `"hidden"`
        (recurrent: sees the input sequence, the output sequence, the state given to a cell, none).
    """
    module = root.get_submodule(site.module)
    if site.op == "linear" and len(site.shape) == 3:
        return site.module, "hidden"  # which tokens an expert sees is its module's own business
    parent_path, _, leaf = site.module.rpartition(".")
    if leaf == "out_proj" and isinstance(root.get_submodule(parent_path), nn.MultiheadAttention):
        return parent_path, "out_proj"
    if isinstance(module, nn.MultiheadAttention):
        return site.module, "out_proj" if "out_proj" in site.weight else "in_proj"
    if isinstance(module, nn.RNNCellBase):
        return site.module, "input" if site.weight.endswith("weight_ih") else "cell_state"
    if isinstance(module, nn.RNNBase):
        name = site.weight.rpartition(".")[2]
        layer = name.removesuffix("_reverse").rpartition("_l")[2]
        if name.startswith("weight_ih") and layer == "0":
            return site.module, "input"
        if name.startswith("weight_hh") and layer == str(module.num_layers - 1):
            return site.module, "state"
        return site.module, "hidden"
    return site.module, "direct"


def main_tensor(output: Any) -> Tensor | None:
    """Return the floating tensor a layer's output stands for: itself, or the first of a tuple."""
    if isinstance(output, PackedSequence):
        return output.data
    if isinstance(output, (tuple, list)) and output:
        return main_tensor(output[0])
    return output if isinstance(output, Tensor) and output.is_floating_point() else None


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return a tensor's rows without those of padding, `[tokens, ...]`; itself without a mask.

    Padding meets every weight and changes no output: what it shows would only blur the moments.

    Args:
        x: `[samples, tokens, ...]`; any other shape than the mask's stays whole.
        mask: `[samples, tokens]`, 0 where a token does not count, or None.

    Example:
        >>> counted(torch.tensor([[7, 8, 0]]), torch.tensor([[1, 1, 0]]))
        tensor([7, 8])
    """
    if mask is None or x.dim() < 2 or tuple(x.shape[:2]) != tuple(mask.shape):
        return x
    return x[mask.to(x.device).bool()]


def input_columns(
    site: Site,
    role: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
    limit: int,
    generator: torch.Generator,
    mask: Tensor | None = None,
) -> Iterator[Columns]:
    """Yield the columns that a layer's weight met in one call, in parts that fit in memory.

    Args:
        site, role: from `role_of`.
        module: the module that was called, with what it was called with and what it returned.
        limit: about how many columns to look at; more are drawn from, with `generator`.
        mask: `[samples, tokens]`, 0 for padding, which is left out (linear layers).
    """
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, (Tensor, PackedSequence))]
    if not tensors:
        return
    x = tensors[0].data if isinstance(tensors[0], PackedSequence) else tensors[0]
    width = site.matrix_shape[2]
    if role == "direct" and site.op == "conv":
        yield from _patches(site, _batched(x, site), limit, generator)
    elif role == "direct" and site.op == "conv_transpose":
        yield from _pixels(_batched(x, site), site.groups, limit, generator)
    elif role == "direct":
        yield from _rows(counted(x, mask), site.groups, limit, generator)
    elif role == "input":
        yield from _rows(x, site.groups, limit, generator)
    elif role == "cell_state":
        given = args[1] if len(args) > 1 else kwargs.get("hx")
        h = given[0] if isinstance(given, (tuple, list)) else given
        if isinstance(h, Tensor):  # none given: the state is zero and adds nothing
            yield from _rows(h, 1, limit, generator)
    elif role == "state" or role == "hidden":
        y = main_tensor(output)
        assert y is not None
        if role == "hidden":
            yield from _alike(_power(y, width, limit, generator), site.groups)
            return
        reverse = site.weight.endswith("_reverse")
        h = y[..., width:] if reverse else y[..., :width]
        if y.dim() == 3:  # the state before the first step is zero and adds nothing
            time = 1 if getattr(module, "batch_first", False) else 0
            h = h.narrow(time, 1 if reverse else 0, max(0, h.shape[time] - 1))
        yield from _rows(h, 1, limit, generator)
    else:
        yield from _attention_inputs(site, role, module, args, kwargs, limit, generator)


def gradient_columns(
    site: Site, role: str, grad: Tensor, width: int, limit: int, generator: torch.Generator,
    mask: Tensor | None = None,
) -> Iterator[Columns]:  # fmt: skip
    """Yield the loss gradients at a layer's output `[groups, n, out]`, column by column.

    Args:
        grad: gradient with respect to the called module's output.
        width: rows of the weight matrix (where gradients cannot be seen, only their power is used).
        mask: `[samples, tokens]`, 0 for padding, which is left out (linear layers, embeddings).
    """
    if role in ("in_proj", "input", "state", "cell_state", "hidden"):
        yield from _alike(_power(grad, width, limit, generator), site.groups)
    elif site.op == "conv":
        yield from _pixels(_batched(grad, site), site.groups, limit, generator)
    elif site.op == "conv_transpose":
        yield from _patches(site, _batched(grad, site), limit, generator)
    else:
        yield from _rows(counted(grad, mask), site.groups, limit, generator)


def token_counts(site: Site, index: Tensor) -> Tensor:
    """Return how often each row of an embedding was looked up `[1, rows]`, in float64."""
    flat = index.detach().reshape(-1).long()
    return torch.bincount(flat, minlength=site.shape[0]).double().unsqueeze(0)


def _rows(x: Tensor, groups: int, limit: int, generator: torch.Generator) -> Iterator[Columns]:
    flat = x.detach().reshape(-1, x.shape[-1])
    pick, weight = _pick(flat.shape[0], limit, generator)
    if pick is not None:
        flat = flat[pick.to(flat.device)]
    rows = max(1, CHUNK // max(1, flat.shape[1]))
    for part in flat.split(rows):
        yield Columns(part.unflatten(-1, (groups, -1)).transpose(0, 1), weight)


def _power(x: Tensor, width: int, limit: int, generator: torch.Generator) -> Iterator[Columns]:
    for part in _rows(x, 1, limit, generator):
        power = part.values.double().square().mean(-1, keepdim=True).sqrt()
        yield Columns(power.expand(-1, -1, width), part.weight, exact=False)


def _alike(columns: Iterator[Columns], groups: int) -> Iterator[Columns]:
    """Let every group see the same columns."""
    for part in columns:
        yield Columns(part.values.expand(groups, -1, -1), part.weight, part.exact)


def _pixels(x: Tensor, groups: int, limit: int, generator: torch.Generator) -> Iterator[Columns]:
    flat = x.detach().flatten(2)
    pick, weight = _pick(flat.shape[2], limit // max(1, len(flat)), generator)
    if pick is not None:
        flat = flat[:, :, pick.to(flat.device)]
    for part in flat.split(max(1, CHUNK // max(1, flat[0].numel()))):
        grouped = part.unflatten(1, (groups, -1)).permute(1, 0, 3, 2)
        yield Columns(grouped.flatten(1, 2), weight)


def _patches(site: Site, x: Tensor, limit: int, generator: torch.Generator) -> Iterator[Columns]:
    """Unfold `x [n, c, *space]` into patches `[groups, n * positions, c/groups * K]`."""
    dims = len(site.kernel)
    x = _pad(site, x.detach())
    for i, (k, s, d) in enumerate(zip(site.kernel, site.stride, site.dilation, strict=True)):
        x = x.unfold(2 + i, (k - 1) * d + 1, s)[..., ::d]
    space = x.shape[2 : 2 + dims]
    count = space.numel()
    pick, weight = _pick(count, limit // max(1, len(x)), generator)
    kept = count if pick is None else len(pick)
    size = x.shape[1] * kept * torch.Size(site.kernel).numel()
    for part in x.split(max(1, CHUNK // max(1, size))):
        if pick is None:
            part = part.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
            part = part.flatten(1, dims)
        else:
            part = part[(slice(None), slice(None), *_unravel(pick.to(x.device), space))]
            part = part.transpose(1, 2)
        columns = part.reshape(*part.shape[:2], site.groups, -1).permute(2, 0, 1, 3)
        yield Columns(columns.flatten(1, 2), weight)


def _pad(site: Site, x: Tensor) -> Tensor:
    sides: list[int] = []
    for i in reversed(range(len(site.kernel))):
        if site.padding and site.padding[0] == "same":
            total = site.dilation[i] * (site.kernel[i] - 1)
            sides += [total // 2, total - total // 2]  # as torch does: the odd one goes right
        elif site.padding and site.padding[0] != "valid":
            sides += [int(site.padding[i])] * 2
    if not any(sides):
        return x
    if site.op == "conv_transpose":
        return F.pad(x, sides)
    return F.pad(x, sides, mode=PAD_MODES.get(site.padding_mode, site.padding_mode))


def _attention_inputs(
    site: Site,
    role: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    limit: int,
    generator: torch.Generator,
) -> Iterator[Columns]:
    assert isinstance(module, nn.MultiheadAttention)
    given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
    query, key, value = (given[n] for n in ("query", "key", "value"))
    if role == "out_proj":
        # The context is a mean of values: their second moment bounds it, the probe sets its scale.
        bias = module.in_proj_bias
        packed = module.in_proj_weight is not None
        weight = (module.in_proj_weight if packed else module.v_proj_weight).detach()
        weight = weight[2 * module.embed_dim :] if packed else weight
        bias_v = None if bias is None else bias.detach()[2 * module.embed_dim :]
        with torch.no_grad():
            seen = [F.linear(value, weight, bias_v)]
        times = query.numel() // query.shape[-1] / max(1, value.numel() // value.shape[-1])
    else:
        name = site.weight.rpartition(".")[2]
        one = {"q_proj_weight": query, "k_proj_weight": key, "v_proj_weight": value}.get(name)
        distinct = {id(t): t for t in (query, key, value)}
        seen = [one] if one is not None else list(distinct.values())
        times = 1 / len(seen)
    for x in seen:
        for part in _rows(x, 1, limit // len(seen), generator):
            yield Columns(part.values, part.weight * times)


def _batched(x: Tensor, site: Site) -> Tensor:
    return x.unsqueeze(0) if x.dim() == len(site.kernel) + 1 else x


def _pick(count: int, limit: int, generator: torch.Generator) -> tuple[Tensor | None, float]:
    """Draw which of `count` positions to look at, and how many each then stands for."""
    if count <= max(1, limit):
        return None, 1.0
    kept = max(1, limit)
    return torch.randperm(count, generator=generator)[:kept].sort().values, count / kept


def _unravel(index: Tensor, space: torch.Size) -> list[Tensor]:
    axes = []
    for size in reversed(space):
        axes.append(index % size)
        index = index // size
    return axes[::-1]
