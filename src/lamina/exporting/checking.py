"""Whether an ONNX file gives in onnxruntime what the network gives in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lamina.errors import NetworkError
from lamina.network.isolate import one_line
from lamina.network.source import Network

Named = dict[str, torch.Tensor]  # inputs by name; a number is a position


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


def compare(path: Path, network: Network, feeds: Sequence[Named]) -> tuple[float, float]:
    """Return the largest relative error and the largest difference of any output.

    Args:
        path: the file.
        network: what it was made of.
        feeds: inputs, one forward pass each.

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
    known = [i.name for i in session.get_inputs()]
    worst = largest = 0.0
    for feed in feeds:
        args, kwargs = split(feed)
        with torch.no_grad():
            wanted = outputs_of(network.module(*args, **kwargs)).values()
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
        for ours, theirs in zip(wanted, found, strict=True):
            ours, got = ours.double().cpu(), torch.from_numpy(theirs).double()
            if ours.shape != got.shape or not bool(torch.isfinite(got).all()):
                return float("inf"), float("inf")
            away = (got - ours).abs()
            worst = max(worst, float(away.norm() / ours.norm().clamp(min=1e-12)))
            largest = max(largest, float(away.max()) if away.numel() else 0.0)
    return worst, largest
