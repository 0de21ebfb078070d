"""Batches over tensors in memory: a light loader whose every epoch can be repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lamina.errors import DataError

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Data:
    """The splits of a data set, each an iterable of batches that can be gone through many times.

    A batch is a tensor, `(x, y)`, or a dict of tensors; see `inputs_of` and `labels_of`.

    Args:
        train: what recovery trains on, or None.
        calibration: what statistics are measured on, or None.
        validation: what decisions are checked on, or None.
        test: the last word; compression never touches it.
        name: what reports call it.
        classes: the number of classes of integer labels, if that is what the labels are.
    """

    train: Iterable[Any] | None = None
    calibration: Iterable[Any] | None = None
    validation: Iterable[Any] | None = None
    test: Iterable[Any] | None = None
    name: str = ""
    classes: int | None = None


class TensorLoader:
    """Batches over tensors in memory, with a seeded order for every epoch.

    Every `iter()` starts the epoch `self.epoch` and then counts it up. The order and the
    augmentation of an epoch follow from `(seed, epoch)` alone, so a training run that was stopped
    goes on with `set_epoch(n)` exactly as if it had not been.

    Args:
        x: inputs [n, ...], or a dict of inputs by name, each [n, ...].
        y: labels [n, ...], or None: then batches are bare tensors instead of `(x, y)`.
        batch_size: samples a batch; the last batch of an epoch may be smaller.
        shuffle: draw a new order every epoch.
        augment: `(x [b, ...], generator) -> x [b, ...]`, random changes of a batch, see `shift`.
        seed: where order and augmentation come from.
        prepare: `x [b, ...] -> x [b, ...]`, the fixed part (scaling, say), applied first. It lets
            bytes stay bytes in memory until a batch is asked for.

    Raises:
        DataError: no samples, unequal lengths, or a batch size below 1.

    Example:
        >>> loader = TensorLoader(torch.arange(5), torch.arange(5), batch_size=2)
        >>> [x.tolist() for x, y in loader], len(loader), loader.dataset_size, loader.epoch
        ([[0, 1], [2, 3], [4]], 3, 5, 1)
    """

    def __init__(
        self,
        x: Tensor | Mapping[str, Tensor],
        y: Tensor | None,
        batch_size: int,
        shuffle: bool = False,
        augment: Augment | None = None,
        seed: int = 0,
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        parts = x if isinstance(x, Mapping) else {"x": x}
        if not parts or any(part.ndim == 0 or len(part) == 0 for part in parts.values()):
            shapes = {name: list(part.shape) for name, part in parts.items()}
            raise DataError("no samples", str(shapes), fix="give at least one sample")
        self.dataset_size = len(next(iter(parts.values())))
        named = {**parts, **({} if y is None else {"y": y})}
        for part in named.values():
            if part.ndim == 0 or len(part) != self.dataset_size:
                raise DataError(
                    "inputs and labels differ in length",
                    ", ".join(f"{n} {list(p.shape)}" for n, p in named.items()),
                    fix="give one label a sample",
                )
        if batch_size < 1:
            raise DataError("bad batch size", str(batch_size), fix="give 1 or more")
        self.x, self.y, self.batch_size = x, y, batch_size
        self.shuffle, self.augment, self.seed, self.prepare = shuffle, augment, seed, prepare
        self.epoch = 0

    def __len__(self) -> int:
        return (self.dataset_size + self.batch_size - 1) // self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Let the next `iter()` start epoch `epoch`."""
        self.epoch = epoch

    def head(self, samples: int, batch_size: int | None = None) -> TensorLoader:
        """The first `samples` samples as stored: not shuffled, not augmented."""
        y = None if self.y is None else self.y[:samples]
        batch_size = batch_size or self.batch_size
        first = _rows(self.x, slice(0, samples))
        return TensorLoader(first, y, batch_size, prepare=self.prepare)

    def __iter__(self) -> Iterator[Any]:
        # Not a generator itself: the epoch must be taken when `iter()` is called, not at the
        # first batch, or two iterators opened together would run the same epoch.
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[Any]:
        # torch's CPU generator looks at the low 32 bits of its seed alone, so both must be in them.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
        order = torch.randperm(self.dataset_size, generator=generator) if self.shuffle else None
        for start in range(0, self.dataset_size, self.batch_size):
            end = start + self.batch_size
            rows: slice | Tensor = slice(start, end) if order is None else order[start:end]
            x: Any = _rows(self.x, rows)
            if self.prepare is not None:
                x = self.prepare(x)
            if self.augment is not None:
                x = self.augment(x, generator)
            yield x if self.y is None else (x, self.y[rows])


def _rows(x: Tensor | Mapping[str, Tensor], rows: slice | Tensor) -> Any:
    return {n: part[rows] for n, part in x.items()} if isinstance(x, Mapping) else x[rows]


def shift(pixels: int = 2, fill: float = 0.0) -> Augment:
    """Augment images by moving each by a whole number of pixels, drawn per image.

    Args:
        pixels: the largest move in each direction, both axes.
        fill: what enters at the border. Images normalised to `(v - mean) / std` have their black
            at `-mean / std`, not at 0.

    Returns:
        A function `(x [b, c, h, w], generator) -> x [b, c, h, w]`.

    Raises:
        DataError: `pixels` is negative, or a batch is not [b, c, h, w].

    Example:
        >>> move = shift(1)
        >>> move(torch.ones(1, 1, 3, 3), torch.Generator().manual_seed(0)).shape
        torch.Size([1, 1, 3, 3])
    """
    if pixels < 0:
        raise DataError("bad shift", f"{pixels} pixels", fix="give 0 or more")

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        if x.ndim != 4:
            raise DataError("cannot shift a batch", str(list(x.shape)), "images are [b, c, h, w]")
        height, width = x.shape[-2:]
        moves = torch.randint(0, 2 * pixels + 1, (2, len(x)), generator=generator)
        padded = F.pad(x, (pixels, pixels, pixels, pixels), value=fill)
        # Every window of the padded batch as a view [b, c, 2p+1, 2p+1, h, w]; one is copied out.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(len(x)), :, moves[0], moves[1]]

    return augment


def mirror() -> Augment:
    """Augment images by turning each left to right with probability one half.

    Returns:
        A function `(x [b, c, h, w], generator) -> x [b, c, h, w]`.

    Example:
        >>> mirror()(torch.ones(1, 1, 3, 3), torch.Generator().manual_seed(0)).shape
        torch.Size([1, 1, 3, 3])
    """

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        turned = torch.rand(len(x), generator=generator) < 0.5
        return torch.where(turned[:, None, None, None], x.flip(3), x)

    return augment
