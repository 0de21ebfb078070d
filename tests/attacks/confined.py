"""Opens hostile files in a process of little memory and time, and tells what came of it.

Run as `python -m tests.attacks.confined FOLDER MAX_BYTES ALLOWED`: for each file of the folder, in
order, one JSON line [name, verdict]. ALLOWED is what the process may take beyond what it has
before it opens the file [bytes]; the system refuses it more.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.attacks.fuzz import deadline, describe, skeleton_for

from lamina.artifact import read, restore
from lamina.errors import FileError

SECONDS = 20.0
ROOT = Path(__file__).parents[2]


def judge(files: Mapping[str, bytes], folder: Path, max_bytes: int, allowed: int) -> dict[str, str]:
    """Return by name `"FileError: ..."`, `"accepted"`, or what else happened."""
    for number, data in enumerate(files.values()):
        (folder / f"{number:05}").write_bytes(data)
    return dict(zip(files, judge_folder(folder, max_bytes, allowed), strict=True))


def judge_folder(folder: Path, max_bytes: int, allowed: int) -> list[str]:
    """Return the verdicts on what is in a folder, by the order of the names."""
    words = [sys.executable, "-m", "tests.attacks.confined", folder, max_bytes, allowed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [*map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    found = dict(json.loads(line) for line in run.stdout.splitlines())
    lost = f"the process died: {run.stderr[-500:]}"
    return [found.get(path.name, lost) for path in sorted(folder.iterdir())]


def room(allowed: int) -> tuple[int, int]:
    """Return limits of the address space that leave so much more than is taken now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize() + allowed, resource.RLIM_INFINITY


def open_fully(path: Path, max_bytes: int) -> str:
    try:
        package = read(path, max_bytes)
        state = package.state()
        restore(package, skeleton_for(state))
    except FileError as error:
        return f"FileError: {str(error)[:300]}"
    return "accepted"


def main(folder: Path, max_bytes: int, allowed: int) -> None:
    from tests.attacks.files import valid_files

    with tempfile.TemporaryDirectory() as other:
        warm = Path(other) / "warm"
        for data in valid_files().values():  # what is imported and compiled is not the file's doing
            warm.write_bytes(data)
            open_fully(warm, max_bytes)
    for path in sorted(folder.iterdir()):
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, room(allowed + 3 * path.lstat().st_size))
        try:
            with deadline(SECONDS), deadline(30.0, real=True):
                verdict = open_fully(path, max_bytes)
        except BaseException as error:
            verdict = describe(error)
        resource.setrlimit(resource.RLIMIT_AS, before)
        print(json.dumps([path.name, verdict]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
