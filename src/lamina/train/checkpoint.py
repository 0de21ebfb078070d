"""Training checkpoints: written whole or not at all, read without unpickling anything."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from lamina.run import write_atomic


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a training state (tensors, numbers, lists and dicts of them)."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the state in `path`, or None where there is none that can be read."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # a missing or damaged checkpoint costs time, not the run
        return None
    return state if isinstance(state, dict) else None
