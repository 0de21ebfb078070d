"""Writing the tensors of a `.lamina` file dense, for programs that know nothing of Lamina."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch

from lamina.artifact import streams
from lamina.artifact.reading import Package, read
from lamina.artifact.records import Record
from lamina.errors import FileError, RunError
from lamina.run import write_atomic

SHARD = 5_000_000_000  # bytes, as transformers splits files that are meant to be shared
NAMES = {  # of safetensors
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def decompress(file: str | Path, out: str | Path, to: str = "") -> Package:
    """Write the tensors of a `.lamina` file dense, and return what the file holds.

    The names are those of the compressed network: of a layer that became two, the names of both.
    Tied tensors are written once, as the file holds them.

    Args:
        file: the `.lamina` file.
        out: where to.
        to: `"safetensors"` or `"pt"`, a state dict of torch; default: as `out` ends.

    Raises:
        FileError: the file is damaged, or a format is unknown or does not have its dtypes.
        RunError: it cannot be written; an older file stays as it was.
    """
    path = Path(out)
    if path.is_dir():
        raise RunError("cannot write", str(path), "it is a folder", "give a file name")
    to = to or ENDINGS.get(path.suffix, "")
    if to not in WRITERS:
        why = f"{path.suffix or 'no ending'} is none of its formats"
        raise FileError("cannot decompress", str(path), why, "let it end in .safetensors or .pt")
    package = read(file)
    WRITERS[to](package, path)
    return package


def summary(package: Package, out: str | Path) -> str:
    """Return what was written dense, and the names in layers that have changed, for people."""
    lines = [f"{len(package.records)} tensors: {out}"]
    for edit in package.edits:
        names = [name for name in package.records if name.startswith(f"{edit.path}.")]
        lines.append(f"{edit.path} became {edit.form}: {', '.join(names)}")
    return "\n".join(lines)


def write_safetensors(package: Package, path: str | Path) -> None:
    """Write all tensors as a safetensors file, whole or not at all, one at a time in memory.

    Args:
        package: the file; tensors keep its names and dtypes.
        path: where to.

    Raises:
        FileError: a dtype that safetensors does not have, or a damaged record.
        RunError: it cannot be written; an older file stays as it was.
    """
    write_records(package.records, path)


def write_records(records: Mapping[str, Record], path: str | Path) -> None:
    """Write tensors of a file as a safetensors file of their own, under the names given.

    A record may come under several names; it is then written as often.

    Raises:
        FileError: a dtype that safetensors does not have, or a damaged record.
        RunError: it cannot be written; an older file stays as it was.
    """
    # Wide elements first: every tensor then begins at a multiple of its element.
    order = sorted(records, key=lambda name: -records[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        record = records[name]
        if record.dtype not in NAMES:
            why, fix = f"there is no {record.dtype} in safetensors", "write a .pt file instead"
            raise FileError("a tensor cannot be written as safetensors", name, why, fix)
        if name == "__metadata__":
            why, fix = "safetensors keeps that name for itself", "write a .pt file instead"
            raise FileError("a tensor cannot be written as safetensors", name, why, fix)
        end = at + size_of(record)
        offsets = [at, end]
        kind = NAMES[record.dtype]
        header[name] = {"dtype": kind, "shape": list(record.shape), "data_offsets": offsets}
        at = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def write(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(head)) + head)
        for name in order:
            tensor = streams.dense(records[name], streams.thread_count())
            file.write(streams.memory_of(tensor).data)

    write_atomic(Path(path), write)


def size_of(record: Record) -> int:
    """Return what a tensor takes when dense [bytes]."""
    return math.prod(record.shape) * record.dtype.itemsize


def write_shards(records: Mapping[str, Record], folder: Path, most: int = SHARD) -> list[Path]:
    """Write tensors as `model.safetensors`, or in several files with an index beside them.

    Args:
        records: tensors by the names they shall have; written in this order.
        folder: where to; it exists.
        most: what a file may hold [bytes]; a larger tensor has a file of its own.

    Raises:
        FileError, RunError: as `write_records`.
    """
    shards: list[dict[str, Record]] = [{}]
    held = 0
    for name, record in records.items():
        size = size_of(record)
        if shards[-1] and held + size > most:
            shards.append({})
            held = 0
        shards[-1][name] = record
        held += size
    if len(shards) == 1:
        write_records(shards[0], folder / "model.safetensors")
        return [folder / "model.safetensors"]
    paths = [
        folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for path, shard in zip(paths, shards, strict=True):
        write_records(shard, path)
    where = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
    index = {
        "metadata": {"total_size": sum(size_of(record) for record in records.values())},
        "weight_map": dict(sorted(where.items())),
    }
    path = folder / "model.safetensors.index.json"
    write_atomic(path, json.dumps(index, indent=2).encode() + b"\n")
    return [*paths, path]


def write_state(package: Package, path: str | Path) -> None:
    """Write all tensors as a state dict, as torch saves one, whole or not at all.

    Raises:
        FileError: a damaged record.
        RunError: it cannot be written; an older file stays as it was.
    """
    state = package.state()

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's own writer hides what the system said
            why = str(error).splitlines()[0]
            raise RunError("cannot write", str(path), why, "free space") from None

    write_atomic(Path(path), write)


ENDINGS = {".safetensors": "safetensors", ".pt": "pt", ".pth": "pt"}
WRITERS = {"safetensors": write_safetensors, "pt": write_state}
