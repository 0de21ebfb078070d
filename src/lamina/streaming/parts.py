"""Coded layers on disk, one file each, and the `.lamina` file that is put together from them.

The manifest, which names everything, comes first in a `.lamina` file; so records wait on disk until
all are there. A run that is stopped finds what it has coded, and does the rest.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from lamina.artifact.container import head_of, manifest_of, stored_names, version_of
from lamina.errors import RunError
from lamina.forms import Edit
from lamina.network.lazy import Lazy
from lamina.run import RunFolder, write_atomic

COPIED = 1 << 22  # bytes that are copied at a time


@dataclass(frozen=True)
class Coded:
    """One tensor's record in a part.

    Args:
        name: of the tensor.
        start, length: bytes in the part's file.
        form, codec: as `Record` names them.
    """

    name: str
    start: int
    length: int
    form: str
    codec: str


@dataclass(frozen=True)
class Part:
    """What became of one layer, or of some tensors that are kept.

    Args:
        path: its file.
        tensors: what it holds.
        edits: the structural edits of the layer, in order.
        facts: what else is known of it.
    """

    path: Path
    tensors: tuple[Coded, ...]
    edits: tuple[Edit, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What its records take in the file."""
        return sum(coded.length for coded in self.tensors)


def write_part(
    folder: RunFolder, path: Path, records: Sequence[tuple[str, bytes, str, str]],
    edits: Iterable[Edit] = (), facts: Mapping[str, Any] | None = None,
) -> Part:  # fmt: skip
    """Write a part, whole or not at all.

    Args:
        folder: of the run.
        path: its file.
        records: name, record, form and codec of every tensor.
        edits: structural edits.
        facts: JSON values.
    """
    head = json.dumps(
        {
            "tensors": [[name, len(data), form, codec] for name, data, form, codec in records],
            "edits": [[e.path, e.form, dict(e.settings)] for e in edits],
            "facts": dict(facts or {}),
        }
    ).encode()
    folder.write(path, b"".join([struct.pack("<Q", len(head)), head, *(r[1] for r in records)]))
    found = read_part(path)
    assert found is not None
    return found


def read_part(path: Path) -> Part | None:
    """Return a part that was written before, or None; its records stay on disk.

    Raises:
        RunError: it is damaged: something else wrote into the run folder.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            head = json.loads(file.read(length))
        at, tensors = 8 + length, []
        for name, size, form, codec in head["tensors"]:
            tensors.append(Coded(name, at, size, form, codec))
            at += size
        if path.stat().st_size != at:
            raise ValueError("it is not as long as it says")
        edits = tuple(Edit(*edit) for edit in head["edits"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise RunError("a coded layer cannot be read", str(path), str(error), "delete it") from None
    return Part(path, tuple(tensors), edits, head["facts"])


@dataclass(frozen=True)
class Written:
    """What a `.lamina` file that was put together holds.

    Args:
        size: of the file [bytes].
        ledger: part, bytes, form and codec of everything in it, in order.
    """

    size: int
    ledger: tuple[tuple[str, int, str | None, str | None], ...]


def assemble(
    path: Path | None, lazy: Lazy, state: Mapping[str, torch.Tensor], parts: Sequence[Part],
    plan: Mapping[str, str],
) -> Written:  # fmt: skip
    """Write the `.lamina` file of coded parts: to the byte what `artifact.pack` makes.

    Args:
        path: where to, whole or not at all; None: only tell what it would be.
        lazy: the network.
        state: the edited skeleton's tensors, in order.
        parts: of all its tensors.
        plan: method chain by site.

    Raises:
        RunError: it cannot be written; an older file stays as it was.
    """
    coded = {c.name: (part, c) for part in parts for c in part.tensors}
    names = names_stored(lazy, state, parts)
    edits = (*lazy.network.edits, *(edit for part in parts for edit in part.edits))
    network = lazy.network
    held = {name: state[name] for name in names}
    version = version_of(coded[name][1].form for name in names)
    manifest = manifest_of(held, edits, network.source, plan, network.box, version)
    head = head_of(manifest, sum(coded[name][1].length for name in names))
    rows = [(n, coded[n][1].length, coded[n][1].form, coded[n][1].codec) for n in names]
    ledger = (("header", len(head), None, None), ("checksum", 4, None, None), *rows)

    def write(file: IO[bytes]) -> None:
        check = zlib.crc32(head)
        file.write(head)
        for name in names:
            part, record = coded[name]
            with part.path.open("rb") as source:
                source.seek(record.start)
                left = record.length
                while left:
                    data = source.read(min(left, COPIED))
                    if not data:
                        raise RunError("a coded layer is cut off", str(part.path), "", "delete it")
                    check = zlib.crc32(data, check)
                    file.write(data)
                    left -= len(data)
        file.write(struct.pack("<I", check))

    if path is not None:
        write_atomic(path, write)
    return Written(sum(row[1] for row in ledger), ledger)


def names_stored(lazy: Lazy, state: Mapping[str, torch.Tensor], parts: Iterable[Part]) -> list[str]:
    """Return under which names tensors are stored: sites' own, and the first of tied ones."""
    first = {c.name for part in parts if part.facts.get("site") for c in part.tensors}
    return stored_names(state, first, lambda name, t: id(t) if t.numel() else name)
