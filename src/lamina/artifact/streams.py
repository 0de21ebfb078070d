"""Reading records piece by piece: symbols, forms of values, and dense tensors in their own memory.

A dense tensor is written part by part into the memory it will stay in, by the arithmetic of
`Grid.dense` and `Codebook.dense` to the bit, so that next to the network itself only the file and
a few parts are ever held. Parts are independent: a few threads share them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamina import codecs
from lamina.artifact import steps
from lamina.artifact.records import OWN_CODES, Record, plane_layout, view_shape
from lamina.codecs import planes, raw
from lamina.codecs.symbols import count_elements
from lamina.errors import FileError
from lamina.forms import Affine, Codebook, Grid, Plain, Sparse, Values
from lamina.forms.values import BOTH, exponent_scale

Bytes = NDArray[np.uint8]
Task = Callable[[], None]
Write = Callable[[NDArray[Any], int, NDArray[np.float32]], None]  # symbols, from which on, where to
MOST_THREADS = 4
COPIED = 1 << 24  # bytes of raw values that are one task
WRITTEN = 1 << 18  # elements that are converted at a time: they stay in the cache
CONVERTED = 1 << 14  # the same through torch, which would start threads of its own for more
LARGEST_EXPONENT = 400
WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}  # elements that are moved, not read


def decode(record: Record) -> Values:
    """Return the values of one tensor, in their form; symbols as narrow as their codec gives them.

    Raises:
        FileError: the record is damaged.
    """
    if record.form == "plain":
        return Plain(dense(record))
    if record.form == "sparse":
        return Sparse(dense(record))
    with _errors_of(record.where):
        symbols = torch.from_numpy(_all_symbols(record)).reshape(record.shape)
        exponents = _exponents(record)
        blocks = _steps(record)
    if record.steps is not None:
        shape = (view_shape(record.shape)[0], -1)
        each, leasts = (None if x is None else x.reshape(shape) for x in blocks)
        assert each is not None
        return Affine(symbols, each, leasts, record.steps.block, record.dtype)
    if record.centroids is not None:
        code = (record.codec, bytes(record.payload)) if record.codec in OWN_CODES else None
        return Codebook(symbols, record.centroids, record.dtype, code)
    return Grid(symbols, record.step, exponents, record.axis, record.dtype)


def dense(record: Record, threads: int = 1) -> torch.Tensor:
    """Return one tensor, dense, to the bit what `decode(record).dense()` is.

    Raises:
        FileError: the record is damaged.
    """
    tensor = torch.empty(record.shape, dtype=record.dtype)
    run(fill(record, memory_of(tensor)), threads)
    return tensor


def memory_of(tensor: torch.Tensor) -> Bytes:
    """Return the memory of a contiguous tensor on the CPU, as bytes."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)


def thread_count() -> int:
    """Return how many threads read a file: as many as torch uses, four at most.

    `LAMINA_THREADS` says another number.
    """
    told = os.environ.get("LAMINA_THREADS", "")
    if told.isdecimal() and int(told):
        return int(told)
    return max(1, min(MOST_THREADS, torch.get_num_threads(), os.cpu_count() or 1))


def run(tasks: Iterable[Task], threads: int) -> None:
    """Do all tasks; the first error, in their order, ends it."""
    if threads == 1:
        for task in tasks:
            task()
        return
    pool = ThreadPoolExecutor(threads, "lamina-read")
    try:
        for done in [pool.submit(task) for task in tasks]:
            done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def fill(record: Record, memory: Bytes) -> list[Task]:
    """Return what has to be done, in any order and any thread, to write a tensor.

    Args:
        record: the tensor.
        memory: where its bytes go [elements * itemsize].

    Raises:
        FileError: the record is damaged; here, or in a task.
    """
    with _errors_of(record.where):
        tasks = FILLS[record.form](record, memory)
    return [_named(task, record.where) for task in tasks]


def _named(task: Task, where: str) -> Task:
    """Let the errors of a task say which tensor it was."""

    def work() -> None:
        with _errors_of(where):
            task()

    return work


@contextmanager
def _errors_of(where: str) -> Iterator[None]:
    """Let errors say which tensor it was."""
    try:
        yield
    except FileError as error:
        place = f"{where}, {error.where}" if error.where else where
        place = where if where in error.where else place
        raise FileError(error.what, place, error.why, error.fix) from None


# --- symbols --------------------------------------------------------------------------------------


def _parts(name: str, data: memoryview, shape: tuple[int, int]) -> tuple[codecs.Part, ...]:
    if name == "raw":
        size = count_elements(shape)
        return (codecs.Part(0, size, partial(raw.decode, bytes(data), (size,), np.dtype("<i4"))),)
    # The parts of blocks take their own bytes, when they are read.
    whole: Any = data if name == "blocks" else bytes(data)
    return codecs.parts(name, whole, shape)


def _symbol_parts(record: Record) -> tuple[codecs.Part, ...]:
    """Return the parts of a record's symbols; those of a codebook check themselves."""
    parts = _parts(record.codec, record.payload, view_shape(record.shape))
    if record.centroids is None:
        return parts
    most = len(record.centroids) - 1

    def checked(part: codecs.Part) -> NDArray[Any]:
        index = part.read()
        if index.size and (int(index.min()) < 0 or int(index.max()) > most):
            why = "the file is damaged"
            raise FileError("a codebook index is out of range", record.where, why)
        return index

    return tuple(codecs.Part(part.start, part.stop, partial(checked, part)) for part in parts)


def _all_symbols(record: Record) -> NDArray[Any]:
    return _join(_symbol_parts(record), record.elements)


def _join(parts: tuple[codecs.Part, ...], size: int) -> NDArray[Any]:
    """Return all symbols in one writable array, no wider than its widest part."""
    if len(parts) == 1:
        return np.require(parts[0].read(), requirements=["C", "W"])
    whole = np.empty(size, dtype=np.int8)
    for part in parts:
        symbols = part.read()
        if symbols.dtype.itemsize > whole.dtype.itemsize:
            whole = whole.astype(symbols.dtype)
        whole[part.start : part.stop] = symbols
    return whole


def _exponents(record: Record) -> torch.Tensor | None:
    """Return a grid's exponents, int32."""
    if record.exponents is None:
        return None
    name, data = record.exponents
    rows, columns = record.shape[0], math.prod(record.shape[1:])
    count = (rows, columns, rows + columns)[record.axis]
    found = _join(_parts(name, data, (1, count)), count).astype(np.int32)
    if found.size and int(np.abs(found, dtype=np.int64).max()) > LARGEST_EXPONENT:
        raise FileError("a grid's exponent is out of range", record.where, "the file is damaged")
    return torch.from_numpy(found)


def _steps(record: Record) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return steps and least values of all blocks, flat, or twice None."""
    if record.steps is None:
        return None, None
    return steps.decode(record.steps, record.elements // record.steps.block)


# --- dense tensors --------------------------------------------------------------------------------


def _fill_plain(record: Record, memory: Bytes) -> list[Task]:
    def check(written: Bytes) -> None:
        if record.dtype == torch.bool and written.size and written.max() > 1:
            why = "the file is damaged"  # other bytes are undefined behaviour in torch
            raise FileError("a truth value is neither 0 nor 1", record.where, why)

    if record.split:
        itemsize, floating = plane_layout(record.dtype)

        def unfold(block: planes.Block) -> None:
            planes.read_block(block, memory[block.start : block.stop], itemsize)
            check(memory[block.start : block.stop])

        found = planes.blocks(record.payload, memory.size, itemsize, floating)
        return [partial(unfold, block) for block in found]
    source = np.frombuffer(record.payload, np.uint8)

    def copy(at: int) -> None:
        check(source[at : at + COPIED])
        memory[at : at + COPIED] = source[at : at + COPIED]

    return [partial(copy, at) for at in range(0, memory.size, COPIED)]


def _fill_sparse(record: Record, memory: Bytes) -> list[Task]:
    """One task: where a part's non-zeros begin is known only after those before it."""
    size = record.dtype.itemsize
    target = memory.view(WORDS[size])

    def scatter() -> None:
        masks, count = [], 0
        for part in _symbol_parts(record):
            mask = part.read()
            if mask.size and (int(mask.min()) < 0 or int(mask.max()) > 1):
                raise FileError(
                    "a mask holds more than 0 and 1", record.where, "the file is damaged"
                )
            count += int(np.count_nonzero(mask))
            masks.append((part.start, part.stop, np.packbits(mask.astype(np.bool_))))
        chunks = _nonzeros(record, count * size)
        held = np.zeros(0, target.dtype)
        for start, stop, packed in masks:
            mask = np.unpackbits(packed, count=stop - start).view(np.bool_)
            wanted = int(np.count_nonzero(mask))
            while held.size < wanted:
                held = np.concatenate([held, next(chunks).view(target.dtype)])
            target[start:stop] = 0
            target[start:stop][mask] = held[:wanted]
            held = held[wanted:]

    return [scatter]


def _nonzeros(record: Record, size: int) -> Iterator[Bytes]:
    """Yield the bytes of a sparse tensor's non-zeros, in order."""
    if not record.split:
        if len(record.values) != size:
            why = f"{len(record.values)} bytes of values instead of {size}"
            raise FileError("a raw tensor has the wrong length", record.where, why)
        found: Iterable[Bytes] = [np.frombuffer(record.values, np.uint8)]
    else:
        itemsize, floating = plane_layout(record.dtype)
        blocks = planes.blocks(record.values, size, itemsize, floating)
        found = (_unfolded(block, itemsize) for block in blocks)
    for values in found:
        if record.dtype == torch.bool and values.size and values.max() > 1:
            why = "the file is damaged"
            raise FileError("a truth value is neither 0 nor 1", record.where, why)
        yield values


def _unfolded(block: planes.Block, itemsize: int) -> Bytes:
    out = np.empty(block.stop - block.start, np.uint8)
    planes.read_block(block, out, itemsize)
    return out


def _fill_codebook(record: Record, memory: Bytes) -> list[Task]:
    assert record.centroids is not None
    word = WORDS[record.dtype.itemsize]
    target = memory.view(word)
    table = memory_of(record.centroids.to(record.dtype)).view(word)

    def look_up(part: codecs.Part) -> None:
        index = part.read()
        for at in range(0, index.size, WRITTEN):
            some = index[at : at + WRITTEN]
            place = part.start + at
            table.take(some, out=target[place : place + some.size], mode="clip")  # checked before

    return [partial(look_up, part) for part in _symbol_parts(record)]


def _fill_grid(record: Record, memory: Bytes) -> list[Task]:
    step, columns = np.float32(record.step), 0
    exponents = _exponents(record)
    scale = last = np.zeros(0, np.float32)
    if exponents is not None:
        columns = record.elements // record.shape[0]
        if record.axis == BOTH:  # rows as they are, and columns without the step
            exponents, others = exponents.split([record.shape[0], columns])
            last = exponent_scale(others).numpy()
        scale = (exponent_scale(exponents) * torch.tensor(record.step, dtype=torch.float32)).numpy()

    def write(symbols: NDArray[Any], at: int, out: NDArray[np.float32]) -> None:
        if not columns:
            np.multiply(symbols, step, out=out, dtype=np.float32)
            return
        for a, b in _rows(at, at + symbols.size, columns):
            some, into = symbols[a - at : b - at], out[a - at : b - at]
            whole = not ((b - a) % columns or a % columns)
            if whole:
                some, into = some.reshape(-1, columns), into.reshape(-1, columns)
            first = a % columns  # of a part of one row; of whole rows 0
            across = slice(first, first + (columns if whole else b - a))
            if record.axis == 1:
                by = scale[across]
            else:
                by = scale[a // columns : b // columns, None] if whole else scale[a // columns]
            np.multiply(some, by, out=into, dtype=np.float32)
            if record.axis == BOTH:
                np.multiply(into, last[across], out=into)

    return _written(record, memory, write)


def _fill_affine(record: Record, memory: Bytes) -> list[Task]:
    assert record.steps is not None
    block = record.steps.block
    step, least = (None if x is None else x.float().numpy() for x in _steps(record))
    assert step is not None

    def write(symbols: NDArray[Any], at: int, out: NDArray[np.float32]) -> None:
        stop = at + symbols.size
        first, last = at // block, -(-stop // block)
        inside = slice(at - first * block, stop - first * block)
        # Two operations, each rounded, as in `Affine.dense`.
        np.multiply(symbols, step[first:last].repeat(block)[inside], out=out, dtype=np.float32)
        if least is not None:
            np.add(out, least[first:last].repeat(block)[inside], out=out)

    return _written(record, memory, write)


def _written(record: Record, memory: Bytes, write: Write) -> list[Task]:
    """Return the tasks that write the float32 values of symbols, part by part, in their dtype."""

    def convert(part: codecs.Part) -> None:
        symbols = part.read()
        narrow = record.dtype != torch.float32
        target = memory if narrow else memory.view(np.float32)
        many, size = (CONVERTED, record.dtype.itemsize) if narrow else (WRITTEN, 1)
        held = np.empty(min(many, symbols.size) if narrow else 0, np.float32)
        with np.errstate(all="ignore"):  # a hostile step may be infinite
            for at in range(0, symbols.size, many):
                some = symbols[at : at + many]
                start = part.start + at
                into = target[start * size : (start + some.size) * size]
                if narrow:
                    write(some, start, held[: some.size])
                    into[:] = memory_of(torch.from_numpy(held[: some.size]).to(record.dtype))
                else:
                    write(some, start, into)  # type: ignore[arg-type]

    return [partial(convert, part) for part in _symbol_parts(record)]


FILLS = {
    "plain": _fill_plain,
    "sparse": _fill_sparse,
    "codebook": _fill_codebook,
    "grid": _fill_grid,
    "affine": _fill_affine,
}


def _rows(start: int, stop: int, columns: int) -> Iterator[tuple[int, int]]:
    """Split a range of elements into the rest of a row, whole rows, and the start of a row."""
    first, last = min(-(-start // columns) * columns, stop), stop // columns * columns
    if start < first:
        yield start, first
    if first < last:
        yield first, last
    if max(first, last) < stop:
        yield max(first, last), stop
