"""Read folders of images, one folder a class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.data.arrays import split_arrays
from lamina.data.loaders import Data, TensorLoader
from lamina.errors import DataError, MissingExtraError

SUFFIXES = (".png", ".jpg", ".jpeg")
# What torchvision's and timm's pretrained networks expect; grey is the mean over the channels.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


Moments = tuple[list[float], list[float], float]


def load_images(
    folder: Path, example: Any = None, batch_size: int = 64, moments: Moments | None = None
) -> Data:
    """Open a folder with one folder of PNG or JPEG files a class.

    `FOLDER/<class>/*.jpg` is split 80 / 10 / 10 from a fixed seed; `FOLDER/train/<class>/*.jpg`
    beside `validation` and `test` is kept as it is. Classes are numbered in the order of their
    names. Inputs are float32 [b, c, h, w], scaled to 0..1 and normalised with ImageNet's mean and
    standard deviation; for anything else give a `file.py:function`.

    Args:
        folder: where to look.
        example: an input [b, c, h, w] of the network: images are scaled and cropped to its size
            and turned grey where it has one channel. Without it they must all have one size.
        batch_size: samples a batch.
        moments: mean and standard deviation by channel and the scale of a pixel, where the network
            was trained with others than ImageNet's and 1/255.

    Raises:
        DataError: no folder, no images, an image that cannot be read, or images of several sizes.
        MissingExtraError: Pillow is not installed.
    """
    if not folder.is_dir():
        why = "it is a file" if folder.exists() else "there is no such folder"
        raise DataError("cannot open images", str(folder), why, "check the path")
    try:
        import PIL.Image  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "images need Pillow", str(folder), fix="pip install pillow"
        ) from error
    channels, size = _shape_of(example)
    parts = {name: folder / name for name in ("train", "validation", "valid", "val", "test")}
    parts = {name: path for name, path in parts.items() if path.is_dir() and _subfolders(path)}
    if "train" in parts:
        classes = [path.name for path in _subfolders(parts["train"])]
        arrays: dict[str, Tensor] = {}
        for name, path in parts.items():
            arrays[f"x_{name}"], arrays[f"y_{name}"] = _read(path, classes, channels, size)
    else:
        classes = [path.name for path in _subfolders(folder)]
        x, y = _read(folder, classes, channels, size)
        arrays = {"x": x, "y": y}
    data = split_arrays(arrays, str(folder), batch_size)
    prepare = _normalize(next(iter(arrays.values())).shape[1], moments or (MEAN, STD, 1 / 255))
    for loader in (data.train, data.calibration, data.validation, data.test):
        if isinstance(loader, TensorLoader):
            loader.prepare = prepare
    return data


def _shape_of(example: Any) -> tuple[int | None, tuple[int, int] | None]:
    if not isinstance(example, Tensor):
        return None, None
    if example.ndim != 4 or example.shape[1] not in (1, 3):
        raise DataError(
            "images do not fit the network",
            f"its input {list(example.shape)}",
            "images are [n, 1 or 3, h, w]",
        )
    return example.shape[1], (example.shape[2], example.shape[3])


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _read(
    folder: Path, classes: list[str], channels: int | None, size: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """Read every image below `folder` into uint8 [n, c, h, w] and class numbers int64 [n]."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    for path in _subfolders(folder):
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        if files and path.name not in classes:
            raise DataError(
                "a class that train does not have", str(path), fix="rename or remove it"
            )
        for file in files:
            image = _decode(file, channels, size)
            if images and image.shape != images[0].shape:
                raise DataError(
                    "images of several sizes",
                    str(file),
                    f"{list(image.shape)} after {list(images[0].shape)} [height, width, channels]",
                    "scale them to one size, or give the network's example input",
                )
            images.append(image)
            labels.append(classes.index(path.name))
    if not images:
        raise DataError(
            "no images", str(folder), "looked for <class>/*.png and *.jpg", "one folder a class"
        )
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def _decode(file: Path, channels: int | None, size: tuple[int, int] | None) -> np.ndarray:
    """Read one image as uint8 [h, w, c], grey if it is stored so and nothing else is asked."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            if channels is None:
                channels = 1 if opened.mode in ("1", "L", "LA", "I;16") else 3
            image = opened.convert("L" if channels == 1 else "RGB")
        if size is not None:
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise DataError("cannot read an image", str(file), str(error), "remove it") from error
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _normalize(channels: int, moments: Any) -> Callable[[Tensor], Tensor]:
    mean, std = torch.tensor(moments[0]), torch.tensor(moments[1])
    if channels == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    elif len(mean) == 1:
        mean, std = mean.expand(channels), std.expand(channels)
    mean, std, scale = mean[:, None, None], std[:, None, None], float(moments[2])
    if scale == 1 / 255:
        return lambda images: (images.to(torch.float32) / 255 - mean) / std
    return lambda images: (images.to(torch.float32) * scale - mean) / std
