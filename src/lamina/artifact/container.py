"""Writing the `.lamina` file: a valid safetensors file whose metadata holds one JSON manifest.

The one tensor, `"d"` (U8), is all tensor records in the manifest's order and, last, the CRC-32 of
every byte before it (header included). Nothing in a file is executed or unpickled.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lamina.artifact import records
from lamina.artifact.exact import exact
from lamina.artifact.manifest import flaw_of
from lamina.errors import FileError
from lamina.forms import Edit

# What is written, and by what; `manifest.READS` is what is read. A file that older readers can read
# stays one, to the byte.
VERSION = 2
NEWER = {"affine": 3}  # forms of values that came later


def pack(
    module: nn.Module,
    edits: tuple[Edit, ...],
    skeleton: str,
    plan: Mapping[str, str],
    box: str = "",
) -> bytes:
    """Return the file's bytes for an edited network.

    Args:
        module: the edited network; tensors that no edit covers are stored losslessly.
        edits: the edits that made it, with the values of what they cover.
        skeleton: the network's source.
        plan: method chain by site.
        box: for which inputs the network equals what it was made of, see `Network.box`.
    """
    values = {e.path: e.values for e in edits if e.form == "values" and e.values is not None}
    state = tensors_of(module)
    body = bytearray()
    names = stored_names(state, values)
    forms: set[str] = set()
    for name in names:
        record = records.encode(values.get(name) or exact(state[name].detach()))
        forms.add(records.form_of(record))
        body += record
    held = {name: state[name] for name in names}
    return seal(manifest_of(held, edits, skeleton, plan, box, version_of(forms)), body)


def version_of(forms: Iterable[str]) -> int:
    """Return the version of the format that a file with these forms of values has.

    Example:
        >>> version_of(["plain", "grid"]), version_of(["affine"])
        (2, 3)
    """
    return max([VERSION, *(NEWER[form] for form in forms if form in NEWER)])


def stored_names(
    state: Mapping[str, torch.Tensor],
    first: Container[str],
    key: Callable[[str, torch.Tensor], object] | None = None,
) -> list[str]:
    """Return the names that tensors are stored under, in order.

    Tied tensors are stored once, under the name an edit knows them by; the skeleton ties them.

    Args:
        state: all tensors.
        first: names that edits have.
        key: what two names share if and only if they are one tensor; default: their memory.
    """
    same = key or memory_key
    owner: dict[object, str] = {}
    for name in [n for n in state if n in first] + list(state):
        owner.setdefault(same(name, state[name]), name)
    return [n for n, tensor in state.items() if n in first or owner[same(n, tensor)] == n]


def manifest_of(
    tensors: Mapping[str, torch.Tensor],
    edits: Iterable[Edit],
    skeleton: str,
    plan: Mapping[str, str],
    box: str = "",
    version: int = VERSION,
) -> dict[str, Any]:
    """Return a file's manifest.

    Args:
        tensors: what is stored, in order; only shapes and dtypes are looked at.
        edits, skeleton, plan, box: as `pack`.
        version: of the format, see `version_of`.
    """
    from lamina._version import __version__

    table = []
    previous = ""
    for name, tensor in tensors.items():
        table.append(_entry(name, tensor, previous))
        previous = name.rpartition(".")[0]
    manifest: dict[str, Any] = {"lamina": version, "by": __version__, "skeleton": skeleton}
    structure = [[e.path, e.form, dict(e.settings)] for e in edits if e.form != "values"]
    if structure:
        manifest["edits"] = structure
    if plan:
        manifest["plan"] = _summary(plan)
    if box:
        manifest["box"] = box
    manifest["tensors"] = " ".join(table)
    return manifest


def tensors_of(module: nn.Module, meta: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of a module's state, as they are, in order.

    Args:
        module: the network.
        meta: tensors without values are welcome.

    Raises:
        FileError: one is not a plain array of numbers.
    """
    found = module.state_dict(keep_vars=True).items()
    tensors = {name: t for name, t in found if isinstance(t, torch.Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or (tensor.is_meta and not meta):
            kind = "meta" if tensor.is_meta else str(tensor.layout)
            raise FileError("a tensor cannot be stored", name, f"it is {kind}, not a plain array")
    return tensors


def memory_key(name: str, tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what two names share if and only if they are one tensor."""
    if not tensor.numel() or tensor.is_meta:
        return (name,)
    return (
        tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype,
    )  # fmt: skip


def _summary(plan: Mapping[str, str]) -> str | dict[str, str]:
    """Return the commonest chain for all sites (`"*"`), and the sites that differ."""
    common, _ = Counter(plan.values()).most_common(1)[0]
    others = {site: chain for site, chain in plan.items() if chain != common}
    return {"*": common} | others if others else common


def seal(manifest: Mapping[str, Any], body: bytes | bytearray) -> bytes:
    """Return a whole file for a manifest and its tensor records."""
    first = head_of(manifest, len(body))
    check = zlib.crc32(body, zlib.crc32(first))
    return b"".join([first, body, struct.pack("<I", check)])


def head_of(manifest: Mapping[str, Any], size: int) -> bytes:
    """Return what comes before the tensor records of a file, where these take `size` bytes."""
    text = json.dumps(manifest, separators=(",", ":"), ensure_ascii=False)
    header = {
        "__metadata__": {"lamina": text},
        "d": {"dtype": "U8", "shape": [size + 4], "data_offsets": [0, size + 4]},
    }
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head


def _entry(name: str, tensor: torch.Tensor, previous: str) -> str:
    """Return a tensor's place in the table: `a.weight:20,1,5,5`, then `.bias:20` (same module)."""
    path, _, leaf = name.rpartition(".")
    shown = f".{leaf}" if path and path == previous else name
    dtype = records.DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise FileError("a tensor's dtype cannot be stored", name, str(tensor.dtype))
    if why := flaw_of(name):
        raise FileError("a tensor's name cannot be stored", repr(name)[:200], why)
    suffix = "" if dtype == "f32" else f":{dtype}"
    return f"{shown}:{','.join(map(str, tensor.shape))}{suffix}"
