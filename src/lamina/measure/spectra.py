"""Spectra of folds: the singular values of blocks of input columns, from Gram matrices.

An SVD of a wide matrix is many times slower than the eigenvalues of the Gram matrix of its short
side, and no more exact where it matters. Of a matrix `[f, n]` in k folds of n/k columns each:

* Where a fold is at least as wide as high, its Gram is `M_i M_i^T [f, f]`. A coarser fold's Gram is
  the sum of its parts', so that 8, 4, 2 and 1 folds take one pass over the matrix.
* Where a fold is narrower, its Gram is `M_i^T M_i`: a diagonal block of that of any coarser fold.

In float64 a value is off by about `1e-16 s_1^2 / s` (s_1 the largest one), so that values below
1e-8 of s_1 are noise: enough for any certificate. With `exact=False` the products are added up in
float32 and only the eigenvalues are float64's: a value is off by about `1e-6 s_1^2 / s`, the energy
of a tail by about 1e-6 of the whole energy, and values below 1e-3 of s_1 may be noise. That is
enough to choose ranks by, in a half to two thirds of the time; no certificate can stand on it.

Memory: a few Gram matrices and `CHUNK` elements of the matrix; never a whole copy of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from lamina.errors import MethodError
from lamina.run import write_atomic

CHUNK = 1 << 22  # elements of the matrix that are converted at a time
BATCH = 1 << 23  # elements of Gram matrices that go to LAPACK in one call
FORMAT = "lamina spectra 1"

_folder: ContextVar[Path | None] = ContextVar("folder of spectra", default=None)


def fold_spectra(
    matrix: torch.Tensor, folds: Iterable[int], *, exact: bool = True
) -> dict[int, torch.Tensor]:
    """Return the singular values of every fold of the input columns, for several numbers of folds.

    Args:
        matrix: `[f, n]`, any floating dtype, on any device.
        folds: numbers of folds k, each a divisor of n; a fold is n/k consecutive columns.
        exact: add up the products in float64; otherwise in float32 (errors: see above).

    Returns:
        per k `[k, min(f, n/k)]`, float64, descending in every fold.

    Raises:
        MethodError: k does not divide the columns, or a value is not finite.

    Example:
        >>> spectra = fold_spectra(torch.tensor([[3.0, 0.0, 4.0, 0.0]]), [1, 2])
        >>> spectra[1].tolist(), spectra[2].tolist()
        ([[5.0]], [[3.0], [4.0]])
    """
    wanted = sorted({int(k) for k in folds})
    if matrix.dim() != 2 or not matrix.is_floating_point():
        what = f"{matrix.dtype} of shape {list(matrix.shape)}"
        raise MethodError("folds are cut from a matrix of floats", what)
    for k in wanted:
        if k < 1 or matrix.shape[1] % k:
            raise MethodError(
                "the columns cannot be cut into folds", f"{k} folds of {matrix.shape[1]} columns",
                "folds are equally wide", "give divisors of the input channels",
            )  # fmt: skip
    matrix, folder = matrix.detach(), _folder.get()
    if folder is None:
        return _computed(matrix, wanted, exact)
    path = folder / f"{_digest(matrix, wanted, exact)}.spectra"
    found = _read(path, matrix.shape, wanted)
    if found is None:
        found = _computed(matrix, wanted, exact)
        _write(path, found)
    return {k: values.to(matrix.device) for k, values in found.items()}


@contextmanager
def cached(folder: Path | None) -> Iterator[None]:
    """Keep the spectra computed inside in a folder, and look there first; None: keep nothing.

    A file is named by a hash of the matrix (values, dtype, shape) and of what was asked. A damaged
    one is computed and written again.

    Args:
        folder: where the files lie; made when first needed.
    """
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


# --- the computation -----------------------------------------------------------------------------


def _computed(matrix: torch.Tensor, wanted: Sequence[int], exact: bool) -> dict[int, torch.Tensor]:
    """Return the spectra; see `fold_spectra`."""
    f, n = matrix.shape
    found = {k: matrix.new_zeros((k, min(f, n // k)), dtype=torch.float64) for k in wanted}
    if not matrix.numel():
        return found
    dtype = torch.float64 if exact else torch.float32
    scale = _unit(matrix)  # a power of two: neither tiny nor huge weights leave float32's range
    wide = [k for k in wanted if n // k >= f]
    for group in _nested(wide, finest=True):
        _solve(_sums(matrix, group, dtype, scale), found)
    for group in _nested([k for k in wanted if k not in wide], finest=False):
        _solve(_blocks(matrix, group, dtype, scale), found)
    return {k: values / scale for k, values in found.items()}


def _unit(matrix: torch.Tensor) -> float:
    """Return the power of two that brings the largest magnitude to [1, 2).

    Raises:
        MethodError: a value is not finite.
    """
    low, high = (float(x) for x in torch.aminmax(matrix))
    peak = max(-low, high)
    if not math.isfinite(low + high):
        raise MethodError("the matrix is not finite", "", "NaN or inf has no spectrum")
    return 2.0 ** -min(max(math.floor(math.log2(peak)), -900), 900) if peak > 0 else 1.0


def _nested(folds: Sequence[int], finest: bool) -> Iterator[list[int]]:
    """Group numbers of folds that share a pass: a number with its divisors, or its multiples."""
    left = sorted(folds, reverse=finest)
    while left:
        first = left[0]
        group = [k for k in left if (first % k if finest else k % first) == 0]
        left = [k for k in left if k not in group]
        yield group


Grams = Iterator[tuple[int, int, torch.Tensor]]  # number of folds, first fold, [folds, r, r]


def _sums(matrix: torch.Tensor, group: Sequence[int], dtype: torch.dtype, scale: float) -> Grams:
    """Yield `M_i M_i^T` of wide folds; those of coarser folds are sums of the finest ones'."""
    f, n = matrix.shape
    finest = group[0]
    width = n // finest
    sums = {k: matrix.new_zeros((f, f), dtype=dtype) for k in group}
    step = max(1, CHUNK // f)
    for i in range(finest):
        part = sums[finest].zero_()
        for j in range(i * width, (i + 1) * width, step):
            chunk = matrix[:, j : min(j + step, (i + 1) * width)].to(dtype) * scale
            part.addmm_(chunk, chunk.mT)
        yield finest, i, part[None]
        for k in group[1:]:
            sums[k] += part
            done, rest = divmod((i + 1) * k, finest)
            if not rest:
                yield k, done - 1, sums[k][None]
                sums[k].zero_()


def _blocks(matrix: torch.Tensor, group: Sequence[int], dtype: torch.dtype, scale: float) -> Grams:
    """Yield `M_i^T M_i` of narrow folds; those of finer folds are diagonal blocks of the others."""
    f, n = matrix.shape
    coarsest = group[0]
    width = n // coarsest
    whole = matrix.new_zeros((width, width), dtype=dtype)
    step = max(1, CHUNK // width)
    for i in range(coarsest):
        whole.zero_()
        for j in range(0, f, step):
            chunk = matrix[j : j + step, i * width : (i + 1) * width].to(dtype) * scale
            whole.addmm_(chunk.mT, chunk)
        for k in group:
            parts, narrow = k // coarsest, n // k
            tiled = whole.reshape(parts, narrow, parts, narrow)
            yield k, i * parts, tiled.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _solve(grams: Grams, found: dict[int, torch.Tensor]) -> None:
    """Write the roots of the eigenvalues of Grams, several folds in a call where they are small."""
    waiting: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for k, first, gram in grams:
        held = waiting.setdefault(k, [])
        held.append((first, gram.to(torch.float64, copy=True)))
        if sum(part.numel() for _, part in held) >= BATCH:
            _flush(held, found[k])
    for k, held in waiting.items():
        _flush(held, found[k])


def _flush(held: list[tuple[int, torch.Tensor]], out: torch.Tensor) -> None:
    if not held:
        return
    start = held[0][0]  # folds come in order
    whole = torch.cat([part for _, part in held]) if len(held) > 1 else held[0][1]
    held.clear()
    for part in whole.split(max(1, BATCH // whole[0].numel())):
        values = torch.linalg.eigvalsh(part).flip(-1)
        out[start : start + len(part)] = values.clamp_min_(0).sqrt_()
        start += len(part)


# --- the cache -----------------------------------------------------------------------------------


def _digest(matrix: torch.Tensor, folds: Sequence[int], exact: bool) -> str:
    """Return a hash of a matrix and of what is asked of it."""
    head = f"{FORMAT} {matrix.dtype} {list(matrix.shape)} {list(folds)} {exact}"
    sha = hashlib.sha256(head.encode())
    for rows in matrix.split(max(1, CHUNK // max(1, matrix.shape[1]))):
        flat = rows.cpu().contiguous().reshape(-1)
        sha.update(memoryview(flat.view(torch.uint8).numpy()))
    return sha.hexdigest()


def _write(path: Path, found: dict[int, torch.Tensor]) -> None:
    from safetensors.torch import save

    data = save({str(k): values.cpu().contiguous() for k, values in found.items()})
    write_atomic(path, hashlib.sha256(data).digest() + data)


def _read(path: Path, shape: torch.Size, wanted: Sequence[int]) -> dict[int, torch.Tensor] | None:
    """Return the spectra of a file, or None where it is missing or damaged."""
    from safetensors.torch import load

    try:
        data = path.read_bytes()
    except OSError:  # missing, or unreadable: computing is always possible
        return None
    if len(data) < 32 or hashlib.sha256(data[32:]).digest() != data[:32]:
        return None
    found = load(data[32:])
    f, n = shape
    if any(str(k) not in found or found[str(k)].shape != (k, min(f, n // k)) for k in wanted):
        return None
    return {k: found[str(k)] for k in wanted}
