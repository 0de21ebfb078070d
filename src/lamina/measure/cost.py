"""What networks cost: parameters, bits and multiply-accumulates, counted; seconds, measured."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import DataError
from lamina.forms import GroupedLinear
from lamina.measure.columns import main_tensor
from lamina.measure.forward import Batch, at_rest, call
from lamina.measure.stats import Cost
from lamina.network.sites import Site, Sites
from lamina.network.source import Network


def site_cost(site: Site, bias_numel: int, bits: int = 32) -> Cost:
    """Return what a layer site costs as it is: dense weight and bias.

    Args:
        site: the layer.
        bias_numel: elements of its bias; 0 where there is none.
        bits: of one element, as stored [bits].

    Example:
        >>> site_cost(Site("fc", shape=(4, 3)), 4, 16)
        Cost(params=16.0, bits=256.0, macs=12.0, seconds=0.0)
    """
    params = float(math.prod(site.shape) + bias_numel)
    return Cost(params, params * bits, float(site.macs))


def network_cost(network: Network, sites: Sites) -> Cost:
    """Return what a network costs as it is.

    Args:
        network: the network.
        sites: its sites, which say how often each layer is used.

    Returns:
        parameters (shared ones once), bits of every tensor of the state dict (shared storage once;
        the header of a safetensors file not included), multiply-accumulates per sample.

    Example:
        >>> network_cost(Network(nn.Linear(3, 4)), Sites((Site("fc", shape=(4, 3)),))).bits
        512.0
    """
    seen: set[tuple[Any, ...]] = set()
    bits = 0.0
    for tensor in network.module.state_dict(keep_vars=True).values():
        if not isinstance(tensor, Tensor) or _storage(tensor) in seen:
            continue
        seen.add(_storage(tensor))
        bits += 8 * tensor.numel() * tensor.element_size()
    macs = sum(site.macs for site in sites.layers)
    return Cost(measured_params(network.module), bits, float(macs))


def measured_params(module: nn.Module) -> float:
    """Return the number of parameters, shared ones counted once.

    Example:
        >>> measured_params(nn.Linear(3, 4))
        16.0
    """
    unique = {_storage(p): p.numel() for p in module.parameters()}
    return float(sum(unique.values()))


def measured_macs(
    module: nn.Module,
    example_inputs: tuple[Any, ...],
    example_kwargs: Mapping[str, Any] | None = None,
) -> float:
    """Count the multiply-accumulates of one sample by running a module once, with hooks.

    Linear, (transposed) convolution, grouped linear, recurrent and attention projections count;
    look-ups, biases, norms and products of activations do not: no compression of weights
    changes them.

    Args:
        module: the network; left as it was.
        example_inputs, example_kwargs: inputs of one forward pass; dimension 0 is the sample.

    Raises:
        DataError: the module does not take the inputs.

    Example:
        >>> measured_macs(nn.Linear(3, 4), (torch.zeros(2, 5, 3),))
        60.0
    """
    kwargs = dict(example_kwargs or {})
    size = next(
        (len(v) for v in (*example_inputs, *kwargs.values()) if isinstance(v, Tensor) and v.dim()),
        1,
    )
    total = 0.0

    def hook(m: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        nonlocal total
        total += _macs(m, args, given, output)

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in module.modules()]
    try:
        with at_rest(module), torch.no_grad():
            call(module, Batch(tuple(example_inputs), kwargs, None, size))
    finally:
        for handle in handles:
            handle.remove()
    return total / max(1, size)


def latency(
    models: Mapping[str, nn.Module],
    inputs: tuple[Any, ...],
    rounds: int = 11,
    threads: int = 1,
    min_time: float = 0.02,
) -> dict[str, float]:
    """Measure how long one forward pass of each model takes, in interleaved rounds.

    Every round times each model in turn, so that a slow spell of the machine hits all alike; the
    first calls are thrown away.

    Args:
        models: by name.
        inputs: positional inputs of one forward pass.
        rounds: how many times each model is timed.
        threads: of torch while measuring; put back afterwards.
        min_time: how long one timing lasts at least, by repeating the call [s].

    Returns:
        by name, the median over rounds [s per forward pass].

    Raises:
        DataError: a model does not take the inputs, or there is nothing to measure.

    Example:
        >>> sorted(latency({"a": nn.Identity()}, (torch.zeros(1),), rounds=1, min_time=0))
        ['a']
    """
    if rounds < 1 or threads < 1:
        raise DataError("nothing to measure", f"{rounds} rounds, {threads} threads")
    batch = Batch(tuple(inputs), {}, None, 1)
    before = torch.get_num_threads()
    times: dict[str, list[float]] = {name: [] for name in models}
    try:
        torch.set_num_threads(threads)
        with at_rest(*models.values()), torch.no_grad():
            for model in models.values():  # the first call checks the inputs and allocates
                call(model, batch)
            calls = {
                name: max(1, math.ceil(min_time / max(1e-7, _timed(model, inputs, 2))))
                for name, model in models.items()
            }
            for _ in range(rounds):
                for name, model in models.items():
                    times[name].append(_timed(model, inputs, calls[name]))
    finally:
        torch.set_num_threads(before)
    return {name: median(values) for name, values in times.items()}


def _timed(model: nn.Module, inputs: tuple[Any, ...], calls: int) -> float:
    _synchronize(inputs)
    start = time.perf_counter()
    for _ in range(calls):
        model(*inputs)
    _synchronize(inputs)
    return (time.perf_counter() - start) / calls


def _synchronize(inputs: tuple[Any, ...]) -> None:
    if any(isinstance(v, Tensor) and v.is_cuda for v in inputs):
        torch.cuda.synchronize()


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    """What two names share if they are the same tensor."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _macs(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
    tensors = [v for v in (*args, *kwargs.values()) if main_tensor(v) is not None]
    if not tensors:
        return 0.0
    x, y = main_tensor(tensors[0]), main_tensor(output)
    if x is None or y is None:
        return 0.0
    if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d, GroupedLinear, nn.Linear)):
        return float(y.numel()) * math.prod(m.weight.shape[1:])
    if isinstance(m, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return float(x.numel()) * math.prod(m.weight.shape[1:])
    if isinstance(m, nn.RNNBase):
        steps = x.numel() / m.input_size
        return steps * sum(p.numel() for n, p in m.named_parameters() if n.startswith("weight"))
    if isinstance(m, nn.RNNCellBase):
        steps = x.numel() / m.input_size
        return steps * (m.weight_ih.numel() + m.weight_hh.numel())
    if isinstance(m, nn.MultiheadAttention):
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        rows = [given[n].numel() / given[n].shape[-1] for n in ("query", "key", "value")]
        if m.in_proj_weight is not None:
            inner = [m.in_proj_weight.numel() / 3] * 3
        else:
            inner = [w.numel() for w in (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)]
        out = rows[0] * m.out_proj.weight.numel()
        return sum(r * w for r, w in zip(rows, inner, strict=True)) + out
    weight = getattr(m, "weight", None)
    named = any(kind.__name__ == "Conv1D" for kind in type(m).__mro__)
    if named and isinstance(weight, Tensor) and weight.dim() == 2:
        return float(x.numel()) * weight.shape[1]  # Hugging Face: stored [in, out]
    return 0.0
