"""Codes that belong to a method, stored with the values as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lamina import codecs
from lamina.artifact.records import matrix_view
from lamina.forms import Codebook


def coded(values: Codebook, codec: str, **settings: Any) -> Codebook:
    """Return a codebook that carries its own code.

    Args:
        values: what to code; index 0 is the zero.
        codec: name of an integer codec.
        settings: of its `encode`.

    Raises:
        FileError: there is no such codec.
    """
    if codec not in codecs.CODECS:
        return values
    return replace(
        values, code=(codec, codecs.get(codec).encode(matrix_view(values.index), **settings))
    )
