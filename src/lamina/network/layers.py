"""Which modules are layers, and how each of their weights is seen as matrices."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn

from lamina.network.sites import Site
from lamina.network.tensors import join

CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDING = (nn.Embedding, nn.EmbeddingBag)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
RECURRENT_WEIGHT = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def describe(path: str, module: nn.Module, parent: nn.Module | None) -> tuple[Site, ...]:
    """Return one site for each weight a module holds; none for modules that are not layers.

    Only the module is looked at: ties, uses and positions are the business of `discover`.

    Args:
        path: module path; `""` for the network itself.
        parent: the module that holds it, which may read its weight raw.

    Example:
        >>> describe("head", nn.Linear(3, 2), None)[0].weight
        'head.weight'
    """
    if isinstance(module, nn.MultiheadAttention):
        return _attention(path, module)
    if isinstance(module, RECURRENT):
        return _recurrent(path, module)
    if type(module).__name__.endswith("Experts"):
        return _experts(path, module)
    weight = module._parameters.get("weight")
    op = op_of(module)
    if not op or weight is None:
        return ()
    site = Site(
        name=path or "weight",
        op=op,
        module=path,
        weight=join(path, "weight"),
        bias=join(path, "bias") if module._parameters.get("bias") is not None else "",
        shape=_shape(weight),
        transposed=_is_hf_conv1d(module),
        rigid=_rigid(path, module, parent),
    )
    if op in ("conv", "conv_transpose"):
        return (_with_geometry(site, module),)
    if op == "linear":
        return (replace(site, groups=int(getattr(module, "groups", 1))),)
    return (site,)


def op_of(module: nn.Module) -> str:
    """Return the operation of a module that has one `weight`; `""` where it is not a layer."""
    if isinstance(module, nn.Linear) or _is_hf_conv1d(module) or _is_grouped_linear(module):
        return "linear"
    if isinstance(module, CONV_TRANSPOSE):
        return "conv_transpose"
    if isinstance(module, CONV):
        return "conv"
    return "embedding" if isinstance(module, EMBEDDING) else ""


def _shape(weight: nn.Parameter) -> tuple[int, ...]:
    return () if isinstance(weight, nn.UninitializedParameter) else tuple(weight.shape)


def _is_hf_conv1d(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    named = any(c.__name__ == "Conv1D" for c in type(module).__mro__) and hasattr(module, "nf")
    return named and weight is not None and weight.dim() == 2


def _is_grouped_linear(module: nn.Module) -> bool:
    """By its attributes: the form lives in a room that this one does not see."""
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features", "groups")]
    weight = module._parameters.get("weight")
    if weight is None or not all(type(n) is int and n > 0 for n in sizes):
        return False
    return _shape(weight) == (sizes[1], sizes[0] // sizes[2])  # type: ignore[operator]


def _with_geometry(site: Site, conv: Any) -> Site:
    padding = conv.padding
    if isinstance(padding, str):
        padding = ("same",) if padding == "same" else (0,) * len(conv.kernel_size)
    return replace(
        site,
        groups=conv.groups,
        kernel=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        padding=tuple(padding),
        dilation=tuple(conv.dilation),
        padding_mode=conv.padding_mode,
    )


def _rigid(path: str, module: nn.Module, parent: nn.Module | None) -> str:
    """Return why a module must stay the module it is, as far as it and its parent tell."""
    leaf = path.rpartition(".")[2]
    if not path:
        return "it is the whole network"
    if isinstance(parent, nn.MultiheadAttention):
        return "read raw by nn.MultiheadAttention"
    if isinstance(parent, nn.TransformerEncoderLayer) and leaf in ("linear1", "linear2"):
        return "read raw by the fast path of nn.TransformerEncoderLayer"
    if leaf == "_orig_mod":
        return "held by torch.compile"
    if getattr(module, "max_norm", None) is not None:
        return "its rows are renormalised whenever they are used (max_norm)"
    plain = (nn.Linear, *CONV, *CONV_TRANSPOSE, *EMBEDDING)
    base = next((kind for kind in plain if isinstance(module, kind)), None)
    if base is None:
        return f"no form replaces a {type(module).__name__}"
    if "forward" in module.__dict__ or any(
        getattr(type(module), name, None) is not getattr(base, name, None)
        for name in ("forward", "_conv_forward")
    ):
        return f"{type(module).__name__} has a forward of its own"
    more = [name for name in module._parameters if name not in ("weight", "bias")]
    more += [name for name, child in module._modules.items() if child is not None]
    return f"{type(module).__name__} holds more than a weight ({more[0]})" if more else ""


def _recurrent(path: str, module: nn.Module) -> tuple[Site, ...]:
    sites = []
    for leaf, weight in module._parameters.items():
        if weight is None or not RECURRENT_WEIGHT.fullmatch(leaf):
            continue
        bias = leaf.replace("weight_", "bias_")
        sites.append(
            Site(
                name=join(path, leaf),
                op="recurrent",
                module=path,
                weight=join(path, leaf),
                bias=join(path, bias) if module._parameters.get(bias) is not None else "",
                shape=_shape(weight),
                rigid=f"{type(module).__name__} keeps its weights in one kernel",
            )
        )
    return tuple(sites)


def _experts(path: str, module: nn.Module) -> tuple[Site, ...]:
    """The weights of experts that one module keeps together, `[experts, out, in]` or, as some
    families do, `[experts, in, out]`; either way a group each."""
    return tuple(
        Site(
            name=join(path, leaf),
            module=path,
            weight=join(path, leaf),
            shape=_shape(weight),
            groups=_shape(weight)[0],
            rigid=f"{type(module).__name__} keeps its experts in one tensor",
        )
        for leaf, weight in module._parameters.items()
        if weight is not None and len(_shape(weight)) == 3 and min(_shape(weight)) > 1
    )


def _attention(path: str, module: nn.MultiheadAttention) -> tuple[Site, ...]:
    sites = []
    for leaf in ATTENTION_WEIGHTS:
        weight = module._parameters.get(leaf)
        if weight is None:
            continue
        # q, k and v apart still share one bias vector, so no single weight can claim it.
        whole = leaf == "in_proj_weight" and module._parameters.get("in_proj_bias") is not None
        sites.append(
            Site(
                name=join(path, leaf),
                module=path,
                weight=join(path, leaf),
                bias=join(path, "in_proj_bias") if whole else "",
                shape=_shape(weight),
                rigid="read raw by nn.MultiheadAttention",
            )
        )
    return tuple(sites)
