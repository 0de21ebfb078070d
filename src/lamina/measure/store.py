"""Statistics to bytes and back: a safetensors file, so that a run can continue."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import torch

from lamina.errors import RunError
from lamina.measure.stats import Cross, LayerStats, Stats

PARTS = ("H", "G", "mean")
CROSSED = ("moment", "second", "mean", "x_second", "x_mean")


def dump_stats(stats: Stats) -> bytes:
    """Return statistics as the bytes of a safetensors file."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, layer in stats.layers.items():
        numbers[name] = {
            f.name: getattr(layer, f.name) for f in fields(layer) if f.name not in PARTS
        }
        for part in PARTS:
            tensor = getattr(layer, part)
            if tensor is not None:
                tensors[f"{part}:{name}"] = tensor.contiguous()
    crossed: dict[str, float] = {}
    for name, cross in stats.cross.items():
        crossed[name] = cross.positions
        for f in fields(cross):
            if f.name != "positions":
                tensors[f"{f.name}:{name}"] = getattr(cross, f.name).contiguous()
    whole = asdict(Stats(samples=stats.samples, loss=stats.loss, network=stats.network))
    whole |= {"layers": numbers, "notes": list(stats.notes), "cross": crossed}
    return save(tensors, {"stats": json.dumps(whole)})


def parse_stats(data: bytes) -> Stats:
    """Undo `dump_stats`.

    Raises:
        RunError: the bytes are not statistics.
    """
    from safetensors.torch import load

    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        whole = json.loads(header["__metadata__"]["stats"])
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
            "saved statistics cannot be read", "stats", str(error), "delete them"
        ) from None
