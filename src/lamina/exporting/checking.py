"""Whether an ONNX file gives in onnxruntime what the network gives in torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lamina.errors import NetworkError
from lamina.network.isolate import one_line
from lamina.network.source import Network

Named = dict[str, torch.Tensor]  # inputs by name; a number is a position
SAMPLES = 16  # more to compare, where a network rounds what its layers are given


@dataclass(frozen=True)
class Compared:
    """How near an ONNX file is to its network.

    Args:
        error: `|onnx - torch| / |torch|`, lengths as vectors, of the worst output; where a network
            rounds its inputs, of the middle sample of the worst feed.
        largest: the largest difference of any number, of samples that are not apart.
        apart: where a network rounds: samples that are farther off than the tolerance.
        worst: the error of the farthest of them.
        samples: how many there were.
    """

    error: float
    largest: float
    apart: int = 0
    worst: float = 0.0
    samples: int = 0


def outputs_of(output: Any) -> Named:
    """Return the floating tensors that a network gives, by name: `output`, `output1`, ..., or
    the names of a mapping. What lies deeper (a cache) is left out."""
    if isinstance(output, torch.Tensor):
        output = {"output": output}
    elif not isinstance(output, Mapping):
        output = {f"output{i or ''}": part for i, part in enumerate(output)}
    return {
        str(name): part
        for name, part in output.items()
        if isinstance(part, torch.Tensor) and part.is_floating_point()
    }


def split(given: Named) -> tuple[list[torch.Tensor], Named]:
    """Return positional and named inputs."""
    args = [x for name, x in given.items() if name.isdigit()]
    return args, {name: x for name, x in given.items() if not name.isdigit()}


def names_of(given: Named) -> list[str]:
    """Return what inputs are called in an ONNX file: those by position `input`, `input1`, ..."""
    return [f"input{n if n != '0' else ''}" if n.isdigit() else n for n in given]


def others(inputs: Named, free: Sequence[str]) -> list[Named]:
    """Return the inputs with other free sizes: one sample more, and shorter by a quarter."""
    if not free:
        return []
    ends = {name.partition("[")[2] for name in free}
    other = {}
    for name, x in inputs.items():
        if "0]" in ends and x.dim():
            x = torch.cat([x, x[:1]])
        if "1]" in ends and x.dim() > 1 and not x.is_floating_point():
            x = x[:, : max(2, 3 * x.shape[1] // 4)]
        other[name] = x
    return [other]


def varied(inputs: Named, rows: int = SAMPLES) -> Named:
    """Return more samples like the first one: tokens in another order, numbers a little off.

    Example:
        >>> made = varied({"input_ids": torch.tensor([[5, 6, 7]])}, 4)["input_ids"]
        >>> made.shape, made.sort().values.unique(dim=0).tolist()
        (torch.Size([4, 3]), [[5, 6, 7]])
    """
    draw = torch.Generator().manual_seed(0)
    made = {}
    for name, x in inputs.items():
        if not x.dim():
            made[name] = x
            continue
        x = torch.cat([x[:1]] * rows)
        if x.is_floating_point():
            x = x * (1 + 0.1 * torch.randn(x.shape, generator=draw)).to(x)
        elif x.dim() == 2 and not name.endswith("mask"):
            x = torch.stack([row[torch.randperm(len(row), generator=draw)] for row in x])
        made[name] = x
    return made


def compare(
    path: Path, network: Network, feeds: Sequence[Named], tolerance: float, rounds: bool = False
) -> Compared:
    """Return how far onnxruntime's outputs are from torch's.

    Args:
        path: the file.
        network: what it was made of.
        feeds: inputs, one forward pass each; dimension 0 is the sample.
        tolerance: from which a sample is apart.
        rounds: whether layers round their inputs to a few integers. Where such a value lies on the
            edge between two, the last bit of a float decides, and with it the whole output; so
            samples are judged one by one there, and the middle one counts.

    Raises:
        NetworkError: onnxruntime cannot open or run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # whatever onnxruntime finds
        raise NetworkError(
            "onnxruntime cannot open the ONNX file", network.name, one_line(error)
        ) from error
    found = [_pairs(session, network, feed) for feed in feeds]
    if not rounds:
        pairs = [pair for feed in found for pair in feed]
        return Compared(max(map(_error, pairs), default=0.0), max(map(_most, pairs), default=0.0))
    each = [_by_sample(feed) for feed in found]
    errors = [error for feed in each for error, _ in feed]
    near = [most for feed in each for error, most in feed if error <= tolerance]
    return Compared(
        max(median(error for error, _ in feed) for feed in each), max(near, default=math.inf),
        sum(not error <= tolerance for error in errors), max(errors), len(errors),
    )  # fmt: skip


def _pairs(session: Any, network: Network, feed: Named) -> list[tuple[Tensor, Tensor]]:
    """Return what torch and what onnxruntime give, output by output."""
    args, kwargs = split(feed)
    with torch.no_grad():
        wanted = outputs_of(network.module(*args, **kwargs)).values()
    known = [i.name for i in session.get_inputs()]
    arrays = {
        n: (x.float() if x.is_floating_point() else x).cpu().numpy()
        for n, x in zip(names_of(feed), feed.values(), strict=True)
        if n in known  # an input that is not used is left out of the file
    }
    try:
        found = session.run(None, arrays)
    except Exception as error:
        raise NetworkError(
            "onnxruntime cannot run the ONNX file", network.name, one_line(error)
        ) from error
    return [
        (ours.double().cpu(), torch.from_numpy(theirs).double())
        for ours, theirs in zip(wanted, found, strict=True)
    ]


def _by_sample(pairs: list[tuple[Tensor, Tensor]]) -> list[tuple[float, float]]:
    """Return error and largest difference of every sample, the worst of its outputs."""
    counts = {t.shape[:1] for pair in pairs for t in pair}
    if len(counts) != 1 or counts == {()}:  # an output has no samples: judged as a whole
        return [(max(map(_error, pairs)), max(map(_most, pairs)))]
    rows = [zip(*(t.unbind(0) for t in pair), strict=True) for pair in pairs]
    samples = [list(sample) for sample in zip(*rows, strict=True)]
    return [(max(map(_error, s)), max(map(_most, s))) for s in samples]


def _error(pair: tuple[Tensor, Tensor]) -> float:
    ours, got = pair
    if ours.shape != got.shape or not bool(torch.isfinite(got).all()):
        return math.inf
    return float((got - ours).norm() / ours.norm().clamp(min=1e-12))


def _most(pair: tuple[Tensor, Tensor]) -> float:
    ours, got = pair
    if ours.shape != got.shape or not bool(torch.isfinite(got).all()):
        return math.inf
    return float((got - ours).abs().max()) if ours.numel() else 0.0
