"""Folders of ours that keep a small file: which they are, and which file is meant.

`lamina export --to lamina-hf` writes them. Their `config.json` names the quantization method
`lamina`; the weights are a `.lamina` file under another name, which says by itself how to rebuild
its network. So whoever has Lamina needs nothing else of the folder but its tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lamina.errors import FileError

METHOD = "lamina"  # what `quantization_config` names
SMALL = "lamina.safetensors"  # not `model.safetensors`: without our import, loading has to fail
FORMAT = 1  # of the folder
KEYS = {"quant_method", "format", "by"}


def small_file(path: str | Path) -> Path | None:
    """Return the `.lamina` file that a path stands for: the path itself, which may be that of the
    file in a folder of ours, or the file in the folder; None where it stands for something else.

    Raises:
        FileError: it is a folder of ours, but of a later format, or without its file.

    Example:
        >>> str(small_file("net.lamina")), small_file("lenet-5")
        ('net.lamina', None)
    """
    folder = Path(path)
    if (folder.suffix == ".lamina" or folder.name == SMALL) and not folder.is_dir():
        return folder
    told = _told(folder / "config.json")
    if told is None:
        return None
    check_told(told)
    if not (folder / SMALL).is_file():
        raise FileError(
            "the folder has lost its weights", str(folder), f"there is no {SMALL}", "copy it again"
        )
    return folder / SMALL


def _told(config: Path) -> dict[str, Any] | None:
    """Return what a folder's configuration says of Lamina, or None."""
    if not config.is_file():
        return None
    try:
        told = json.loads(config.read_text(encoding="utf-8"))["quantization_config"]
        ours = told["quant_method"] == METHOD
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # whoever opens it as another folder says what is wrong
    return dict(told) if ours else None


def check_told(told: Mapping[str, Any]) -> None:
    """Refuse a `quantization_config` that is none of ours.

    Raises:
        FileError: it says more than a folder of ours does, or is of a later version.
    """
    strange = sorted(str(key) for key in set(told) - KEYS)
    if strange:
        raise FileError(
            "unknown settings of lamina", f"quantization_config: {', '.join(strange)}"[:200], "",
            f"it has {', '.join(sorted(KEYS))}",
        )  # fmt: skip
    version = told.get("format")
    if type(version) is not int or version != FORMAT:
        raise FileError(
            "unknown format of a folder", f"quantization_config: {version!r}"[:200],
            f"this reads {FORMAT}", "update lamina",
        )  # fmt: skip
    if not isinstance(told.get("by", ""), str):
        raise FileError("unknown settings of lamina", "quantization_config: by is no text")
