"""What counts as the same in onnxruntime; the session is a stand-in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from lamina.exporting.checking import compare, others, varied
from lamina.network.source import Network

onnxruntime = pytest.importorskip("onnxruntime")


class Session:
    """Gives three times the input, and other rows where it is told so."""

    off: ClassVar[dict[int, float]] = {}

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def get_inputs(self) -> list[Any]:
        return [type("Input", (), {"name": "input"})]

    def run(self, _: None, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        y = 3 * arrays["input"]
        for row, factor in self.off.items():
            y[row : row + 1] *= factor
        return [y]


class Three(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * x


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return {"0": torch.randn(8, 5, generator=torch.Generator().manual_seed(0))}


def compared(feed: dict[str, torch.Tensor], off: dict[int, float], rounds: bool) -> Any:
    Session.off = off
    network = Network(Three(), (feed["0"],))
    return compare(Path("net.onnx"), network, [feed], 1e-3, rounds)


def test_a_network_that_rounds_nothing_is_judged_by_all_its_numbers(feed: Any) -> None:
    assert compared(feed, {}, False).error == 0
    found = compared(feed, {2: 1.5}, False)
    away = (0.5 * 3 * feed["0"][2]).norm() / (3 * feed["0"]).norm()
    assert found.error == pytest.approx(float(away), rel=1e-5)
    assert found.largest == pytest.approx(float((1.5 * feed["0"][2]).abs().max()), rel=1e-5)
    assert (found.apart, found.samples) == (0, 0)


def test_one_that_rounds_may_have_samples_apart_which_are_told(feed: Any) -> None:
    found = compared(feed, {2: 1.5, 5: 1.25}, True)
    assert found.error < 1e-6 and found.largest < 1e-6
    assert (found.apart, found.samples) == (2, 8) and found.worst == pytest.approx(0.5, rel=1e-5)
    assert compared(feed, {}, True).apart == 0


def test_where_most_samples_are_off_it_computes_something_else(feed: Any) -> None:
    found = compared(feed, dict.fromkeys(range(5), 1.5), True)
    assert found.error == pytest.approx(0.5, rel=1e-5) and found.apart == 5
    assert compared(feed, {0: float("nan")}, False).error == float("inf")
    assert compared(feed, {0: float("nan")}, True).worst == float("inf")


def test_more_samples_are_like_the_first() -> None:
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    made = varied({"input_ids": ids, "attention_mask": mask, "0": torch.ones(2, 3)}, 7)
    assert made["input_ids"].shape == (7, 6) and len(made["input_ids"].unique(dim=0)) > 1
    assert bool((made["input_ids"].sort(1).values == ids[:1]).all())
    assert bool((made["attention_mask"] == mask[:1]).all())
    assert made["0"].shape == (7, 3) and 0.5 < float(made["0"].min()) < 1 < float(made["0"].max())


def test_other_sizes_are_one_sample_more_and_fewer_tokens() -> None:
    (other,) = others({"input_ids": torch.arange(16).reshape(2, 8)}, ["input_ids[0]", "x[1]"])
    assert other["input_ids"].shape == (3, 6) and others({}, []) == []
