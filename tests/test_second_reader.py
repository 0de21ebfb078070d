"""docs/format.md suffices: a reader written from it gives every bit that Lamina's own gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import second_reader
from torch import nn

from lamina import codecs
from lamina.artifact import pack, read, unpack
from lamina.artifact.records import CODEC_IDS
from lamina.codecs import planes
from lamina.forms import Affine, Codebook, Edit, Grid, Plain, Sparse, install

TESTS = Path(__file__).parent
FILES = sorted((TESTS / "golden").glob("*.lamina"))
CASES = [c for c in json.loads((TESTS / "codecs/golden.json").read_text()) if "hex" in c]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DECODE = dict(zip(CODEC_IDS, second_reader.CODECS, strict=True))
SIZES = st.tuples(st.integers(1, 9), st.integers(1, 24))


def bits(array):
    """A dense tensor's bytes, whoever made it."""
    if isinstance(array, np.ndarray):
        return array.tobytes()
    flat = array.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def agree(data):
    """Compare both readers; return what was compared."""
    _, dense = second_reader.read_file(data)
    state = unpack(data).state()
    assert list(dense) == list(state)
    for name, tensor in state.items():
        assert dense[name].shape == tuple(tensor.shape), name
        assert bits(dense[name]) == bits(tensor), name
    return dense


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_golden_files(path):
    dense = agree(path.read_bytes())
    assert len(dense) >= 11
    manifest, _ = second_reader.read_file(path.read_bytes())
    assert manifest["skeleton"] == read(path).skeleton


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['codec']}-{c['name']}")
def test_golden_codes(case):
    data, shape = bytes.fromhex(case["hex"]), tuple(case["shape"])
    if "dtype" in case:
        found = np.frombuffer(data, np.dtype(case["dtype"]).newbyteorder("<"))
    else:
        found = np.array(DECODE[case["codec"]](data, shape))
    assert found.reshape(-1).tolist() == case["symbols"]


def draw_symbols(shape, seed):
    """Integers with unequal rows and columns, sometimes large."""
    random = np.random.default_rng(seed)
    density = random.random((shape[0], 1)) * random.random((1, shape[1])) * random.choice([0.2, 4])
    sizes = random.laplace(0, random.choice([1, 3, 40, 1e5, 1e8]), shape)
    return np.where(random.random(shape) < density, sizes, 0).astype(np.int32)


NAMES = ("rans", "adaptive", "context", "huffman")


@given(SIZES, st.sampled_from(NAMES), st.integers(0, 9999))
def test_any_symbols(shape, name, seed):
    symbols = draw_symbols(shape, seed)
    if name == "context":
        symbols = symbols.clip(-200, 200)
    found = np.array(DECODE[name](codecs.get(name).encode(symbols), shape)).reshape(shape)
    assert found.tolist() == symbols.tolist()


WAYS = {"rows": 0, "gaps": 1, "above": 2, "bursts": 3}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("across", [False, True])
def test_every_way_of_context(way, across):
    random = np.random.default_rng(0)
    rows = np.arange(80)[:, None] % 2
    symbols = np.rint(random.normal(0, 0.8 + 6 * rows, (80, 90))).astype(np.int32)
    if way == "gaps":
        sizes = random.integers(1, 9, (160, 150)) * random.choice([-1, 1], (160, 150))
        dense = 0.01 + 0.07 * (np.arange(160)[:, None] % 2)
        symbols = np.where(random.random((160, 150)) < dense, sizes, 0).astype(np.int32)
    if way == "bursts":  # long stretches of zeros between dense ones
        rows = np.repeat(random.random((80, 9)) < 0.2, 10, 1)
        symbols = np.where(rows, random.integers(1, 3, (80, 90)), 0).astype(np.int32)
        symbols *= random.random((80, 90)) < 0.95
    if way == "above":
        size = np.repeat(random.choice([0.5, 4], (8, 240)), 20, 0)
        symbols = np.rint(random.normal(0, size)).astype(np.int32)
    symbols = np.ascontiguousarray(symbols.T) if across else symbols
    data = codecs.get("context").encode(symbols)
    assert data[0] & 3 == WAYS[way] and data[0] >> 2 & 1 == across
    found = np.array(second_reader.context(data, symbols.shape)).reshape(symbols.shape)
    assert found.tolist() == symbols.tolist()


@pytest.mark.parametrize("block", [1, 7, 100, 5000])
@pytest.mark.parametrize("shape", [(30, 11), (3, 100), (1, 70), (1, 1)])
def test_blocks(shape, block):
    symbols = draw_symbols(shape, 1).clip(-99, 99)
    data = codecs.get("blocks").encode(symbols, block=block)
    assert list(second_reader.blocks(data, shape)) == symbols.reshape(-1).tolist()


@given(SIZES, st.integers(3, 12), st.integers(0, 99))
def test_bloomier_false_positives_included(shape, bits, seed):
    codec, symbols = codecs.get("bloomier"), np.abs(draw_symbols(shape, seed)).clip(0, 5)
    data = codec.encode(symbols, bits=bits)
    found = np.array(second_reader.bloomier(data, shape)).reshape(shape)
    assert found.tolist() == codec.decode(data, shape).tolist()
    assert (found == symbols)[symbols > 0].all()


@given(SIZES, st.sampled_from(["<f2", "<f4", "<f8", "u1", "<i2", "<i4", "<i8"]), st.integers(0, 99))
def test_planes(shape, kind, seed):
    random = np.random.default_rng(seed)
    values = (random.normal(0, 30, shape) * random.choice([0, 1, 3])).astype(kind)
    if seed % 2:
        values = np.cumsum(values.reshape(-1)).astype(kind)
    data = planes.encode(values.tobytes(), values.itemsize, "f" in kind)
    assert second_reader.planes(data, values.size, kind).tobytes() == values.tobytes()


def test_many_lanes():
    symbols = np.random.default_rng(0).integers(-3, 4, (200, 200))
    data = codecs.get("rans").encode(symbols)
    assert np.array(second_reader.rans(data, (200, 200))).tolist() == symbols.reshape(-1).tolist()


@settings(max_examples=25)
@given(SIZES, st.sampled_from(FLOATS), st.integers(0, 9999))
def test_files_that_lamina_writes(shape, dtype, seed):
    """Every form, in every float dtype, as `pack` writes it."""
    torch.manual_seed(seed)
    symbols = torch.from_numpy(draw_symbols(shape, seed).clip(-999, 999))
    dense = torch.randn(shape).to(dtype)
    axis = seed % 2
    exponents = torch.randint(-9, 9, (shape[axis],), dtype=torch.int32)
    kind = (torch.float16, torch.float32)[seed % 2]
    steps, leasts = torch.rand(shape[0], 1).to(kind), torch.randn(shape[0], 1).to(kind)
    values = {
        "affine": Affine(symbols, steps, None, shape[1], dtype),
        "least": Affine(symbols, steps, leasts, shape[1], dtype),
        "plain": Plain(dense),
        "sparse": Sparse(torch.where(symbols == 0, torch.zeros((), dtype=dtype), dense)),
        "codebook": Codebook(symbols.abs() % 5, torch.randn(5), dtype),
        "grid": Grid(symbols, 0.037, None, 0, dtype),
        "scaled": Grid(symbols, 0.037, exponents, axis, dtype),
    }
    net = nn.Module()
    for name in values:
        net.register_buffer(name, torch.zeros(shape, dtype=dtype))
    edits = tuple(Edit(name, "values", values=v) for name, v in values.items())
    install(net, edits)
    agree(pack(net, edits, "module", {}))


def test_a_wrong_bit_is_seen():
    """The comparison itself sees one wrong value."""
    data = bytearray(FILES[0].read_bytes())
    with pytest.raises(ValueError, match="checksum"):
        second_reader.read_file(bytes(data[:-9] + b"x" + data[-8:]))
    dense = second_reader.read_file(bytes(data))[1]["plain"].copy()
    dense[0, 0] += 1
    assert bits(dense) != bits(read(FILES[0]).state()["plain"])


def test_it_shares_no_code():
    for path in TESTS.glob("second_*.py"):
        text = path.read_text()
        assert "lamina" not in text.replace('["lamina"]', "").partition('"""\n')[2]
        assert len(text.splitlines()) < 200
