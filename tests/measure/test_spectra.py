"""Spectra of folds against numpy's float64 SVD, the cache on disk, and what float32 misses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import MethodError
from lamina.measure import spectra
from lamina.measure.spectra import cached, fold_spectra


def svd(matrix: torch.Tensor, folds: int) -> np.ndarray:
    """The reference: numpy's SVD of every fold in float64."""
    parts = np.split(matrix.to(torch.float64).numpy(), folds, 1)
    return np.stack([np.linalg.svd(part, compute_uv=False) for part in parts])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(f: int, n: int, least: float, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall geometrically from 1 to `least`."""
    r = min(f, n)
    left, right = (torch.linalg.qr(normal(m, r, seed=seed + i)).Q for i, m in enumerate((f, n)))
    return (left * torch.logspace(0, np.log10(least), r, dtype=torch.float64)) @ right.T


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    folds = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 6, 8, 12]), min_size=1, max_size=5))
    return draw(st.integers(1, 30)), int(np.lcm.reduce(folds)) * draw(st.integers(1, 3)), folds


@given(cases(), st.integers(0, 9), st.sampled_from([1, 7, 1 << 22]))
def test_all_divisors_on_both_sides_are_numpys(case, seed, chunk) -> None:
    """Wide, narrow and mixed folds, nested or not, in chunks of any size."""
    f, n, folds = case
    matrix = normal(f, n, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "CHUNK", chunk)
        patch.setattr(spectra, "BATCH", max(1, chunk // 2))
        found = fold_spectra(matrix, folds)
    assert set(found) == set(folds)
    for k in folds:
        wanted = svd(matrix, k)
        assert found[k].shape == wanted.shape and found[k].dtype == torch.float64
        np.testing.assert_allclose(found[k], wanted, atol=3e-8 * wanted.max())
        assert (found[k].diff(dim=1) <= 0).all(), "descending"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_of_the_weights_does_not_matter(dtype) -> None:
    matrix = normal(12, 24).to(dtype)
    for k, values in fold_spectra(matrix, [1, 2, 3]).items():
        np.testing.assert_allclose(values, svd(matrix, k), rtol=1e-9)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_scale_of_the_weights_does_not_matter(exact, size) -> None:
    """In float32 the squares of 1e30 would be infinite, those of 1e-30 would vanish."""
    matrix = (normal(8, 12) * size).to(torch.float32)
    found = fold_spectra(matrix, [2], exact=exact)[2]
    np.testing.assert_allclose(found, svd(matrix, 2), rtol=1e-9 if exact else 1e-5)


def test_what_float64_resolves_and_float32_misses() -> None:
    """The documented errors hold; the control: a float32 Gram alone loses the small values."""
    matrix = decaying(96, 192, least=1e-6)
    true = svd(matrix, 1)[0]
    exact, fast = (fold_spectra(matrix, [1], exact=e)[1][0].numpy() for e in (True, False))
    assert np.abs(exact - true).max() <= 1e-15 / true.min()
    assert np.abs(exact / true - 1).max() < 1e-3
    assert (np.abs(fast - true) <= 1e-6 / true + 1e-12).all(), "documented"
    assert np.abs(fast / true - 1)[true > 1e-2].max() < 1e-2
    assert np.abs(fast / true - 1)[true < 1e-5].max() > 0.5, "noise, as documented"
    tail = np.cumsum((true**2)[::-1])[::-1]
    assert (np.abs(np.cumsum((fast**2)[::-1])[::-1] - tail) <= 1e-6 * tail[0]).all()


@pytest.mark.parametrize(("f", "n"), [(64, 64), (48, 192), (192, 48)])
def test_fast_tails_keep_their_bound_on_flat_spectra(f, n) -> None:
    """Random matrices, square ones among them: 1e-6 of the whole energy at every rank."""
    for seed in range(5):
        matrix = normal(f, n, seed=seed).to(torch.float32)
        for k, values in fold_spectra(matrix, [1, 2, 4], exact=False).items():
            true = svd(matrix, k) ** 2
            off = np.abs((values.numpy() ** 2)[:, ::-1].cumsum(1) - true[:, ::-1].cumsum(1))
            assert off.max() <= 1e-6 * true.sum(1).max()


def test_zeros_and_nothing() -> None:
    assert not fold_spectra(torch.zeros(3, 4), [1, 2])[2].any()
    assert fold_spectra(torch.zeros(0, 4), [1, 4])[4].shape == (4, 0)
    assert fold_spectra(torch.zeros(3, 0), [2])[2].shape == (2, 0)
    assert fold_spectra(torch.ones(3, 4), []) == {}


def test_the_matrix_is_only_read() -> None:
    matrix = normal(6, 8).requires_grad_()
    before = matrix.detach().clone()
    found = fold_spectra(matrix, [1, 2], exact=False)
    assert torch.equal(matrix, before) and not found[1].requires_grad
    turned = normal(8, 6).T
    np.testing.assert_allclose(fold_spectra(turned, [2])[2], svd(turned.contiguous(), 2))


@pytest.mark.parametrize(
    ("matrix", "folds", "why"),
    [
        (torch.ones(4, 6), [1, 4], "4 folds of 6 columns"),
        (torch.ones(4, 6), [0], "0 folds"),
        (torch.ones(4), [1], "shape"),
        (torch.ones(4, 6, dtype=torch.int32), [1], "int32"),
        (torch.full((4, 6), float("nan")), [1], "not finite"),
        (torch.tensor([[1.0, float("-inf")]]), [1], "not finite"),
    ],
)
def test_what_has_no_spectrum_is_refused(matrix, folds, why) -> None:
    with pytest.raises(MethodError, match=why):
        fold_spectra(matrix, folds)


# --- the cache -----------------------------------------------------------------------------------


@pytest.fixture
def count(monkeypatch) -> list[int]:
    """The number of spectra that were really computed."""
    calls: list[int] = []
    compute = spectra._computed

    def counted(*given):
        calls.append(1)
        return compute(*given)

    monkeypatch.setattr(spectra, "_computed", counted)
    return calls


def same(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_the_cache_gives_the_same_and_is_asked_first(tmp_path: Path, count) -> None:
    matrix = normal(6, 12).float()
    plain = fold_spectra(matrix, [1, 2, 3])
    with cached(tmp_path / "deep" / "spectra"):
        first, again = (fold_spectra(matrix.clone(), [3, 2, 1, 1]) for _ in range(2))
    assert same(plain, first) and same(plain, again) and len(count) == 2
    with cached(None):
        fold_spectra(matrix, [1])
    fold_spectra(matrix, [1, 2, 3])
    assert len(count) == 4, "outside nothing is kept"


def test_whatever_matters_is_in_the_key(tmp_path: Path, count) -> None:
    matrix = normal(6, 12).float()
    other = matrix.clone()
    other[5, 11] = torch.nextafter(other[5, 11], torch.tensor(9.0))
    with cached(tmp_path):
        for given, folds, exact in (
            (matrix, [1, 2], True),
            (matrix, [1], True),
            (matrix, [1, 2], False),
            (other, [1, 2], True),
            (matrix.double(), [1, 2], True),
            (matrix.reshape(12, 6), [1, 2], True),
        ):
            for _ in range(2):
                fold_spectra(given, folds, exact=exact)
    assert len(count) == len(list(tmp_path.iterdir())) == 6
    with cached(tmp_path):
        fold_spectra(matrix.T.contiguous().T, [2, 1])
    assert len(count) == 6, "how it lies in memory does not matter"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_computed_again(tmp_path: Path, count, damage) -> None:
    matrix = normal(6, 12)
    with cached(tmp_path):
        good = fold_spectra(matrix, [1, 2])
        (path,) = tmp_path.iterdir()
        data = path.read_bytes()
        flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
        if damage == "foreign":  # whole, but of another matrix
            spectra._write(path, {1: torch.zeros(1, 2), 2: torch.zeros(2, 2)})
        else:
            path.write_bytes({"cut": data[:-9], "flipped": flipped, "empty": b""}[damage])
        assert same(fold_spectra(matrix, [1, 2]), good) and len(count) == 2
        assert path.read_bytes() == data, "and mended"
        fold_spectra(matrix, [1, 2])
    assert len(count) == 2


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    from lamina.errors import RunError

    (tmp_path / "file").write_text("")
    with cached(tmp_path / "file"), pytest.raises(RunError, match="cannot write"):
        fold_spectra(normal(2, 2), [1])


def test_caches_nest_and_end_with_an_error(tmp_path: Path, count) -> None:
    with cached(tmp_path), pytest.raises(ZeroDivisionError), cached(None):
        _ = 1 / 0
    fold_spectra(normal(2, 2), [1])
    assert not list(tmp_path.iterdir())
