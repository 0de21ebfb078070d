"""Reading shards: what is there comes back to the bit, what is not there or damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lamina.errors import NetworkError
from lamina.network.shards import identity, open_shards

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    first = {"a": torch.randn(7, 5), "b": torch.randn(3, 2, 4).to(torch.bfloat16)}
    second = {"c": torch.arange(6), "d": torch.tensor(2.5), "e": torch.zeros(0, 3)}
    safetensors.save_file(first, tmp_path / "one.safetensors")
    safetensors.save_file(second, tmp_path / "two.safetensors")
    index = dict.fromkeys(first, "one.safetensors") | dict.fromkeys(second, "two.safetensors")
    write_index(tmp_path, index)
    return tmp_path


def write_index(folder: Path, index: object) -> None:
    text = json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def test_every_tensor_is_read_to_the_bit(folder: Path) -> None:
    given = safetensors.load_file(folder / "one.safetensors")
    given |= safetensors.load_file(folder / "two.safetensors")
    found = open_shards(folder)
    assert set(found) == set(given)
    for name, stored in found.items():
        assert torch.equal(stored.tensor(), given[name]) and stored.dtype == given[name].dtype


def test_rows_and_chunks_are_parts_of_the_whole(folder: Path) -> None:
    found = open_shards(folder)
    a, b = found["a"], found["b"]
    assert torch.equal(a.read(2, 5), a.tensor()[2:5])
    assert torch.equal(b.read(1, 3), b.tensor().reshape(3, 8)[1:3])
    pieces = list(a.chunks(40))
    assert [len(p) for p in pieces] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(pieces), a.tensor())


def test_one_file_needs_no_index(folder: Path) -> None:
    (folder / "one.safetensors").rename(folder / "model.safetensors")
    assert set(open_shards(folder)) == {"a", "b"}


def test_identity_changes_with_the_files(folder: Path) -> None:
    before = identity(open_shards(folder))
    assert identity(open_shards(folder)) == before
    safetensors.save_file(
        {n: s.tensor() + 1 for n, s in open_shards(folder).items() if n in "ab"},
        folder / "one.safetensors",
    )
    assert identity(open_shards(folder)) != before


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "two.safetensors").unlink()
    with pytest.raises(NetworkError, match=r"a shard is missing at .*two\.safetensors"):
        open_shards(folder)


def test_a_tensor_the_shard_lacks_is_named(folder: Path) -> None:
    write_index(folder, {"a": "one.safetensors", "ghost": "two.safetensors"})
    with pytest.raises(NetworkError, match="ghost"):
        open_shards(folder)


@pytest.mark.parametrize("keep", [4, 60, -9])
def test_a_cut_shard_is_refused(folder: Path, keep: int) -> None:
    path = folder / "one.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(NetworkError, match="damaged"):
        open_shards(folder)


def test_a_shard_cut_after_it_was_opened_is_refused(folder: Path) -> None:
    found = open_shards(folder)
    path = folder / "one.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(NetworkError, match="cut off"):
        [stored.tensor() for stored in found.values()]


@pytest.mark.parametrize(
    "index", [{"a": "../one.safetensors"}, {"a": "/etc/passwd"}, {"a": 3}, ["a"]]
)
def test_an_index_that_leads_elsewhere_is_refused(folder: Path, index: object) -> None:
    write_index(folder, index)
    with pytest.raises(NetworkError, match="index cannot be read"):
        open_shards(folder)


def test_without_safetensors_it_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(NetworkError, match=r"it holds pytorch_model\.bin"):
        open_shards(tmp_path)
