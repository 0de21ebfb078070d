"""Statistics to bytes and back: a safetensors file, so that a run can continue."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

import torch

from lamina.errors import RunError
from lamina.measure.stats import Cross, LayerStats, Stats

PARTS = ("H", "G", "mean")
WIDTH = 8  # bytes of a number
CROSSED = ("moment", "second", "mean", "x_second", "x_mean")


def save_stats(stats: Stats, file: IO[bytes]) -> None:
    """Write statistics as a safetensors file, tensor by tensor: they may be most of the memory."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, layer in stats.layers.items():
        numbers[name] = {
            f.name: getattr(layer, f.name) for f in fields(layer) if f.name not in PARTS
        }
        for part in PARTS:
            tensor = getattr(layer, part)
            if tensor is not None:
                tensors[f"{part}:{name}"] = tensor
    crossed: dict[str, float] = {}
    for name, cross in stats.cross.items():
        crossed[name] = cross.positions
        for f in fields(cross):
            if f.name != "positions":
                tensors[f"{f.name}:{name}"] = getattr(cross, f.name)
    whole = asdict(Stats(samples=stats.samples, loss=stats.loss, network=stats.network))
    whole |= {"layers": numbers, "notes": list(stats.notes), "cross": crossed}
    header: dict[str, Any] = {"__metadata__": {"stats": json.dumps(whole)}}
    end = 0
    for name in sorted(tensors):
        shape, first, end = list(tensors[name].shape), end, end + WIDTH * tensors[name].numel()
        header[name] = {"dtype": "F64", "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % WIDTH)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in sorted(tensors):
        held = tensors[name].detach().to("cpu", torch.float64).contiguous().numpy()
        file.write(held.astype("<f8", copy=False).reshape(-1).view("u1").data)


def load_stats(path: Path) -> Stats:
    """Read what `save_stats` wrote.

    Raises:
        RunError: the file holds no statistics.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            whole = json.loads(file.metadata()["stats"])
        layers = {}
        for name, numbers in whole["layers"].items():
            H, G = tensors[f"H:{name}"], tensors[f"G:{name}"]
            layers[name] = LayerStats(H, G, tensors.get(f"mean:{name}"), **numbers)
        return Stats(
            layers=layers,
            samples=whole["samples"],
            loss=whole["loss"],
            network=whole["network"],
            notes=tuple(whole["notes"]),
            cross={
                name: Cross(**{p: tensors[f"{p}:{name}"] for p in CROSSED}, positions=positions)
                for name, positions in whole["cross"].items()
            },
        )
    except Exception as error:
        raise RunError(
            "saved statistics cannot be read", str(path), str(error), "delete them"
        ) from None
