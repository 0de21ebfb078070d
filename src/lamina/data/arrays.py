"""Split the user's arrays into train, calibration, validation and test."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lamina.data.loaders import Data, TensorLoader
from lamina.errors import DataError

SPELLINGS = {
    "train": ("train",),
    "calibration": ("calibration", "calib"),
    "validation": ("validation", "valid", "val"),
    "test": ("test",),
}
Pair = tuple[Tensor, Tensor | None]


def split_arrays(arrays: Mapping[str, Tensor], name: str, batch_size: int = 128) -> Data:
    """Make a `Data` of named arrays.

    Args:
        arrays: `x [n, ...]` and optionally `y [n, ...]`, split 80 / 10 / 10 into train, validation
            and test from a fixed seed; or `x_train`, `y_train`, `x_validation` (`x_valid`,
            `x_val`), `x_calibration`, `x_test`, kept as they are. Validation that is missing is a
            tenth of train; calibration is the first 1,000 samples of train.
        name: what errors and reports call it.
        batch_size: samples a batch.

    Raises:
        DataError: no such arrays, no samples, lengths that differ, or fewer than 10 samples
            to split.

    Example:
        >>> data = split_arrays({"x": torch.rand(50, 3)}, "demo")
        >>> data.train.dataset_size, data.validation.dataset_size, data.test.dataset_size
        (40, 5, 5)
    """
    pairs: dict[str, Pair] = {}
    for split, spellings in SPELLINGS.items():
        for spelling in spellings:
            if f"x_{spelling}" in arrays:
                pairs[split] = _pair(arrays, f"_{spelling}", name)
    if not pairs and "x" in arrays:
        x, y = _pair(arrays, "", name)
        tenth = len(x) // 10
        rows = _draw(len(x), name).split([len(x) - 2 * tenth, tenth, tenth])
        for split, index in zip(("train", "validation", "test"), rows, strict=True):
            pairs[split] = x[index], None if y is None else y[index]
    if not pairs:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise DataError("no inputs", name, f"it holds {found}", "name the arrays x and y")
    if "train" in pairs and "validation" not in pairs:
        x, y = pairs["train"]
        order = _draw(len(x), name)
        rows = order.split([len(x) - len(x) // 10, len(x) // 10])
        for split, index in zip(("train", "validation"), rows, strict=True):
            pairs[split] = x[index], None if y is None else y[index]
    loaders = {
        split: TensorLoader(x, y, batch_size, shuffle=split == "train")
        for split, (x, y) in pairs.items()
    }
    if "calibration" not in loaders and "train" in loaders:
        loaders["calibration"] = loaders["train"].head(1_000)
    return Data(**loaders, name=name, classes=_count_classes(pairs))


def _pair(arrays: Mapping[str, Tensor], suffix: str, name: str) -> Pair:
    x, y = arrays[f"x{suffix}"], arrays.get(f"y{suffix}")
    where = f"{name} x{suffix} {list(x.shape)}"
    if x.ndim < 2 or x.numel() == 0:
        why = "it has no samples" if x.ndim and x.numel() == 0 else "a sample is one number"
        raise DataError("no usable inputs", where, why, "give x as [samples, ...]")
    if y is not None and (y.ndim == 0 or len(y) != len(x)):
        raise DataError("inputs and labels differ in length", f"{where}, y {list(y.shape)}")
    return x, y


def _draw(count: int, name: str) -> Tensor:
    if count < 10:
        raise DataError(
            "too few samples to split", name, f"{count} of them", "give 10 or more, or x_train, ..."
        )
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _count_classes(pairs: Mapping[str, Pair]) -> int | None:
    labels = [y for _, y in pairs.values() if y is not None]
    if not labels or any(y.is_floating_point() or y.ndim != 1 or y.min() < 0 for y in labels):
        return None
    return int(max(y.max() for y in labels)) + 1
