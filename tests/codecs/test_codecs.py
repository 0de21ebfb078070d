from __future__ import annotations

import numpy as np
import pytest

from lamina import codecs
from lamina.codecs import structure
from lamina.errors import FileError


def make_sources() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    live = (
        (rng.random((200, 1)) < 0.3) & (rng.random((1, 300)) < 0.4) & (rng.random((200, 300)) < 0.2)
    )
    return {
        "grid": np.where(live, rng.integers(1, 3, live.shape), 0),
        "dense": np.round(rng.laplace(0, 2.5, (20, 25))),
        "ternary": rng.choice([-1, 0, 1], (64, 64), p=[0.05, 0.9, 0.05]),
        "long int8": np.round(rng.normal(0, 30, (400, 500))),
        "vector": np.round(rng.normal(0, 20, 120)),
        "zeros": np.zeros((30, 30)),
    }


@pytest.mark.parametrize("name", list(make_sources()))
def test_best_length_and_estimate(name: str) -> None:
    symbols = make_sources()[name].astype(np.int32)
    codec, data = codecs.best(symbols)
    np.testing.assert_array_equal(codecs.get(codec).decode(data, symbols.shape), symbols)
    for other in codecs.INTEGER:
        if other == "adaptive" and symbols.size > codecs.LONG:
            continue  # it has to earn its slowness, and is minutes here without numba
        assert len(data) <= len(codecs.best(symbols, [other])[1])
    assert abs(codecs.length(symbols) - len(data)) <= 0.005 * len(data) + 8
    assert abs(codecs.estimate(symbols) - len(data)) <= 0.05 * len(data) + 8


def test_best_leaves_adaptive_out_for_long_tensors() -> None:
    symbols = np.zeros(codecs.adaptive.LARGEST + 1, dtype=np.int32)
    assert codecs.best(symbols)[0] == "rans"
    assert codecs.length(symbols) == 1 == codecs.estimate(symbols)


def test_empty_and_scalar() -> None:
    assert codecs.best(np.zeros((0, 3), np.int32))[1] == b""
    codec, data = codecs.best(np.array(-9))
    assert codecs.get(codec).decode(data, ()).item() == -9


def test_unknown_names() -> None:
    with pytest.raises(FileError, match="zip"):
        codecs.get("zip")
    for names in (["raw"], ["zip"], []):
        with pytest.raises(ValueError, match="names"):
            codecs.best(np.arange(3), names)


def test_structure_is_found_only_where_it_is() -> None:
    live = make_sources()["grid"] != 0
    shuffled = np.random.default_rng(0).permutation(live.reshape(-1)).reshape(live.shape)
    assert structure.structure_bits(live) > 1000
    assert structure.structure_bits(shuffled) < 50
    assert structure.structure_bits(np.zeros((3, 3), dtype=bool)) == 0.0


def test_kernels_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.codecs import kernels

    kernels._numba_njit.cache_clear()
    kernels._compile.cache_clear()
    monkeypatch.setenv("LAMINA_NUMBA", "0")
    try:
        assert kernels.compiled(codecs.rans.count_into) is None
        with pytest.raises(ValueError, match="needs numba"):
            codecs.rans.encode(np.arange(5000), backend="numba")
    finally:
        kernels._numba_njit.cache_clear()
        kernels._compile.cache_clear()


def columns_that_differ() -> np.ndarray:
    rng = np.random.default_rng(2)
    live = rng.random((120, 160)) < np.array([0.02, 0.5])[rng.integers(0, 2, 160)]
    return np.where(live, rng.integers(-2, 3, live.shape), 0).astype(np.int32)


def test_length_and_best_of_rows_that_differ() -> None:
    symbols = columns_that_differ()
    codes = {name: codecs.best(symbols, [name])[1] for name in codecs.INTEGER}
    assert len(codes["context"]) < 0.95 * len(codes["rans"])
    name, data = codecs.best(symbols, ["rans", "context"])
    assert (name, data) == ("context", codes["context"])
    assert len(codecs.best(symbols)[1]) == min(map(len, codes.values()))


@pytest.mark.parametrize("chosen", [["context", "blocks"], ["context", "adaptive"]])
@pytest.mark.parametrize("shape", [(3,), (2, 2), (0, 5), ()])
def test_a_choice_of_codecs_that_suit_little_still_codes(
    chosen: list[str], shape: tuple[int, ...]
) -> None:
    symbols = np.random.default_rng(0).integers(-(2**31), 2**31, shape).astype(np.int32)
    name, data = codecs.best(symbols, chosen)
    assert name in chosen
    np.testing.assert_array_equal(codecs.get(name).decode(data, shape), symbols)


def test_adaptive_is_left_out_of_a_choice_where_too_long() -> None:
    symbols = np.zeros(codecs.adaptive.LARGEST + 1, dtype=np.int32)
    symbols[7] = 1
    assert codecs.best(symbols, ["blocks", "context"])[0] == "blocks"


@pytest.mark.parametrize("kind", ["rows", "alike", "constant", "line", "wide"])
def test_length_of_long_tensors_is_that_of_blocks(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs.blocks, "BLOCK", 5000)
    monkeypatch.setattr(codecs.adaptive, "LARGEST", 5000)
    for function in (codecs.blocks.encode, codecs.blocks.length):
        monkeypatch.setitem(function.__kwdefaults__, "block", 5000)
    rng = np.random.default_rng(0)
    symbols = {
        "rows": lambda: columns_that_differ().T,
        "alike": lambda: rng.integers(-40, 41, (200, 100)),
        "constant": lambda: np.full((200, 100), -5),
        "line": lambda: np.rint(rng.normal(0, 9, 20_001)),
        "wide": lambda: rng.integers(-(2**31), 2**31, (200, 100)),
    }[kind]().astype(np.int32)
    name, data = codecs.best(symbols)
    assert name == "blocks"
    assert abs(codecs.length(symbols) - len(data)) <= 0.005 * len(data) + 8


def test_independent_symbols_of_one_law_lose_nothing() -> None:
    """Negative control: `best` is never longer than rans, nor much shorter where nothing is."""
    rng = np.random.default_rng(0)
    for symbols in (rng.integers(-3, 4, (150, 150)), np.rint(rng.normal(0, 20, (300, 300)))):
        whole = len(codecs.rans.encode(symbols.astype(np.int32)))
        assert 0.99 * whole - 8 <= len(codecs.best(symbols.astype(np.int32))[1]) <= whole


def test_parts_check_the_name() -> None:
    with pytest.raises(FileError, match="zip"):
        codecs.parts("zip", b"", (1,))
