"""Every example runs, says what it promises, and stays short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.own import ENVIRONMENT

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))
SAYS = {
    "ten_lines": "the same outputs: True",
    "own_data": "points",
    "plan_edit": "kept bit for bit: True",
    "load_file": "accuracy on a test batch",
}


def test_every_example_is_known() -> None:
    assert {path.stem for path in EXAMPLES} == set(SAYS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", path],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SAYS[path.stem] in done.stdout
