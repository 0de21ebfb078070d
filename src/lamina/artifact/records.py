"""Tensor records: one tensor's values to bytes and back, exactly.

    record  = varint(length of body) body
    body    = head [parameters] payload...
    head    = form (bits 0-2: 0 plain, 1 sparse, 2 codebook, 3 grid)
              + codec of the symbols (bits 3-5: index into CODEC_IDS)
              + flag (bit 6: exponents follow) + axis (bit 7)
    plain   : raw little-endian values
    sparse  : varint(length) coded 0/1 mask; raw little-endian non-zeros, in row order
    codebook: k - 1 as varint, k float32 centroids; coded index
    grid    : float32 step; [codec byte, varint(length), coded exponents]; coded symbols

Symbols are coded as the tensor's 2-D view `[shape[0], rest]`.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import torch

from lamina import codecs
from lamina.codecs import raw
from lamina.errors import FileError
from lamina.forms import Codebook, Grid, Plain, Sparse, Values

CODEC_IDS = ("raw", "rans", "adaptive")  # the order is part of the format
DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f64": torch.float64,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
    "c64": torch.complex64,
    "c128": torch.complex128,
}
DTYPE_NAMES = {v: k for k, v in DTYPES.items()}


def varint(value: int) -> bytes:
    """Return an unsigned LEB128 integer."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return (value, position after it).

    Raises:
        FileError: the data ends inside the number, or it has more than nine bytes.
    """
    value = 0
    for i in range(9):
        if at + i >= len(data):
            break
        byte = data[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    raise FileError("a number in the file is cut off", f"byte {at}", "the file is damaged")


def flat_bytes(tensor: torch.Tensor) -> bytes:
    """Return a tensor's raw little-endian bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def from_bytes(data: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Undo `flat_bytes`.

    Raises:
        FileError: the length does not fit the shape.
    """
    size = torch.empty((), dtype=dtype).element_size()
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if len(data) != count * size:
        raise FileError(
            "a raw tensor has the wrong length", f"{shape} {dtype}", f"{len(data)} bytes"
        )
    if not count:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool and max(data) > 1:  # undefined behaviour in torch
        raise FileError("a truth value is neither 0 nor 1", str(shape), "the file is damaged")
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def matrix_view(symbols: torch.Tensor) -> np.ndarray:
    """Return integers as the 2-D int32 array that codecs see."""
    array = symbols.detach().cpu().to(torch.int32).contiguous().numpy()
    return array.reshape(view_shape(tuple(array.shape)))


def view_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the 2-D view's shape: `[shape[0], rest]`; vectors and scalars are one row."""
    if len(shape) < 2:
        return (1, int(np.prod(shape, dtype=np.int64)) if shape else 1)
    return (shape[0], int(np.prod(shape[1:], dtype=np.int64)))


def _code(array: np.ndarray) -> tuple[int, bytes]:
    name, data = codecs.best(array)
    return CODEC_IDS.index(name), data


def _decode(codec: int, data: memoryview, shape: tuple[int, int]) -> torch.Tensor:
    if codec >= len(CODEC_IDS):
        raise FileError(
            "unknown codec", str(codec), "this version does not have it", "update lamina"
        )
    name = CODEC_IDS[codec]
    if name == "raw":
        array = raw.decode(bytes(data), shape, np.dtype("<i4"))
    else:
        array = codecs.get(name).decode(bytes(data), shape)
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))


def encode(values: Values) -> bytes:
    """Return a tensor's record."""
    if isinstance(values, Plain):
        body = bytes([0]) + flat_bytes(values.tensor)
    elif isinstance(values, Sparse):
        body = _encode_sparse(values)
    elif isinstance(values, Codebook):
        codec, data = _code(matrix_view(values.index))
        table = flat_bytes(values.centroids.to(torch.float32))
        body = bytes([2 | codec << 3]) + varint(len(values.centroids) - 1) + table + data
    else:
        body = _encode_grid(values)
    return varint(len(body)) + body


def _encode_sparse(values: Sparse) -> bytes:
    tensor = values.tensor.detach().cpu().contiguous()
    # By bits and not by value: a negative zero has to come back.
    flat = tensor.reshape(-1)
    mask = flat.view(torch.uint8).reshape(flat.numel(), -1).any(1) if flat.numel() else flat != 0
    mask = mask.reshape(tensor.shape).bool()  # `any` of bytes gives bytes
    codec, data = _code(matrix_view(mask))
    return bytes([1 | codec << 3]) + varint(len(data)) + data + flat_bytes(tensor[mask])


def _encode_grid(values: Grid) -> bytes:
    codec, data = _code(matrix_view(values.symbols))
    head = 3 | codec << 3
    extra = b""
    if values.exponents is not None:
        head |= 0x40 | (values.axis << 7)
        exponent_codec, exponents = _code(matrix_view(values.exponents))
        extra = bytes([exponent_codec]) + varint(len(exponents)) + exponents
    return bytes([head]) + struct.pack("<f", values.step) + extra + data


def decode(body: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> Values:
    """Undo `encode`, from a record's body.

    Raises:
        FileError: the record is damaged, or of a form or codec this version does not have.
    """
    if not len(body):
        raise FileError("a tensor record is empty", str(shape), "the file is damaged")
    form, codec = body[0] & 7, body[0] >> 3 & 7
    if form == 0:
        return Plain(from_bytes(body[1:], shape, dtype))
    if form == 1:
        return _decode_sparse(body, codec, shape, dtype)
    if form == 2:
        return _decode_codebook(body, codec, shape, dtype)
    if form == 3:
        return _decode_grid(body, codec, shape, dtype)
    raise FileError("unknown form of values", str(form), "", "update lamina")


def codec_of(body: memoryview) -> str:
    """Return the name of the codec of a valid record's symbols."""
    return CODEC_IDS[body[0] >> 3 & 7] if body[0] & 7 else "raw"


def _part(body: memoryview, at: int, length: int) -> tuple[memoryview, int]:
    if length > len(body) - at:
        raise FileError("a tensor record is cut off", f"byte {at}", "the file is damaged")
    return body[at : at + length], at + length


def _decode_sparse(
    body: memoryview, codec: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Values:
    length, at = read_varint(body, 1)
    data, at = _part(body, at, length)
    mask = _decode(codec, data, view_shape(shape)).reshape(shape)
    if bool(((mask != 0) & (mask != 1)).any()):
        raise FileError("a mask holds more than 0 and 1", str(shape), "the file is damaged")
    nonzero = from_bytes(body[at:], (int(mask.sum()),), dtype)
    tensor = torch.zeros(shape, dtype=dtype)
    tensor[mask.bool()] = nonzero
    return Sparse(tensor)


def _decode_codebook(
    body: memoryview, codec: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Values:
    count, at = read_varint(body, 1)
    table, at = _part(body, at, (count + 1) * 4)
    centroids = from_bytes(table, (count + 1,), torch.float32)
    index = _decode(codec, body[at:], view_shape(shape)).reshape(shape)
    if index.numel() and (int(index.min()) < 0 or int(index.max()) > count):
        raise FileError("a codebook index is out of range", str(shape), "the file is damaged")
    return Codebook(index, centroids, dtype)


def _decode_grid(
    body: memoryview, codec: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Values:
    head, at = _part(body, 1, 4)
    (step,) = struct.unpack("<f", head)
    exponents, axis = None, body[0] >> 7
    if body[0] & 0x40:
        kind, at = _part(body, at, 1)
        length, at = read_varint(body, at)
        data, at = _part(body, at, length)
        rest = math.prod(shape[1:])
        if not shape or not shape[0] * rest:
            raise FileError("a grid with exponents has no axes", str(shape), "the file is damaged")
        count = rest if axis else shape[0]
        exponents = _decode(kind[0], data, (1, count)).reshape(-1)
        if exponents.numel() and int(exponents.abs().max()) > 400:
            raise FileError("a grid's exponent is out of range", str(shape), "the file is damaged")
    symbols = _decode(codec, body[at:], view_shape(shape)).reshape(shape)
    return Grid(symbols, step, exponents, axis, dtype)
