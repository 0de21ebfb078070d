"""The packed layout of 4-bit integers with two zeros in every four: what hardware would read.

Four weights take one byte of two codes (offset 8) and half a byte of two 2-bit positions: 12 bits
instead of 128. Files are smaller still, for they are entropy coded; this layout is what ratios
"with indices" count, and what kernels for sparse tensor cores begin from.
"""

from __future__ import annotations

import torch

from lamina.errors import FileError

OFFSET = 8  # added to a code, so that it is 0 to 15


def pack_two_four(symbols: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes and the positions of a matrix, as bytes.

    Args:
        symbols: `[rows, 4 m]` integers of -8 to 7, at most two of every four not zero.

    Returns:
        codes `[rows m]`, the earlier of two in the low half; positions `[ceil(rows m / 2)]`, of one
        four in the low half, of the next in the high one.

    Raises:
        FileError: it does not fit the layout.

    Example:
        >>> codes, places = pack_two_four(torch.tensor([[0, -7, 0, 3]]))
        >>> codes.tolist(), places.tolist()
        ([177], [13])
    """
    if symbols.dim() != 2 or symbols.shape[1] % 4:
        raise FileError("a matrix does not fit 2:4", str(tuple(symbols.shape)), "fours are asked")
    four = symbols.reshape(-1, 4).to(torch.int64)
    if four.numel() and (int(four.min()) < -OFFSET or int(four.max()) >= OFFSET):
        raise FileError("a matrix does not fit 4 bits", f"{int(four.min())}..{int(four.max())}")
    if bool(((four != 0).sum(1) > 2).any()):
        raise FileError("a matrix does not fit 2:4", "", "more than two of a four are not zero")
    # The two places: of what is not zero, else any; in rising order.
    order = torch.argsort((four != 0).to(torch.int64), dim=1, descending=True, stable=True)
    places = order[:, :2].sort(1).values
    codes = four.gather(1, places) + OFFSET
    halves = places[:, 0] + 4 * places[:, 1]
    if len(halves) % 2:
        halves = torch.cat([halves, halves.new_zeros(1)])
    packed = halves[0::2] + 16 * halves[1::2]
    return (codes[:, 0] + 16 * codes[:, 1]).to(torch.uint8), packed.to(torch.uint8)


def unpack_two_four(
    codes: torch.Tensor, places: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """Undo `pack_two_four`: return int32 `[rows, 4 m]`.

    Example:
        >>> unpack_two_four(*pack_two_four(torch.tensor([[5, 0, 0, 0]])), (1, 4)).tolist()
        [[5, 0, 0, 0]]
    """
    count = shape[0] * shape[1] // 4
    if len(codes) != count or len(places) != -(-count // 2):
        raise FileError("packed bytes do not fit", f"{len(codes)} and {len(places)} for {shape}")
    pair = torch.stack([codes & 15, codes >> 4], 1).to(torch.int32) - OFFSET
    half = torch.stack([places & 15, places >> 4], 1).reshape(-1)[:count].to(torch.int64)
    four = torch.zeros(count, 4, dtype=torch.int32)
    four.scatter_(1, torch.stack([half & 3, half >> 2], 1), pair)
    return four.reshape(shape)
