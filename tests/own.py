"""A network and data of a user's own, as files, and the command line as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

NET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    layers = nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)
    return nn.Sequential(*layers), (torch.zeros(1, 16),)


def loaders():
    from lamina.data import TensorLoader

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 16, generator=generator)
    y = x[:, :4].argmax(1)
    return {
        "train": TensorLoader(x, y, 64, shuffle=True),
        "calibration": [(x[:128], y[:128])],
        "validation": [(x[128:256], y[128:256])],
        "test": [(x[256:], y[256:])],
    }
"""

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NO_COLOR": "1"}
COMMAND = [sys.executable, "-m", "lamina.cli"]
FAST = ["--methods", "rdoq", "--recover", "none"]


def write_net(folder: Path, text: str = "") -> Path:
    """Write net.py (with more functions, if any) and return its path."""
    path = folder / "net.py"
    path.write_text(NET + text, encoding="utf-8")
    return path


def run_lamina(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [*COMMAND, *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


def start_lamina(*words: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """Start the command line and do not wait for it."""
    command = [*COMMAND, *map(str, words)]
    # Tests that run in the background of a shell inherit that Ctrl-C is ignored: take it back.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
