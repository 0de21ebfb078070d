"""TensorLoader and shift: order, resume and augmentation, against something written plainly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lamina.data import TensorLoader, shift
from lamina.errors import DataError


def rows(loader: TensorLoader) -> list[int]:
    return [int(v) for x, _ in loader for v in x]


def test_batches_cover_the_data_in_order() -> None:
    x = torch.arange(23).reshape(23, 1)
    loader = TensorLoader(x, x + 100, batch_size=5)
    batches = list(loader)
    assert [len(b[0]) for b in batches] == [5, 5, 5, 5, 3]
    assert len(loader) == 5 and loader.dataset_size == 23
    assert torch.equal(torch.cat([b[0] for b in batches]), x)
    assert torch.equal(torch.cat([b[1] for b in batches]), x + 100)


def test_labels_follow_their_inputs_through_the_shuffle() -> None:
    x = torch.arange(40)
    for a, b in TensorLoader(x, x * 3, 7, shuffle=True, seed=5):
        assert torch.equal(a * 3, b)


def test_each_epoch_is_a_new_permutation() -> None:
    loader = TensorLoader(torch.arange(50), torch.arange(50), 8, shuffle=True)
    first, second = rows(loader), rows(loader)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first != list(range(50))


def test_seeds_differ_and_repeat() -> None:
    def epoch(seed: int) -> list[int]:
        return rows(TensorLoader(torch.arange(50), torch.arange(50), 8, shuffle=True, seed=seed))

    assert epoch(3) == epoch(3)
    assert epoch(3) != epoch(4)
    assert sorted(epoch(2**40 + 1)) == list(range(50))  # a seed beyond 32 bits is no error


def test_global_random_state_neither_matters_nor_moves() -> None:
    def epoch(seed: int) -> Tensor:
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        x = torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(0))
        batches = list(TensorLoader(x, None, 8, shuffle=True, augment=shift(2)))
        assert torch.equal(before, torch.random.get_rng_state())
        return torch.cat(batches)

    assert torch.equal(epoch(1), epoch(2))


@given(st.integers(0, 4), st.integers(0, 2**31))
def test_set_epoch_resumes_exactly(done: int, seed: int) -> None:
    """Epochs `done`.. of a fresh loader equal those of one that ran through, augmentation too."""
    x = torch.arange(10 * 16, dtype=torch.float32).reshape(10, 1, 4, 4)

    def make() -> TensorLoader:
        return TensorLoader(x, torch.arange(10), 3, shuffle=True, augment=shift(1), seed=seed)

    through = make()
    for _ in range(done):
        list(through)
    resumed = make()
    resumed.set_epoch(done)
    assert resumed.epoch == through.epoch == done
    for (a, u), (b, v) in zip(through, resumed, strict=True):
        assert torch.equal(a, b) and torch.equal(u, v)
    assert resumed.epoch == done + 1


def test_an_epoch_left_half_way_counts() -> None:
    loader = TensorLoader(torch.arange(20), torch.arange(20), 4, shuffle=True)
    next(iter(loader))
    assert loader.epoch == 1
    two = iter(loader), iter(loader)  # opened together: epochs 1 and 2, not 1 twice
    assert [v.tolist() for v, _ in two[0]] != [v.tolist() for v, _ in two[1]]
    assert loader.epoch == 3


def test_without_labels_a_batch_is_a_tensor() -> None:
    batches = list(TensorLoader(torch.arange(5), None, 2))
    assert all(isinstance(b, Tensor) for b in batches)


def test_prepare_comes_before_augment() -> None:
    x = torch.ones(4, 1, 2, 2, dtype=torch.uint8)
    loader = TensorLoader(
        x, None, 4, prepare=lambda b: b.float() * 2, augment=lambda b, g: b + b.dtype.itemsize
    )
    assert torch.equal(next(iter(loader)), torch.full((4, 1, 2, 2), 6.0))


def test_head_is_plain() -> None:
    x = torch.arange(30.0).reshape(30, 1, 1, 1)
    loader = TensorLoader(
        x, torch.arange(30), 4, shuffle=True, augment=shift(1), prepare=lambda b: b + 1
    )
    head = loader.head(10, batch_size=6)
    assert torch.equal(torch.cat([a for a, _ in head]), x[:10] + 1)
    assert head.dataset_size == 10 and loader.epoch == 0


@pytest.mark.parametrize(
    ("x", "y", "size"),
    [
        (torch.zeros(0, 3), None, 4),
        (torch.tensor(1.0), None, 4),
        (torch.zeros(3, 1), torch.zeros(2), 4),
        (torch.zeros(3, 1), torch.tensor(0), 4),
        (torch.zeros(3, 1), torch.zeros(3), 0),
    ],
)
def test_refuses_what_is_no_data(x: Tensor, y: Tensor | None, size: int) -> None:
    with pytest.raises(DataError):
        TensorLoader(x, y, size)


def shift_one_by_one(x: Tensor, moves: Tensor, pixels: int, fill: float) -> Tensor:
    """The brute-force reference: output pixel (i, j) is input pixel (i + dy, j + dx) or fill."""
    out = torch.full_like(x, fill)
    _, channels, height, width = x.shape
    for n in range(len(x)):
        dy, dx = (int(moves[0, n]) - pixels), (int(moves[1, n]) - pixels)
        for c in range(channels):
            for i in range(height):
                for j in range(width):
                    if 0 <= i + dy < height and 0 <= j + dx < width:
                        out[n, c, i, j] = x[n, c, i + dy, j + dx]
    return out


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 3),
    st.integers(0, 1000),
)
def test_shift_equals_the_loop(n: int, c: int, h: int, w: int, pixels: int, seed: int) -> None:
    x = torch.arange(1, n * c * h * w + 1, dtype=torch.float32).reshape(n, c, h, w)
    moved = shift(pixels, fill=-0.5)(x, torch.Generator().manual_seed(seed))
    moves = torch.randint(0, 2 * pixels + 1, (2, n), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(moved, shift_one_by_one(x, moves, pixels, -0.5))


def test_shift_draws_every_move_and_moves_each_image_on_its_own() -> None:
    x = torch.zeros(2000, 1, 9, 9)
    x[:, :, 4, 4] = 1
    moved = shift(2)(x, torch.Generator().manual_seed(0))
    places = moved.flatten(1).argmax(1)
    counts = torch.bincount(places, minlength=81).reshape(9, 9)
    assert int(counts.sum()) == 2000
    assert (counts[2:7, 2:7] > 40).all()  # 80 expected of each of the 25 moves
    counts[2:7, 2:7] = 0
    assert not counts.any()


def test_shift_by_nothing_is_nothing() -> None:
    x = torch.rand(3, 2, 4, 5)
    assert torch.equal(shift(0)(x, torch.Generator()), x)


def test_shift_refuses_what_is_no_image() -> None:
    with pytest.raises(DataError, match="-1 pixels"):
        shift(-1)
    with pytest.raises(DataError, match=r"\[3, 4\]"):
        shift(1)(torch.zeros(3, 4), torch.Generator())
