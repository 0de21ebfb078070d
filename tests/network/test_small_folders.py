"""Which file a path stands for: itself, the one a folder of ours keeps, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import FileError
from lamina.network.small_folders import SMALL, check_told, small_file

OURS = {"quant_method": "lamina", "format": 1, "by": "0.1.0"}


def folder(place: Path, told: Any, weights: bool = True) -> Path:
    place.mkdir(exist_ok=True)
    config = {"model_type": "bert"} | ({} if told is None else {"quantization_config": told})
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if weights:
        (place / SMALL).write_bytes(b"")
    return place


def test_a_file_stands_for_itself_and_a_folder_of_ours_for_its_file(tmp_path: Path) -> None:
    assert small_file(tmp_path / "net.lamina") == tmp_path / "net.lamina"
    ours = folder(tmp_path / "ours", OURS)
    assert small_file(ours) == small_file(str(ours)) == ours / SMALL
    assert small_file(ours / SMALL) == ours / SMALL
    named = folder(tmp_path / "folder.lamina", OURS)
    assert small_file(named) == named / SMALL


@pytest.mark.parametrize("told", [None, {"quant_method": "awq"}, {}, "lamina", 3])
def test_other_folders_stand_for_no_file(tmp_path: Path, told: Any) -> None:
    assert small_file(folder(tmp_path / "other", told)) is None


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_damaged_configuration_is_for_others_to_refuse(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert small_file(tmp_path) is None and small_file(tmp_path / "none") is None


def test_folders_of_ours_that_cannot_be_opened_say_why(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"lost its weights .*no lamina\.safetensors; copy it"):
        small_file(folder(tmp_path / "empty", OURS, weights=False))
    with pytest.raises(FileError, match="this reads 1; update lamina"):
        small_file(folder(tmp_path / "later", {**OURS, "format": 2}))
    with pytest.raises(FileError, match=r"unknown settings of lamina .*file"):
        check_told({**OURS, "file": "../../x"})
