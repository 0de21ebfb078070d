"""Open data by name: what ships with the package, and files of the user's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.data.arrays import split_arrays
from lamina.data.batches import as_data, inputs_of
from lamina.data.images import load_images
from lamina.data.loaders import Data, TensorLoader
from lamina.data.mnist import load_mnist
from lamina.data.text import load_text
from lamina.errors import DataError, LaminaError
from lamina.network.source import Network

KINDS = "use mnist-10k, file.npz, images:FOLDER, text:FILE or file.py:function"


def load(spec: str, example: Any = None, network: Network | None = None) -> Data:
    """Open a data set by its spec.

    Args:
        spec: one of
            `mnist-10k`, the digits that ship with the package;
            `file.npz`, arrays `x [n, ...]` and optionally `y [n, ...]`, taken as they are and split
            80 / 10 / 10 from a fixed seed, or `x_train`, `y_train`, `x_validation`, ..., `x_test`;
            `text:FILE`, for a network from a Hugging Face folder, whose tokenizer cuts it (see
            `load_text`);
            `images:FOLDER`, one folder of PNG or JPEG a class (see `load_images`);
            `file.py:function`, a function of yours that takes nothing and returns what `as_data`
            takes. The file is run: give only files you trust.
        network: that the data are for; text needs its tokenizer.
        example: an example input of the network, or a tuple of them, if there is one; images are
            scaled to it, and arrays of another shape are refused.

    Raises:
        DataError: the spec is unknown, or what it names is missing, empty, ragged, damaged, holds
            NaN, or does not fit the network.
        MissingExtraError: images need Pillow.

    Example:
        >>> load("mnist-10k").test.dataset_size
        2000
    """
    if isinstance(example, (tuple, list)):
        example = example[0] if example else None
    kind, _, rest = spec.partition(":")
    path, _, function = spec.rpartition(":")
    if spec == "mnist-10k":
        data = load_mnist()
    elif kind == "images":
        data = load_images(Path(rest), example)
    elif kind == "text":
        _must_exist(Path(rest))
        if network is None:
            raise DataError("text needs a network", spec, "its tokenizer cuts the text", "name one")
        data = load_text(Path(rest), network)
    elif path.endswith(".py"):
        data = _call(Path(path), function)
    elif spec.endswith(".npz"):
        data = load_npz(Path(spec), example)
    elif spec.endswith(".py"):
        raise DataError("no function named", spec, fix=f"write {spec}:FUNCTION")
    else:
        raise DataError("unknown data", repr(spec), fix=KINDS)
    _must_fit(data, example, spec)
    return data


def load_npz(path: Path, example: Any = None) -> Data:
    """Open a NumPy archive with `x` and optionally `y`, or with `x_train`, `y_train` and so on.

    Floats become float32 (or the example's dtype), integers int64 unless the example is floating.
    Nothing is unpickled.

    Raises:
        DataError: the file is missing, damaged, or holds no usable arrays.
    """
    _must_exist(path)
    try:
        # Opened here: np.load leaves a damaged file open.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, not an archive of named ones")
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # a damaged zip raises from zipfile, zlib, struct or numpy alike
        ragged = "Object arrays" in str(error)
        raise DataError(
            "cannot read arrays",
            str(path),
            "an array is ragged or holds objects" if ragged else str(error),
            "write it with numpy.savez(path, x=..., y=...) from plain arrays",
        ) from error
    dtype = example.dtype if isinstance(example, Tensor) else None
    floating = dtype if dtype is not None and dtype.is_floating_point else None
    tensors = {key: _as_tensor(array, key, path, floating) for key, array in arrays.items()}
    return split_arrays(tensors, str(path))


def _as_tensor(array: np.ndarray, key: str, path: Path, floating: torch.dtype | None) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise DataError("not numbers", f"{path} {key}", f"its type is {array.dtype}")
    if array.dtype.kind == "f":
        dtype = floating if key.startswith("x") and floating else torch.float32
    else:
        dtype = floating if key.startswith("x") and floating else torch.int64
    tensor = torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    if tensor.is_floating_point() and not tensor.isfinite().all():
        bad = int((~tensor.isfinite()).sum())
        raise DataError("NaN or infinity in the data", f"{path} {key}", f"{bad} values", "clean it")
    return tensor.to(dtype)


def _call(path: Path, function: str) -> Data:
    """Run the user's file and call their function."""
    _must_exist(path)
    where = f"{path}:{function}"
    name = f"lamina_user_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(found)
    # Data classes and DataLoader workers look their module up by name, so it has to be there; and
    # the file's neighbours are found as when the file is run by itself.
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        found.loader.exec_module(module)
        made = getattr(module, function, None)
        if not callable(made):
            raise DataError("no such function", where, fix=f"define {function}() in {path.name}")
        data = as_data(made())
    except LaminaError:
        raise
    except Exception as error:
        raise DataError(
            "the data function failed", where, f"{type(error).__name__}: {error}"
        ) from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    if data is None:
        raise DataError("the data function returned None", where, fix="return loaders or batches")
    return data


def _must_exist(path: Path) -> None:
    if not path.is_file():
        why = "it is a folder" if path.is_dir() else "there is no such file"
        raise DataError("cannot open data", str(path), why, "check the path")


def _must_fit(data: Data, example: Any, spec: str) -> None:
    if not isinstance(example, Tensor):
        return
    for loader in (data.train, data.calibration, data.validation):
        if not isinstance(loader, TensorLoader):
            continue
        args, _ = inputs_of(next(iter(loader.head(1))))
        sample, wanted = list(args[0].shape[1:]), list(example.shape[1:])
        if sample != wanted:
            raise DataError(
                "the data does not fit the network",
                spec,
                f"a sample is {sample}, the network takes {wanted}",
                "give data of that shape",
            )
