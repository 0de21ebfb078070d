"""Killed at any point, the same command continues and ends with the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.own import run_lamina, start_lamina, write_net

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no kill -9")

EPOCHS = 6
COMMAND = (
    *("compress", "net.py:build", "--data", "net.py:slow_loaders", "--size", "25%"),
    *("--methods", "rdoq", "--recover", str(EPOCHS), "--samples", "64", "-o"),
)
# Every batch takes a moment, so that a kill lands where it is aimed on any machine.
SLOW = """

class Slow:
    def __init__(self, loader):
        self.loader = loader
        self.dataset_size = 512

    def __len__(self):
        return len(self.loader)

    def set_epoch(self, epoch):
        self.loader.set_epoch(epoch)

    def __iter__(self):
        import time

        for x, y in self.loader:
            time.sleep(0.02)
            yield x + 0.1 * torch.randn_like(x), y  # random, and not seeded by the loader


def slow_loaders():
    return loaders() | {"train": Slow(loaders()["train"])}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.py and `whole`, the run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("resume")
    write_net(folder, SLOW)
    done = run_lamina(*COMMAND, "whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    facts = json.loads((folder / "whole" / "report.json").read_text(encoding="utf-8"))
    assert facts["recovery"]["steps"] == 8 * EPOCHS  # the file holds what was trained
    return folder


def stages(run: Path, name: str) -> list[Path]:
    return list((run / "stages").glob(f"{name}-*"))


def end_when(
    place: Path, run: str, is_time: Callable[[Path], bool], how: signal.Signals
) -> tuple[int, str]:
    """Start the command, end it as soon as `is_time`, and return its exit code and stderr."""
    with start_lamina(*COMMAND, run, cwd=place) as process:
        limit = time.monotonic() + 120
        while not is_time(place / run):
            assert process.poll() is None, "it ended before it could be stopped"
            assert time.monotonic() < limit
            time.sleep(0.005)
        process.send_signal(how)
        _, err = process.communicate()
    return process.returncode, err


def finish(place: Path, run: str) -> dict[str, dict[str, object]]:
    """Run the same command to its end, compare the file, and return the stages by name."""
    done = run_lamina(*COMMAND, run, cwd=place)
    assert done.returncode == 0, done.stderr
    whole = (place / "whole" / "net.lamina").read_bytes()
    assert (place / run / "net.lamina").read_bytes() == whole
    report = json.loads((place / run / "report.json").read_text(encoding="utf-8"))
    return {stage["name"]: stage for stage in report["stages"]}


def test_killed_after_the_measurements(place: Path) -> None:
    seen: list[subprocess.CompletedProcess[str]] = []

    def is_measured(run: Path) -> bool:
        if not stages(run, "stats"):
            return False
        seen.append(run_lamina(*COMMAND, run.name, cwd=place))
        return True

    code, _ = end_when(place, "early", is_measured, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (place / "early" / "net.lamina").exists()
    assert seen[0].returncode == 2  # a running command keeps others out, its death lets them in
    assert "in use by another process" in seen[0].stderr
    assert finish(place, "early")["measure"]["cached"] is True


def test_killed_twice_while_training(place: Path) -> None:
    def is_training(run: Path) -> bool:
        return bool(stages(run, "recover"))

    code, _ = end_when(place, "late", is_training, signal.SIGKILL)
    assert code == -signal.SIGKILL
    (checkpoint,) = stages(place / "late", "recover")
    first = checkpoint.stat().st_mtime_ns
    code, _ = end_when(
        place, "late", lambda _: checkpoint.stat().st_mtime_ns != first, signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    assert not stages(place / "late", "recovered")
    told = finish(place, "late")
    assert told["propose"]["cached"] is True
    assert told["recover"]["cached"] is False


def test_interrupted_while_training(place: Path) -> None:
    code, err = end_when(place, "stopped", lambda run: bool(stages(run, "recover")), signal.SIGINT)
    assert code == 130
    assert err == "lamina: interrupted; the same command continues the run in stopped\n"
    finish(place, "stopped")


def test_a_finished_run_is_not_trained_again(place: Path) -> None:
    before = (place / "whole" / "net.lamina").read_bytes()
    told = finish(place, "whole")
    assert all(told[name]["cached"] for name in ("measure", "propose", "recover"))
    assert (place / "whole" / "net.lamina").read_bytes() == before


def test_a_new_budget_measures_nothing_again(place: Path) -> None:
    words = [word if word != "25%" else "40%" for word in COMMAND]
    words[words.index(str(EPOCHS))] = "none"
    done = run_lamina(*words, "whole", cwd=place)
    assert done.returncode == 0, done.stderr
    facts = json.loads((place / "whole" / "report.json").read_text(encoding="utf-8"))
    told = {stage["name"]: stage["cached"] for stage in facts["stages"]}
    assert told["measure"] and told["propose"] and not told["plan"]
    assert facts["budget"]["text"] == "size=40%"
    # What is measured depends on the seed: then it is done again.
    done = run_lamina(*words, "whole", "--seed", "1", cwd=place)
    assert done.returncode == 0, done.stderr
    facts = json.loads((place / "whole" / "report.json").read_text(encoding="utf-8"))
    assert not any(s["cached"] for s in facts["stages"] if s["name"] in ("measure", "propose"))
