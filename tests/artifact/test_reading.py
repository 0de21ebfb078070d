"""Reading: all is checked at once, a tensor is decoded when asked for, and alone if asked for."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
import torch
from tests.artifact.test_container import changed, edited_net, opened
from torch import nn

from lamina import codecs
from lamina.artifact import pack, read, read_tensor, reading, records, streams, unpack
from lamina.artifact.container import seal
from lamina.errors import FileError
from lamina.forms import Codebook, Edit, Grid, Plain, Sparse, install


def test_nothing_is_decoded_before_it_is_asked_for(monkeypatch):
    net, edits = edited_net()
    package = unpack(pack(net, edits, "module", {}))
    wanted = {name: values.dense() for name, values in package.tensors.items()}
    seen = []
    whole = streams.codecs.parts
    monkeypatch.setattr(streams.codecs, "parts", lambda *a: seen.append(a) or whole(*a))
    package = unpack(pack(net, edits, "module", {}))
    assert package.codecs and package.ledger and len(package.tensors) == len(wanted)
    assert "conv.weight" in package.tensors and "no" not in package.tensors
    assert {n: (r.form, r.shape) for n, r in package.records.items()}["conv.weight"] == (
        "sparse", (4, 2, 3, 3),
    )  # fmt: skip
    assert not seen
    assert torch.equal(package.dense("fc.1.weight"), wanted["fc.1.weight"])
    assert len(seen) == 1, "one tensor alone"


def test_one_tensor_alone(tmp_path):
    net, edits = edited_net()
    file = pack(net, edits, "module", {})
    path = tmp_path / "net.lamina"
    path.write_bytes(file)
    state = net.state_dict()
    for name in unpack(file).records:
        assert torch.equal(read_tensor(path, name), state[name])
    with pytest.raises(FileError, match=r"no such tensor at .*net\.lamina: wte\.weight.*it has "):
        read_tensor(path, "wte.weight")
    path.write_bytes(file[:-9] + bytes([file[-9] ^ 1]) + file[-8:])  # damage elsewhere
    with pytest.raises(FileError, match="checksum"):
        read_tensor(path, "conv.weight")


def test_a_large_tensor_is_read_into_its_own_memory_only(tmp_path):
    net = nn.Linear(1000, 1500, bias=False)
    symbols = torch.randint(-3, 4, (1500, 1000), dtype=torch.int8)
    edits = (Edit("weight", "values", values=Grid(symbols, 0.25)),)
    install(net, edits)
    (tmp_path / "x.lamina").write_bytes(pack(net, edits, "module", {}))
    tracemalloc.start()
    try:
        package = read(tmp_path / "x.lamina")
        assert tracemalloc.get_traced_memory()[1] < 1_200_000, "the file, and a little"
    finally:
        tracemalloc.stop()
    assert torch.equal(package.dense("weight"), net.weight)
    assert package.tensors["weight"].symbols.dtype.itemsize <= 4


@pytest.mark.parametrize("mapped", [0, 1 << 40])
def test_mapped_or_not_a_file_reads_the_same(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(reading, "MAPPED", mapped)
    net, edits = edited_net()
    path = tmp_path / "net.lamina"
    path.write_bytes(pack(net, edits, "module", {}))
    package = read(path)
    assert package.size == sum(package.ledger.values()) == path.stat().st_size
    (tmp_path / "other").write_bytes(b"x")
    (tmp_path / "other").replace(path)  # a package outlives the name of its file
    state = package.state()
    assert all(torch.equal(state[name], t) for name, t in net.state_dict().items() if name in state)
    for data in (b"", b"1234567"):
        path.write_bytes(data)
        if data or mapped:
            with pytest.raises(FileError, match="too short"):
                read(path)


def test_damage_inside_a_record_names_file_and_tensor(tmp_path):
    """Right checksum, wrong payload: seen when the tensor is decoded."""
    whole = records.encode(Grid(torch.randint(-9, 9, (40, 40), dtype=torch.int32), 1.0))
    _, at = records.read_varint(memoryview(whole), 0)
    body = whole[at:-30]
    path = tmp_path / "bad.lamina"
    path.write_bytes(seal({"lamina": 2, "tensors": "a:40,40"}, records.varint(len(body)) + body))
    package = read(path)
    for work in (package.state, lambda: package.tensors["a"], lambda: package.dense("a")):
        with pytest.raises(FileError, match=r"bad\.lamina: a"):
            work()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_all_versions_are_read(version):
    assert set(unpack(changed(lamina=version)).records) == {"weight", "bias"}


@pytest.mark.parametrize("version", [0, 4, True, 1.0, "2", None, [2], 10**30])
def test_other_versions_are_not(version):
    with pytest.raises(FileError, match="unknown file version"):
        unpack(changed(lamina=version))


def test_values_are_split_in_planes_where_that_is_shorter():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 100), nn.Linear(3, 1))
    sparse = torch.randn(100, 200) * (torch.rand(100, 200) < 0.5)
    install(net, [Edit("0.weight", "values", values=Plain(sparse))])
    plain = unpack(pack(net, (), "module", {}))
    held = unpack(pack(net, (Edit("0.weight", "values", values=Sparse(sparse)),), "module", {}))
    assert plain.codecs["0.weight"] == "planes" and held.records["0.weight"].split
    assert plain.ledger["0.weight"] < 0.9 * 4 * 20_000
    assert plain.codecs["1.bias"] == "raw", "where planes cost more, raw values stay"
    assert plain.ledger["1.bias"] == 6
    for package in (plain, held):
        assert torch.equal(package.dense("0.weight"), sparse)


OWN = [name for name in records.OWN_CODES if name in codecs.CODECS]


@pytest.mark.parametrize("name", OWN)
def test_a_methods_own_code_is_stored_and_kept(name):
    """What it says, false positives and all, is the index; saving again gives the same bytes."""
    rng = np.random.default_rng(0)
    index = np.where(rng.random((60, 50)) < 0.1, rng.integers(1, 9, (60, 50)), 0)
    codec = codecs.get(name)
    data = codec.encode(index, **({"bits": 8} if name == "bloomier" else {}))
    told = torch.from_numpy(codec.decode(data, index.shape).astype(np.int32))
    net = nn.Linear(50, 60, bias=False)
    values = Codebook(told, torch.arange(9.0), code=(name, data))
    edits = (Edit("weight", "values", values=values),)
    install(net, edits)
    file = pack(net, edits, "module", {})
    package = unpack(file)
    back = package.tensors["weight"]
    assert package.codecs["weight"] == name and back.code == (name, data)
    assert torch.equal(package.dense("weight"), net.weight)
    again = (Edit("weight", "values", values=back),)
    assert pack(net, again, "module", {}) == file
    wrong = told.clone()
    wrong[3, 3] = 8 - wrong[3, 3]
    with pytest.raises(FileError, match="own code does not give its index"):
        records.encode(Codebook(wrong, torch.arange(9.0), code=(name, data)))


def test_an_own_code_of_an_unknown_codec_is_refused():
    index = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(FileError, match="'zip'"):
        records.encode(Codebook(index, torch.zeros(1), code=("zip", b"")))


def test_a_plain_record_of_planes_is_checked_up_front():
    whole = records.encode(Plain(torch.randn(40, 50)))
    _, at = records.read_varint(memoryview(whole), 0)
    body = memoryview(whole)[at:]
    assert body[0] == 1 << 3
    for bad in (body[:1], body[:2], body[:20], bytes([2 << 3]) + bytes(body[1:])):
        with pytest.raises(FileError):
            records.parse(memoryview(bad), (40, 50), torch.float32)
    for bad in (body[:-1], bytes(body) + b"\0"):  # the last plane takes the rest: seen inside
        with pytest.raises(FileError, match="at w"):
            streams.dense(records.parse(memoryview(bad), (40, 50), torch.float32, "w"))


def test_the_manifest_says_version_2():
    manifest, _ = opened(pack(nn.Linear(2, 2), (), "module", {}))
    assert json.dumps(manifest["lamina"]) == "2"
