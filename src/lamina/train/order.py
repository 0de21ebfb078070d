"""The training batches: how many, and in an order that a resumed run repeats."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lamina.data import Data
from lamina.errors import DataError

SEEDS = 1 << 63  # seeds that torch takes


def seeded(batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """Yield batches, each drawn from a random state of its own.

    A run that is resumed skips batches without training on them; random augmentation in a loader of
    the user's must not notice the difference.

    Example:
        >>> drawn = (torch.rand(()) for _ in range(3))
        >>> again = (torch.rand(()) for _ in range(3))
        >>> list(seeded(drawn, 1)) == list(seeded(again, 1))
        True
    """
    own = getattr(batches, "generator", None)  # a loader's own: it would run on between epochs
    generator = own if isinstance(own, torch.Generator) else None
    before = None if generator is None else generator.get_state()
    try:
        set_seed(seed)
        if generator is not None:
            generator.manual_seed(seed % SEEDS)
        source = iter(batches)
        for i in itertools.count():
            if i:
                set_seed(seed * 1_000_003 + i)
            try:
                batch = next(source)
            except StopIteration:
                return
            yield batch
    finally:
        if generator is not None and before is not None:
            generator.set_state(before)


class Epochs:
    """Training batches, numbered from 0 on through all epochs, each with random state of its own.

    Args:
        train: the loader; its `set_epoch` is called, where it has one.
        seed: of data order and of what is drawn while a batch is trained on.
        per_epoch: batches of one epoch, as far as the loader can tell; corrected where it gives
            fewer.

    Example:
        >>> list(Epochs("ab", 0, 2).numbered(1, 4))
        [(1, 'b'), (2, 'a'), (3, 'b')]
    """

    def __init__(self, train: Any, seed: int, per_epoch: int) -> None:
        self.train, self.seed, self.per_epoch = train, seed, per_epoch

    def numbered(self, start: int, end: int) -> Iterator[tuple[int, Any]]:
        """Yield (number, batch) from `start` up to `end`, as if all before had been drawn.

        Raises:
            DataError: an epoch has no batches.
        """
        number = start
        while number < end:
            epoch, skip = divmod(number, self.per_epoch)
            if hasattr(self.train, "set_epoch"):
                self.train.set_epoch(epoch)
            seen = 0
            for raw in seeded(self.train, self.seed + epoch):
                seen += 1
                if seen > skip:
                    set_seed(self.seed * 1_000_003 + number)
                    yield number, raw
                    number += 1
                if number >= end:
                    return
                if seen == self.per_epoch:
                    break
            if not seen:
                raise no_batches()
            self.per_epoch = seen  # a loader may give fewer than its length says


def no_batches() -> DataError:
    return DataError("the training data gives no batches", "data.train", "", "give some")


def set_seed(seed: int) -> None:
    """Seed torch's global generators; any whole number will do."""
    torch.manual_seed(seed % SEEDS)


def count_batches(loader: Any) -> int:
    """Return the number of batches of one epoch, counted where the loader cannot tell."""
    try:
        return len(loader)
    except TypeError:
        return sum(1 for _ in loader)


def samples_of(data: Data) -> int:
    """Return the number of training samples, as far as it can be told without reading them all."""
    size = getattr(data.train, "dataset_size", None)
    if size is None:
        dataset = getattr(data.train, "dataset", None)
        size = len(dataset) if dataset is not None and hasattr(dataset, "__len__") else None
    return int(size) if size else 64 * count_batches(data.train)
