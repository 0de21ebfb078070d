from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from lamina.train.checkpoint import read_checkpoint, write_checkpoint

STATE = {"step": 3, "net": {"w": torch.arange(6.0)}, "history": [{"loss": 0.5}], "price": 1e-6}


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("import pathlib; pathlib.Path('hostile-was-here').write_text('x')",)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    write_checkpoint(path, STATE)
    state = read_checkpoint(path)
    assert state is not None
    assert torch.equal(state.pop("net")["w"], torch.arange(6.0))
    assert state == {k: v for k, v in STATE.items() if k != "net"}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_missing_file_is_none(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "none.pt") is None
    assert read_checkpoint(tmp_path) is None


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "middle"])
def test_a_damaged_file_is_none(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.pt"
    write_checkpoint(path, STATE)
    data = path.read_bytes()
    at = data.index(b"PK", 4) // 2
    broken = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "text": b"not a checkpoint",
        "middle": data[:at] + bytes(64) + data[at + 64 :],
    }
    path.write_bytes(broken[damage])
    assert read_checkpoint(path) is None


def test_a_checkpoint_of_something_else_is_none(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    assert read_checkpoint(tmp_path / "list.pt") is None


def test_a_hostile_pickle_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"step": Hostile()}, "zip.pt")
    Path("bare.pt").write_bytes(pickle.dumps({"step": Hostile()}))
    for name in ("zip.pt", "bare.pt"):
        assert read_checkpoint(Path(name)) is None
        assert not Path("hostile-was-here").exists()
    pickle.loads(Path("bare.pt").read_bytes())  # noqa: S301 - the control: it would have run
    assert Path("hostile-was-here").exists()
