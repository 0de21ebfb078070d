"""Streaming: a folder compressed layer by layer, in the memory of its largest layer.

Without data every layer is rounded by itself. With data blocks are calibrated in the order they
run, each on what the compressed blocks before it give.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lamina.errors import BudgetError, NetworkError
from lamina.measure.memory import free_memory
from lamina.network.shards import open_shards
from lamina.streaming.folder import Streamed, compress_folder

__all__ = ["Streamed", "compress_folder", "free_memory", "refuse_beside", "why_stream"]

SHARE = 0.5  # of the free memory: a folder that is larger is streamed unasked


def why_stream(model: Any, stream: bool | None) -> str:
    """Return why a model is to be streamed, as a note for the report, or `""`.

    Args:
        model: what `compress` takes.
        stream: what the user said; None: whatever the memory asks for.

    Raises:
        NetworkError: streaming was asked for, and the model is not a folder with safetensors.
    """
    named = isinstance(model, (str, os.PathLike)) and (Path(model) / "config.json").is_file()
    if stream is False or not (stream or named):
        return ""
    if not named:
        raise NetworkError(
            "only a Hugging Face folder can be streamed", str(model)[:80],
            "everything else is there as a whole already", "leave stream out",
        )  # fmt: skip
    folder = Path(model)
    if stream:
        return "Streaming was asked for."
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = free_memory()
    if size <= SHARE * free:
        return ""
    open_shards(folder)
    return (
        f"Streamed, as the folder ({size / 1e9:.1f} GB) is larger than half of the free memory "
        f"({free / 1e9:.1f} GB); stream=False opens it as a whole."
    )


def refuse_beside(**others: Any) -> None:
    """Refuse what needs the whole network, beside streaming.

    Raises:
        BudgetError: what was given, by name.
    """
    for name, said in others.items():
        if said is not None and said is not False and said not in ("auto", "none"):
            raise BudgetError(
                f"{name} does not go with streaming", "", "the network is never there as a whole",
                f"leave {name} out, or open it as a whole (stream=False)",
            )  # fmt: skip
