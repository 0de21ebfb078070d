"""The run folder: stage outputs keyed by content, a lock, and files that are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lamina.errors import BusyError, RunError

MARK = "lamina-run.json"
PART = ".part"  # files that are being written; after a kill they are left behind


def write_atomic(path: Path, data: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename.

    A process that is killed meanwhile leaves the older file as it was, and perhaps a hidden
    temporary file `.NAME.*.part` beside it.

    Args:
        path: the file; missing folders are made.
        data: its bytes, or a function that writes them into an open file.

    Raises:
        RunError: the disk is full, or the folder cannot be written; an older file stays as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(PART, f".{path.name}.", path.parent)
        with os.fdopen(handle, "wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
        temporary = None
        _sync_folder(path.parent)
    except OSError as error:
        raise RunError(
            "cannot write", str(path), error.strerror or str(error), "free space or choose a folder"
        ) from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, where the system can."""
    if os.name == "nt":  # folders cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network disks
            raise
    finally:
        os.close(handle)


def umask() -> int:
    """Return the permissions that new files of this process do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def key_of(*parts: Any) -> str:
    """Return a short hash of JSON values [16 hex].

    Example:
        >>> key_of("stats", 1) == key_of("stats", 1) != key_of("stats", 2)
        True
    """
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds what a run has made so far.

    Stage outputs lie in `stages/` under names that carry the hash of everything they were made
    from, so that a stage is done again exactly when something it depends on has changed.
    """

    path: Path

    def stage(self, name: str, key: str, suffix: str) -> Path:
        """Return where a stage's output for this key lies (or will lie)."""
        return self.path / "stages" / f"{name}-{key}{suffix}"

    def read(self, path: Path) -> bytes | None:
        """Return a stage's output, or None where it is missing."""
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError("cannot read", str(path), error.strerror or str(error)) from None

    def write(self, path: Path, data: bytes | Callable[[IO[bytes]], object]) -> None:
        """Write a file of the run, whole or not at all: its bytes, or what writes them."""
        write_atomic(path, data)


@contextmanager
def open_run(path: str | Path) -> Iterator[RunFolder]:
    """Open (or make) a run folder and hold its lock.

    Raises:
        RunError: the path is a file, or a folder with other things in it, or cannot be written.
        BusyError: another process holds the lock.
    """
    folder = Path(path)
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    if not new and not folder.is_dir():
        raise RunError("the run folder is a file", str(folder), "", "choose another with -o")
    others = [] if new else [e for e in folder.iterdir() if not e.name.endswith(PART)]
    if others and not (folder / MARK).exists():
        raise RunError(
            "the folder holds other things", str(folder), "it is not a run folder",
            "choose an empty or a new one with -o",
        )  # fmt: skip
    try:
        if not (folder / MARK).exists():
            write_atomic(folder / MARK, b'{"lamina_run": 1}\n')
        lock = _lock(folder)
    except RunError:
        _discard(new)
        raise
    for part in (*folder.glob(f".*{PART}"), *folder.glob(f"stages/.*{PART}")):
        part.unlink(missing_ok=True)
    try:
        yield RunFolder(folder)
    finally:
        _discard(new)
        os.close(lock)  # closing gives the lock back, and so does any kind of death


def _discard(new: list[Path]) -> None:
    """Remove a new run folder, and new ones around it, where nothing was made: bad input."""
    try:
        folder = new[0] if new else None
        if folder is None or not {entry.name for entry in folder.iterdir()} <= {MARK, ".lock"}:
            return
        for name in (MARK, ".lock"):
            (folder / name).unlink(missing_ok=True)
        for place in new:
            place.rmdir()
    except OSError:  # another process has begun to use it, or (Windows) the lock is open
        pass


def _lock(folder: Path) -> int:
    """Take the folder's lock; it goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            os.close(handle)
            raise _busy(folder) from None
        return handle
    try:
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError("cannot write", str(folder), error.strerror or str(error)) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise _busy(folder) from None
    return handle


def _busy(folder: Path) -> BusyError:
    return BusyError(
        "the run folder is in use by another process", str(folder), "",
        "wait for it, or choose another folder with -o",
    )  # fmt: skip
