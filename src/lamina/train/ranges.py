"""Where the ranges of activation quantizers begin: what calibration batches show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lamina.errors import DataError, MethodError
from lamina.measure.forward import at_rest, batches, call
from lamina.train.pact import InputQuantizer, grid_of

STARTS = ("percentile", "mse")
SAMPLED = 1 << 16  # values of one input that are looked at, of each batch
TRIALS = 40


@dataclass
class Seen:
    """What a group of layers was given: a sample of the values of each batch."""

    paths: list[str]
    values: list[Tensor] = field(default_factory=list)
    lows: list[float] = field(default_factory=list)


def observe(
    module: nn.Module, run: Callable[..., Any], paths: Sequence[str], loader: Iterable[Any],
    count: int = 10,
) -> list[Seen]:  # fmt: skip
    """Run a network over batches, and return what its layers are given.

    Layers that are given the very same tensor in every batch are one group.

    Args:
        module: the network, whose hooks see the inputs.
        run: what to call; the network, or what holds it.
        paths: module paths of the layers.
        loader: batches.
        count: how many.

    Raises:
        DataError: there is no batch.
    """
    given: dict[str, list[Tensor]] = {}

    def note(path: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
                given.setdefault(path, []).append(args[0].detach())

        return hook

    hooks = [module.get_submodule(path).register_forward_pre_hook(note(path)) for path in paths]
    groups: dict[str, Seen] = {}
    leader: dict[str, str] = {}
    try:
        with at_rest(module), torch.no_grad():
            for number, batch in enumerate(batches(module, loader)):
                if number == count:
                    break
                given.clear()
                call(run, batch)  # type: ignore[arg-type]
                _group(given, leader, groups, first=number == 0)
                for path, seen in groups.items():
                    for x in given.get(path, ()):
                        flat = x.to(torch.float32).reshape(-1)
                        seen.lows.append(float(flat.min()))
                        seen.values.append(_sample(flat))
    finally:
        for hook in hooks:
            hook.remove()
    if not groups and paths:
        raise DataError("calibration reaches none of the layers", ", ".join(paths)[:200])
    return list(groups.values())


def _group(
    given: dict[str, list[Tensor]], leader: dict[str, str], groups: dict[str, Seen], first: bool
) -> None:
    """Note which layers are given the same tensors; what differs once is a group of its own."""
    owners: dict[tuple[int, ...], str] = {}
    for path, tensors in given.items():
        key = tuple(t.data_ptr() for t in tensors)
        key += tuple(n for t in tensors for n in (*t.shape, *t.stride()))
        head = owners.setdefault(key, path)
        if first or path not in leader:
            leader[path] = head
            groups.setdefault(head, Seen([])).paths.append(path)
        elif leader[path] != head and leader[path] != path:
            groups[leader[path]].paths.remove(path)
            leader[path] = path
            groups[path] = Seen([path])


def _sample(values: Tensor) -> Tensor:
    """Return some of the values, drawn at random but the same ones in every run.

    Every n-th would not do: it is of the same few channels where n divides their number, and the
    channels that stand out are what a range is about.
    """
    if values.numel() <= SAMPLED:
        return values.clone()
    index = torch.randint(values.numel(), (SAMPLED,), generator=torch.Generator().manual_seed(0))
    return values[index.to(values.device)]


def make_quantizers(
    seen: Sequence[Seen], bits: int, kind: str = "asymmetric", start: str = "percentile",
    percentile: float = 0.1, plus: bool = True,
) -> list[tuple[list[str], InputQuantizer]]:  # fmt: skip
    """Return one quantizer for each group, its range from what was seen.

    Args:
        seen: from `observe`.
        bits: of a value.
        kind: of ranges on both sides of 0; an input that is never negative gets a one-sided one.
        start: `"percentile"`, or `"mse"`: the ends shrunk to the least squared error.
        percentile: of values beyond either end [%].
        plus: see `InputQuantizer`.

    Raises:
        MethodError: there is no such start.
    """
    if start not in STARTS or not 0 <= percentile < 50:
        why = f"start is of {', '.join(STARTS)}, percentile 0 to under 50"
        raise MethodError("unknown start of ranges", f"{start!r}, {percentile!r}", why)
    made = []
    for group in seen:
        if not group.values:
            continue
        share = percentile / 100
        ends = torch.tensor([share, 1 - share])
        low, high = torch.stack([torch.quantile(v, ends) for v in group.values]).mean(0).tolist()
        own = "one-sided" if min(group.lows) >= 0 else kind
        if own == "symmetric":
            high = max(high, -low)
        if start == "mse":
            low, high = _search(torch.cat(group.values), own, bits, low, high)
        made.append((group.paths, InputQuantizer(own, bits, high, low, plus)))
    return made


def _search(values: Tensor, kind: str, bits: int, low: float, high: float) -> tuple[float, float]:
    """Return the ends of least squared error: both shrunk and widened, then each for itself."""
    values = _sample(values)
    shares = torch.linspace(0.2, 1.6, TRIALS).tolist()

    def error(a: float, b: float) -> float:
        top = torch.tensor(max(b, 1e-5))
        step, zero, levels = grid_of(kind, bits, top, torch.tensor(a))
        q = torch.round(values / step).clamp(zero, zero + levels - 1)
        return float((q * step - values).square().mean())

    def least(tries: list[tuple[float, float]]) -> tuple[float, float]:
        return min([(low, high), *tries], key=lambda ends: error(*ends))

    low, high = least([(low * s, high * s) for s in shares])
    if kind == "asymmetric":
        for _ in range(2):
            low, high = least([(low, high * s) for s in shares])
            low, high = least([(low * s, high) for s in shares])
    return low, high
