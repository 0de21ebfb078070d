"""Grids per block: dense to the bit, and found again in what quantized files are opened as."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.forms import Affine, Edit, Grid, find_affine, install

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def weights(rows=40, columns=96, seed=0):
    """Weights as trained ones are: rows of different spread, some of them odd."""
    draw = np.random.default_rng(seed)
    found = draw.standard_normal((rows, columns)) * 0.02 * draw.lognormal(0, 0.5, (rows, 1))
    found[3] = 0
    found[5, :40] = 0.25
    found[7] *= 1e-7  # steps below what a float16 holds
    found[9, 0] = 40.0
    return found.astype(np.float32)


def through(kind, values):
    """Return what a GGUF file gives back of values, and what they take in it [bytes]."""
    gguf = pytest.importorskip("gguf")
    kind = getattr(gguf.GGMLQuantizationType, kind)
    coded = gguf.quants.quantize(values, kind)
    return torch.from_numpy(gguf.quants.dequantize(coded, kind).copy()), coded.nbytes


def random_affine(seed, kind, least, block, levels, shape=(12, 64)):
    """Return a grid as files hold them: whole ranges, and steps of few bits."""
    draw = np.random.default_rng(seed)
    low = 0 if least else -(levels // 2)
    symbols = torch.from_numpy(draw.integers(low, low + levels, shape))
    steps = draw.lognormal(-6, 0.5, (shape[0], shape[1] // block))
    steps = torch.from_numpy(steps).half().to(kind)
    leasts = -steps * 7.3 if least else None
    if kind == torch.float32:  # as k-quants: a float16 times a small integer
        steps = steps * torch.from_numpy(draw.integers(1, 64, tuple(steps.shape)))
        leasts = -steps.half().float() * 7 if least else None
    return Affine(symbols, steps, leasts, block)


def test_the_sum_is_of_the_rounded_product():
    """Float64 arithmetic, rounded twice by hand: a fused multiply-add gives other bits."""
    draw = np.random.default_rng(0)
    q = draw.integers(-1000, 1000, (50, 32))
    step, least = draw.standard_normal((2, 50, 1)).astype(np.float32)
    got = Affine(torch.from_numpy(q), *map(torch.from_numpy, (step, least)), 32).dense().numpy()
    product = (q * step.astype(np.float64)).astype(np.float32)
    wanted = (product.astype(np.float64) + least).astype(np.float32)
    assert (got == wanted).all()
    fused = (q * step.astype(np.float64) + least).astype(np.float32)
    assert (got != fused).any(), "the test can tell the two apart"


@pytest.mark.parametrize("kind", KINDS)
def test_what_gguf_gives_back_is_found(kind):
    tensor, _ = through(kind, weights())
    found = find_affine(tensor)
    assert found is not None and same(found.dense(), tensor)
    assert found.block == 32 and found.steps.dtype == torch.float16
    assert (found.leasts is not None) == kind.endswith("1")
    most = 2 ** int(kind[1])
    assert int(found.symbols.max()) - int(found.symbols.min()) < most, "no wider than in the file"


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_other_kinds_of_gguf_are_found(kind):
    """Any bytes are such a file, once the scales are numbers."""
    gguf = pytest.importorskip("gguf")
    number = getattr(gguf.GGMLQuantizationType, kind)
    elements, size = gguf.GGML_QUANT_SIZES[number]
    draw = np.random.default_rng(0)
    coded = draw.integers(0, 256, (16 * 512 // elements, size), dtype=np.uint8)
    scales = draw.lognormal(-7, 0.3, (len(coded), 2)).astype(np.float16).view(np.uint8)
    first = {"Q4_K": 0, "Q5_K": 0, "IQ4_NL": 0, "Q2_K": size - 4}.get(kind, size - 2)
    wide = 4 if kind in ("Q2_K", "Q4_K", "Q5_K") else 2
    coded[:, first : first + wide] = scales[:, :wide]
    tensor = torch.from_numpy(gguf.quants.dequantize(coded.reshape(16, -1), number).copy())
    found = find_affine(tensor)
    assert found is not None and same(found.dense(), tensor)


@settings(max_examples=20)
@given(
    st.integers(0, 999), st.sampled_from([torch.float16, torch.float32]), st.booleans(),
    st.sampled_from([16, 32]), st.sampled_from([4, 15, 16, 31]),
)  # fmt: skip
def test_any_such_grid_is_found(seed, kind, least, block, levels):
    grid = random_affine(seed, kind, least, block, levels)
    found = find_affine(grid.dense())
    assert found is not None and same(found.dense(), grid.dense())
    assert found.symbols.shape == grid.symbols.shape and found.block in (16, 32)


def test_zeros_of_either_sign_come_back():
    """Q4_0 has negative steps, whose zeros are negative; a step of zero has zeros of both signs."""
    symbols = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([[0.5, -0.5], [0.25, 0.125], [-0.5, 0.0], [0.0, -0.0]]).half()
    dense = Affine(symbols, steps, None, 32).dense()
    assert bool((torch.signbit(dense) & (dense == 0)).any())
    found = find_affine(dense)
    assert found is not None and same(found.dense(), dense)


def test_other_values_have_none():
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(16, 64, generator=draw)
    grid = through("Q4_1", weights())[0]
    for row in (0, 20, 39):
        wrong = grid.clone()
        wrong[row, 50] = wrong[row, 50] * 1.001
        assert find_affine(wrong) is None, "one value of a row is on no grid"
    for tensor in (
        normal, normal.bfloat16().float(), normal.half().float(), normal.bfloat16(), grid.double(),
        grid[:, :30], grid[0], grid.reshape(4, 10, 96), torch.zeros(0, 32), torch.zeros(8, 64),
        torch.full((8, 64), 0.5), torch.full((8, 64), torch.nan), torch.full((8, 64), torch.inf),
        torch.zeros(8, 64, device="meta"), normal.masked_fill(normal > 0, torch.inf),
    ):  # fmt: skip
        assert find_affine(tensor) is None
    assert find_affine(Grid(torch.randint(-9, 9, (8, 64)), 0.0371).dense()) is None
    assert find_affine(grid) is not None, "control"


def test_it_is_installed_like_any_values():
    grid = random_affine(1, torch.float16, True, 32, 16)
    layer = torch.nn.Linear(64, 12)
    install(layer, [Edit("weight", "values", values=grid)])
    assert same(layer.weight.detach(), grid.dense())
