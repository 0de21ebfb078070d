"""Tensor records: one tensor's values to bytes, and the heads of records back.

    record  = varint(length of body) body
    body    = head [parameters] payload...
    head    = form (bits 0-2: 0 plain, 1 sparse, 2 codebook, 3 grid, 4 affine)
              + codec of the symbols (bits 3-5: index into CODEC_IDS; plain: 0 raw, 1 planes)
              + flag (bit 6: grid: exponents follow; sparse: non-zeros by planes; affine: there are
              least values) + axis (bit 7; affine: steps are float32, not float16)
    plain   : raw little-endian values, or planes
    sparse  : varint(length) coded 0/1 mask; non-zeros in row order, raw or planes
    codebook: k - 1 as varint, k float32 centroids; coded index
    grid    : float32 step; [codec byte, varint(length), coded exponents]; coded symbols
              (codec byte: bit 7 says that exponents of the columns follow those of the rows)
    affine  : block as varint; varint(length), steps; [float32 factor, varint(length), leasts];
              coded symbols (`steps.py`)

Symbols are coded as the tensor's 2-D view `[shape[0], rest]`. What the payloads hold is read in
`streams.py`, when it is wanted.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

import numpy as np
import torch

from lamina import codecs
from lamina.artifact import steps
from lamina.artifact.steps import Steps
from lamina.codecs import planes
from lamina.codecs.fields import varint
from lamina.errors import FileError
from lamina.forms import Affine, Codebook, Grid, Plain, Sparse, Values
from lamina.forms.values import BOTH

# the order is part of the format
CODEC_IDS = ("raw", "rans", "adaptive", "context", "blocks", "huffman", "bloomier")
FORMS = ("plain", "sparse", "codebook", "grid", "affine")
OWN_CODES = ("huffman", "bloomier")  # a method chose these: they are kept when saved again
SAMPLE, SAMPLES = 1 << 14, 8  # elements, stretches: of more, sizes are predicted
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


def plane_layout(dtype: torch.dtype) -> tuple[int, bool]:
    """Return what planes need to know of a dtype: bytes of an element, and whether it is a float.

    A complex number is two floats.
    """
    return dtype.itemsize >> dtype.is_complex, dtype.is_floating_point or dtype.is_complex


def matrix_view(symbols: torch.Tensor) -> np.ndarray:
    """Return integers as the 2-D int32 array that codecs see."""
    array = symbols.detach().cpu().to(torch.int32).contiguous().numpy()
    return array.reshape(view_shape(tuple(array.shape)))


def view_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the 2-D view's shape: `[shape[0], rest]`; vectors and scalars are one row."""
    if len(shape) < 2:
        return (1, math.prod(shape))
    return (shape[0], math.prod(shape[1:]))


def encode(values: Values) -> bytes:
    """Return a tensor's record.

    Raises:
        FileError: a codebook's own code does not give its index.
    """
    if isinstance(values, Plain):
        split, data = _code_values(values.tensor)
        body = bytes([split << 3]) + data
    elif isinstance(values, Sparse):
        body = _encode_sparse(values)
    elif isinstance(values, Codebook):
        codec, data = _own_code(values) if values.code else _code(matrix_view(values.index))
        table = flat_bytes(values.centroids.to(torch.float32))
        body = bytes([2 | codec << 3]) + varint(len(values.centroids) - 1) + table + data
    elif isinstance(values, Affine):
        codec, data = _code(matrix_view(values.symbols))
        flags = (values.leasts is not None) << 6 | (values.steps.dtype == torch.float32) << 7
        body = bytes([4 | codec << 3 | flags]) + steps.encode(values) + data
    else:
        body = _encode_grid(values)
    return varint(len(body)) + body


def form_of(record: bytes) -> str:
    """Return the form of a record that `encode` made."""
    return FORMS[record[read_varint(memoryview(record), 0)[1]] & 7]


def _code(array: np.ndarray) -> tuple[int, bytes]:
    name, data = codecs.best(array)
    return CODEC_IDS.index(name), data


def _own_code(values: Codebook) -> tuple[int, bytes]:
    """Return the code that a method made itself, if it says what the index says."""
    name, data = values.code or ("", b"")
    index = matrix_view(values.index)
    if name not in CODEC_IDS or not np.array_equal(
        codecs.get(name).decode(data, index.shape), index
    ):
        raise FileError(
            "a codebook cannot be stored", repr(name), "its own code does not give its index",
            "make the code again after the index has changed, or leave it out",
        )  # fmt: skip
    return CODEC_IDS.index(name), data


def _code_values(tensor: torch.Tensor) -> tuple[bool, bytes]:
    """Return whether planes are shorter than raw values, and the shorter of the two."""
    raw = flat_bytes(tensor)
    split = planes.encode(raw, *plane_layout(tensor.dtype)) if raw else raw
    return (True, split) if len(split) < len(raw) else (False, raw)


def values_bytes(tensor: torch.Tensor) -> float:
    """Return what exact values take in a file [bytes]; for many, from a sample of them.

    Example:
        >>> values_bytes(torch.zeros(1000)) < 10
        True
    """
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= 2 * SAMPLE * SAMPLES:
        return float(len(_code_values(flat)[1]))
    starts = torch.linspace(0, flat.numel() - SAMPLE, SAMPLES).long().tolist()
    some = torch.cat([flat[start : start + SAMPLE] for start in starts])
    return len(_code_values(some)[1]) * flat.numel() / some.numel()


def _encode_sparse(values: Sparse) -> bytes:
    tensor = values.tensor.detach().cpu().contiguous()
    # By bits and not by value: a negative zero has to come back.
    flat = tensor.reshape(-1)
    mask = flat.view(torch.uint8).reshape(flat.numel(), -1).any(1) if flat.numel() else flat != 0
    mask = mask.reshape(tensor.shape).bool()  # `any` of bytes gives bytes
    codec, data = _code(matrix_view(mask))
    split, held = _code_values(tensor[mask])
    return bytes([1 | codec << 3 | split << 6]) + varint(len(data)) + data + held


def _encode_grid(values: Grid) -> bytes:
    codec, data = _code(matrix_view(values.symbols))
    head = 3 | codec << 3
    extra = b""
    if values.exponents is not None:
        both = values.axis == BOTH
        head |= 0x40 | (0 if both else values.axis << 7)
        exponent_codec, exponents = _code(matrix_view(values.exponents))
        exponent_codec |= 0x80 * both
        extra = bytes([exponent_codec]) + varint(len(exponents)) + exponents
    return bytes([head]) + struct.pack("<f", values.step) + extra + data


@dataclass(frozen=True)
class Record:
    """What a record's head says, and where its payloads are; nothing is decoded yet.

    Args:
        form: one of `FORMS`.
        codec: of the symbols (of the mask, if sparse); plain: `"raw"` or `"planes"`.
        shape, dtype: of the dense tensor.
        where: what errors call it.
        payload: the coded symbols; plain: the values.
        values: sparse: the non-zeros.
        split: the values (plain, sparse) are coded by planes.
        centroids: codebook: float32 `[k]`.
        step: grid.
        exponents: grid: codec and bytes of the exponents.
        axis: grid: the exponents' axis, or `BOTH`.
        steps: affine: steps and least values.
    """

    form: str
    codec: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    payload: memoryview
    values: memoryview = field(default_factory=lambda: memoryview(b""))
    split: bool = False
    centroids: torch.Tensor | None = None
    step: float = 0.0
    exponents: tuple[str, memoryview] | None = None
    axis: int = 0
    steps: Steps | None = None

    @property
    def elements(self) -> int:
        """How many elements the dense tensor has."""
        return math.prod(self.shape)


def parse(body: memoryview, shape: tuple[int, ...], dtype: torch.dtype, where: str = "") -> Record:
    """Read a record's head and check it against the declared shape; cheap, whatever its size.

    Raises:
        FileError: it is damaged, or of a form or codec this version does not have.
    """
    where = where or f"{shape} {dtype}"
    if not len(body):
        raise FileError("a tensor record is empty", where, "the file is damaged")
    head = body[0]
    form, codec = head & 7, head >> 3 & 7
    if form >= len(FORMS):
        raise FileError("unknown form of values", str(form), "", "update lamina")
    if form == 0:
        return _parse_plain(body[1:], codec, shape, dtype, where)
    name = _codec_name(codec)
    if form == 1:
        length, at = read_varint(body, 1)
        mask, at = _part(body, at, length)
        split = bool(head & 0x40)
        return Record("sparse", name, shape, dtype, where, mask, body[at:], split)
    if form == 2:
        count, at = read_varint(body, 1)
        table, at = _part(body, at, (count + 1) * 4)
        _check_float(dtype, where)
        centroids = torch.frombuffer(bytearray(table), dtype=torch.float32)
        return Record("codebook", name, shape, dtype, where, body[at:], centroids=centroids)
    _check_float(dtype, where)
    if form == 4:
        return _parse_affine(body, name, shape, dtype, where)
    number, at = _part(body, 1, 4)
    (step,) = struct.unpack("<f", number)
    exponents, axis = None, head >> 7
    if head & 0x40:
        kind, at = _part(body, at, 1)
        length, at = read_varint(body, at)
        data, at = _part(body, at, length)
        if not shape or not math.prod(shape):
            raise FileError("a grid with exponents has no axes", where, "the file is damaged")
        if kind[0] & 0x80:
            if axis:
                raise FileError("a grid's exponents have two axes", where, "the file is damaged")
            axis = BOTH
        exponents = (_codec_name(kind[0] & 0x7F), data)
    return Record(
        "grid", name, shape, dtype, where, body[at:], step=step, exponents=exponents, axis=axis
    )


def _parse_affine(
    body: memoryview, codec: str, shape: tuple[int, ...], dtype: torch.dtype, where: str
) -> Record:
    kind = torch.float32 if body[0] & 0x80 else torch.float16
    block, at = read_varint(body, 1)
    columns = view_shape(shape)[1]
    if not math.prod(shape) or not block or columns % block:
        why = f"{columns} columns are no blocks of {block}"
        raise FileError("a tensor has no such blocks", where, why)
    length, at = read_varint(body, at)
    coded, at = _part(body, at, length)
    factor, leasts = 0.0, None
    if body[0] & 0x40:
        number, at = _part(body, at, 4)
        (factor,) = struct.unpack("<f", number)
        length, at = read_varint(body, at)
        leasts, at = _part(body, at, length)
    if not math.isfinite(factor):
        raise FileError("the factor of the least values is not finite", where, "", "copy it again")
    held = Steps(block, kind, coded, factor, leasts)
    return Record("affine", codec, shape, dtype, where, body[at:], steps=held)


def _parse_plain(
    data: memoryview, codec: int, shape: tuple[int, ...], dtype: torch.dtype, where: str
) -> Record:
    size = math.prod(shape) * dtype.itemsize
    if codec > 1:
        raise FileError("unknown codec of values", str(codec), "", "update lamina")
    if codec:
        planes.blocks(data, size, *plane_layout(dtype))  # raises where blocks are cut off
    elif len(data) != size:
        why = f"{len(data)} bytes instead of {size}"
        raise FileError("a raw tensor has the wrong length", where, why)
    name = "planes" if codec else "raw"
    return Record("plain", name, shape, dtype, where, data, split=bool(codec))


def _check_float(dtype: torch.dtype, where: str) -> None:
    if not dtype.is_floating_point:
        why = f"it is declared {dtype}"
        raise FileError("a grid or a codebook holds floats only", where, why)


def _codec_name(codec: int) -> str:
    if codec >= len(CODEC_IDS) or CODEC_IDS[codec] not in codecs.CODECS:
        why = "this version does not have it"
        raise FileError("unknown codec", str(codec), why, "update lamina")
    return CODEC_IDS[codec]


def _part(body: memoryview, at: int, length: int) -> tuple[memoryview, int]:
    if length > len(body) - at:
        raise FileError("a tensor record is cut off", f"byte {at}", "the file is damaged")
    return body[at : at + length], at + length
