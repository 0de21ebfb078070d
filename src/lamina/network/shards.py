"""The weights of a Hugging Face folder, read one tensor, or a few rows of one, at a time.

Nothing is mapped: pages of a mapped file count as memory of the process for as long as the system
likes, and what this is for is a bound on memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamina.errors import NetworkError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # bytes, as safetensors
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DAMAGED = "the file is damaged or was not copied whole"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies.

    Args:
        file: the shard.
        start: its first byte in the file.
        shape, dtype: as stored.
    """

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Rows of its 2-D view `[shape[0], rest]`; a vector, or a scalar, is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Return rows `[last - first, rest]` of its 2-D view, as stored.

        Raises:
            NetworkError: the shard cannot be read, or ends too early.
        """
        last = self.rows if last is None else last
        width = math.prod(self.shape) // max(1, self.rows)
        found = torch.empty((last - first, width), dtype=self.dtype)
        if not found.numel():
            return found
        memory = found.reshape(-1).view(torch.uint8).numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start + first * width * self.dtype.itemsize)
                while memory:
                    got = file.readinto(memory)
                    if not got:
                        raise NetworkError("a shard is cut off", str(self.file), DAMAGED)
                    memory = memory[got:]
        except OSError as error:
            why = error.strerror or str(error)
            raise NetworkError("cannot read a shard", str(self.file), why) from None
        return found

    def tensor(self) -> torch.Tensor:
        """Return the whole tensor, as stored.

        Raises:
            NetworkError: as `read`.
        """
        return self.read().reshape(self.shape)

    def chunks(self, size: int) -> Iterator[torch.Tensor]:
        """Yield its rows in order, about `size` bytes at a time."""
        width = max(1, self.bytes // max(1, self.rows))
        step = max(1, size // width)
        for first in range(0, self.rows, step):
            yield self.read(first, min(first + step, self.rows))


def open_shards(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a folder by its name there; only headers are read.

    Raises:
        NetworkError: there are no safetensors, a shard is missing or damaged, or the index names a
            tensor that its shard does not hold.
    """
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        others = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.safetensors")))
        why = f"it holds {others[0]}" if others else "there are no weights"
        raise NetworkError(
            f"the folder has neither {SINGLE} nor {INDEX}", str(folder), why,
            "save it with save_pretrained (safetensors)",
        )  # fmt: skip
    index = _index(folder / INDEX)
    missing = sorted({file for file in index.values() if not (folder / file).is_file()})
    if missing:
        some = f"and {len(missing) - 1} more" if len(missing) > 1 else f"{INDEX} names it"
        raise NetworkError("a shard is missing", str(folder / missing[0]), some, "copy it again")
    headers = {file: _header(folder / file) for file in sorted(set(index.values()))}
    found = {}
    for name, file in index.items():
        if name not in headers[file]:
            why = f"{INDEX} names {name!r}, which it does not hold"
            raise NetworkError("a shard lacks a tensor", str(folder / file), why, "copy it again")
        found[name] = headers[file][name]
    return found


def identity(tensors: Mapping[str, Stored]) -> list[Any]:
    """Return what tells whether the shards have changed: names, sizes and times of change."""
    files = sorted({stored.file for stored in tensors.values()})
    stats = [file.stat() for file in files]
    return [[file.name, s.st_size, s.st_mtime_ns] for file, s in zip(files, stats, strict=True)]


def _index(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise NetworkError("the index cannot be read", str(path), type(error).__name__) from None
    if not isinstance(found, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in found.values()
    ):
        why = "a shard's name is no plain file name"
        raise NetworkError("the index cannot be read", str(path), why)
    return found


def _header(path: Path) -> dict[str, Stored]:
    """Read a shard's header, and check that the file is as long as it says."""
    try:
        whole = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else MAX_HEADER + 1
            if length > min(MAX_HEADER, whole - 8):
                raise NetworkError("a shard is damaged", str(path), DAMAGED)
            header = json.loads(file.read(length))
    except OSError as error:
        raise NetworkError("cannot read a shard", str(path), error.strerror or "") from None
    except (ValueError, RecursionError):
        raise NetworkError("a shard is damaged", str(path), "its header is no JSON") from None
    found = {}
    try:
        for name, told in header.items():
            if name == "__metadata__":
                continue
            start, end = told["data_offsets"]
            kind = DTYPES.get(told["dtype"])
            if kind is None:
                why = f"{name!r} is {told['dtype']}"
                raise NetworkError("a shard has a dtype that is not known", str(path), why)
            stored = Stored(path, 8 + length + start, tuple(map(int, told["shape"])), kind)
            right = 0 <= start <= end <= whole - 8 - length and end - start == stored.bytes
            if not right or any(n < 0 for n in stored.shape):
                raise NetworkError("a shard is damaged", f"{path}: {name}", DAMAGED)
            found[name] = stored
    except (KeyError, TypeError, ValueError, AttributeError):
        raise NetworkError("a shard is damaged", str(path), "its header says nonsense") from None
    return found
