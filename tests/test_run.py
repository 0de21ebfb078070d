"""The run folder: whole files or none, one process at a time, nothing left of nothing."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from tests.own import ENVIRONMENT

from lamina.errors import BusyError, RunError
from lamina.run import MARK, PART, RunFolder, key_of, open_run, write_atomic


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_write_atomic_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["new", "new/file"]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # not the 0600 of a temporary file


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_atomic_keeps_the_old_file_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RunError, match=r"cannot write at .*file: No space left on device; free"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_write_atomic_cleans_up_after_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit to set")
def test_write_atomic_at_a_real_file_size_limit(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
from lamina.run import write_atomic
path = Path({str(tmp_path / "file")!r})
write_atomic(path, b"old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
write_atomic(path, b"x" * 1_000_000)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert "RunError: cannot write" in done.stderr, done.stderr
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_a_function_may_write_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, lambda file: (file.write(b"one"), file.write(b"two")))
    assert path.read_bytes() == b"onetwo"

    def stop(file: IO[bytes]) -> None:
        file.write(b"x" * 100_000)
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_atomic(path, stop)
    assert path.read_bytes() == b"onetwo"
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not synced there")
def test_file_and_folder_are_synced_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name must not reach the disk before the bytes, and both before the call returns."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append("rename"), replace(a, b)))
    write_atomic(tmp_path / "file", b"new")
    assert seen == ["file", "rename", "folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
@pytest.mark.parametrize("moment", ["written", "synced"])
def test_a_killed_write_leaves_the_old_file_whole(tmp_path: Path, moment: str) -> None:
    """Killed with half the bytes out, and between the last sync and the rename."""
    (tmp_path / "file").write_bytes(b"old")
    code = f"""
import os, signal
from pathlib import Path
from lamina import run

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half(file):
    file.write(b"x" * 500_000)
    file.flush()
    kill()

if {moment == "synced"}:
    os.replace = kill
run.write_atomic(Path({str(tmp_path / "file")!r}), half if {moment == "written"} else b"new")
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_bytes() == b"old"
    left = [name for name in names(tmp_path) if name != "file"]
    assert all(name.startswith(".file.") and name.endswith(PART) for name in left)
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit to set")
@pytest.mark.parametrize("name", ["net.lamina", "out.safetensors", "out.pt"])
def test_every_file_of_the_user_survives_a_full_disk(tmp_path: Path, name: str) -> None:
    code = f"""
import resource, signal, sys
from pathlib import Path
import torch
from torch import nn
import lamina
from lamina import artifact
folder, name = Path({str(tmp_path)!r}), {name!r}
lamina.save(nn.Linear(3, 2), folder / "small.lamina")
lamina.save(nn.Linear(300, 300), folder / "large.lamina")
(folder / name).write_bytes(b"old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
if name == "net.lamina":
    lamina.save(nn.Linear(300, 300), folder / name)
else:
    artifact.decompress(folder / "large.lamina", folder / name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert "RunError: cannot write" in done.stderr, done.stderr
    assert (tmp_path / name).read_bytes() == b"old"
    assert names(tmp_path) == sorted(["large.lamina", name, "small.lamina"])


def test_write_atomic_into_a_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write"):
        write_atomic(tmp_path / "file" / "x", b"")


def test_keys_follow_from_their_parts() -> None:
    assert key_of("a", 1, {"x": 1, "y": 2}) == key_of("a", 1, {"y": 2, "x": 1})
    keys = {key_of("a", 1), key_of("a", 2), key_of("b", 1), key_of("a1"), key_of("a", "1")}
    assert len(keys) == 5
    assert all(len(key) == 16 for key in keys)


def test_a_stage_is_read_back(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        path = run.stage("stats", "abc", ".bin")
        assert run.read(path) is None
        run.write(path, b"data")
        assert run.read(path) == b"data"
    assert names(tmp_path / "run") == [".lock", MARK, "stages", "stages/stats-abc.bin"]


def test_an_unreadable_stage_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    with pytest.raises(RunError, match="cannot read"):
        RunFolder(tmp_path).read(tmp_path / "stage")


def test_a_folder_with_other_things_is_refused_and_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunError, match="holds other things"), open_run(tmp_path):
        pass
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file"), open_run(tmp_path / "file"):
        pass


def test_a_run_that_made_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), open_run(tmp_path / "run"):
        raise ValueError("wrong")
    assert names(tmp_path) == []


def test_a_failed_run_keeps_what_was_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="later"), open_run(tmp_path / "run") as run:
        run.write(run.stage("stats", "abc", ".bin"), b"data")
        raise ValueError("later")
    with open_run(tmp_path / "run") as run:
        assert run.read(run.stage("stats", "abc", ".bin")) == b"data"


def test_what_a_killed_write_left_is_no_obstacle_and_goes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "stages").mkdir(parents=True)
    (folder / "stages" / ".stats-abc.bin.12345678.part").touch()
    with open_run(tmp_path / "run2"):  # killed before even the mark was written
        pass
    (tmp_path / "run2").mkdir()
    (tmp_path / "run2" / f".{MARK}.12345678.part").touch()
    with open_run(tmp_path / "run2"):
        assert names(tmp_path / "run2") == [".lock", MARK]
    (folder / MARK).touch()
    with open_run(folder):
        assert names(folder) == [".lock", MARK, "stages"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = f"""
import sys
from lamina.run import open_run
with open_run({str(folder)!r}):
    print("locked", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(BusyError, match="in use by another process"), open_run(folder):
            pass
        other.kill()
    with open_run(folder) as run:  # death gives the lock back
        assert run.path == folder
