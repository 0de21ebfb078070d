"""2:4 sparsity as what runs: which layers can use it here, and putting the kernels in.

Tensor cores of NVIDIA GPUs from compute capability 8.0 skip two of every four weights. torch has
the kernels for two-dimensional weights of 16-bit floats (and 8-bit integers) in certain multiples;
nothing of the kind exists for CPUs. A layer whose weight is 2:4 runs anywhere as a dense one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CAPABILITY = (8, 0)  # Ampere
MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.int8: (32, 128)}
GROUP, KEPT = 4, 2


@dataclass(frozen=True)
class Placed:
    """What `accelerate` did: layers that skip zeros now, and by layer why others do not."""

    sparse: tuple[str, ...]
    dense: Mapping[str, str]


def is_two_four(weight: Tensor) -> bool:
    """Return whether at most two of every four weights along the input are not zero.

    Args:
        weight: `[out, in]`.

    Example:
        >>> is_two_four(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 3]]))
        True
        >>> is_two_four(torch.tensor([[1.0, 1, 0, 2, 0, 0, 0, 3]]))
        False
    """
    if weight.dim() != 2 or not weight.numel() or weight.shape[1] % GROUP:
        return False
    return bool(((weight != 0).unflatten(1, (-1, GROUP)).sum(-1) <= KEPT).all())


def missing_here(device: torch.device | str) -> str:
    """Return why a device has no kernels that skip zeros, or `""`.

    Example:
        >>> missing_here("cpu")
        'kernels for 2:4 weights exist for CUDA only, and the device is cpu'
    """
    kind = torch.device(device)
    if kind.type != "cuda":
        return f"kernels for 2:4 weights exist for CUDA only, and the device is {kind.type}"
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    if torch.version.hip is not None:
        return "kernels for 2:4 weights exist for CUDA only, and this is ROCm"
    if not hasattr(torch.sparse, "to_sparse_semi_structured"):
        return "this torch has no semi-structured tensors"
    found = torch.cuda.get_device_capability(kind)
    if found < CAPABILITY:
        return f"the GPU has compute capability {found[0]}.{found[1]}, and they need 8.0"
    return ""


def unfit(weight: Tensor, dtype: torch.dtype | None = None) -> str:
    """Return why a weight cannot be held as 2:4, or `""`.

    Args:
        weight: `[out, in]`.
        dtype: it will have; default: its own.
    """
    dtype = dtype or weight.dtype
    if weight.dim() != 2:
        return f"the weight has {weight.dim()} dimensions, not 2"
    if dtype not in MULTIPLES:
        return f"the kernels take 16-bit floats and 8-bit integers, not {dtype}"
    rows, columns = MULTIPLES[dtype]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        shape = " x ".join(map(str, weight.shape))
        return f"{shape} is no multiple of {rows} x {columns}"
    if not is_two_four(weight):
        return "more than two of some four weights are not zero"
    return ""


def accelerate(
    module: nn.Module, device: torch.device | str = "cuda", dtype: torch.dtype = torch.float16
) -> Placed:
    """Move a network to a GPU, its 2:4 layers held so that kernels skip their zeros; in place.

    Args:
        module: a network, loaded.
        device: where to.
        dtype: of the network from then on; 16-bit.

    Returns:
        which layers skip zeros, and why the others do not; where the device has no such kernels,
        nothing is changed or moved, and all say so.

    Example:
        >>> accelerate(nn.Sequential(nn.Linear(64, 32)), "cpu").dense
        {'0': 'kernels for 2:4 weights exist for CUDA only, and the device is cpu'}
    """
    linear = {n: m for n, m in module.named_modules() if type(m) is nn.Linear}
    if why := missing_here(device):
        return Placed((), dict.fromkeys(linear, why))
    uses: dict[int, int] = {}
    for _, p in module.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    dense = {}
    for name, layer in linear.items():
        tied = "its weight is tied" if uses[id(layer.weight)] > 1 else ""
        if why := tied or unfit(layer.weight, dtype):
            dense[name] = why
    module.to(device=device, dtype=dtype)
    for name, layer in linear.items():
        if name not in dense:
            held = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
            layer.weight = nn.Parameter(held, requires_grad=False)
    return Placed(tuple(name for name in linear if name not in dense), dense)
