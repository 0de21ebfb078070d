"""Folders of images, one folder a class; what needs Pillow is skipped where it is not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamina.data import load
from lamina.errors import DataError, MissingExtraError

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def paint(file: Path, pixels: np.ndarray) -> None:
    image = pytest.importorskip("PIL.Image")
    file.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels.astype(np.uint8)).save(file)


def colour(value: int, height: int = 6, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), (value, 0, 255))


def paint_folder(folder: Path, counts: dict[str, int]) -> None:
    for k, (name, count) in enumerate(sorted(counts.items())):
        for i in range(count):
            paint(folder / name / f"{i:03}.png", colour(100 * k + i))


def pairs(loader: Any) -> list[tuple[int, int]]:
    """(red value, label) of every image, read back through the normalisation."""
    found = []
    for x, y in loader:
        red = np.rint((x[:, 0, 0, 0].double().numpy() * STD[0] + MEAN[0]) * 255).astype(int)
        found += list(zip(red.tolist(), y.tolist(), strict=True))
    return found


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingExtraError, match="pip install pillow"):
        load(f"images:{tmp_path}")


def test_one_folder_a_class_is_split(tmp_path: Path) -> None:
    paint_folder(tmp_path, {"cat": 12, "dog": 8})
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    data = load(f"images:{tmp_path}")
    parts = [pairs(s) for s in (data.train, data.validation, data.test)]
    assert [len(p) for p in parts] == [16, 2, 2]
    assert data.classes == 2
    wanted = [(i, 0) for i in range(12)] + [(100 + i, 1) for i in range(8)]
    assert sorted(parts[0] + parts[1] + parts[2]) == wanted
    assert len(pairs(data.calibration)) == 16


def test_values_are_normalised(tmp_path: Path) -> None:
    paint_folder(tmp_path, {"a": 10})
    x, _ = next(iter(load(f"images:{tmp_path}").test or ()))
    assert x.shape == (1, 3, 6, 8) and x.dtype == torch.float32
    np.testing.assert_allclose(x[0, 1], (0 - MEAN[1]) / STD[1], rtol=1e-5)
    np.testing.assert_allclose(x[0, 2], (1 - MEAN[2]) / STD[2], rtol=1e-5)


def test_splits_of_their_own(tmp_path: Path) -> None:
    paint_folder(tmp_path / "train", {"a": 5, "b": 5})
    paint_folder(tmp_path / "val", {"a": 2, "b": 2})
    paint_folder(tmp_path / "test", {"b": 3})
    data = load(f"images:{tmp_path}")
    assert sorted(pairs(data.validation)) == [(0, 0), (1, 0), (100, 1), (101, 1)]
    assert pairs(data.test) == [(0, 1), (1, 1), (2, 1)]  # b is class 1 even where a is missing
    assert len(pairs(data.train)) == 10


def test_a_class_that_train_does_not_have(tmp_path: Path) -> None:
    paint_folder(tmp_path / "train", {"a": 10})
    paint_folder(tmp_path / "test", {"c": 1})
    with pytest.raises(DataError, match="train does not have"):
        load(f"images:{tmp_path}")


def test_the_example_gives_size_and_channels(tmp_path: Path) -> None:
    for i in range(10):
        paint(tmp_path / "a" / f"{i}.png", colour(i, 6 + i, 20 - i))
    data = load(f"images:{tmp_path}", example=torch.zeros(1, 1, 5, 7))
    assert next(iter(data.train or ()))[0].shape == (8, 1, 5, 7)
    with pytest.raises(DataError, match="several sizes"):
        load(f"images:{tmp_path}")
    with pytest.raises(DataError, match=r"\[1, 784\]"):
        load(f"images:{tmp_path}", example=torch.zeros(1, 784))


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    for i in range(10):
        paint(tmp_path / "a" / f"{i}.jpg", np.full((4, 4), 255))
    x, _ = next(iter(load(f"images:{tmp_path}").test or ()))
    assert x.shape == (1, 1, 4, 4)
    np.testing.assert_allclose(x, (1 - MEAN.mean()) / STD.mean(), rtol=1e-5)


def test_damaged_and_missing_images(tmp_path: Path) -> None:
    paint_folder(tmp_path / "damaged", {"a": 10})
    file = tmp_path / "damaged" / "a" / "003.png"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match=r"003\.png"):
        load(f"images:{tmp_path / 'damaged'}")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="no images"):
        load(f"images:{tmp_path / 'empty'}")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="it is a file"):
        load(f"images:{tmp_path / 'file'}")
