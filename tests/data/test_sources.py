"""Data opened by name: arrays, the user's own function, and one clear line for everything bad."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lamina.data import load
from lamina.errors import DataError, LaminaError, PlanError


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def pool(loader: Any) -> torch.Tensor:
    return torch.cat([b[0] if isinstance(b, (tuple, list)) else b for b in loader])


# --- file.npz


def test_npz_is_split_80_10_10_the_same_way_every_time(tmp_path: Path) -> None:
    x = np.arange(100, dtype=np.float64).reshape(50, 2)
    spec = save(tmp_path / "a.npz", x=x, y=np.arange(50) % 3)
    one, two = load(spec), load(spec)
    parts = [pool(d) for d in (one.train, one.validation, one.test)]
    assert [len(p) for p in parts] == [40, 5, 5]
    assert sorted(torch.cat(parts)[:, 0].tolist()) == x[:, 0].tolist()  # disjoint and complete
    assert parts[0].dtype == torch.float32 and one.classes == 3
    assert all(
        torch.equal(pool(getattr(one, s)), pool(getattr(two, s)))
        for s in ("calibration", "validation", "test")
    )
    labelled = torch.cat([y for _, y in one.test])
    assert labelled.dtype == torch.int64
    assert torch.equal(labelled, (pool(one.test)[:, 0] / 2).long() % 3)  # labels follow inputs


def test_npz_without_labels(tmp_path: Path) -> None:
    data = load(save(tmp_path / "a.npz", x=np.zeros((20, 4), np.int32)))
    batch = next(iter(data.train or ()))
    assert isinstance(batch, torch.Tensor) and batch.dtype == torch.int64 and data.classes is None


def test_npz_with_splits_of_its_own(tmp_path: Path) -> None:
    x = np.arange(60, dtype=np.float32).reshape(30, 2)
    spec = save(
        tmp_path / "a.npz",
        x_train=x[:20], y_train=np.zeros(20), x_val=x[20:25], y_val=np.zeros(5), x_test=x[25:],
    )  # fmt: skip
    data = load(spec)
    assert torch.equal(pool(data.validation), torch.from_numpy(x[20:25]))
    assert torch.equal(pool(data.test), torch.from_numpy(x[25:]))
    assert torch.equal(pool(data.calibration), torch.from_numpy(x[:20]))
    assert data.classes is None  # float labels are no classes


def test_npz_validation_is_cut_from_train_where_it_is_missing(tmp_path: Path) -> None:
    x = np.arange(40, dtype=np.float32)[:, None]
    data = load(save(tmp_path / "a.npz", x_train=x))
    assert data.test is None
    assert len(pool(data.validation)) == 4
    both = torch.cat([pool(data.train), pool(data.validation)])
    assert sorted(both[:, 0].tolist()) == list(range(40))
    kept = set(pool(data.calibration)[:, 0].tolist())
    assert not kept & set(pool(data.validation)[:, 0].tolist())


def test_npz_follows_the_example(tmp_path: Path) -> None:
    spec = save(tmp_path / "a.npz", x=np.zeros((20, 1, 3, 3), np.uint8), y=np.zeros(20, np.int8))
    data = load(spec, example=(torch.zeros(2, 1, 3, 3, dtype=torch.float64),))
    x, y = next(iter(data.train or ()))
    assert x.dtype == torch.float64 and y.dtype == torch.int64
    with pytest.raises(DataError, match=r"\[1, 3, 3\].*\[1, 4, 4\]"):
        load(spec, example=torch.zeros(2, 1, 4, 4))
    with pytest.raises(DataError, match="does not fit"):
        load("mnist-10k", example=torch.zeros(2, 784))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((0, 3))}, "no samples"),
        ({"x": np.zeros((20, 0))}, "no samples"),
        ({"x": np.zeros(20)}, "one number"),
        ({"x": np.zeros((9, 2))}, "9 of them"),
        ({"x_train": np.zeros((9, 2))}, "9 of them"),
        ({"x": np.zeros((20, 2)), "y": np.zeros(19)}, r"y \[19\]"),
        ({"x_test": np.zeros((20, 2)), "y_test": np.zeros(())}, "differ in length"),
        ({"x": np.full((20, 2), np.nan)}, "NaN.*40 values"),
        ({"x": np.zeros((20, 2)), "y": np.full(20, np.inf)}, "NaN.* y"),
        ({"x": np.array([[1, 2], [3]] * 10, dtype=object)}, "ragged"),
        ({"x": np.array([["a"]] * 20)}, "not numbers"),
        ({"x": np.zeros((20, 2), complex)}, "not numbers"),
        ({"images": np.zeros((20, 2))}, "it holds images"),
        ({}, "it holds nothing"),
    ],
)
def test_bad_arrays(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    spec = save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load(spec)
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_damaged_archives(tmp_path: Path) -> None:
    whole = Path(save(tmp_path / "whole.npz", x=np.random.rand(50, 4))).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for name, content in [
        ("empty", b""),
        ("text", b"hello"),
        ("cut", whole[:-200]),
        ("flipped", bytes(flipped)),
        ("pickle", b"\x80\x04K\x01."),
    ]:
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"cannot read arrays at .*{name}.npz"):
            load(str(path))


def test_a_lone_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "lone.npz").open("wb") as file:
        np.save(file, np.zeros((20, 2)))
    with pytest.raises(DataError, match=r"lone\.npz: it is a single array"):
        load(str(tmp_path / "lone.npz"))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    spec = save(tmp_path / "bomb.npz", x=np.array([Bomb()] * 20, dtype=object))
    with pytest.raises(DataError):
        load(spec)
    assert not (tmp_path / "exploded").exists()


# --- file.py:function


def write(path: Path, body: str) -> str:
    path.write_text("import torch\nfrom lamina.data import Data\n" + body)
    return str(path)


@pytest.mark.parametrize(
    ("body", "calibration"),
    [
        ("def make(): return Data(calibration=[torch.zeros(4, 2)])", 4),
        ("class D: train = [torch.zeros(6, 2)]\ndef make(): return D()", 6),
        ("def make():\n    for _ in range(3): yield torch.zeros(2, 2), torch.zeros(2)", 6),
        ("make = lambda: [{'ids': torch.zeros(5, 2)}]", None),
    ],
)
def test_a_function_of_the_user(body: str, calibration: int | None, tmp_path: Path) -> None:
    data = load(write(tmp_path / "mine.py", body) + ":make")
    assert data.calibration is not None
    if calibration is not None:
        assert len(pool(data.calibration)) == calibration


@pytest.mark.parametrize(
    ("body", "function", "message"),
    [
        ("", "make", "no such function"),
        ("make = 3", "make", "no such function"),
        ("def make(: pass", "make", "SyntaxError"),
        ("import no_such_module_at_all", "make", "ModuleNotFoundError"),
        ("def make(): return 1 / 0", "make", "ZeroDivisionError"),
        ("def make(n): return []", "make", "TypeError"),
        ("def make(): pass", "make", "returned None"),
        ("def make(): return []", "make", "no batches"),
        (
            "def make():\n    yield torch.zeros(2)\n    raise OSError('disk')",
            "make",
            "OSError: disk",
        ),
    ],
)
def test_bad_functions(body: str, function: str, message: str, tmp_path: Path) -> None:
    spec = write(tmp_path / "bad.py", body) + f":{function}"
    with pytest.raises(DataError, match=message) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


def test_a_function_finds_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "a_neighbour_of_mine.py").write_text("SIZE = 3")
    before = list(sys.path)
    body = "from a_neighbour_of_mine import SIZE\ndef make(): return [torch.zeros(SIZE, 2)]"
    assert len(pool(load(write(tmp_path / "mine.py", body) + ":make").calibration)) == 3
    assert sys.path == before


def test_lamina_errors_of_the_function_pass(tmp_path: Path) -> None:
    body = "from lamina.errors import PlanError\ndef make(): raise PlanError('mine')"
    with pytest.raises(PlanError, match="mine"):
        load(write(tmp_path / "a.py", body) + ":make")


# --- everything else


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist", "unknown data at 'mnist'.*mnist-10k"),
        ("", "unknown data"),
        ("missing.npz", "missing.npz: there is no such file"),
        ("missing.py:make", "missing.py: there is no such file"),
        ("mine.py", "mine.py:FUNCTION"),
        ("images:missing", "there is no such folder"),
        ("text:missing.txt", "there is no such file"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(spec)


def test_text_says_what_it_takes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("words")
    with pytest.raises(LaminaError, match="tokenizer"):
        load(f"text:{file}")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(DataError, match="it is a folder"):
        load(str(tmp_path / "a.npz"))
