"""Dense files: exact names, dtypes and values, read back by those who know nothing of Lamina."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file
from tests.artifact.test_container import Net, bits, edited_net
from torch import nn

from lamina.artifact import decompress, pack, write_safetensors, write_state
from lamina.artifact.container import seal
from lamina.errors import FileError, RunError
from lamina.forms import Edit, Grid, install


@pytest.fixture
def file(tmp_path):
    net, edits = edited_net()
    path = tmp_path / "net.lamina"
    path.write_bytes(pack(net, edits, "module", {}))
    return path


LOADS = {"safetensors": load_file, "pt": lambda path: torch.load(path, weights_only=True)}


@pytest.mark.parametrize("kind", LOADS)
def test_every_tensor_comes_out_as_it_was(file, kind):
    net, _ = edited_net()
    out = file.with_name(f"out.{kind}")
    package = decompress(file, out)
    state, wanted = LOADS[kind](out), net.state_dict()
    assert set(state) == set(package.records) == set(wanted) - {"wte.weight"}, "ties come once"
    assert {"fc.0.weight", "fc.1.weight", "fc.1.bias"} <= set(state), "a layer became two"
    for name, tensor in state.items():
        assert tensor.dtype == wanted[name].dtype and tensor.shape == wanted[name].shape
        assert bits(tensor) == bits(wanted[name]), name
    assert sorted(p.name for p in file.parent.iterdir()) == ["net.lamina", out.name]


def test_a_network_of_ones_own_takes_its_state_back(tmp_path):
    """Without structural edits and ties, the file's tensors are the network's state dict."""
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    (tmp_path / "net.lamina").write_bytes(pack(net, (), "module", {}))
    for kind, load in LOADS.items():
        decompress(tmp_path / "net.lamina", tmp_path / f"net.{kind}")
        fresh = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        fresh.load_state_dict(load(tmp_path / f"net.{kind}"))
        assert all(bits(a) == bits(b) for a, b in zip(
            fresh.state_dict().values(), net.state_dict().values(), strict=True))  # fmt: skip


def test_every_dtype_of_safetensors_is_aligned_and_exact(tmp_path):
    from lamina.artifact.dense import NAMES

    net = nn.Module()
    for i, dtype in enumerate(NAMES):
        net.register_buffer(f"t{i}", torch.arange(3).to(dtype))
        net.register_buffer(f"scalar{i}", torch.tensor(1).to(dtype))
    (tmp_path / "net.lamina").write_bytes(pack(net, (), "module", {}))
    decompress(tmp_path / "net.lamina", tmp_path / "out.safetensors")
    data = (tmp_path / "out.safetensors").read_bytes()
    assert struct.unpack("<Q", data[:8])[0] % 8 == 0
    state = load_file(tmp_path / "out.safetensors")
    assert all(bits(state[n]) == bits(t) for n, t in net.state_dict().items())
    assert {t.dtype for t in state.values()} == set(NAMES)


def test_what_safetensors_cannot_hold_is_refused_and_pt_can(tmp_path):
    net = nn.Module()
    net.register_buffer("wide", torch.tensor([1 + 2j], dtype=torch.complex128))
    path = tmp_path / "net.lamina"
    path.write_bytes(pack(net, (), "module", {}))
    with pytest.raises(FileError, match=r"at wide: .*complex128.*\.pt"):
        decompress(path, tmp_path / "out.safetensors")
    decompress(path, tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt", weights_only=True)["wide"].item() == 1 + 2j
    path.write_bytes(seal({"lamina": 2, "tensors": "__metadata__:0"}, b"\x01\x00"))
    with pytest.raises(FileError, match="keeps that name"):
        decompress(path, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["out", "out.onnx", "out.lamina", "out.SAFE"])
def test_an_ending_that_says_nothing_is_refused(file, name):
    with pytest.raises(FileError, match=r"cannot decompress at .*\.safetensors or \.pt"):
        decompress(file, file.with_name(name))
    assert not file.with_name(name).exists()
    decompress(file, file.with_name(name), "safetensors")
    assert load_file(file.with_name(name))


def test_a_folder_a_missing_file_and_no_space_are_one_error_each(file, monkeypatch):
    with pytest.raises(RunError, match="it is a folder"):
        decompress(file, file.parent)
    with pytest.raises(FileError, match=r"cannot read the file at .*none\.lamina"):
        decompress(file.with_name("none.lamina"), file.with_name("out.pt"))
    with pytest.raises(FileError, match="cannot decompress"):
        decompress(file, file.with_name("out.pt"), "onnx")


@pytest.mark.parametrize("kind", LOADS)
def test_damage_while_it_is_written_leaves_the_old_file(tmp_path, kind):
    from lamina.artifact import records

    whole = records.encode(Grid(torch.randint(-9, 9, (40, 40), dtype=torch.int32), 1.0))
    body = whole[records.read_varint(memoryview(whole), 0)[1] : -30]
    path, out = tmp_path / "bad.lamina", tmp_path / f"out.{kind}"
    path.write_bytes(seal({"lamina": 2, "tensors": "a:40,40"}, records.varint(len(body)) + body))
    out.write_bytes(b"old")
    with pytest.raises(FileError, match=r"bad\.lamina: a"):
        decompress(path, out)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.lamina", out.name]


def test_both_writers_take_a_package(tmp_path):
    from lamina.artifact import unpack

    package = unpack(pack(Net(), (), "module", {}))
    write_safetensors(package, tmp_path / "a.safetensors")
    write_state(package, tmp_path / "a.pt")
    a, b = load_file(tmp_path / "a.safetensors"), LOADS["pt"](tmp_path / "a.pt")
    assert set(a) == set(b) and all(bits(a[n]) == bits(b[n]) for n in a)


def test_safetensors_are_written_a_tensor_at_a_time(tmp_path):
    """Coded symbols of all layers would be seen here; dense tensors are torch's own memory."""
    net = nn.Sequential(*(nn.Linear(300, 300, bias=False) for _ in range(10)))
    edits = tuple(
        Edit(f"{i}.weight", "values", values=Grid(torch.randint(-3, 4, (300, 300)), 0.5))
        for i in range(10)
    )
    install(net, edits)
    (tmp_path / "net.lamina").write_bytes(pack(net, edits, "module", {}))
    decompress(tmp_path / "net.lamina", tmp_path / "out.safetensors")  # kernels are there now
    tracemalloc.start()
    try:
        decompress(tmp_path / "net.lamina", tmp_path / "out.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
    finally:
        tracemalloc.stop()
    state = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(state[n], t) for n, t in net.state_dict().items())
