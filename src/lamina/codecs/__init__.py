"""Codecs: symbols to bytes and back, exactly, and a prediction of the length.

The contract each codec keeps:

1. `decode(encode(x), x.shape)` equals `x` to the bit, on every machine, with or without numba:
   the bytes do not depend on the backend, and golden files keep decoding forever.
2. The shape is not in the bytes (the manifest has it), nor is a checksum (the artifact has one).
3. `decode` of damaged bytes raises `FileError` or returns wrong values of the declared shape, in
   bounded time and memory; nothing larger than a few times the declared shape is ever allocated.
4. Integer codecs take any integer array that fits into int32, and give back int8, int16 or int32.

| codec | for | decode [M/s] |
|---|---|---|
| `raw` | whatever does not compress; also takes and needs the type | memory speed |
| `rans` | integers; order-0 entropy plus a small table | 700 |
| `context` | matrices whose rows differ; sparse ones by gaps; what stands above | 130 to 700 |
| `blocks` | longer tensors, in independent pieces of `rans` or `context` | as these, each |
| `adaptive` | small integer tensors with structured zeros; no table | 1 |
| `planes` | floats, losslessly: bytes to bytes | 300 to 700 |
| `huffman` | Deep Compression's format, for a pruned tensor | 450 |
| `bloomier` | Weightless: non-zeros exact, some zeros come back wrong; if asked for | 190 |

A new codec is one module with `encode`, `decode` and `length`, and one line in `CODECS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.codecs import adaptive, blocks, bloomier, context, huffman, rans, raw
from lamina.codecs.structure import structure_bits
from lamina.codecs.symbols import Symbols, check_symbols, count_elements
from lamina.errors import FileError

__all__ = ["CODECS", "INTEGER", "Part", "anchored", "best", "estimate", "get", "length", "parts"]

CODECS: dict[str, ModuleType] = {
    "raw": raw,
    "rans": rans,
    "adaptive": adaptive,
    "context": context,
    "blocks": blocks,
    "huffman": huffman,
    "bloomier": bloomier,
}
INTEGER = ("rans", "adaptive", "context", "huffman", "blocks")  # those that `best` may choose
LONG = 1 << 16  # symbols; from here on `adaptive` has to earn its slowness
EARNED = 0.94
TRIED = 1 << 18  # symbols; from here on `adaptive` is first tried on a part


@dataclass(frozen=True)
class Part:
    """An independent piece of a coded tensor.

    Args:
        start, stop: the elements it holds, counted in C order.
        read: gives them as a flat array of int8, int16 or int32.
    """

    start: int
    stop: int
    read: Callable[[], NDArray[Any]]


def parts(name: str, data: bytes, shape: Sequence[int]) -> tuple[Part, ...]:
    """Return the pieces of a coded tensor, in order; each may be read alone, in any thread.

    Raises:
        FileError: there is no such codec, or the data is damaged in a way that shows.

    Example:
        >>> [part.read().tolist() for part in parts("rans", get("rans").encode([7, 7]), (2,))]
        [[7, 7]]
    """
    codec = get(name)
    size = count_elements(shape)
    if name == "blocks":
        return tuple(Part(*piece) for piece in blocks.pieces(data, shape))
    return (Part(0, size, lambda: codec.decode(data, shape).reshape(-1)),)


def get(name: str) -> ModuleType:
    """Return the codec of that name, as a file states it.

    Raises:
        FileError: there is no such codec.

    Example:
        >>> get("rans").decode(get("rans").encode([7, 7, 7]), (3,)).tolist()
        [7, 7, 7]
    """
    if name not in CODECS:
        fix = "a newer version may know it; here are " + ", ".join(CODECS)
        raise FileError("cannot decode a tensor", repr(name), "no codec has that name", fix)
    return CODECS[name]


def best(symbols: NDArray[Any], names: Sequence[str] | None = None) -> tuple[str, bytes]:
    """Return the shortest code of an integer tensor and the codec's name.

    Codecs that cannot be shorter are not run. `adaptive` decodes a million symbols a second, so for
    more than 2 ** 16 it is taken only where it saves 6 %, and for more than 2 ** 21 never; a codec
    that is named alone is always used.

    Args:
        symbols: whole numbers that fit into int32, any shape.
        names: the integer codecs to choose from; all by default.

    Raises:
        ValueError: the values are not such numbers, or a name is not that of an integer codec.

    Example:
        >>> import numpy as np
        >>> best(np.eye(64, dtype=int) * 0)
        ('adaptive', b'')
    """
    array = check_symbols(symbols)
    chosen = INTEGER if names is None else tuple(names)
    if not chosen or not set(chosen) <= set(INTEGER):
        raise ValueError(f"names are of {INTEGER}, not {chosen}")
    if len(chosen) == 1:
        return chosen[0], CODECS[chosen[0]].encode(array)
    if "blocks" in chosen and array.size > blocks.BLOCK:
        return "blocks", blocks.encode(array)
    codes = []
    if "rans" in chosen:
        codes.append(("rans", rans.encode(array)))
    if "context" in chosen and _suits_context(array):
        codes.append(("context", context.encode(array)))
    if "huffman" in chosen and _suits_huffman(array):
        codes.append(("huffman", huffman.encode(array)))
    quick = min((len(code) for _, code in codes), default=None)
    if "adaptive" in chosen and _suits_adaptive(array, quick):
        code = adaptive.encode(array)
        if quick is None or len(code) < _to_beat(array, quick):
            return "adaptive", code
    if not codes:  # what was asked for is worth little here, but one of these takes any tensor
        name = "adaptive" if "adaptive" in chosen else "blocks"
        return name, CODECS[name].encode(array)
    return min(codes, key=lambda code: len(code[1]))


def length(symbols: NDArray[Any]) -> int:
    """Return the bytes of `best(symbols)`, to within 0.5 % and 8 bytes.

    Exact where `adaptive` or `context` has to be run; from the histogram alone where not.
    """
    array = check_symbols(symbols)
    if array.size <= LONG and _suits_adaptive(array, None):
        mixed = adaptive.length(array)
        if not array.any():
            return mixed
        counts = rans.count_symbols(array.reshape(-1))[1]
        entropy = float(-(counts * np.log2(counts / array.size)).sum())
        if not _suits_context(array) and mixed <= (entropy + 2 * len(counts)) / 8:
            return mixed  # no table is as short as two bits an entry
        return min(_quick_length(array), mixed)
    quick = _quick_length(array)
    if _suits_adaptive(array, quick):
        mixed = adaptive.length(array)
        return mixed if mixed < _to_beat(array, quick) else quick
    return quick


def _quick_length(array: Symbols) -> int:
    """Return the bytes without `adaptive`."""
    if array.size > blocks.BLOCK:
        return blocks.length(array)
    lengths = [rans.length(array)]
    if _suits_context(array):
        lengths.append(context.length(array))
    if _suits_huffman(array):
        lengths.append(huffman.length(array))
    return min(lengths)


def _suits_huffman(array: Symbols) -> bool:
    """Return whether gaps may be shorter: a long, sparse tensor (`adaptive` has the small ones)."""
    return array.size > LONG and 0 < int(np.count_nonzero(array)) < 0.1 * array.size


def _suits_context(array: Symbols) -> bool:
    grid = array.reshape(array.shape[0], -1) if array.ndim > 1 and array.size else array
    return context.suits(grid)


def _to_beat(array: Symbols, quick: int) -> float:
    return quick + 1 if array.size <= LONG else EARNED * quick


def estimate(symbols: NDArray[Any]) -> float:
    """Return the bytes of `best(symbols)`, roughly and fast: for a planner's many questions.

    Order-0 entropy and a table, or entropy less what the densities of rows and columns are worth to
    the adaptive codec (`structure_bits`). On trained LeNet-5s and synthetic sources it was off by
    up to 7 % on matrices, 10 % on convolutions (whose kernels' structure it does not see) and a few
    bytes. How far it is off changes slowly with the step of a grid, so correct it by a few exact
    lengths (`anchored`) where that matters. It takes 1 to 5 ms.

    Args:
        symbols: whole numbers that fit into int32, any shape.
    """
    array = check_symbols(symbols)
    if not array.any():
        if array.size <= adaptive.LARGEST:
            return 0.0
        zero, count = np.zeros(1, np.int64), np.array([array.size])
        return float(rans.length_of_counts(zero, count))
    counts = rans.count_symbols(array.reshape(-1))[1]
    entropy = float(-(counts * np.log2(counts / array.size)).sum())
    static = 6.0 + 0.7 * len(counts) + 1.0005 * entropy / 8
    if not _suits_adaptive(array, None):
        return static
    rows = array.shape[0] if array.ndim else 1
    saved = structure_bits(array.reshape(rows, -1) != 0)
    # Fitted: each distinct value and each byte cost a little to learn.
    return min(static, 1.0 + 0.4 * len(counts) + 1.002 * max(entropy - saved, 0.0) / 8)


def anchored(quick: Sequence[float], exact: Callable[[int], float], anchors: int) -> list[float]:
    """Return lengths along a curve from quick estimates, corrected by a few exact ones.

    Args:
        quick: estimates, in the order of the curve.
        exact: gives the exact length of the i-th.
        anchors: how many exact ones to ask for; both ends are among them.

    Example:
        >>> anchored([10.0, 20.0, 40.0], lambda i: [11.0, 0.0, 44.0][i], 2)
        [11.0, 22.0, 44.0]
    """
    if not quick:
        return []
    places = sorted({round(i) for i in np.linspace(0, len(quick) - 1, max(anchors, 1))})
    ratios = [exact(k) / max(quick[k], 1.0) for k in places]
    corrected = np.interp(np.arange(len(quick)), places, ratios) * np.maximum(quick, 1.0)
    return [float(x) for x in corrected]


def _suits_adaptive(array: Symbols, quick: int | None) -> bool:
    """Return whether `adaptive` may be worth running, where another codec takes `quick` bytes."""
    if array.size > adaptive.LARGEST:
        return False
    if array.size <= LONG or not array.any():
        return True
    if float(np.abs(array.reshape(-1), dtype=np.float64).mean()) > 8.0:
        return False
    if quick is None or array.size <= TRIED or array.ndim < 2:
        return True
    rows = max(LONG * len(array) // array.size, 1)  # it needs no more to show what it is worth
    return adaptive.length(array[:rows]) < EARNED * _quick_length(array[:rows])
