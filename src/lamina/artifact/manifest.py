"""The manifest of a file: JSON read strictly, so that no two readers can take it for two things."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from lamina.artifact.records import DTYPES
from lamina.errors import FileError
from lamina.forms import Edit

READS = (1, 2, 3)
MAX_ELEMENTS = 1 << 40
MAX_DIMENSIONS = 32
MAX_NAME = 1000  # characters
SIZES = re.compile(r"[0-9]{1,40}(,[0-9]{1,40})*")
Entry = tuple[str, tuple[int, ...], torch.dtype]


def read_json(text: str | bytes) -> Any:
    """Return what JSON says; keys come once, and numbers are numbers.

    Raises:
        ValueError: it is not JSON, or ambiguous. RecursionError: it is too deep.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def read_header(text: bytes, size: int) -> str:
    """Return the manifest's text from a safetensors header with one tensor of `size` bytes.

    Raises:
        FileError: it is another header.
    """
    try:
        header = read_json(text)
        manifest, blob = header["__metadata__"]["lamina"], header["d"]
        told = {key: blob[key] for key in ("dtype", "shape", "data_offsets")}
        if not isinstance(manifest, str) or set(header) != {"__metadata__", "d"}:
            raise ValueError("it has other tensors")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FileError(
            "not a .lamina file", "header", "it has no manifest", "make one with lamina compress"
        ) from None
    # Compared as text: True is 1 in Python, and so is 1.0.
    if repr(told) != repr({"dtype": "U8", "shape": [size], "data_offsets": [0, size]}) or size < 4:
        why = "the data is not as long as told"
        raise FileError("the file is cut off or damaged", "header", why)
    return manifest


def read_manifest(text: str) -> dict[str, Any]:
    """Return the manifest, every key of the right type.

    Raises:
        FileError: it is another text, or of an unknown version.
    """
    try:
        manifest = read_json(text)
        version = manifest["lamina"]
    except (ValueError, KeyError, TypeError, RecursionError):
        why = "it is not the JSON we write"
        raise FileError("the manifest is not valid", "header", why) from None
    if type(version) is not int or version not in READS:
        why = f"this reads {READS[0]} to {READS[-1]}"
        raise FileError("unknown file version", str(version)[:40], why, "update lamina")
    plan = manifest.setdefault("plan", {})
    if isinstance(plan, str):
        manifest["plan"] = plan = {"*": plan}
    if not isinstance(plan, dict) or not all(is_text(v) for pair in plan.items() for v in pair):
        raise FileError("the manifest is not valid", "plan", "it is no map of texts")
    for key, default in (("skeleton", "module"), ("by", ""), ("box", "")):
        if not is_text(manifest.setdefault(key, default)):
            raise FileError("the manifest is not valid", key, "it is no text")
    if not isinstance(manifest.get("tensors"), str):
        raise FileError("the manifest is not valid", "tensors", "it is no text")
    return dict(manifest)


def read_edits(manifest: Mapping[str, Any]) -> tuple[Edit, ...]:
    """Return the structural edits.

    Raises:
        FileError: they are not `[path, form, {setting: integer}]`.
    """
    found = manifest.get("edits", [])
    if not isinstance(found, list):
        raise FileError("the manifest is not valid", "edits", "it is no list")
    edits = []
    for edit in found:
        right = isinstance(edit, list) and [type(part) for part in edit] == [str, str, dict]
        if right:
            right = all(is_text(k) and type(v) is int for k, v in edit[2].items())
        if not right or not is_text(edit[1]):
            why = "an edit is path, form and integers"
            raise FileError("the manifest is not valid", "edits", why)
        # The whole network has the empty path, and only `install` knows which forms it may have.
        if edit[0] and (why := flaw_of(edit[0])):
            raise FileError("the manifest is not valid", f"edits: {edit[0]!r}"[:200], why)
        edits.append(Edit(*edit))
    return tuple(edits)


def read_table(manifest: Mapping[str, Any]) -> list[Entry]:
    """Return (name, shape, dtype) of every tensor.

    Raises:
        FileError: an entry is not one, or a tensor could not exist.
    """
    found: list[Entry] = []
    names: set[str] = set()
    previous = ""
    for entry in manifest["tensors"].split():
        shown, colon, rest = entry.partition(":")
        sizes, _, dtype = rest.partition(":")
        name = f"{previous}{shown}" if shown.startswith(".") else shown
        if sizes.count(",") >= MAX_DIMENSIONS:
            raise FileError("a tensor is too large to be true", entry[:200])
        why = flaw_of(name)
        if sizes and not SIZES.fullmatch(sizes):
            why = "its shape is wrong"
        elif dtype not in ("", *DTYPES) or not colon:
            why = "its dtype is wrong"
        elif name in names:
            why = "its name comes twice"
        if why:
            raise FileError("the manifest is not valid", repr(entry[:200]), why)
        shape = tuple(int(n) for n in sizes.split(",")) if sizes else ()
        # Sides of an empty tensor count too: its strides would overflow.
        if math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
            raise FileError("a tensor is too large to be true", entry[:200])
        names.add(name)
        found.append((name, shape, DTYPES[dtype or "f32"]))
        previous = name.rpartition(".")[0]
    return found


def is_text(value: object) -> bool:
    """Whether a value may be shown to people: a text without what steers a terminal.

    Example:
        >>> is_text("rdoq"), is_text("\x1b[2J"), is_text(7)
        (True, False, False)
    """
    return isinstance(value, str) and not any(
        unicodedata.category(c) in ("Cc", "Cs") for c in value
    )


def flaw_of(name: str) -> str:
    """Return why a dotted name cannot be that of a tensor or a module, or `""`.

    Example:
        >>> flaw_of("encoder.0.weight"), flaw_of("..")
        ('', 'a part of its name is empty')
    """
    if len(name) > MAX_NAME:
        return f"its name is longer than {MAX_NAME} characters"
    if not all(name.split(".")):
        return "a part of its name is empty"
    if any(c.isspace() or c == ":" for c in name):
        return "its name has a space or a colon"
    if not is_text(name):
        return "its name has a character that is none"
    return ""
