from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from lamina.errors import RunError
from lamina.measure.stats import LayerStats, Stats
from lamina.measure.store import load_stats, save_stats


def make_stats() -> Stats:
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    layers = {
        "conv1": LayerStats(random(1, 4, 4), random(1, 3, 3), random(1, 4), 49.0, 0.37, 128),
        "a:b.weight_ih_l0": LayerStats(random(2, 9), random(2, 5).mT, None, 1.0, 1.0, 128),
    }
    return Stats(layers, 128, "logits", "0123456789abcdef", ("a note", "ünïcode"))


def dumped(stats: Stats) -> bytes:
    file = io.BytesIO()
    save_stats(stats, file)
    return file.getvalue()


def parsed(data: bytes, folder: Path) -> Stats:
    (folder / "stats").write_bytes(data)
    return load_stats(folder / "stats")


def test_statistics_come_back_to_the_bit(tmp_path: Path) -> None:
    stats = make_stats()
    again = parsed(dumped(stats), tmp_path)
    assert list(again.layers) == list(stats.layers)
    for name, layer in stats.layers.items():
        other = again.layers[name]
        for part in ("H", "G", "mean"):
            a, b = getattr(layer, part), getattr(other, part)
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b))
        for part in ("positions", "scale", "samples"):
            assert getattr(layer, part) == getattr(other, part)
    for part in ("samples", "loss", "network", "notes"):
        assert getattr(again, part) == getattr(stats, part)


def test_same_statistics_same_bytes() -> None:
    assert dumped(make_stats()) == dumped(make_stats())


def test_the_library_reads_the_file_too() -> None:
    from safetensors.torch import load

    tensors = load(dumped(make_stats()))
    assert torch.equal(tensors["H:conv1"], make_stats().layers["conv1"].H)


def test_no_layers_are_statistics_too(tmp_path: Path) -> None:
    stats = Stats(network="f" * 16, notes=("data-free",))
    assert parsed(dumped(stats), tmp_path) == stats


@pytest.mark.parametrize("at", [0, 7, 8, 40, 300])
def test_damage_is_one_clear_error(at: int, tmp_path: Path) -> None:
    data = dumped(make_stats())
    for broken in (data[:at], data[:at] + b"\xff" * 8 + data[at + 8 :]):
        with pytest.raises(RunError, match="statistics cannot be read"):
            parsed(broken, tmp_path)


def test_a_file_without_an_h_is_damaged(tmp_path: Path) -> None:
    from safetensors.torch import load, save

    data = dumped(make_stats())
    length = int.from_bytes(data[:8], "little")
    meta = json.loads(data[8 : 8 + length])["__metadata__"]
    tensors = {k: v for k, v in load(data).items() if k != "H:conv1"}
    with pytest.raises(RunError):
        parsed(save(tensors, meta), tmp_path)
