"""Calibration block by block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hf_folders import tokens
from torch import nn

import lamina
from lamina.errors import DataError, MethodError
from lamina.network.pretrained import open_folder
from lamina.network.source import main_output
from lamina.run import open_run
from lamina.streaming import Streamed, layers

Folder = Callable[[str], Path]


def stream(folder: Path, data: Any, **options: Any) -> Streamed:
    return lamina.compress(folder, data, "16%", stream=True, **options)  # type: ignore[return-value]


def error(folder: Path, model: nn.Module, data: Any) -> float:
    """Return the relative square error of the outputs."""
    original, total = open_folder(folder).module, 0.0
    for batch in data:
        with torch.no_grad():
            y, z = (main_output(m(**batch)).float() for m in (original, model))
        total += float((z - y).square().sum() / y.square().sum()) / len(data)
    return total


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_it_is_better_than_without_data(tiny: Folder, kind: str) -> None:
    found = stream(tiny(kind), tokens(6, 1, pad=True))
    free = stream(tiny(kind), None)
    size = found.report.facts["size"]
    assert size["file"] <= size["limit"] and found.plan.objective == "sum"
    held_out = tokens(3, 2)
    ours, theirs = (error(tiny(kind), each.model, held_out) for each in (found, free))
    assert ours < 0.6 * theirs
    assert any("block by block" in note for note in found.report.facts["notes"])
    assert found.report.facts["data"]["samples"] == 24


def test_a_stopped_run_goes_on_and_ends_the_same(
    tiny: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tokens(3, 1)
    expected = stream(tiny("bert"), data).file
    written: list[Path] = []
    own = layers.write_part

    def write(folder: Any, path: Path, *args: Any, **kwargs: Any) -> Any:
        written.append(path)
        return own(folder, path, *args, **kwargs)

    monkeypatch.setattr(layers, "write_part", write)

    def stop(stage: str, done: int, total: int, text: str) -> None:
        if stage == "code" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "run") as run:
        stream(tiny("bert"), data, run=run, watch=stop)
    assert len(written) > 12
    with open_run(tmp_path / "run") as run:
        found = stream(tiny("bert"), data, run=run)
    assert found.file == expected and len(set(written)) == len(written)


def test_other_data_is_not_taken_for_the_same(tiny: Folder, tmp_path: Path) -> None:
    files = []
    for seed in (1, 2, 1):
        with open_run(tmp_path / "run") as run:
            files.append(stream(tiny("bert"), tokens(2, seed), run=run).file)
    assert files[0] == files[2] != files[1]


def test_methods_that_change_the_form_are_refused(tiny: Folder) -> None:
    with pytest.raises(MethodError, match="alds does not go with streaming"):
        stream(tiny("bert"), tokens(1, 0), methods=["alds"])


def test_data_the_network_does_not_take_is_refused(tiny: Folder) -> None:
    with pytest.raises(DataError, match="does not take this batch"):
        stream(tiny("bert"), [{"pixels": torch.zeros(2, 3)}])
