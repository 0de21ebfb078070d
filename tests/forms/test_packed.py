"""The packed 2:4 layout: it comes back, and takes what the formula says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import FileError
from lamina.forms.packed import pack_two_four, unpack_two_four


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
def test_it_comes_back_and_takes_12_bits_of_every_four(rows: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(-8, 8, (rows, m, 4), generator=generator)
    order = torch.rand(rows, m, 4, generator=generator).argsort(-1)
    symbols = symbols.masked_fill(order < 2, 0).reshape(rows, 4 * m)
    codes, places = pack_two_four(symbols)
    assert codes.dtype == places.dtype == torch.uint8
    assert codes.numel() + places.numel() == rows * m + -(-rows * m // 2)
    if rows * m % 2 == 0:
        assert 8 * (codes.numel() + places.numel()) == 12 * rows * m
    assert torch.equal(unpack_two_four(codes, places, (rows, 4 * m)), symbols.int())


def test_what_does_not_fit_is_refused() -> None:
    for bad, why in (
        (torch.tensor([[1, 1, 1, 0]]), "more than two"),
        (torch.tensor([[8, 0, 0, 0]]), "4 bits"),
        (torch.tensor([[-9, 0, 0, 0]]), "4 bits"),
        (torch.zeros(2, 6, dtype=torch.int64), "fours"),
        (torch.zeros(4, dtype=torch.int64), "fours"),
    ):
        with pytest.raises(FileError, match=why):
            pack_two_four(bad)
    codes, places = pack_two_four(torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(FileError, match="packed bytes"):
        unpack_two_four(codes, places, (3, 4))
