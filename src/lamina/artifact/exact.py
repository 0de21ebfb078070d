"""Which form holds a tensor's values exactly in the fewest bytes."""

from __future__ import annotations

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
    if found is not None and exact_bytes(found) < values_bytes(tensor):
        return found
    return Plain(tensor)


def exact_bytes(values: Plain | Affine) -> float:
    """Return what exact values take in a file [bytes]; of many plain ones from a sample."""
    if isinstance(values, Plain):
        return values_bytes(values.tensor)
    return float(codecs.length(matrix_view(values.symbols)) + len(steps.encode(values)))
