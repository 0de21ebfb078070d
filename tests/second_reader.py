"""A second reader of `.lamina` files, written from docs/format.md alone: it proves the document."""

from __future__ import annotations

import json
import math
import struct
import zlib

import numpy as np
from tests.second_adaptive import adaptive
from tests.second_codecs import bloomier, huffman, planes
from tests.second_context import blocks, context
from tests.second_rans import rans, varint

KINDS = "f16 <f2 f32 <f4 f64 <f8 bf16 <u2 i8 i1 i16 <i2 i32 <i4 i64 <i8 u8 u1 bool ? c64 <c8"
KINDS = dict(zip(KINDS.split()[::2], KINDS.split()[1::2], strict=True), c128="<c16")


def read_file(data):
    """Return (manifest, {name: dense array}); bf16 as its 16 bits."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise ValueError("checksum")
    manifest, data = json.loads(header["__metadata__"]["lamina"]), data[8 + length : -4]
    if manifest["lamina"] not in (1, 2, 3):
        raise ValueError("version")
    dense, name = {}, ""
    for entry in manifest["tensors"].split():
        shown, sizes, dtype = (entry + ":f32").split(":")[:3]
        name = name.rpartition(".")[0] + shown if shown[0] == "." else shown
        shape = tuple(map(int, sizes.split(","))) if sizes else ()
        n, data = varint(data)
        dense[name] = read_record(data[:n], shape, dtype)
        data = data[n:]
    return manifest, dense


def read_record(body, shape, dtype):
    form, codec, flag, axis = body[0] & 7, body[0] >> 3 & 7, body[0] >> 6 & 1, body[0] >> 7
    view = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
    kind, body = np.dtype(KINDS[dtype]), body[1:]
    if form == 0:
        return read_values(body, codec, math.prod(shape), kind).reshape(shape)
    if form == 1:
        n, body = varint(body)
        mask = read_symbols(body[:n], codec, view).reshape(shape) != 0
        out = np.zeros(shape, kind)
        out[mask] = read_values(body[n:], flag, int(mask.sum()), kind)
        return out
    if form == 2:
        n, body = varint(body)
        table = np.frombuffer(body[: 4 * n + 4], "<f4")
        return rounded(table[read_symbols(body[4 * n + 4 :], codec, view)], dtype).reshape(shape)
    if form == 4:
        return rounded(read_blocks(body, codec, flag, axis, view), dtype).reshape(shape)
    scale, body = np.frombuffer(body[:4], "<f4"), body[4:]
    if flag:
        n, rest = varint(body[1:])
        both = body[0] >> 7
        e = read_symbols(rest[:n], body[0] & 127, (1, sum(view) if both else view[axis]))[0]
        octaves = np.array([1.0, 1.189207115002721, 1.4142135623730951, 1.681792830507429])[e % 4]
        octaves, body = np.ldexp(octaves, e // 4).astype("<f4"), rest[n:]
        if both:
            rows, columns = octaves[: view[0]] * scale, octaves[view[0] :]
            values = read_symbols(body, codec, view).astype("<f4") * rows[:, None] * columns
            return rounded(values, dtype).reshape(shape)
        scale = octaves * scale
        scale = scale if axis else scale[:, None]
    return rounded(read_symbols(body, codec, view).astype("<f4") * scale, dtype).reshape(shape)


def read_blocks(body, codec, flag, single, view):
    number, word = ("<f4", "<i4") if single else ("<f2", "<i2")
    block, body = varint(body)
    count = view[0] * view[1] // block
    n, body = varint(body)
    step, body = planes(body[:n], count, np.dtype(word)).view(number), body[n:]
    if flag:
        factor, (n, body) = np.frombuffer(body[:4], "<f4"), varint(body[4:])
        with np.errstate(over="ignore"):
            guess = (step.astype("<f4") * factor).astype(number).view(word)
        least, body = (planes(body[:n], count, np.dtype(word)) + guess).view(number), body[n:]
    values = read_symbols(body, codec, view).astype("<f4").reshape(-1, block)
    values = values * step[:, None].astype("<f4")
    return values + least[:, None].astype("<f4") if flag else values


def rounded(values, dtype):
    if dtype != "bf16":
        return values.astype(KINDS[dtype])
    bits = values.view("<u4").astype("<u8")
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("<u2")


def read_values(data, codec, count, kind):
    return planes(data, count, kind) if codec else np.frombuffer(data, kind, count)


def read_symbols(data, codec, shape):
    return np.array(CODECS[codec](data, shape)).reshape(shape)


def raw(data, shape):
    return np.frombuffer(data, "<i4")


CODECS = (raw, rans, adaptive, context, blocks, huffman, bloomier)
