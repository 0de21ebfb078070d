"""Reading the `.lamina` file: everything is checked at once, tensors are decoded when wanted.

What is checked before any tensor's memory is taken: the shell, the CRC-32 of every byte, the
manifest, the declared sizes, the framing of the records and the head of every record.
"""

from __future__ import annotations

import errno
import math
import mmap
import stat
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lamina.artifact import records, streams
from lamina.artifact.manifest import read_edits, read_header, read_manifest, read_table
from lamina.artifact.records import Record
from lamina.errors import FileError
from lamina.forms import Edit, Values

MAX_HEADER = 100_000_000  # as safetensors
# Without a limit of the caller's own: what a file of this length may unfold to [bytes]. No network
# shrinks ten thousand fold, and a hostile file of a kilobyte shall not take all memory.
MOST_BYTES, FREE_BYTES, MOST_RATIO = 64 << 30, 64 << 20, 10_000
MAPPED = 32 << 20  # bytes; a larger file is mapped, so that the system may drop what was read


@dataclass(frozen=True)
class Tensors(Mapping[str, Values]):
    """The tensors of a file by name, in order; each is decoded anew whenever it is asked for.

    Args:
        records: the undecoded tensors.
    """

    records: Mapping[str, Record]

    def __getitem__(self, name: str) -> Values:
        return streams.decode(self.records[name])

    def __contains__(self, name: object) -> bool:  # without decoding it
        return name in self.records

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True)
class Package:
    """What a file holds.

    Args:
        skeleton: how to rebuild the network: `"zoo:lenet-5"`, or `"module"` (the caller gives it).
        edits: structural edits, in order.
        records: every tensor by name, in order, undecoded: form, codec, shape, dtype.
        plan: method chains by site, for people; never acted on.
        by: what wrote it.
        box: for which inputs the network equals what it was made of, for people, see `Network.box`.
        ledger: bytes on disk by part; the parts add up to the size of the file.
        size: bytes of the file.
    """

    skeleton: str
    edits: tuple[Edit, ...]
    records: Mapping[str, Record]
    plan: Mapping[str, str] = field(default_factory=dict)
    by: str = ""
    box: str = ""
    ledger: Mapping[str, int] = field(default_factory=dict)
    size: int = 0

    @property
    def tensors(self) -> Mapping[str, Values]:
        """The values of every tensor by name, in order; decoded when asked for, and not kept."""
        return Tensors(self.records)

    @property
    def codecs(self) -> dict[str, str]:
        """The codec of each tensor's symbols; of plain tensors `"raw"` or `"planes"`."""
        return {name: record.codec for name, record in self.records.items()}

    def dense(self, name: str) -> torch.Tensor:
        """Return one tensor, dense; nothing else is decoded.

        Raises:
            FileError: there is no such tensor, or its record is damaged.
        """
        if name not in self.records:
            some = ", ".join(list(self.records)[:4])
            raise FileError("the file has no such tensor", name, f"it has {some}, ...")
        return streams.dense(self.records[name], streams.thread_count())

    def state(self) -> dict[str, torch.Tensor]:
        """Return every tensor, dense."""
        state = {n: torch.empty(r.shape, dtype=r.dtype) for n, r in self.records.items()}
        fills = (streams.fill(r, streams.memory_of(state[n])) for n, r in self.records.items())
        streams.run((task for tasks in fills for task in tasks), streams.thread_count())
        return state


def read(path: str | Path, max_bytes: int | None = None) -> Package:
    """Read a file and check it; tensors are decoded when they are asked for.

    Large files are mapped into memory: leave the file as it is (replacing it is fine) while the
    package is in use.

    Args:
        path: the file.
        max_bytes: as `unpack`.

    Raises:
        FileError: missing, truncated, corrupt, hostile, or of an unknown version.
    """
    try:
        data = _bytes_of(Path(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or str(error)
        raise FileError(
            "cannot read the file", repr(path) if "\0" in str(path) else str(path), why
        ) from None
    return unpack(data, max_bytes, str(path))


def read_tensor(path: str | Path, name: str, max_bytes: int | None = None) -> torch.Tensor:
    """Read one tensor of a file, dense; the whole file is checked, only this tensor is decoded.

    Args:
        path: the file.
        name: the tensor, as `lamina inspect FILE` lists it.
        max_bytes: as `unpack`.

    Raises:
        FileError: as `read`, or there is no such tensor.
    """
    package = read(path, max_bytes)
    if name not in package.records:
        why = "it has " + ", ".join(list(package.records)[:4])
        raise FileError("the file has no such tensor", f"{path}: {name}", why, "see lamina inspect")
    return package.dense(name)


def _bytes_of(path: Path) -> memoryview:
    # Others may have no end, or block: opening a pipe waits for its writer.
    if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is not a file")
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        # On Windows a mapped file cannot be replaced.
        if size < MAPPED or sys.platform == "win32":
            return memoryview(file.read())
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def unpack(data: bytes | memoryview, max_bytes: int | None = None, where: str = "") -> Package:
    """Read a file's bytes.

    Args:
        data: the file; it is not copied, and read again as tensors are decoded.
        max_bytes: what all its tensors together may take in memory, checked before any is taken;
            default: what a file of this length can honestly hold, at most 64 GiB.
        where: the file's name, for errors.

    Raises:
        FileError: as `read`.
    """
    try:
        return _unpack(memoryview(data).cast("B"), max_bytes, where)
    except FileError as error:
        if not where or error.where.startswith(where):
            raise
        raise FileError(error.what, f"{where}: {error.where}", error.why, error.fix) from None


def _unpack(data: memoryview, max_bytes: int | None, where: str) -> Package:
    manifest, body, ledger = _open(data)
    if max_bytes is None:
        max_bytes = min(MOST_BYTES, FREE_BYTES + MOST_RATIO * len(data))
    table, edits = read_table(manifest), read_edits(manifest)
    whole = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in table)
    if whole > max_bytes:
        raise FileError(
            "the file unfolds to more than is allowed", f"{len(data)} bytes",
            f"its tensors claim {whole} bytes, and at most {max_bytes} are allowed",
            "if you trust it, read it with a larger max_bytes",
        )  # fmt: skip
    found: dict[str, Record] = {}
    at = 0
    for name, shape, dtype in table:
        length, start = records.read_varint(body, at)
        if length > len(body) - start:
            raise FileError("a tensor record is cut off", name, "the file is damaged")
        place = f"{where}: {name}" if where else name
        found[name] = records.parse(body[start : start + length], shape, dtype, place)
        ledger[name] = ledger.get(name, 0) + start + length - at  # a tensor may be called header
        at = start + length
    if at != len(body):
        raise FileError("the file has bytes that belong to nothing", f"{len(body) - at} bytes")
    return Package(
        manifest["skeleton"],
        edits,
        found,
        manifest["plan"],
        manifest["by"],
        manifest["box"],
        ledger,
        len(data),
    )


def _open(data: memoryview) -> tuple[dict[str, Any], memoryview, dict[str, int]]:
    """Check the outer shell; return manifest, tensor records, and the ledger so far."""
    if len(data) < 8:
        raise FileError("not a .lamina file", f"{len(data)} bytes", "it is too short")
    (length,) = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER or length + 8 > len(data):
        raise FileError("not a .lamina file, or cut off", "header", f"it claims {length} bytes")
    text = read_header(bytes(data[8 : 8 + length]), len(data) - 8 - length)
    (stored,) = struct.unpack("<I", data[-4:])
    if stored != zlib.crc32(data[:-4]):
        raise FileError(
            "the file is damaged", "checksum", "the CRC-32 does not match", "copy it again"
        )
    return read_manifest(text), data[8 + length : -4], {"header": 8 + length, "checksum": 4}
