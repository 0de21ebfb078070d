"""Which form holds a tensor's values exactly in the fewest bytes."""

from __future__ import annotations

import math

import torch

from lamina import codecs
from lamina.artifact import steps
from lamina.artifact.records import matrix_view, values_bytes
from lamina.forms import Affine, Plain, find_affine


def exact(tensor: torch.Tensor) -> Plain | Affine:
    """Return values that give a tensor back bit for bit, in the shorter of two forms.

    Example:
        >>> exact(torch.ones(3, 5)).__class__.__name__
        'Plain'
    """
    found = find_affine(tensor)
    if found is None:
        return Plain(tensor)
    plain = values_bytes(tensor)
    # Coding symbols takes long; mostly it is enough to know how many there may be.
    levels = int(found.symbols.max()) - int(found.symbols.min()) + 1
    most = found.symbols.numel() * math.log2(levels) / 8
    most += found.steps.numel() * found.steps.itemsize * (2 if found.leasts is not None else 1)
    return found if most < plain or exact_bytes(found) < plain else Plain(tensor)


def exact_bytes(values: Plain | Affine) -> float:
    """Return what exact values take in a file [bytes]; of many plain ones from a sample."""
    if isinstance(values, Plain):
        return values_bytes(values.tensor)
    return float(codecs.length(matrix_view(values.symbols)) + len(steps.encode(values)))
