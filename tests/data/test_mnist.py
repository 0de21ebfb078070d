"""The shipped digits: sizes, balance, disjointness, scale, and that the file can be remade."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from importlib.resources import files
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from lamina.data import TensorLoader, load

# Digits of each class in the first 10,000 of MNIST's training set.
CLASS_COUNTS = [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_mnist.py"


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with files("lamina.data").joinpath("mnist-10k.npz").open("rb") as file:
        return dict(np.load(file, allow_pickle=False))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_mnist", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_holds_what_it_says(arrays: dict[str, np.ndarray]) -> None:
    assert arrays["images"].shape == (10_000, 28, 28) and arrays["images"].dtype == np.uint8
    assert np.bincount(arrays["labels"]).tolist() == CLASS_COUNTS
    assert arrays["counts"].tolist() == [7_000, 1_000, 2_000]
    # The mean grey of these digits, measured on the source; .1307 is that of all 60,000.
    assert arrays["images"].mean() / 255 == pytest.approx(0.131126, abs=1e-5)


def test_splits_are_disjoint(arrays: dict[str, np.ndarray]) -> None:
    """All 10,000 images differ, so splits by row share no image."""
    seen = {hashlib.sha256(image.tobytes()).digest() for image in arrays["images"]}
    assert len(seen) == 10_000


def test_splits_are_balanced_and_mixed(arrays: dict[str, np.ndarray]) -> None:
    labels = arrays["labels"]
    total = np.asarray(CLASS_COUNTS)
    start = 0
    for count in (7_000, 1_000, 2_000):
        part = np.bincount(labels[start : start + count], minlength=10)
        assert np.abs(part - total * count / 10_000).max() <= 1.5
        # Mixed, too: any 500 rows in a row look like the whole (a sorted split would not).
        piece = np.bincount(labels[start : start + 500], minlength=10)
        assert np.abs(piece - total / 20).max() < 30
        start += count


def test_load_gives_the_splits_normalised(arrays: dict[str, np.ndarray]) -> None:
    data = load("mnist-10k")
    sizes = [getattr(data, s).dataset_size for s in ("train", "calibration", "validation", "test")]
    assert sizes == [7_000, 1_000, 1_000, 2_000]
    assert (data.name, data.classes) == ("mnist-10k", 10)
    x = torch.cat([x for x, _ in data.test])
    y = torch.cat([y for _, y in data.test])
    wanted = (arrays["images"][8_000:, None].astype(np.float64) / 255 - 0.1307) / 0.3081
    assert x.shape == (2_000, 1, 28, 28) and x.dtype == torch.float32
    np.testing.assert_allclose(x.numpy(), wanted, atol=1e-6)
    assert y.dtype == torch.int64 and np.array_equal(y.numpy(), arrays["labels"][8_000:])


def test_calibration_is_the_head_of_train_and_does_not_move() -> None:
    data = load("mnist-10k")
    first, again = list(data.calibration), list(data.calibration)
    assert [len(x) for x, _ in first] == [250] * 4
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert isinstance(data.train, TensorLoader)
    plain = next(iter(data.train.head(250, 250)))
    assert torch.equal(first[0][0], plain[0])


def test_train_is_augmented_with_black() -> None:
    loader = load("mnist-10k").train
    assert isinstance(loader, TensorLoader)
    x, _ = next(iter(loader))
    black = -0.1307 / 0.3081
    assert len(x) == 128 and float(x.min()) == pytest.approx(black, abs=1e-6)
    # A border of zeros would be grey in normalised units; there is none in digits this bright.
    assert not (x == 0).any()


def test_two_loads_do_not_share_an_epoch() -> None:
    one, two = load("mnist-10k").train, load("mnist-10k").train
    assert isinstance(one, TensorLoader) and isinstance(two, TensorLoader)
    iter(one)
    assert (one.epoch, two.epoch) == (1, 0)


def test_the_file_is_remade_byte_for_byte(
    arrays: dict[str, np.ndarray],
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Undo the split into a stand-in for the source package, run the script, compare the bytes.

    The split must not depend on the order of the source, so the stand-in holds another order.
    """
    digits = tmp_path / "src" / "digits"
    digits.mkdir(parents=True)
    for digit in range(10):
        images = arrays["images"][arrays["labels"] == digit][::-1]
        values = np.round(images.reshape(-1) / 255, 3).tolist()
        (digits / f"{digit}.json").write_text(json.dumps({"data": values}))
    target = tmp_path / "again.npz"
    monkeypatch.setattr("sys.argv", ["make_mnist.py", str(tmp_path), "-o", str(target)])
    script.main()
    again = dict(np.load(target, allow_pickle=False))
    assert all(np.array_equal(again[key], arrays[key]) for key in arrays)
    once = target.read_bytes()
    script.main()
    assert target.read_bytes() == once


def test_the_script_refuses_another_package(script: ModuleType, tmp_path: Path) -> None:
    digits = tmp_path / "src" / "digits"
    digits.mkdir(parents=True)
    (digits / "0.json").write_text(json.dumps({"data": [0.5] * 784}))
    with pytest.raises(SystemExit, match=r"mnist@1\.1\.0"):
        script.read_digits(tmp_path)


def test_shares_add_up(script: ModuleType) -> None:
    wanted = [701, 789, 694, 722, 686, 604, 710, 749, 661, 684]
    assert script.share_out(CLASS_COUNTS, 7_000) == wanted and sum(wanted) == 7_000
    assert script.share_out([1, 1, 1], 2) == [1, 1, 0]


def test_the_notice_names_the_origin() -> None:
    notice = files("lamina.data").joinpath("NOTICE").read_text()
    assert all(word in notice for word in ("LeCun", "Cortes", "Burges", "CC BY-SA 3.0"))
