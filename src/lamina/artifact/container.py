"""The `.lamina` file: a valid safetensors file whose metadata holds one JSON manifest.

The one tensor, `"d"` (U8), is all tensor records in the manifest's order and, last, the CRC-32 of
every byte before it (header included). Nothing in a file is executed or unpickled.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lamina.artifact import records
from lamina.errors import FileError
from lamina.forms import Codebook, Edit, Plain, Sparse, Values, install

VERSION = 1
MAX_HEADER = 100_000_000  # as safetensors
MAX_ELEMENTS = 1 << 40
MAX_DIMENSIONS = 32
# Without a limit of the caller's own: what a file of this length may unfold to [bytes]. No network
# shrinks ten thousand fold, and a hostile file of a kilobyte shall not take all memory.
MOST_BYTES, FREE_BYTES, MOST_RATIO = 64 << 30, 64 << 20, 10_000


@dataclass(frozen=True)
class Package:
    """What a file holds.

    Args:
        skeleton: how to rebuild the network: `"zoo:lenet-5"`, or `"module"` (the caller gives it).
        edits: structural edits, in order.
        tensors: values of every tensor by name, in order.
        plan: method chains by site, for people; never acted on.
        by: what wrote it.
        ledger: bytes on disk by part; the parts add up to the size of the file.
        codecs: the codec of each tensor's symbols; `"raw"` where there are none.
    """

    skeleton: str
    edits: tuple[Edit, ...]
    tensors: Mapping[str, Values]
    plan: Mapping[str, str] = field(default_factory=dict)
    by: str = ""
    ledger: Mapping[str, int] = field(default_factory=dict)
    codecs: Mapping[str, str] = field(default_factory=dict)

    def state(self) -> dict[str, torch.Tensor]:
        """Return every tensor, dense."""
        return {name: values.dense() for name, values in self.tensors.items()}


def pack(
    module: nn.Module, edits: tuple[Edit, ...], skeleton: str, plan: Mapping[str, str]
) -> bytes:
    """Return the file's bytes for an edited network.

    Args:
        module: the edited network; tensors that no edit covers are stored losslessly.
        edits: the edits that made it, with the values of what they cover.
        skeleton: the network's source.
        plan: method chain by site.
    """
    from lamina._version import __version__

    values = {e.path: e.values for e in edits if e.form == "values" and e.values is not None}
    state = _tensors(module)
    # Tied tensors are stored once, under the name an edit knows them by; the skeleton ties them.
    owner: dict[tuple[Any, ...], str] = {}
    for name in [n for n in state if n in values] + list(state):
        owner.setdefault(_memory(name, state[name]), name)
    table, body = [], bytearray()
    previous = ""
    for name, tensor in state.items():
        if name not in values and owner[_memory(name, tensor)] != name:
            continue
        held = values.get(name) or Plain(tensor.detach())
        body += records.encode(held)
        table.append(_entry(name, tensor, previous))
        previous = name.rpartition(".")[0]
    manifest: dict[str, Any] = {"lamina": VERSION, "by": __version__, "skeleton": skeleton}
    structure = [[e.path, e.form, dict(e.settings)] for e in edits if e.form != "values"]
    if structure:
        manifest["edits"] = structure
    if plan:
        manifest["plan"] = _summary(plan)
    manifest["tensors"] = " ".join(table)
    return seal(manifest, bytes(body))


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a module's state, as they are, in order.

    Raises:
        FileError: one is not a plain array of numbers.
    """
    found = module.state_dict(keep_vars=True).items()
    tensors = {name: t for name, t in found if isinstance(t, torch.Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "meta" if tensor.is_meta else str(tensor.layout)
            raise FileError("a tensor cannot be stored", name, f"it is {kind}, not a plain array")
    return tensors


def _memory(name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what two names share if and only if they are one tensor."""
    if not tensor.numel():
        return (name,)
    return (
        tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype,
    )  # fmt: skip


def _summary(plan: Mapping[str, str]) -> str | dict[str, str]:
    """Return the commonest chain for all sites (`"*"`), and the sites that differ."""
    common, _ = Counter(plan.values()).most_common(1)[0]
    others = {site: chain for site, chain in plan.items() if chain != common}
    return {"*": common} | others if others else common


def seal(manifest: Mapping[str, Any], body: bytes) -> bytes:
    """Return a whole file for a manifest and its tensor records."""
    text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False)
    header = {
        "__metadata__": {"lamina": text},
        "d": {"dtype": "U8", "shape": [len(body) + 4], "data_offsets": [0, len(body) + 4]},
    }
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    whole = struct.pack("<Q", len(head)) + head + body
    return whole + struct.pack("<I", zlib.crc32(whole))


def _entry(name: str, tensor: torch.Tensor, previous: str) -> str:
    """Return a tensor's place in the table: `a.weight:20,1,5,5`, then `.bias:20` (same module)."""
    path, _, leaf = name.rpartition(".")
    shown = f".{leaf}" if path and path == previous else name
    dtype = records.DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise FileError("a tensor's dtype cannot be stored", name, str(tensor.dtype))
    if any(c.isspace() or c == ":" for c in name):
        raise FileError("a tensor's name cannot be stored", repr(name), "it has a space or a colon")
    suffix = "" if dtype == "f32" else f":{dtype}"
    return f"{shown}:{','.join(map(str, tensor.shape))}{suffix}"


def read(path: str | Path, max_bytes: int | None = None) -> Package:
    """Read a file and check it.

    Args:
        path: the file.
        max_bytes: as `unpack`.

    Raises:
        FileError: missing, truncated, corrupt, hostile, or of an unknown version.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FileError("cannot read the file", str(path), error.strerror or str(error)) from None
    try:
        return unpack(data, max_bytes)
    except FileError as error:
        raise FileError(error.what, f"{path}: {error.where}", error.why, error.fix) from None


def unpack(data: bytes, max_bytes: int | None = None) -> Package:
    """Read a file's bytes.

    Args:
        data: the file.
        max_bytes: what all its tensors together may take in memory, checked before any is taken;
            default: what a file of this length can honestly hold, at most 64 GiB.

    Raises:
        FileError: as `read`.
    """
    manifest, body, ledger = _open(memoryview(data))
    if max_bytes is None:
        max_bytes = min(MOST_BYTES, FREE_BYTES + MOST_RATIO * len(data))
    try:
        table = _table(manifest)
        edits = tuple(
            Edit(str(path), str(form), {str(k): int(v) for k, v in settings.items()})
            for path, form, settings in manifest.get("edits", [])
        )
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise FileError("the manifest is not valid", "edits or tensors", str(error)) from None
    whole = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in table)
    if whole > max_bytes:
        raise FileError(
            "the file unfolds to more than is allowed", f"{len(data)} bytes",
            f"its tensors claim {whole} bytes, and at most {max_bytes} are allowed",
            "if you trust it, read it with a larger max_bytes",
        )  # fmt: skip
    tensors: dict[str, Values] = {}
    codecs: dict[str, str] = {}
    at = 0
    for name, shape, dtype in table:
        length, start = records.read_varint(body, at)
        if length > len(body) - start:
            raise FileError("a tensor record is cut off", name, "the file is damaged")
        tensors[name] = records.decode(body[start : start + length], shape, dtype)
        codecs[name] = records.codec_of(body[start : start + length])
        ledger[name] = ledger.get(name, 0) + start + length - at  # a tensor may be called header
        at = start + length
    if at != len(body):
        raise FileError("the file has bytes that belong to nothing", f"{len(body) - at} bytes")
    plan = manifest.get("plan", {})
    if isinstance(plan, str):
        plan = {"*": plan}
    return Package(
        str(manifest.get("skeleton", "module")),
        edits,
        tensors,
        plan if isinstance(plan, dict) else {},
        str(manifest.get("by", "")),
        ledger,
        codecs,
    )


def _open(data: memoryview) -> tuple[dict[str, Any], memoryview, dict[str, int]]:
    """Check the outer shell; return manifest, tensor records, and the ledger so far."""
    if len(data) < 8:
        raise FileError("not a .lamina file", f"{len(data)} bytes", "it is too short")
    (length,) = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER or length + 8 > len(data):
        raise FileError("not a .lamina file, or cut off", "header", f"it claims {length} bytes")
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        text = header["__metadata__"]["lamina"]
        blob = header["d"]
        begin, end = blob["data_offsets"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FileError(
            "not a .lamina file", "header", "it has no manifest", "make one with lamina compress"
        ) from None
    if blob.get("dtype") != "U8" or [begin, end] != [0, len(data) - 8 - length] or end < 4:
        raise FileError(
            "the file is cut off or damaged", "header", "the data is not as long as told"
        )
    (stored,) = struct.unpack("<I", data[-4:])
    if stored != zlib.crc32(data[:-4]):
        raise FileError(
            "the file is damaged", "checksum", "the CRC-32 does not match", "copy it again"
        )
    try:
        manifest = json.loads(text)
        version = manifest["lamina"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise FileError(
            "the manifest is not valid", "header", "it is not the JSON we write"
        ) from None
    if version != VERSION:
        raise FileError("unknown file version", str(version), f"this is {VERSION}", "update lamina")
    return manifest, data[8 + length : -4], {"header": 8 + length, "checksum": 4}


def _table(manifest: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Return (name, shape, dtype) of every tensor."""
    found: list[tuple[str, tuple[int, ...], torch.dtype]] = []
    names: set[str] = set()
    previous = ""
    for entry in manifest["tensors"].split():
        shown, _, rest = entry.partition(":")
        sizes, _, dtype = rest.partition(":")
        name = f"{previous}{shown}" if shown.startswith(".") else shown
        shape = tuple(int(n) for n in sizes.split(",")) if sizes else ()
        if name in names or dtype not in ("", *records.DTYPES) or any(n < 0 for n in shape):
            raise FileError(
                "the manifest is not valid", entry, "a name, a shape or a dtype is wrong"
            )
        # Sides of an empty tensor count too: its strides would overflow.
        if math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS or len(shape) > MAX_DIMENSIONS:
            raise FileError("a tensor is too large to be true", entry[:200])
        names.add(name)
        found.append((name, shape, records.DTYPES[dtype or "f32"]))
        previous = name.rpartition(".")[0]
    return found


def restore(package: Package, skeleton: nn.Module) -> nn.Module:
    """Put a package's edits and tensors into a skeleton, in place, and return it.

    Raises:
        FileError: the skeleton is not the one the file was made from.
    """
    install(skeleton, package.edits)
    _check_fits(package, skeleton)
    install(skeleton, [Edit(n, "values", values=v) for n, v in package.tensors.items()])
    return skeleton


def _check_fits(package: Package, skeleton: nn.Module) -> None:
    """Refuse a skeleton with tensors the file does not have, or the other way round.

    Either would leave values of its own in the network, or round what the file holds exactly.
    """
    state = _tensors(skeleton)
    fix = "give the skeleton the file was made from"
    for name, values in package.tensors.items():
        tensor = state.get(name)
        if tensor is None:
            raise FileError(
                "the skeleton does not fit the file", name, "it has no such tensor", fix
            )
        shape, dtype = describe_values(values)
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            why = f"file {shape} {dtype}, skeleton {tuple(tensor.shape)} {tensor.dtype}"
            raise FileError("the skeleton does not fit the file", name, why, fix)
    stored = {_memory(name, state[name]) for name in package.tensors}
    for name, tensor in state.items():
        if tensor.numel() and _memory(name, tensor) not in stored:
            raise FileError("the skeleton does not fit the file", name, "the file lacks it", fix)


def describe_values(values: Values) -> tuple[tuple[int, ...], torch.dtype]:
    """Return shape and dtype of the dense tensor."""
    if isinstance(values, (Plain, Sparse)):
        return tuple(values.tensor.shape), values.tensor.dtype
    held = values.index if isinstance(values, Codebook) else values.symbols
    return tuple(held.shape), values.dtype
