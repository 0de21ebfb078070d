"""Files for the attacks: small valid ones, taken apart and put together with right checksums."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lamina import codecs
from lamina.artifact import records
from lamina.forms import Affine, Codebook, Grid, Plain, Sparse

GOLDEN = Path(__file__).parents[1] / "golden"
VERSION = 2


def mend(whole: bytes) -> bytes:
    """Return a file's bytes, all but the checksum, with the right checksum."""
    return whole + struct.pack("<I", zlib.crc32(whole))


def wrap(text: str, body: bytes, header: Any = None) -> bytes:
    """Return a sealed file of a manifest's text, as it is, and records; or of another header."""
    if header is None:
        size = len(body) + 4
        blob = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
        header = {"__metadata__": {"lamina": text}, "d": blob}
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return mend(struct.pack("<Q", len(head)) + head + body)


def seal(manifest: Mapping[str, Any], *bodies: bytes) -> bytes:
    """Return a sealed file of a manifest and the bodies of its records."""
    manifest = {"lamina": VERSION, "tensors": "", **manifest}
    return wrap(json.dumps(manifest), b"".join(records.varint(len(b)) + b for b in bodies))


def open_up(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Return manifest and record bodies of a valid file."""
    (length,) = struct.unpack("<Q", data[:8])
    manifest = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["lamina"])
    rest, bodies = memoryview(data)[8 + length : -4], []
    at = 0
    while at < len(rest):
        size, at = records.read_varint(rest, at)
        bodies.append(bytes(rest[at : at + size]))
        at += size
    return manifest, bodies


def body_of(record: bytes) -> bytes:
    """Return a record without its length."""
    size, at = records.read_varint(memoryview(record), 0)
    assert at + size == len(record)
    return record[at:]


def make_symbols(rows: int, cols: int, spread: float, seed: int = 0) -> np.ndarray:
    """Return integers [rows, cols], many of them zero, densities unlike by row."""
    random = np.random.default_rng(seed)
    density = random.random((rows, 1))
    values = np.rint(random.laplace(0, spread, (rows, cols)))
    return np.where(random.random((rows, cols)) < density, values, 0).astype(np.int32)


def code_by(name: str, symbols: np.ndarray) -> bytes:
    """Return the symbols as a codec of that name writes them."""
    if name == "bloomier":
        return bytes(codecs.get(name).encode(symbols, bits=8))
    if name == "blocks":
        return bytes(codecs.get(name).encode(symbols, block=100))
    if name == "context":
        symbols = symbols.clip(-200, 200)
    return bytes(codecs.get(name).encode(symbols))


def context_kinds() -> dict[str, np.ndarray]:
    """Return matrices that `context` codes in each of its ways: rows, gaps, above."""
    random = np.random.default_rng(0)
    rows = np.arange(64)[:, None] % 2
    bell = np.rint(random.normal(0, 0.8 + 6 * rows, (64, 70)))
    size = np.repeat(random.choice([0, 4], (16, 70)), 4, 0)
    kinds = {
        "rows": bell,
        "gaps": np.where(random.random((64, 70)) < 0.05 + 0.1 * rows, bell, 0),
        "above": np.rint(random.normal(0, 0.2 + size)),
    }
    return {kind: symbols.astype(np.int32) for kind, symbols in kinds.items()}


@cache
def coded_bodies() -> dict[str, tuple[str, bytes]]:
    """Return by name the table's entry (without the name) and the body of records of every kind."""
    found: dict[str, tuple[str, bytes]] = {}
    step = struct.pack("<f", 0.25)
    for number, name in enumerate(records.CODEC_IDS):
        if name not in codecs.CODECS:
            continue
        for rows, cols, spread in ((1, 1, 1), (9, 14, 1.5), (24, 40, 40)):
            if (cols, spread) == (40, 40) and name == "bloomier":
                continue
            symbols = make_symbols(rows, cols, spread)
            if name in ("huffman", "bloomier"):
                table = np.arange(64, dtype="<f4").tobytes()
                head = bytes([2 | number << 3]) + records.varint(63) + table
                symbols = np.abs(symbols).clip(0, 63)
            else:
                head = bytes([3 | number << 3]) + step
            data = np.asarray(symbols, "<i4").tobytes() if name == "raw" else code_by(name, symbols)
            found[f"{name}{rows}"] = f"{rows},{cols}", head + data
    for kind, matrix in context_kinds().items():
        head = bytes([3 | records.CODEC_IDS.index("context") << 3]) + step
        found[f"context-{kind}"] = "64,70", head + code_by("context", matrix)
    torch.manual_seed(0)
    symbols = torch.from_numpy(make_symbols(8, 6, 2))
    dense = torch.randn(8, 6)
    for name, values in {
        "lanes": Grid(torch.from_numpy(make_symbols(100, 140, 40)), 0.5),
        "plain": Plain(dense),
        "plain16": Plain(dense.bfloat16()),
        "large": Plain(torch.randn(40, 50) * 0.02),
        "truth": Plain(dense > 0),
        "long": Plain(torch.arange(5)),
        "scalar": Plain(torch.tensor(2.0, dtype=torch.float64)),
        "empty": Plain(torch.zeros(0, 4)),
        "sparse": Sparse(torch.where(symbols == 0, torch.zeros(()), dense)),
        "thin": Sparse(torch.where(torch.rand(60, 50) < 0.6, 0, torch.randn(60, 50) * 0.02)),
        "codebook": Codebook(symbols.abs(), torch.randn(20), torch.float16),
        "scaled0": Grid(symbols, 0.1, torch.arange(8, dtype=torch.int32), 0),
        "affine": Affine(symbols, torch.rand(8, 2).half(), None, 3),
        "least": Affine(symbols, torch.rand(8, 1), torch.randn(8, 1), 6, torch.bfloat16),
        "scaled1": Grid(symbols, 0.1, torch.arange(6, dtype=torch.int32), 1, torch.bfloat16),
    }.items():
        tensor = values.dense()
        entry = ",".join(map(str, tensor.shape)) + ":" + records.DTYPE_NAMES[tensor.dtype]
        found[name] = entry, body_of(records.encode(values))
    return found


@cache
def valid_files() -> dict[str, bytes]:
    """Return small files of every kind of record, alone and together, and the golden ones."""
    bodies = coded_bodies()
    files = {name: seal({"tensors": f"a:{entry}"}, body) for name, (entry, body) in bodies.items()}
    few = [n for n in bodies if n not in ("lanes", "large", "thin") and not n.endswith("24")]
    files["all"] = seal(
        {
            "by": "0.1.0",
            "skeleton": "module",
            "edits": [["fc", "low_rank", {"folds": 1, "rank": 2}]],
            "plan": {"*": "alds keep", "fc": "keep"},
            "tensors": " ".join(
                ["fc.0.weight:2,4 fc.1.weight:3,2 .bias:3"]
                + [f"{name}.w:{bodies[name][0]}" for name in few]
            ),
        },
        *(bytes(1 + size) for size in (32, 24, 12)),
        *(bodies[name][1] for name in few),
    )
    for path in sorted(GOLDEN.glob("*.lamina")):
        files[path.name] = path.read_bytes()
    return files
