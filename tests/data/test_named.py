"""Arrays, pictures and functions for networks that call their inputs by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.folders import save_folder

pytest.importorskip("transformers")

from lamina.data import load
from lamina.errors import DataError
from lamina.network.pretrained import open_folder


def write_images(folder: Path, classes: tuple[str, ...] = ("a", "b", "c")) -> None:
    image = pytest.importorskip("PIL.Image")
    draw = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_pictures_of_a_vit_are_scaled_as_its_folder_says(tmp_path: Path) -> None:
    save_folder("vit", tmp_path / "vit")
    write_images(tmp_path / "images")
    network = open_folder(tmp_path / "vit")
    plain = load(f"images:{tmp_path / 'images'}", network=network)
    said = {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(said))
    data = load(f"images:{tmp_path / 'images'}", network=network)
    (x, y), (before, _) = next(iter(data.calibration or ())), next(iter(plain.calibration or ()))
    assert x.keys() == {"pixel_values"} and x["pixel_values"].shape[1:] == (3, 16, 16)
    assert y.dtype == torch.int64 and data.classes == 3
    assert float(x["pixel_values"].min()) >= -1 and float(x["pixel_values"].max()) <= 1
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    assert torch.allclose(
        (before["pixel_values"] * std + mean) * 2 - 1, x["pixel_values"], atol=1e-5
    )
    assert torch.isfinite(network.forward(**x)).all()


def test_labels_of_more_classes_than_the_network_has_are_refused(tmp_path: Path) -> None:
    save_folder("vit", tmp_path / "vit")
    write_images(tmp_path / "images", ("a", "b", "c", "d"))
    with pytest.raises(DataError, match="4 classes"):
        load(f"images:{tmp_path / 'images'}", network=open_folder(tmp_path / "vit"))


@pytest.mark.parametrize("key", ["x", "input_values"])
def test_arrays_of_a_sound_model(tmp_path: Path, key: str) -> None:
    save_folder("wav2vec2", tmp_path)
    network = open_folder(tmp_path)
    waves = np.random.default_rng(0).normal(size=(20, 400)).astype(np.float32)
    np.savez(tmp_path / "a.npz", **{key: waves})
    data = load(str(tmp_path / "a.npz"), network=network)
    found: list[Any] = [
        b for loader in (data.train, data.validation, data.test) for b in loader or ()
    ]
    assert all(b.keys() == {"input_values"} for b in found)
    rows = torch.cat([b["input_values"] for b in found])
    assert sorted(rows[:, 0].tolist()) == sorted(waves[:, 0].tolist())
    assert torch.isfinite(network.forward(**found[0])).all()


def test_several_arrays_by_name_stay_together(tmp_path: Path) -> None:
    save_folder("t5", tmp_path)
    network = open_folder(tmp_path)
    ids = np.arange(30)[:, None] + np.arange(4)
    np.savez(
        tmp_path / "a.npz", input_ids_train=ids, decoder_input_ids_train=ids + 1,
        labels_train=ids + 2, input_ids_val=ids[:5] + 40, decoder_input_ids_val=ids[:5] + 41,
        labels_val=ids[:5] + 42,
    )  # fmt: skip
    data = load(str(tmp_path / "a.npz"), network=network)
    for split in ("train", "calibration", "validation"):
        for x, y in getattr(data, split):
            assert torch.equal(x["input_ids"] + 1, x["decoder_input_ids"])
            assert torch.equal(x["input_ids"] + 2, y)
            assert bool((x["input_ids"] >= 40).all()) or split != "validation"


def test_a_function_of_a_module_may_take_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_folder("bert", tmp_path / "bert")
    (tmp_path / "my_pack").mkdir()
    (tmp_path / "my_pack" / "__init__.py").touch()
    (tmp_path / "my_pack" / "loading.py").write_text(
        "import torch\n\ndef plain():\n    return [{'input_ids': torch.ones(2, 3, dtype=int)}]\n"
        "\ndef made(network):\n    rows = network.module.config.vocab_size\n"
        "    return [{'input_ids': torch.full((2, 3), rows - 1)}]\n"
    )
    monkeypatch.chdir(tmp_path)
    network = open_folder(tmp_path / "bert")
    (batch,) = load("my_pack.loading:made", network=network).calibration or ()
    assert int(batch["input_ids"][0, 0]) == 95
    (batch,) = load("my_pack.loading:plain", network=network).calibration or ()
    assert batch["input_ids"].shape == (2, 3)
    for spec in ("my_pack.nothing:made", "no_such_pack:made", "my_pack.loading:none"):
        with pytest.raises(DataError):
            load(spec, network=network)
