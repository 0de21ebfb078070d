"""What users pass as `data=` and what a batch holds: read both, guess nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from lamina.data.loaders import Data, TensorLoader
from lamina.errors import DataError

CALIBRATION_SAMPLES = 1_000
LABEL_KEYS = ("labels", "label", "targets", "target")
SPLITS = ("train", "calibration", "validation", "test")
_SHAPES = "give tensors, (x, y) pairs or dicts of tensors"


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what a batch feeds the network, as positional and keyword arguments.

    A tensor is the one input. `(x,)` and `(x, y)` give x, where x may itself be a tuple of several
    inputs or a dict. A dict gives keyword arguments, without its labels.

    Raises:
        DataError: the batch is none of these.

    Example:
        >>> args, kwargs = inputs_of((torch.zeros(4, 3), torch.zeros(4)))
        >>> args[0].shape, kwargs
        (torch.Size([4, 3]), {})
    """
    if isinstance(batch, Mapping):
        return (), {str(k): v for k, v in batch.items() if k not in LABEL_KEYS}
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        x = batch[0]
        if isinstance(x, Mapping):
            return (), {str(k): v for k, v in x.items()}
        if isinstance(x, (tuple, list)) and x and all(isinstance(v, Tensor) for v in x):
            return tuple(x), {}
        if isinstance(x, Tensor):
            return (x,), {}
    if isinstance(batch, Tensor):
        return (batch,), {}
    raise DataError("cannot read a batch", _describe(batch), fix=_SHAPES)


def labels_of(batch: Any) -> Tensor | None:
    """Return the labels of a batch: y of `(x, y)`, a dict's `labels`, or None.

    Raises:
        DataError: the batch is no tensor, pair or dict, or its labels are no tensor.

    Example:
        >>> labels_of((torch.zeros(2, 3), torch.tensor([1, 0])))
        tensor([1, 0])
    """
    inputs_of(batch)
    labels: Any = None
    if isinstance(batch, Mapping):
        labels = next((batch[k] for k in LABEL_KEYS if k in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        labels = batch[1]
    if labels is None or isinstance(labels, Tensor):
        return labels
    raise DataError("labels are not a tensor", type(labels).__name__, fix="give y as a tensor")


def size_of(batch: Any) -> int:
    """Return the number of samples in a batch: dimension 0 of its first input tensor.

    Raises:
        DataError: the batch holds no tensor with a batch dimension.

    Example:
        >>> size_of({"input_ids": torch.zeros(4, 7)})
        4
    """
    args, kwargs = inputs_of(batch)
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise DataError("a batch holds no tensor with a batch dimension", _describe(batch), fix=_SHAPES)


def as_data(source: Any) -> Data | None:
    """Make a `Data` of whatever a user passed as `data=`.

    Args:
        source: None; a `load` spec such as `"mnist-10k"`; an iterable of batches (calibration
            only); or an object or dict with some of `train`, `calibration`, `validation`, `test`.

    Calibration that is missing is cut from train: its first 1,000 samples, not augmented where
    train is a `TensorLoader`. Calibration must be the same on every pass, so a generator or a
    shuffling loader is replaced by a list of its first 1,000 samples; a list, an unshuffled
    `TensorLoader` and an unshuffled torch `DataLoader` stay as they are.

    Raises:
        DataError: nothing that can be read as batches, no batches at all, NaN in those that were
            looked at, or a one-shot iterator as train, validation or test, which are gone through
            several times.

    Example:
        >>> data = as_data(torch.zeros(8, 3) for _ in range(10))
        >>> len(data.calibration), data.train
        (10, None)
    """
    if source is None:
        return None
    if isinstance(source, (str, PathLike)):
        from lamina.data.sources import load

        return load(str(source))
    if isinstance(source, Mapping):
        splits = {k: source[k] for k in SPLITS if source.get(k) is not None}
        unknown = sorted(str(k) for k in source if k not in SPLITS)
        if unknown or not splits:
            raise DataError(
                "cannot read a dict as data",
                f"keys {unknown or list(source)}",
                "it may hold only train, calibration, validation and test",
                "wrap a single batch in a list",
            )
        return _assemble(splits, source)
    splits = {k: getattr(source, k, None) for k in SPLITS}
    splits = {
        k: v
        for k, v in splits.items()
        if v is not None and (hasattr(v, "__iter__") or not callable(v))
    }
    if splits:
        return _assemble(splits, source)
    return Data(calibration=_steady(_batches(source, "data"), "data"))


def _assemble(splits: Mapping[str, Any], source: Any) -> Data:
    for split in ("train", "validation", "test"):
        loader = splits.get(split)
        if loader is not None and isinstance(_batches(loader, split), Iterator):
            raise DataError(
                "a one-shot iterator cannot be a split",
                split,
                "it is gone through several times",
                "give a list or a DataLoader",
            )
    calibration = splits.get("calibration")
    if calibration is not None:
        calibration = _steady(_batches(calibration, "calibration"), "calibration")
    elif isinstance(splits.get("train"), TensorLoader):
        train = splits["train"]
        calibration = train.head(CALIBRATION_SAMPLES, batch_size=min(train.batch_size, 250))
    elif splits.get("train") is not None:
        calibration = _first(splits["train"], "train")
    if isinstance(source, Data):
        name, classes = source.name, source.classes
    else:
        name, classes = getattr(source, "name", ""), getattr(source, "classes", None)
    return Data(
        train=splits.get("train"),
        calibration=calibration,
        validation=splits.get("validation"),
        test=splits.get("test"),
        name=name if isinstance(name, str) else "",
        classes=classes if isinstance(classes, int) else None,
    )


def _batches(source: Any, where: str) -> Any:
    """Refuse what iterates, but not over batches; `source` itself otherwise."""
    why = ""
    if isinstance(source, Tensor):
        why = "a tensor is one batch at most"
    elif isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Tensor):
        why = "a pair of tensors reads as one batch (x, y)"
    elif isinstance(source, (str, bytes, Mapping)) or not hasattr(source, "__iter__"):
        why = "this is not an iterable of batches"
    if why:
        raise DataError(
            "cannot read data", f"{where} {_describe(source)}", why, "wrap it in a list"
        )
    try:
        count = len(source)
    except TypeError:  # no length is fine, and a DataLoader over a stream has one that raises
        return source
    if count == 0:
        raise DataError("no batches", where, "it is empty", "give at least one batch")
    return source


def _steady(source: Iterable[Any], where: str) -> Iterable[Any]:
    """`source` if every pass over it gives the same samples, else a list of its first ones."""
    if isinstance(source, (list, tuple)):
        for batch in source:
            _check(batch, where)
        return source
    if isinstance(source, TensorLoader):
        if not (source.shuffle or source.augment):
            return source
        return source.head(CALIBRATION_SAMPLES, batch_size=min(source.batch_size, 250))
    loader = torch.utils.data.DataLoader
    if isinstance(source, loader) and isinstance(
        source.sampler, torch.utils.data.SequentialSampler
    ):
        return source
    return _first(source, where)


def _first(source: Iterable[Any], where: str, samples: int = CALIBRATION_SAMPLES) -> list[Any]:
    """The first `samples` samples of `source` as a list of batches; the last may be cut."""
    batches: list[Any] = []
    with _pinned(source):
        for batch in source:
            _check(batch, where)
            size = size_of(batch)
            batches.append(batch if size <= samples else cut_batch(batch, samples, size))
            samples -= size
            if samples <= 0:
                break
    if not batches:
        raise DataError("no batches", where, "it is empty", "give at least one batch")
    return batches


@contextmanager
def _pinned(source: Any) -> Iterator[None]:
    """Fix torch's random state while `source` is looked at, and put everything back after.

    A shuffling DataLoader would otherwise calibrate on other samples in every process, and a run
    that is resumed would not end with the same bytes.
    """
    found = getattr(source, "generator", None)
    generator = found if isinstance(found, torch.Generator) else None
    before = None if generator is None else generator.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield
        finally:
            if generator is not None and before is not None:
                generator.set_state(before)


def cut_batch(value: Any, samples: int, size: int) -> Any:
    """Keep the first `samples` of everything in a batch that has `size` of them."""
    if isinstance(value, Tensor):
        return value[:samples] if value.ndim and len(value) == size else value
    if isinstance(value, Mapping):
        return {k: cut_batch(v, samples, size) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(cut_batch(v, samples, size) for v in value)
    return value


def _check(batch: Any, where: str) -> None:
    args, kwargs = inputs_of(batch)
    labels = labels_of(batch)
    size = size_of(batch)
    if size == 0:
        raise DataError("an empty batch", where, "it has no samples", "drop it")
    if labels is not None and labels.ndim and len(labels) != size:
        raise DataError(
            "inputs and labels differ in length", where, f"{size} inputs, {len(labels)} labels"
        )
    for value in chain(args, kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise DataError("NaN or infinity in the data", where, fix="clean the inputs first")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"Tensor {list(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
