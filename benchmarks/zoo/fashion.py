"""Turn the four files of Fashion-MNIST into one `.npz` that `lamina.data.load` opens.

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb FOLDER
    python benchmarks/zoo/fashion.py FOLDER fashion.npz

`FOLDER` is searched for the files by name, at any depth. Images are scaled by the mean and the
standard deviation of the training pixels and stored in half precision, as a `.npz` is taken as it
is; the classes are `T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, boot`.

Reference: Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747.
"""

from __future__ import annotations

import argparse
import gzip
import math
import struct
from pathlib import Path

import numpy as np

MEAN, STD = 0.2860, 0.3530  # of the training pixels, on 0..1
FILES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """Return the array of bytes of a gzipped idx file (magic, sizes, values, big endian)."""
    with gzip.open(path, "rb") as file:
        content = file.read()
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no idx file of bytes")
    sizes = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3])
    if values.size != math.prod(sizes):
        raise SystemExit(f"{path} holds {values.size} values, and says {sizes}")
    return values.reshape(sizes)


def find(folder: Path, name: str) -> Path:
    """Return the one file called `name` under `folder`."""
    found = sorted(folder.rglob(name))
    if not found:
        raise SystemExit(f"no {name} under {folder}")
    return found[0]


def convert(folder: Path, out: Path) -> dict[str, tuple[int, ...]]:
    """Write `x_train`, `y_train`, `x_test`, `y_test` to `out`; return their shapes."""
    arrays: dict[str, np.ndarray] = {}
    for split, prefix in FILES.items():
        images = read_idx(find(folder, f"{prefix}-images-idx3-ubyte.gz"))
        scale = ((np.arange(256) / 255 - MEAN) / STD).astype(np.float16)
        arrays[f"x_{split}"] = scale[images][:, None]
        arrays[f"y_{split}"] = read_idx(find(folder, f"{prefix}-labels-idx1-ubyte.gz"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return {name: array.shape for name, array in arrays.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the four .gz files are, at any depth")
    parser.add_argument("out", type=Path, help="the .npz to write")
    arguments = parser.parse_args()
    for name, shape in convert(arguments.folder, arguments.out).items():
        print(name, shape)
    print(f"{arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
