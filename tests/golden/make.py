"""The golden files: tensors of every form and codec, one file for each version of the format.

Run `python -m tests.golden.make` only to add the file of a new version; the old ones stay. The
values of version 1 are made again by `known`; those of later ones stand beside them, dense.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from lamina import codecs
from lamina.artifact import records, unpack
from lamina.artifact.container import seal
from lamina.codecs import blocks, bloomier, context, planes
from lamina.forms import Plain, Sparse

GOLDEN = Path(__file__).parent


def symbols(rows: int, columns: int, spread: int) -> np.ndarray:
    """Integers from a small recurrence, not from a random generator that may change."""
    state, found = 12345, []
    for _ in range(rows * columns):
        state = (1103515245 * state + 12345) % (1 << 31)
        found.append((state >> 16) % 64)
    return (np.array(found, dtype=np.int32) ** 3 * spread >> 18).reshape(
        rows, columns
    ) - spread // 4


def known() -> dict[str, tuple[str, torch.Tensor]]:
    """Return by name the form and the dense values of every tensor of the file."""
    ramp = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 8
    rare = torch.where(ramp % 0.5 == 0, ramp, torch.zeros(()))
    table = torch.tensor([-1.5, 0.0, 0.25, 3.0])
    index = torch.from_numpy(symbols(6, 7, 8) % 4)
    quarter = torch.tensor([2.0**-1.25, 2.0**-0.5, 1.0, 2.0**0.75, 2.0], dtype=torch.float64)
    grid = torch.from_numpy(symbols(5, 4, 8)).float()
    return {
        "plain": ("Plain", ramp),
        "half": ("Plain", ramp.to(torch.bfloat16)),
        "count": ("Plain", torch.tensor(7)),
        "truth": ("Plain", torch.tensor([True, False, True])),
        "none": ("Plain", torch.zeros(0, 3)),
        "sparse": ("Sparse", rare),
        "codebook": ("Codebook", table[index.long()]),
        "rans": ("Grid", torch.from_numpy(symbols(40, 50, 200)) * torch.tensor(0.03)),
        "adaptive": ("Grid", torch.from_numpy(symbols(8, 9, 8)) * torch.tensor(0.5)),
        "raw": ("Grid", torch.from_numpy(symbols(2, 3, 8)) * torch.tensor(0.5)),
        "scaled": ("Grid", grid * (quarter.float() * torch.tensor(0.1))[:, None]),
    }


def coded(codec: str, array: np.ndarray) -> bytes:
    """Code by a codec of our choice, whichever is shortest."""
    return codecs.get(codec).encode(array)


def head(form: int, codec: str, more: int = 0) -> bytes:
    return bytes([form | records.CODEC_IDS.index(codec) << 3 | more])


def golden() -> bytes:
    """Return the file's bytes, put together by hand wherever the writer could choose."""
    float32 = np.dtype("<f4")
    rows = np.array([[-5, -2, 0, 3, 4]], dtype=np.int32)
    parts = {
        "codebook": head(2, "rans")
        + records.varint(3)
        + np.array([-1.5, 0, 0.25, 3], float32).tobytes()
        + coded("rans", symbols(6, 7, 8) % 4),
        "rans": head(3, "rans")
        + float32.type(0.03).tobytes()
        + coded("rans", symbols(40, 50, 200)),
        "adaptive": head(3, "adaptive")
        + float32.type(0.5).tobytes()
        + coded("adaptive", symbols(8, 9, 8)),
        "raw": head(3, "raw") + float32.type(0.5).tobytes() + coded("raw", symbols(2, 3, 8)),
        "scaled": head(3, "adaptive", 0x40)
        + float32.type(0.1).tobytes()
        + bytes([records.CODEC_IDS.index("rans")])
        + records.varint(len(coded("rans", rows)))
        + coded("rans", rows)
        + coded("adaptive", symbols(5, 4, 8)),
    }
    body, table = b"", []
    for name, (kind, tensor) in known().items():
        if name in parts:
            body += records.varint(len(parts[name])) + parts[name]
        else:
            body += records.encode(Plain(tensor) if kind == "Plain" else Sparse(tensor))
        dtype = records.DTYPE_NAMES[tensor.dtype]
        table.append(f"{name}:{','.join(map(str, tensor.shape))}" + f":{dtype}" * (dtype != "f32"))
    manifest = {
        "lamina": 1,
        "by": "0.1.0",
        "skeleton": "module",
        "edits": [["fc", "low_rank", {"folds": 1, "rank": 2}]],
        "plan": {"fc": "alds keep"},
        "tensors": " ".join(table),
    }
    return seal(json.loads(json.dumps(manifest)), body)


def second() -> tuple[bytes, dict[str, torch.Tensor]]:
    """Return a file of version 2, with what version 1 did not have, and its dense tensors."""
    table = torch.tensor([0.0, -1.5, 0.25, 3.0])
    wide, few = symbols(48, 40, 60), symbols(48, 40, 8)
    zero = np.zeros_like(few)
    sparse = np.where(symbols(48, 40, 64) % 9 == 0, few, zero)
    rows = np.where(np.arange(48)[:, None] % 3 == 0, wide, few)
    one, three = np.zeros(48, dtype=np.int64), np.minimum(np.arange(48) % 3, 1)
    ways = {
        "rows": (rows, three, context.ROWS, False),
        "columns": (rows.T.copy(), three, context.ROWS, True),
        "gaps": (sparse, one, context.GAPS, False),
        "bursts": (np.sort(sparse, 1), one, context.BURSTS, False),
        "above": (few, three, context.ABOVE, False),
    }
    grid = head(3, "context") + np.dtype("<f4").type(0.25).tobytes()
    parts: dict[str, bytes] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (array, classes, way, across) in ways.items():
        low = int(array.min())
        layout = context.Layout(way, across, classes, low, int(array.max()) - low + 1)
        turned = np.ascontiguousarray(array.T if across else array)
        parts[name] = grid + context._encode_rows(turned, layout, "auto")
        shapes[name] = array.shape
    step = np.dtype("<f4").type(0.25).tobytes()
    parts["blocks"] = head(3, "blocks") + step + blocks.encode(wide, block=700)
    parts["own"] = head(2, "huffman") + records.varint(3) + table.numpy().tobytes()
    parts["own"] += coded("huffman", np.abs(sparse) % 4)
    parts["filter"] = head(2, "bloomier") + records.varint(3) + table.numpy().tobytes()
    parts["filter"] += bloomier.encode(np.abs(sparse) % 4, bits=5)
    shapes |= {"blocks": wide.shape, "own": sparse.shape, "filter": sparse.shape}
    curve = torch.from_numpy(wide).float().reshape(-1) / 64
    plain = {"float": curve, "half": curve.to(torch.bfloat16), "count": torch.arange(300)}
    body, lines = b"", []
    for name, part in parts.items():
        body += records.varint(len(part)) + part
        lines.append(f"{name}:{','.join(map(str, shapes[name]))}")
    held = torch.where(curve > 0.1, curve, torch.zeros(()))
    for name, values in {**{k: Plain(v) for k, v in plain.items()}, "thin": Sparse(held)}.items():
        body += records.encode(values)
        dtype = records.DTYPE_NAMES[values.tensor.dtype]
        size = ",".join(map(str, values.tensor.shape))
        lines.append(f"{name}:{size}" + f":{dtype}" * (dtype != "f32"))
    manifest = {"lamina": 2, "by": "0.1.0", "skeleton": "module", "tensors": " ".join(lines)}
    data = seal(manifest, body)
    return data, unpack(data).state()


def third() -> tuple[bytes, dict[str, torch.Tensor]]:
    """Return a file of version 3, with grids per block of every kind, and its dense tensors."""
    wide = symbols(12, 40, 60)
    turn = torch.from_numpy(symbols(12, 10, 200)).float().div(64).exp2()
    bodies, lines = b"", []
    for number, (codec, kind, dtype, factor) in enumerate(
        [
            ("rans", torch.float16, torch.float32, None),
            ("rans", torch.float16, torch.float32, -7.5),
            ("context", torch.float16, torch.float32, 0.0),
            ("adaptive", torch.float16, torch.float16, -7.5),
            ("blocks", torch.float16, torch.bfloat16, -7.5),
            ("raw", torch.float16, torch.float64, 1e30),  # a guess that is infinite
            ("rans", torch.float32, torch.float32, None),
            ("context", torch.float32, torch.float32, -7.5),
            ("adaptive", torch.float32, torch.bfloat16, 0.0),
            ("blocks", torch.float32, torch.float32, -7.5),
        ]
    ):
        steps = (turn * 0.0123).to(kind).numpy()
        word = "<u2" if kind == torch.float16 else "<u4"
        flags = 0x40 * (factor is not None) | 0x80 * (kind == torch.float32)
        body = head(4, codec, flags) + records.varint(4) + framed(steps.view(word))
        if factor is not None:
            leasts = (steps.astype("f4") * np.float32(-7.1)).astype(steps.dtype)
            with np.errstate(over="ignore"):
                guess = (steps.astype("f4") * np.float32(factor)).astype(steps.dtype)
            body += np.dtype("<f4").type(factor).tobytes()
            body += framed(leasts.view(word) - guess.view(word))
        body += blocks.encode(wide, block=70) if codec == "blocks" else coded(codec, wide)
        bodies += records.varint(len(body)) + body
        lines.append(f"t{number}:12,8,5:{records.DTYPE_NAMES[dtype]}")
    bodies += records.encode(Plain(turn))
    lines.append("plain:12,10")
    manifest = {"lamina": 3, "by": "0.1.0", "skeleton": "module", "tensors": " ".join(lines)}
    data = seal(manifest, bodies)
    return data, unpack(data).state()


def framed(words: np.ndarray) -> bytes:
    """Return integers by planes, with their length before them."""
    data = planes.encode(np.ascontiguousarray(words).tobytes(), words.itemsize, False)
    return records.varint(len(data)) + data


if __name__ == "__main__":
    target = GOLDEN / "version-3.lamina"
    if target.exists():
        raise SystemExit(f"{target.name} is there: golden files never change")
    data, state = third()
    target.write_bytes(data)
    save_file(state, target.with_suffix(".safetensors"))
