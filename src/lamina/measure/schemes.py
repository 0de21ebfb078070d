"""The four ways to fold a convolution's weight into a matrix, and the way back.

A low rank pair shares the taps of a kernel out, axis by axis: what the encoding layer owns stands
in the columns of the folded matrix, beside the input channels, and what the decoding layer owns in
the rows, beside the outputs. Scheme 0 is the usual unfolding `[f, c K]`; with scheme 3 (3x3 taps on
the decoder) the same weight is `[9 f, c]`. Linear layers and 1x1 convolutions have one scheme.

The input channels are cut into k folds first, and each fold is folded then; it is the order in
which a grouped encoder sees them. Here the channel is the slowest index of a column, so a slice of
columns is a slice of channels in every scheme; with the taps slowest it is not.

Liebenwein et al. 2021, arXiv:2107.11442, section 2 (scheme 0); the others are of its authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lamina.errors import MethodError
from lamina.forms.low_rank import ENCODER_AXES, split_axes


@dataclass(frozen=True)
class Scheme:
    """Who owns which taps.

    Args:
        number: 0 (the encoder owns all), 1, 2 (one axis each), 3 (the decoder owns all).
        kernel: of the convolution; `()` for a linear layer.

    Example:
        >>> Scheme(1, (3, 5)).encoder, Scheme(1, (3, 5)).decoder
        ((1, 5), (3, 1))
    """

    number: int = 0
    kernel: tuple[int, ...] = ()

    @property
    def encoder(self) -> tuple[int, ...]:
        """Kernel of the encoding layer."""
        return tuple(split_axes(self.kernel, self.number, 1)[0])

    @property
    def decoder(self) -> tuple[int, ...]:
        """Kernel of the decoding layer."""
        return tuple(split_axes(self.kernel, self.number, 1)[1])

    @property
    def before(self) -> int:
        """Taps of the encoding layer."""
        return math.prod(self.encoder)

    @property
    def after(self) -> int:
        """Taps of the decoding layer."""
        return math.prod(self.decoder)


PLAIN = Scheme()


def distinct_schemes(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """Return the schemes that fold a kernel differently; only a Conv2d has more than one.

    Example:
        >>> distinct_schemes((3, 3)), distinct_schemes((1, 5)), distinct_schemes((1, 1))
        ((0, 1, 2, 3), (0, 3), (0,))
    """
    if len(kernel) != 2 or max(kernel) == 1:
        return (0,)
    return tuple(range(len(ENCODER_AXES))) if min(kernel) > 1 else (0, 3)


def fold(matrix: torch.Tensor, folds: int, scheme: Scheme = PLAIN) -> torch.Tensor:
    """Return `[k, f * after, c/k * before]` from the usual matrix `[f, c K]`.

    Example:
        >>> fold(torch.zeros(8, 4 * 9), 2, Scheme(3, (3, 3))).shape
        torch.Size([2, 72, 2])
    """
    parts = split_taps(matrix.unflatten(1, (folds, -1)), scheme).transpose(0, 1)
    return parts.flatten(1, 2)


def split_taps(columns: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return `[..., after, m]` of `[..., n]`: the decoder's taps apart from all else of a column.

    Args:
        columns: the last dimension holds channels, and then the taps of the kernel.
    """
    if scheme.after == 1:  # nothing moves
        return columns.unsqueeze(-2)
    first = columns.dim()  # the axis of the kernel that comes after the channels
    tensor = columns.unflatten(-1, (-1, *scheme.kernel))
    mine = [first + i for i, size in enumerate(scheme.decoder) if size > 1]
    rest = [i for i in range(first - 1, tensor.dim()) if i not in mine]
    moved = tensor.permute(*range(first - 1), *mine, *rest)
    return moved.reshape(*columns.shape[:-1], scheme.after, -1)


def expand(encode: torch.Tensor, scheme: Scheme = PLAIN) -> torch.Tensor:
    """Return what the decoder sees of a patch: `[k, j * after, c/k * K]` of `[k, j, c/k * before]`.

    Row `(j, t)` is the encoder's row j, placed at the decoder's tap t. With it every scheme is a
    product of two matrices again: the pair computes with `decode @ block_diag(*expand(encode))`.
    """
    if scheme.after == 1:
        return encode
    folds, rank, width = encode.shape
    taps = torch.eye(scheme.after).to(encode).reshape(scheme.after, 1, *scheme.decoder)
    rows = encode.reshape(folds, rank, 1, width // scheme.before, *scheme.encoder)
    return (rows * taps).reshape(folds, rank * scheme.after, width * scheme.after)


def recompose(encode: torch.Tensor, decode: torch.Tensor, folds: int = 1) -> torch.Tensor:
    """Return the dense weight that a low rank pair computes with: `decode` after `encode`.

    A network that is to be decomposed again is composed first: a pair is no layer to fold.

    Args:
        encode: weight of the encoding layer, `[k j, c/k, *kernel]`, or `[k j, c/k]` (linear).
        decode: weight of the decoding layer, `[f, k j, *kernel]`, or `[f, k j]`.
        folds: number of groups of the encoding layer, k.

    Returns:
        `[f, c, *kernel]`, or `[f, c]`.

    Raises:
        MethodError: the shapes are not those of a pair.

    Example:
        >>> recompose(torch.ones(2, 3), torch.ones(4, 2), folds=2).shape
        torch.Size([4, 6])
    """
    shapes = f"encode {list(encode.shape)}, decode {list(decode.shape)}, {folds} folds"
    before, after = encode.shape[2:], decode.shape[2:]
    fits = encode.dim() == decode.dim() >= 2 and folds > 0 and encode.shape[0] % folds == 0
    if not fits or decode.shape[1] != encode.shape[0]:
        raise MethodError("these weights are no pair", shapes)
    if any(a > 1 and b > 1 for a, b in zip(before, after, strict=True)):
        raise MethodError("these weights are no pair", shapes, "both own the taps of one axis")
    inside = encode.reshape(folds, len(encode) // folds, encode.shape[1], -1)
    outside = decode.reshape(len(decode), *inside.shape[:2], -1)
    # One of the two is 1 on every axis: the taps of the product are those of either, interleaved.
    product = torch.einsum("fijd,ijce->ficde", outside, inside)
    product = product.reshape(len(decode), -1, *after, *before)
    axes = len(after)
    order = [2 + i + side * axes for i in range(axes) for side in (0, 1)]
    kernel = [a * b for a, b in zip(after, before, strict=True)]
    return product.permute(0, 1, *order).reshape(*product.shape[:2], *kernel)
