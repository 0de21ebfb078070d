"""A folder without its values: the same network, sites and digest as when it is opened whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lamina.errors import NetworkError
from lamina.network.discover import discover
from lamina.network.lazy import open_lazily, scan
from lamina.network.pretrained import open_folder

Folder = Callable[[str], Path]
safetensors = pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2"])
def test_it_is_what_the_open_folder_is(tiny: Folder, kind: str) -> None:
    lazy, whole = open_lazily(tiny(kind)), open_folder(tiny(kind))
    state = whole.module.state_dict()
    assert lazy.network.source == whole.source
    assert list(lazy.state) == list(state)
    assert all(t.is_meta for t in lazy.network.module.parameters())
    for name, tensor in state.items():
        assert torch.equal(lazy.tensor(name), tensor) and lazy.state[name].dtype == tensor.dtype
    assert scan(lazy) == whole.digest()


def test_sites_are_those_of_the_open_folder(tiny: Folder) -> None:
    found = discover(open_lazily(tiny("llama")).network, lazy=True)
    whole = discover(open_folder(tiny("llama")))
    assert (found.layers, found.rest) == (whole.layers, whole.rest)  # positions too
    assert not found.chains and "streamed" in found.refusals[0].why


def test_tied_tensors_are_one(tiny: Folder) -> None:
    lazy = open_lazily(tiny("llama"))
    assert lazy.key("lm_head.weight") == lazy.key("model.embed_tokens.weight")
    assert "lm_head.weight" not in lazy.firsts()


def untie(folder: Path, change: float) -> None:
    """Store the head too, changed or not."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"]["model.embed_tokens.weight"]
    held = safetensors.load_file(folder / file)
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + change
    safetensors.save_file(held, folder / file, {"format": "pt"})
    index["weight_map"]["lm_head.weight"] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_what_is_stored_twice_is_tied_only_if_equal(own: Folder, change: float) -> None:
    folder = own("llama")
    untie(folder, change)
    lazy = open_lazily(folder)
    tied = lazy.key("lm_head.weight") == lazy.key("model.embed_tokens.weight")
    assert tied == (change == 0)
    assert scan(lazy) == open_folder(folder).digest()


def test_a_missing_tensor_is_named(own: Folder) -> None:
    folder = own("bert")
    held = safetensors.load_file(folder / "model.safetensors")
    del held["encoder.layer.1.output.dense.weight"]
    safetensors.save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NetworkError, match=r"missing .*encoder\.layer\.1\.output\.dense\.weight"):
        open_lazily(folder)


def test_a_tensor_of_another_shape_is_named(own: Folder) -> None:
    folder = own("bert")
    held = safetensors.load_file(folder / "model.safetensors")
    held["pooler.dense.weight"] = torch.zeros(3, 3)
    safetensors.save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NetworkError, match=r"does not fit .*pooler\.dense\.weight"):
        open_lazily(folder)
