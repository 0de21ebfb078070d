"""The digits that ship with Lamina: the first 10,000 of MNIST's training set."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from lamina.data.loaders import Data, TensorLoader, shift
from lamina.errors import DataError

MEAN, STD = 0.1307, 0.3081


def normalize(images: Tensor) -> Tensor:
    """Turn greys uint8 [b, 28, 28] into network inputs float32 [b, 1, 28, 28]."""
    return (images.unsqueeze(1).to(torch.float32) / 255 - MEAN) / STD


@lru_cache(maxsize=1)
def _read() -> tuple[Tensor, Tensor, tuple[int, ...]]:
    path = files("lamina.data").joinpath("mnist-10k.npz")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = torch.from_numpy(arrays["images"])
            labels = torch.from_numpy(arrays["labels"]).long()
            counts = tuple(int(n) for n in arrays["counts"])
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            "cannot read the shipped digits", str(path), str(error), "reinstall lamina"
        ) from error
    return images, labels, counts


def load_mnist() -> Data:
    """Load the shipped digits: 7,000 train, 1,000 validation, 2,000 test, always the same.

    Batches are `(x float32 [b, 1, 28, 28], y int64 [b])`, normalised with mean .1307 and standard
    deviation .3081. Train is shuffled and moved by up to 2 pixels; calibration is its first 1,000
    digits as they are.

    Raises:
        DataError: the packaged file is missing or damaged.

    Example:
        >>> data = load_mnist()
        >>> [loader.dataset_size for loader in (data.train, data.validation, data.test)]
        [7000, 1000, 2000]
    """
    images, labels, counts = _read()
    (x1, x2, x3), (y1, y2, y3) = images.split(counts), labels.split(counts)
    black = -MEAN / STD
    train = TensorLoader(x1, y1, 128, shuffle=True, augment=shift(2, black), prepare=normalize)
    return Data(
        train=train,
        calibration=train.head(1_000, batch_size=250),
        validation=TensorLoader(x2, y2, 500, prepare=normalize),
        test=TensorLoader(x3, y3, 500, prepare=normalize),
        name="mnist-10k",
        classes=10,
    )
