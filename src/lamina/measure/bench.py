"""Benchmarks: a network and what was made of it, timed in turn, whole and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import DataError
from lamina.measure.clock import (
    Job,
    Timer,
    check_timed,
    clock,
    middle,
    record_calls,
    whole_call,
)
from lamina.network.isolate import batch_size
from lamina.network.source import Network

LAYER_SHARE = 0.5  # of the time, for all layers together
TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds",
          "decoder_input_ids", "decoder_attention_mask")  # fmt: skip


@dataclass(frozen=True)
class LayerTime:
    """One layer: what it was and is, and the time of all its calls in one forward pass [s]."""

    name: str
    before: str
    after: str
    before_s: float
    after_s: float
    ratio: float
    noise: float


@dataclass(frozen=True)
class Bench:
    """How much faster a network has become.

    Args:
        before_s, after_s: medians of one forward pass [s].
        ratio: median of the original's time over the other's in the same round.
        low, high: quartiles of that ratio over the rounds.
        noise: of the ratio: twice the standard error of the median.
        rounds: how many there were.
        threads: of torch.
        clock: `"process"` (what other programs take does not count) or `"wall"`.
        batch, tokens: shape of the inputs; tokens 0: they are no texts.
        layers: where asked for.
    """

    before_s: float
    after_s: float
    ratio: float
    low: float
    high: float
    noise: float
    rounds: int
    threads: int
    clock: str
    batch: int
    tokens: int = 0
    layers: tuple[LayerTime, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}


def bench(
    original: Network, final: nn.Module, *, batch: int = 0, tokens: int = 0, threads: int = 1,
    seconds: float = 10.0, layers: Sequence[str] = (), timer: Timer | None = None,
) -> Bench:  # fmt: skip
    """Time a network against its original, in interleaved rounds.

    Args:
        original: with example inputs.
        final: what was made of it.
        batch, tokens: shape of the inputs; 0: that of the example inputs.
        threads: of torch; with one thread on the CPU, the clock is that of the process.
        seconds: what it may take, about.
        layers: paths of layers to time too; those that are gone are left out.
        timer: times jobs; default: `clock`.

    Raises:
        BudgetError: there are no example inputs, or the network does not take these.
        DataError: the shape cannot be made from the example inputs.

    Example:
        >>> net = Network(nn.Linear(8, 8), (torch.zeros(2, 8),))
        >>> bench(net, net.module, batch=4, seconds=0.01).batch
        4
    """
    check_timed(original)
    if threads < 1 or seconds <= 0:
        raise DataError("nothing to measure", f"{threads} threads, {seconds} s")
    network = shaped(original, batch, tokens)
    timer = timer or clock
    for module in (network.module, final):  # or the timer would say less well what is wrong
        record_calls(replace(network, module=module), ())
    call = whole_call(network)
    share = 1 - LAYER_SHARE if layers else 1.0
    rows = timer([Job(network.module, (call,)), Job(final, (call,))], threads, seconds * share)
    ratios = sorted(row[0] / max(1e-12, row[1]) for row in rows)
    ratio, noise = middle(ratios)
    found = _layers(network, final, layers, threads, seconds * LAYER_SHARE, timer)
    size = batch_size(tuple(network.example_inputs), network.example_kwargs)
    device = next((p.device.type for p in final.parameters()), "cpu")
    return Bench(
        median(row[0] for row in rows), median(row[1] for row in rows), ratio,
        ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4], noise, len(rows), threads,
        "process" if threads == 1 and device == "cpu" else "wall", size, tokens_of(network), found,
    )  # fmt: skip


def shaped(network: Network, batch: int = 0, tokens: int = 0) -> Network:
    """Return a network with example inputs of another shape: repeated, or cut.

    Raises:
        DataError: there are no tokens, or a number is negative.

    Example:
        >>> net = Network(nn.Identity(), example_kwargs={"input_ids": torch.zeros(1, 16).long()})
        >>> shaped(net, 2, 128).example_kwargs["input_ids"].shape
        torch.Size([2, 128])
    """
    if batch < 0 or tokens < 0:
        raise DataError("no such shape", f"batch {batch}, {tokens} tokens", "", "give 1 or more")
    args, kwargs = tuple(network.example_inputs), dict(network.example_kwargs)
    if tokens:
        known = [name for name in kwargs if name in TOKENS]
        if not known:
            raise DataError(
                "tokens of what", f"{tokens} tokens", "the example inputs hold no input_ids",
                "leave --tokens out, or give example_kwargs=",
            )  # fmt: skip
        for name in known:
            kwargs[name] = _resized(kwargs[name], 1, tokens, name == "position_ids")
    if batch:
        size = batch_size(args, kwargs)
        args = tuple(_batched(v, size, batch) for v in args)
        kwargs = {name: _batched(v, size, batch) for name, v in kwargs.items()}
    return replace(network, example_inputs=args, example_kwargs=kwargs)


def tokens_of(network: Network) -> int:
    """Return how many tokens a sample of a network's example inputs has; 0: it is no text."""
    for name in TOKENS:
        value = network.example_kwargs.get(name)
        if isinstance(value, Tensor) and value.dim() > 1:
            return int(value.shape[1])
    return 0


def shape_of(network: Network) -> str:
    """Return in words what a network's example inputs are: samples, and tokens of each.

    Example:
        >>> shape_of(Network(nn.Identity(), (torch.zeros(1, 3),)))
        'the example inputs, 1 sample'
        >>> ids = torch.zeros(2, 128, dtype=torch.int64)
        >>> shape_of(Network(nn.Identity(), example_kwargs={"input_ids": ids}))
        'the example inputs, 2 x 128 tokens'
    """
    count = batch_size(tuple(network.example_inputs), network.example_kwargs)
    tokens = tokens_of(network)
    told = f"{count} x {tokens} tokens" if tokens else f"{count} sample{'s' * (count > 1)}"
    return f"the example inputs, {told}"


# --- its parts -----------------------------------------------------------------------------------


def _batched(value: Any, size: int, batch: int) -> Any:
    if isinstance(value, Tensor) and value.dim() and len(value) == size:
        return _resized(value, 0, batch)
    if isinstance(value, (tuple, list)):
        return type(value)(_batched(v, size, batch) for v in value)
    if isinstance(value, Mapping):
        return {key: _batched(v, size, batch) for key, v in value.items()}
    return value


def _resized(value: Any, axis: int, length: int, counts: bool = False) -> Any:
    """Return a tensor repeated and cut to a length along an axis; what counts goes on counting."""
    if not isinstance(value, Tensor) or value.dim() <= axis or not value.shape[axis]:
        return value
    if counts:
        line = torch.arange(length, dtype=value.dtype, device=value.device)
        return line.expand(*value.shape[:axis], length).contiguous()
    index = torch.arange(length, device=value.device) % value.shape[axis]
    return value.index_select(axis, index)


def _layers(
    network: Network, final: nn.Module, names: Sequence[str], threads: int, seconds: float,
    timer: Timer,
) -> tuple[LayerTime, ...]:  # fmt: skip
    """Time layers and what stands in their place; those that are alike in all are timed once."""
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name in names:
        try:
            pairs[name] = network.module.get_submodule(name), final.get_submodule(name)
        except AttributeError:  # it is gone
            continue
    calls = {name: made for name, made in record_calls(network, list(pairs)).items() if made}
    groups: dict[str, list[str]] = {}
    for name, made in calls.items():
        key = repr((*map(_outline, pairs[name]), made))
        groups.setdefault(key, []).append(name)
    found: dict[str, LayerTime] = {}
    for alike in groups.values():
        before, after = pairs[alike[0]]
        jobs = [Job(module, calls[alike[0]]) for module in (before, after)]
        rows = timer(jobs, threads, seconds / len(groups))
        ratio, noise = middle([row[0] / max(1e-12, row[1]) for row in rows])
        times = median(row[0] for row in rows), median(row[1] for row in rows)
        for name in alike:
            kinds = type(before).__name__, type(after).__name__
            found[name] = LayerTime(name, *kinds, *times, ratio, noise)
    return tuple(found[name] for name in names if name in found)


def _outline(module: nn.Module) -> str:
    tensors = [(n, tuple(t.shape), str(t.dtype)) for n, t in module.state_dict().items()]
    return repr((type(module).__name__, repr(module), tensors))
