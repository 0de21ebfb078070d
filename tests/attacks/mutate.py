"""Mutations of files: of bytes, of records, of the table and the JSON; checksums mended or not."""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

from tests.attacks.files import mend, open_up, seal, wrap

from lamina.artifact import records
from lamina.errors import FileError

BYTES = (0, 1, 2, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 129, 192, 254, 255)
NUMBERS: tuple[Any, ...] = (
    0,
    1,
    2,
    3,
    7,
    255,
    256,
    65535,
    65536,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 40,
    1 << 63,
    1 << 64,
    1 << 200,
    -1,
    -2,
    0.0,
    1.0,
    2.5,
    1e308,
    float("inf"),
    float("nan"),
)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    False,
    "",
    "a",
    ".",
    "..",
    "1",
    "\0",
    "a\x1bb",
    "\ud800",
    "__class__",
    [],
    {},
    [[]],
    [1],
    {"a": 1},
    "f32",
    "module",
    "zoo:lenet-5",
    "zoo:no",
    "python:os.py:system",
    "low_rank",
    "tucker",
    "biased",
    "identity",
    "layout",
    "values",
)
SIDES = (
    "0",
    "1",
    "2",
    "3",
    "9",
    "14",
    "64",
    "-1",
    "1048576",
    str(1 << 40),
    "9" * 30,
    "",
    "x",
    "1.5",
)
BROKEN = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, struct.error)
BROKEN += (RecursionError,)
DTYPES = (*records.DTYPES, "f8", "")


def mutate(data: bytes, other: bytes, random: Random) -> bytes:
    """Return a file made from one file, and perhaps parts of another."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        kind = random.random()
        try:
            if kind < 0.25:
                data = change_bytes(data, other, random)
            elif kind < 0.7:
                data = change_record(data, other, random)
            elif kind < 0.85:
                data = change_table(data, random)
            else:
                data = change_json(data, random)
        except (*BROKEN, FileError):  # no structure is left to change
            data = mend(edit_bytes(data, other, random))
    return data


def change_bytes(data: bytes, other: bytes, random: Random) -> bytes:
    """Edit the whole file's bytes; mostly the header's length and the checksum are mended."""
    if len(data) < 12:
        return edit_bytes(data, other, random)
    if random.random() < 0.1:
        return edit_bytes(data, other, random)
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) or random.random() < 0.2:
        return mend(edit_bytes(data[:-4], other, random))
    head, body = data[8 : 8 + length], data[8 + length : -4]
    if random.random() < 0.5:
        head = edit_bytes(head, other[8:], random)
    else:
        body = edit_bytes(body, other, random)
        size = len(body) + 4
        header = json.loads(head)
        header["d"]["shape"], header["d"]["data_offsets"] = [size], [0, size]
        head = json.dumps(header).encode()
    return mend(struct.pack("<Q", len(head)) + head + body)


def edit_bytes(data: bytes, other: bytes, random: Random) -> bytes:
    """Flip, set, cut, insert, repeat or splice."""
    out, kind = bytearray(data), random.randrange(8)
    at = random.randrange(len(out)) if out else 0
    if not out or kind == 0:
        out[at:at] = random.randbytes(random.choice((1, 1, 2, 4, 9)))
    elif kind in (1, 2):
        out[at] ^= 1 << random.randrange(8)
    elif kind == 3:
        out[at] = random.choice(BYTES)
    elif kind == 4:
        del out[at : at + random.choice((1, 1, 2, 4, 16, len(out)))]
    elif kind == 5:
        end = at + random.randrange(1, 17)
        out[at:at] = out[at:end] * random.choice((1, 1, 3))
    elif kind == 6:
        begin = random.randrange(len(other) or 1)
        piece = other[begin : begin + random.randrange(1, 40)]
        out[at : at + random.choice((0, len(piece)))] = piece
    else:
        number = records.varint(min(abs(int(random.choice(NUMBERS[:15]))), (1 << 62)))
        out[at : at + random.choice((0, 1, len(number)))] = number
    return bytes(out)


def change_record(data: bytes, other: bytes, random: Random) -> bytes:
    """Change the body of one record and seal the file again: damage that only a codec can see."""
    manifest, bodies = open_up(data)
    if not bodies:
        return change_table(data, random)
    at, kind = random.randrange(len(bodies)), random.random()
    body = bodies[at]
    if kind < 0.15 and body:  # near the start: headers of records and codecs
        near = random.randrange(min(len(body), 12))
        body = body[:near] + bytes([random.randrange(256)]) + body[near + 1 :]
    elif kind < 0.3 and body:  # another form, codec or flag
        body = bytes([random.randrange(256)]) + body[1:]
    elif kind < 0.38:
        body = random.choice(open_up(other)[1] or [b""])
    else:
        body = edit_bytes(body, other, random)
    bodies[at] = body
    return seal(manifest, *bodies)


def change_table(data: bytes, random: Random) -> bytes:
    """Change one entry of the tensor table."""
    manifest, bodies = open_up(data)
    table = manifest["tensors"].split(" ")
    at, kind = random.randrange(len(table)), random.randrange(7)
    name, sizes, dtype = (table[at] + "::").split(":")[:3]
    sides = sizes.split(",")
    if kind == 0:
        dtype = random.choice(DTYPES)
    elif kind in (1, 2):
        sides[random.randrange(len(sides))] = random.choice(SIDES)
    elif kind == 3:
        sides = random.choice(
            (sides[::-1], sides[1:], [*sides, "1"], ["1", *sides], [*sides, *sides])
        )
    elif kind == 4:
        name = random.choice(("", ".", "..", ".x.y", "a", "a.b", "x" * 3000, "é", "_", *table[:1]))
    elif kind == 5:
        table.insert(at, random.choice(table))
    else:
        table[at] = ""
    if kind < 5:
        table[at] = f"{name}:{','.join(sides)}" + (f":{dtype}" if dtype else "")
    return seal({**manifest, "tensors": " ".join(table)}, *bodies)


def change_json(data: bytes, random: Random) -> bytes:
    """Change one value somewhere in the manifest or the header."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length : -4]
    if random.random() < 0.15:
        alter(header, random)
        return wrap("", body, header)
    manifest = json.loads(header["__metadata__"]["lamina"])
    alter(manifest, random)
    text = json.dumps(manifest)
    if random.random() < 0.1:  # a key comes twice
        text = text[:-1] + ', "' + random.choice(list(manifest)) + '": 1}'
    return wrap(text, body)


def alter(node: Any, random: Random) -> None:
    """Replace, add or remove one value of nested lists and maps, in place."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys or random.random() < 0.05:
            if isinstance(node, dict):
                node[random.choice(("edits", "plan", "x", "tensors"))] = random.choice(VALUES)
            else:
                node.append(random.choice(VALUES))
            return
        key = random.choice(keys)
        child = node[key]
        if isinstance(child, (dict, list)) and random.random() < 0.75:
            node = child
            continue
        if random.random() < 0.15:
            del node[key]
        elif isinstance(child, dict | list) or random.random() < 0.8:
            node[key] = random.choice(VALUES)
        else:
            node[key] = [child]
        return
