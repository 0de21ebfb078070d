"""Fail when a file is over its line budget: one that outgrows its page has taken a second job."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = {"src/**/*.py": 400, "pyproject.toml": 100, "CONTRIBUTING.md": 60}


def find_overruns(root: Path, budgets: dict[str, int]) -> list[str]:
    """Return a line for each file under `root` that is over the budget [lines] of its pattern."""
    overruns = []
    for pattern, limit in budgets.items():
        for path in sorted(root.glob(pattern)):
            count = len(path.read_text(encoding="utf-8").splitlines())
            if count > limit:
                name = path.relative_to(root).as_posix()
                overruns.append(f"{name}: {count} lines, limit {limit}")
    return overruns


if __name__ == "__main__":
    found = find_overruns(ROOT, BUDGETS)
    print("\n".join(found) if found else "line budget: ok")
    sys.exit(1 if found else 0)
