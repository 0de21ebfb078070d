"""Rounding in pieces gives the integers and the bytes that `rdoq` and the codecs give whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.artifact import records
from lamina.codecs import blocks
from lamina.errors import MethodError, SiteError
from lamina.forms import Grid
from lamina.methods.rdoq.problem import pose
from lamina.methods.rdoq.rounding import quantize
from lamina.network.sites import Site
from lamina.streaming import rounding
from lamina.streaming.rounding import grid_record, round_to


def lazily(**tensors: torch.Tensor) -> Any:
    """Return tensors that are read by rows."""

    def rows(name: str, first: int, last: int) -> torch.Tensor:
        t = tensors[name]
        return t.reshape(t.shape[0] if t.dim() > 1 else 1, -1)[first:last]

    return SimpleNamespace(state=tensors, stored=tensors, rows=rows, tensor=tensors.__getitem__)


@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    st.sampled_from([0.5, 1.0, 0.3, 7.0]),
)
def test_integers_are_those_of_rdoq(values: list[float], step: float) -> None:
    step = float(np.float32(step))
    values += [step * k / 2 for k in range(-5, 6)]  # ties
    weight = torch.tensor([values])
    site = Site("fc", module="fc", weight="w", shape=tuple(weight.shape))
    weights = {"weight": weight}
    result = quantize(pose(site, weights, None), weights, step, 0.0)
    expected = result.values["weight"].symbols.numpy()
    assert np.array_equal(round_to(weight.numpy(), step), expected)


@pytest.mark.parametrize("shape", [(40, 30), (7, 5, 3), (50,), (2, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_record_is_that_of_the_whole(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    symbols = torch.from_numpy(round_to(weight.float().numpy(), 0.25))
    record, _ = grid_record(lazily(w=weight), "w", 0.25)
    assert record == records.encode(Grid(symbols, 0.25, dtype=dtype))


@pytest.mark.parametrize("shape", [(40, 30), (3, 901), (1, 1000)])
def test_pieces_are_those_of_the_codec(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(rounding.blocks, "BLOCK", 256)
    monkeypatch.setattr(rounding, "CHUNK", 64)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    symbols = round_to(weight.numpy(), 0.25)
    record, codec = grid_record(lazily(w=weight), "w", 0.25)
    assert codec == "blocks" and record.endswith(blocks.encode(symbols, block=256))
    _, start = records.read_varint(memoryview(record), 0)
    found = records.parse(memoryview(record)[start:], shape, torch.float32)
    assert (found.form, found.codec, found.step) == ("grid", "blocks", 0.25)


def test_what_has_no_grid_point_is_refused() -> None:
    with pytest.raises(SiteError, match="not finite at w"):
        grid_record(lazily(w=torch.tensor([[1.0, float("inf")]])), "w", 0.5)
    with pytest.raises(MethodError, match="too fine"):
        grid_record(lazily(w=torch.tensor([[1.0, 2.0]])), "w", 1e-12)
