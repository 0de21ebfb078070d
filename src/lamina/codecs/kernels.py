"""Where inner loops are compiled: one place that knows numba.

A kernel is a plain module-level Python function over lists or arrays of integers. With numba it
runs compiled (and cached on disk); without, the very same function runs as it is, or the codec
takes a vectorised way that writes the same bytes. Set `LAMINA_NUMBA=0` to leave numba out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def _numba_njit() -> Callable[..., Any] | None:
    if os.environ.get("LAMINA_NUMBA", "1") == "0":
        return None
    try:
        from numba import njit
    except (
        Exception
    ):  # numba also fails with SystemError or ImportError beside a numpy too new for it
        return None
    return njit  # type: ignore[no-any-return]


@cache
def _compile(kernel: Callable[..., Any]) -> Callable[..., Any] | None:
    njit = _numba_njit()
    if njit is None:
        return None
    try:
        return njit(cache=True, nogil=True)(kernel)  # type: ignore[no-any-return]
    except RuntimeError:  # neither the package folder nor the user's cache folder can be written
        return njit(nogil=True)(kernel)  # type: ignore[no-any-return]


def compiled(kernel: Callable[..., Any], backend: str = "auto") -> Callable[..., Any] | None:
    """Return the compiled kernel, or None where the caller must take the way without numba.

    Args:
        kernel: a module-level function.
        backend: "auto" (numba if it is there), "numba" (must be there) or "numpy" (leave it out).

    Raises:
        ValueError: another backend, or "numba" where there is no numba.
    """
    if backend not in ("auto", "numba", "numpy"):
        raise ValueError(f"backend is 'auto', 'numba' or 'numpy', not {backend!r}")
    fast = None if backend == "numpy" else _compile(kernel)
    if backend == "numba" and fast is None:
        raise ValueError("backend 'numba' needs numba; install it or use 'auto'")
    return fast
