"""A linear probe: perfect where classes lie apart, chance where nothing is left of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lamina.errors import DataError
from lamina.measure.linear_probe import linear_probe
from lamina.measure.quality import evaluate


def points(n: int = 240, classes: int = 3) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(n) % classes
    return 4 * torch.eye(classes, 6)[y] + 0.5 * torch.randn(n, 6, generator=draw), y


class Blind(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), 6, generator=torch.Generator().manual_seed(1))


class Turned(nn.Module):
    """All is still there, but not where the classifier of the original looks for it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)


def test_the_classifier_is_the_originals() -> None:
    x, y = points()
    batches = [(x[:100], y[:100]), (x[100:], y[100:])]
    same = nn.Identity()
    assert linear_probe(same, same, batches) == 100.0
    assert linear_probe(same, Blind(), batches) == pytest.approx(100 / 3, abs=12)
    assert linear_probe(same, Turned(), batches) < 40
    assert evaluate(Blind(), batches, "probe", original=same) == linear_probe(
        same, Blind(), batches
    )


def test_it_agrees_with_another_implementation() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = points()
    x = x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))  # hard
    found = linear_probe(nn.Identity(), nn.Identity(), [(x, y)])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    first, second = order[: len(y) // 2], order[len(y) // 2 :]
    v, right = nn.functional.normalize(x, dim=-1).double(), 0
    for fit, judge in ((first, second), (second, first)):
        mean, spread = v[fit].mean(0), v[fit].std(0)
        model = linear.LogisticRegression(C=1 / (2e-3 * len(fit)), max_iter=1000)
        model.fit(((v[fit] - mean) / spread).numpy(), y[fit].numpy())
        guessed = model.predict(((v[judge] - mean) / spread).numpy())
        right += int((torch.from_numpy(guessed) == y[judge]).sum())
    assert found == pytest.approx(100 * right / len(y), abs=1)
    assert 40 < found < 95


@pytest.mark.parametrize(
    "labels", [None, torch.zeros(4), torch.zeros(4, 2, dtype=torch.long), torch.tensor([-100] * 4)]
)
def test_labels_are_needed(labels: Tensor | None) -> None:
    batch = torch.ones(4, 3) if labels is None else (torch.ones(4, 3), labels)
    with pytest.raises(DataError, match="no labels for a probe"):
        linear_probe(nn.Identity(), nn.Identity(), [batch])
    with pytest.raises(DataError, match="too few labels"):
        linear_probe(nn.Identity(), nn.Identity(), [(torch.ones(4, 3), torch.ones(4).long())])
