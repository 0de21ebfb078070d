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
