"""Open data by name: what ships with the package, and files of the user's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.data.batches import inputs_of
from lamina.data.functions import call_function, is_function
from lamina.data.images import load_images
from lamina.data.jsonl import load_jsonl
from lamina.data.loaders import Data, TensorLoader
from lamina.data.mnist import load_mnist
from lamina.data.named import check_classes, image_moments, main_name, split_named, with_names
from lamina.data.text import load_text
from lamina.errors import DataError
from lamina.network.source import Network

KINDS = "use mnist-10k, file.npz, images:FOLDER, text:FILE, jsonl:FILE, file.py:function"


def load(spec: str, example: Any = None, network: Network | None = None) -> Data:
    """Open a data set by its spec.

    Args:
        spec: one of
            `mnist-10k`, the digits that ship with the package;
            `file.npz`, arrays `x [n, ...]` and optionally `y [n, ...]`, taken as they are and split
            80 / 10 / 10 from a fixed seed, or `x_train`, `y_train`, `x_validation`, ..., `x_test`;
            `text:FILE` or `jsonl:FILE`, for a network from a Hugging Face folder, whose tokenizer
            cuts it (see `load_text`, `load_jsonl`); `text:FILE?tokens=256` says how long samples
            are, `text:FILE?tokenizer=FOLDER` where the tokenizer lies (for a `.lamina` file), and
            `&` goes between the two;
            `images:FOLDER`, one folder of PNG or JPEG a class (see `load_images`);
            `file.py:function` or `package.module:function`, a function of yours that takes nothing,
            or the network, and returns what `as_data` takes. It is run: give only code you trust.
        network: that the data are for. Text needs its tokenizer; networks of `transformers` get
            dicts, and arrays may be called what they call their inputs.
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
    main = main_name(network)
    if example is None and network is not None and main == "pixel_values":
        example = network.example_kwargs.get(main)
    if spec == "mnist-10k":
        data = load_mnist()
    elif kind == "images":
        data = load_images(Path(rest), example, moments=image_moments(network))
    elif kind in ("text", "jsonl"):
        path, options = _options(rest, spec)
        _must_exist(path)
        if network is None:
            raise DataError("text needs a network", spec, "its tokenizer cuts the text", "name one")
        network = replace(network, folder=options.get("tokenizer", network.folder))
        tokens = int(options["tokens"]) if "tokens" in options else None
        data = (load_text if kind == "text" else load_jsonl)(path, network, tokens)
        return check_classes(data, network, spec)
    elif spec.endswith(".npz"):
        data = load_npz(Path(spec), example, network)
    elif is_function(spec):
        return call_function(spec, network)
    elif spec.endswith(".py"):
        raise DataError("no function named", spec, fix=f"write {spec}:FUNCTION")
    else:
        raise DataError("unknown data", repr(spec), fix=KINDS)
    if main and network is not None and spec != "mnist-10k":
        return check_classes(with_names(data, network), network, spec)
    _must_fit(data, example, spec)
    return data


def _options(text: str, spec: str) -> tuple[Path, dict[str, str]]:
    """Return a file and the options that its name ends with."""
    name, mark, rest = text.rpartition("?")
    if not mark or Path(text).is_file():
        return Path(text), {}
    options = dict(part.partition("=")[::2] for part in rest.split("&"))
    if not all(options.get(key) for key in options) or not set(options) <= {"tokens", "tokenizer"}:
        raise DataError("cannot read data", repr(spec), f"?{rest}", "write ?tokens=64, say")
    tokens = options.get("tokens", "2")
    if not (tokens.isascii() and tokens.isdigit() and len(tokens) < 10):
        raise DataError("bad number of tokens", repr(tokens), "", "write ?tokens=64, say")
    return Path(name), options


def load_npz(path: Path, example: Any = None, network: Network | None = None) -> Data:
    """Open a NumPy archive with `x` and optionally `y`, or with `x_train`, `y_train` and so on.

    For a network of `transformers` arrays may also be called what it calls its inputs.

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
    return split_named(tensors, str(path), network)


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
