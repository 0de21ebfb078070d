"""Folding in four schemes, and the way back, by index arithmetic and by convolving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lamina.errors import MethodError
from lamina.measure.low_rank import factorize
from lamina.measure.schemes import PLAIN, Scheme, distinct_schemes, expand, fold, recompose

KERNELS = [(3, 3), (3, 5), (2, 1), (1, 4)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("folds", [1, 2, 4])
def test_the_folded_matrices_are_those_of_the_table(kernel: tuple[int, int], folds: int) -> None:
    """Slice the channels first, then fold: element by element."""
    f, c, (k1, k2) = 3, 8, kernel
    weight = np.random.default_rng(0).standard_normal((f, c, k1, k2))
    matrix = torch.from_numpy(weight.reshape(f, -1))
    for number in range(4):
        parts = fold(matrix, folds, Scheme(number, kernel)).numpy()
        for i, part in enumerate(np.split(weight, folds, axis=1)):
            moved = {
                0: part.transpose(0, 1, 2, 3).reshape(f, -1),
                1: part.transpose(0, 2, 1, 3).reshape(f * k1, -1),
                2: part.transpose(0, 3, 1, 2).reshape(f * k2, -1),
                3: part.transpose(0, 2, 3, 1).reshape(f * k1 * k2, -1),
            }[number]
            np.testing.assert_array_equal(parts[i], moved)


def test_fold_then_chunk_is_another_matrix_for_the_split_schemes_only() -> None:
    """The published code folds `[f k1, k2 c]` and cuts columns: no channels in schemes 1 and 2."""
    f, c, k, folds = 3, 8, 3, 2
    weight = np.random.default_rng(0).standard_normal((f, c, k, k))
    matrix = torch.from_numpy(weight.reshape(f, -1))
    whole = {
        0: weight.reshape(f, -1),
        1: weight.transpose(0, 2, 3, 1).reshape(f * k, k * c),
        2: weight.transpose(0, 3, 2, 1).reshape(f * k, k * c),
        3: weight.transpose(0, 2, 3, 1).reshape(f * k * k, c),
    }
    for number, folded in whole.items():
        mine = fold(matrix, folds, Scheme(number, (k, k)))
        spectra = torch.linalg.svdvals(mine).numpy()
        chunks = [np.linalg.svd(m, compute_uv=False) for m in np.split(folded, folds, 1)]
        same = np.allclose(spectra, np.stack(chunks))
        assert same == (number in (0, 3)), f"scheme {number}"


def test_linear_layers_have_one_scheme() -> None:
    matrix = torch.randn(3, 6)
    assert torch.equal(fold(matrix, 2), torch.stack([matrix[:, :3], matrix[:, 3:]]))
    assert torch.equal(expand(matrix[None], PLAIN), matrix[None])
    assert (PLAIN.encoder, PLAIN.before, PLAIN.after) == ((), 1, 1)
    assert distinct_schemes(()) == distinct_schemes((3,)) == distinct_schemes((3, 3, 3)) == (0,)


@pytest.mark.parametrize("kernel", KERNELS)
def test_schemes_that_are_left_out_are_the_same_as_others(kernel: tuple[int, int]) -> None:
    matrix = torch.randn(3, 4 * kernel[0] * kernel[1])
    kept = [fold(matrix, 2, Scheme(n, kernel)) for n in distinct_schemes(kernel)]
    for number in range(4):
        one = fold(matrix, 2, Scheme(number, kernel))
        assert sum(one.shape == other.shape and torch.equal(one, other) for other in kept) == 1


@pytest.mark.parametrize("kernel", [(3, 3), (3, 2), (1, 4)])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("folds", [1, 2])
def test_a_pair_is_composed_to_the_convolution_it_computes(
    kernel: tuple[int, int], number: int, folds: int
) -> None:
    scheme = Scheme(number, kernel)
    encode = torch.randn(folds * 3, 4 // folds, *scheme.encoder, dtype=torch.float64)
    decode = torch.randn(5, folds * 3, *scheme.decoder, dtype=torch.float64)
    weight = recompose(encode, decode, folds)
    assert weight.shape == (5, 4, *kernel)
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(
        F.conv2d(F.conv2d(x, encode, groups=folds), decode), F.conv2d(x, weight)
    )
    rows = expand(encode.reshape(folds, 3, -1), scheme)
    product = decode.flatten(1) @ torch.block_diag(*rows)
    torch.testing.assert_close(product, weight.flatten(1))


@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 3), (5, 8, 3, 2), (3, 8, 2, 2, 2)])
@pytest.mark.parametrize("folds", [1, 4])
def test_composing_undoes_decomposing_at_full_rank(shape: tuple[int, ...], folds: int) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    kernel = shape[2:]
    for number in range(4) if len(kernel) == 2 else (0,):
        scheme = Scheme(number, kernel)
        matrix = weight.flatten(1)
        rank = min(fold(matrix, folds, scheme).shape[1:])
        encode, decode = factorize(matrix, None, None, folds, rank, scheme)
        pair = (
            encode.reshape(folds * rank, shape[1] // folds, *scheme.encoder),
            decode.reshape(shape[0], folds * rank, *scheme.decoder),
        )
        torch.testing.assert_close(recompose(*pair, folds), weight, rtol=0, atol=1e-10)
        if folds > 1:  # the groups matter
            with pytest.raises((MethodError, AssertionError)):
                torch.testing.assert_close(recompose(*pair, 1), weight)


@pytest.mark.parametrize(
    ("encode", "decode", "folds", "why"),
    [
        ((6, 4), (5, 4), 1, "no pair"),
        ((6, 4), (5, 6), 4, "no pair"),
        ((6, 4), (5, 6), 0, "no pair"),
        ((6, 4, 3), (5, 6), 1, "no pair"),
        ((6, 4, 3, 3), (5, 6, 3, 1), 1, "both own the taps"),
    ],
)
def test_what_is_no_pair_is_refused(
    encode: tuple[int, ...], decode: tuple[int, ...], folds: int, why: str
) -> None:
    with pytest.raises(MethodError, match=why):
        recompose(torch.zeros(encode), torch.zeros(decode), folds)
