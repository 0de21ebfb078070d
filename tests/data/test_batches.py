"""What `data=` may be and what a batch may hold, and a plain refusal of everything else."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lamina.data import Data, TensorLoader, as_data, inputs_of, labels_of, shift, size_of
from lamina.errors import DataError

X, Y = torch.arange(12.0).reshape(4, 3), torch.tensor([0, 1, 2, 0])


def inputs(loader: Any) -> Tensor:
    return torch.cat([inputs_of(batch)[0][0] for batch in loader])


# --- one batch


@pytest.mark.parametrize(
    ("batch", "args", "kwargs", "labels"),
    [
        (X, (X,), {}, None),
        ((X,), (X,), {}, None),
        ((X, Y), (X,), {}, Y),
        ([X, Y], (X,), {}, Y),
        ((X, None), (X,), {}, None),
        (((X, Y), Y), (X, Y), {}, Y),
        (([X, Y],), (X, Y), {}, None),
        (({"a": X}, Y), (), {"a": X}, Y),
        ({"a": X, "labels": Y}, (), {"a": X}, Y),
        (OrderedDict(a=X, target=Y), (), {"a": X}, Y),
        (UserDict(a=X, b=Y), (), {"a": X, "b": Y}, None),
    ],
)
def test_inputs_and_labels(batch: Any, args: Any, kwargs: Any, labels: Tensor | None) -> None:
    got_args, got_kwargs = inputs_of(batch)
    assert len(got_args) == len(args) and all(a is b for a, b in zip(got_args, args, strict=True))
    assert set(got_kwargs) == set(kwargs) and all(got_kwargs[k] is kwargs[k] for k in kwargs)
    assert labels_of(batch) is labels
    assert size_of(batch) == 4


@pytest.mark.parametrize(
    "batch", [None, 3, "text", (), (X, Y, Y), (np.zeros(3), Y), ((), Y), ((1, 2), Y), [[X], Y, Y]]
)
def test_unreadable_batches(batch: Any) -> None:
    for read in (inputs_of, labels_of, size_of):
        with pytest.raises(DataError, match="cannot read a batch"):
            read(batch)


def test_labels_that_are_no_tensor() -> None:
    with pytest.raises(DataError, match="list"):
        labels_of((X, [0, 1, 2, 0]))


def test_a_batch_without_samples_dimension() -> None:
    with pytest.raises(DataError, match="batch dimension"):
        size_of({"a": torch.tensor(1.0), "b": "text"})


# --- data=


def test_none_is_none() -> None:
    assert as_data(None) is None


def test_a_list_stays_as_it_is() -> None:
    batches = [(X, Y)] * 500  # 2,000 samples: the user chose them, all are kept
    data = as_data(batches)
    assert data is not None and data.calibration is batches
    assert (data.train, data.validation, data.test) == (None, None, None)


def test_a_generator_is_taken_once_and_cut_at_1000_samples() -> None:
    drawn = 0

    def batches() -> Iterator[Any]:
        nonlocal drawn
        while True:
            drawn += 1
            yield torch.full((300, 2), float(drawn)), torch.full((300,), drawn)

    data = as_data(batches())
    assert data is not None and isinstance(data.calibration, list)
    assert [size_of(b) for b in data.calibration] == [300, 300, 300, 100]
    last = labels_of(data.calibration[-1])
    assert last is not None and len(last) == 100
    assert drawn == 4  # an endless generator is asked for no more than is kept
    assert torch.equal(inputs(data.calibration), inputs(data.calibration))


def test_cutting_dicts_and_nested_batches() -> None:
    big = {"ids": torch.zeros(1500, 7), "mask": torch.ones(1500, 7), "scale": torch.ones(3)}
    data = as_data(iter([big]))
    assert data is not None and isinstance(data.calibration, list)
    assert {k: len(v) for k, v in data.calibration[0].items()} == {
        "ids": 1000,
        "mask": 1000,
        "scale": 3,
    }
    data = as_data(iter([((torch.zeros(1500, 2), torch.zeros(1500, 3)), torch.zeros(1500))]))
    assert data is not None and isinstance(data.calibration, list)
    (a, b), y = data.calibration[0]
    assert (len(a), len(b), len(y)) == (1000, 1000, 1000)


def test_calibration_is_cut_from_a_tensor_loader_without_augmentation() -> None:
    x = torch.rand(1500, 1, 4, 4)
    train = TensorLoader(x, torch.zeros(1500), 64, shuffle=True, augment=shift(2))
    data = as_data(SimpleNamespace(train=train, validation=[X], name="mine", classes=7))
    assert data is not None and data.train is train and data.validation == [X]
    assert torch.equal(inputs(data.calibration), x[:1000])
    assert train.epoch == 0  # looking at train must not move it: resumed runs count epochs
    assert (data.name, data.classes) == ("mine", 7)


def test_calibration_from_a_shuffling_dataloader_is_the_same_every_time() -> None:
    """... in every process, and neither torch's random state nor the loader's own moves."""
    x = torch.arange(3000.0)[:, None]
    own = torch.Generator().manual_seed(5)

    def cut(seed: int, generator: torch.Generator | None) -> Tensor:
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        loader = DataLoader(TensorDataset(x), 64, shuffle=True, generator=generator)
        data = as_data({"train": loader})
        assert data is not None and torch.equal(before, torch.random.get_rng_state())
        return inputs(data.calibration)

    assert len(cut(1, None)) == 1000
    assert torch.equal(cut(1, None), cut(2, None))
    assert not torch.equal(cut(1, None), x[:1000])
    state = own.get_state()
    assert torch.equal(cut(1, own), cut(2, own))
    assert torch.equal(state, own.get_state())


def test_a_shuffling_loader_as_calibration_is_held_still() -> None:
    x = torch.arange(40.0)[:, None]
    for loader in (
        DataLoader(TensorDataset(x), 8, shuffle=True),
        TensorLoader(x, None, 8, shuffle=True),
    ):
        data = as_data(loader)
        assert data is not None
        assert torch.equal(inputs(data.calibration), inputs(data.calibration))
        assert torch.equal(inputs(data.calibration).sort(0).values, x)


def test_a_still_loader_stays() -> None:
    loader = DataLoader(TensorDataset(torch.zeros(2000, 2)), 8)
    data = as_data(loader)
    assert data is not None and data.calibration is loader
    plain = TensorLoader(torch.zeros(20, 2), None, 8)
    data = as_data({"calibration": plain})
    assert data is not None and data.calibration is plain


def test_a_stream_of_unknown_length() -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.zeros(10, 3))

    data = as_data(DataLoader(Stream(), 4))
    assert data is not None and isinstance(data.calibration, list)
    assert [size_of(b) for b in data.calibration] == [4, 4, 2]


def test_data_passes_through() -> None:
    data = as_data(Data(validation=[X], name="n", classes=3))
    assert data == Data(validation=[X], name="n", classes=3)


def test_a_name_is_loaded() -> None:
    data = as_data("mnist-10k")
    assert data is not None and data.classes == 10


def one_shot() -> Iterator[Any]:
    yield X, Y


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no batches"),
        (iter(()), "no batches"),
        (DataLoader(TensorDataset(torch.zeros(0, 2)), 4), "no batches"),
        ({"train": []}, "no batches at train"),
        ({"train": [], "calibration": [X]}, "no batches at train"),
        (X, "one batch at most"),
        ((X, Y), "one batch"),
        (7, "int"),
        (nn.Linear(2, 2), "Linear"),
        ({"input_ids": X}, "input_ids"),
        ({}, "dict"),
        (Data(), "Data"),
        ({"train": one_shot()}, "one-shot"),
        ({"train": [X], "validation": one_shot()}, "one-shot"),
        ([X, 3], "cannot read a batch"),
        ([np.zeros((2, 2))], "cannot read a batch"),
        ([X[:0]], "empty batch"),
        ([(X, Y[:3])], "differ in length"),
        ([X / 0], "NaN"),
        (iter([torch.tensor([[1.0, float("inf")]])]), "NaN"),
        ("no-such-data", "unknown data"),
    ],
)
@pytest.mark.filterwarnings("ignore:Length of split")
def test_bad_data(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_data(source)
