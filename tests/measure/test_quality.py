"""Metrics and fidelity against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.errors import DataError
from lamina.measure.quality import evaluate, fidelity, metric_named

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 3.0], [1.0, 0.0, 0.5]])
LABELS = torch.tensor([0, 1, 2, 2])


def test_accuracy_is_in_points() -> None:
    assert evaluate(nn.Identity(), [(LOGITS, LABELS)]) == 75.0


def test_loss_and_perplexity() -> None:
    batches = [(LOGITS[:3], LABELS[:3]), (LOGITS[3:], LABELS[3:])]
    expected = float(F.cross_entropy(LOGITS, LABELS))
    assert evaluate(nn.Identity(), batches, "loss") == pytest.approx(expected)
    assert evaluate(nn.Identity(), batches, "perplexity") == pytest.approx(math.exp(expected))


class Tokens(nn.Module):
    """Predicts that every token is followed by the next number."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return 10 * F.one_hot((input_ids + 1) % 7, 7).float()


def test_labels_of_a_causal_language_model_are_shifted() -> None:
    ids = torch.tensor([[0, 1, 2, 3]])
    batch = {"input_ids": ids, "labels": ids}
    assert evaluate(Tokens(), [batch]) == 100.0
    ignored = {"input_ids": ids, "labels": torch.tensor([[-100, -100, 2, 3]])}
    assert evaluate(Tokens(), [ignored]) == 100.0


def test_a_metric_of_ones_own() -> None:
    seen = []

    def training(module: nn.Module, loader: object) -> float:
        seen.append(module.training)
        return 42.0

    net = nn.Linear(2, 2).train()
    assert evaluate(net, [torch.zeros(1, 2)], training) == 42.0
    assert seen == [False] and net.training
    assert metric_named(training).name == "training"


@pytest.mark.parametrize(
    "metric, match",
    [
        (lambda m, l: float("nan"), "lambda.*nan"),
        (lambda m, l: "good", "lambda.*str"),
        ("acuracy", "accuracy, loss"),
        ("agreement", "original"),
    ],
)
def test_metrics_that_mean_nothing(metric: object, match: str) -> None:
    with pytest.raises(DataError, match=match):
        evaluate(nn.Identity(), [(LOGITS, LABELS)], metric)  # type: ignore[arg-type]


def test_labels_are_needed_and_must_fit() -> None:
    with pytest.raises(DataError, match="no labels"):
        evaluate(nn.Identity(), [LOGITS])
    with pytest.raises(DataError, match="do not fit"):
        evaluate(nn.Identity(), [(LOGITS, LABELS + 7)])


class Plus(nn.Module):
    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return x + self.change


def test_fidelity_by_hand() -> None:
    change = torch.tensor([0.0, 0.0, 1.5])
    one = fidelity(nn.Identity(), Plus(change), [LOGITS[:1], LOGITS[1:]], loss="logits")
    p, q = LOGITS.softmax(1), (LOGITS + change).softmax(1)
    assert one.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert one.agreement == 50.0
    cosine = F.cosine_similarity(LOGITS, LOGITS + change).mean()
    assert one.cosine == pytest.approx(float(cosine), rel=1e-6)
    power = float(LOGITS.square().sum()) / (4 * 1.5**2)
    assert one.sqnr_db == pytest.approx(10 * math.log10(power))
    assert (one.samples, one.predictions) == (4, 1.0)


def test_features_are_compared_by_distance() -> None:
    found = fidelity(nn.Identity(), Plus(torch.tensor([0.0, 2.0, 0.0])), [LOGITS])
    assert (found.loss, found.kl) == ("features", 2.0)


def test_equal_networks() -> None:
    found = fidelity(nn.Identity(), nn.Identity(), iter([LOGITS]))
    assert (found.agreement, found.kl, found.cosine, found.sqnr_db) == (100.0, 0.0, 1.0, 300.0)


def test_outputs_of_different_shape() -> None:
    with pytest.raises(DataError, match="differ in shape"):
        fidelity(nn.Identity(), nn.Linear(3, 2), [LOGITS])


class Padded(nn.Module):
    """Gives what it is given; what lies where nothing counts must not matter."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return x


def padded(tokens: Tensor, far: float) -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    return torch.where(mask[..., None] == 1, tokens, torch.full_like(tokens, far)), mask


class Moved(nn.Module):
    """Changes tokens that count a little, and padding a lot."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        kept = attention_mask[..., None] == 1
        return torch.where(kept, x + torch.tensor([0.0, 0.5, 0.0]), -7 * x)


def test_padding_does_not_count() -> None:
    tokens = torch.tensor([[[2.0, 0, 0], [0, 2, 0], [1, 1, 1]], [[0, 0, 2], [1, 1, 1], [1, 1, 1]]])
    found = []
    for far in (1.0, 50.0):
        x, mask = padded(tokens, far)
        batch = {"x": x, "attention_mask": mask}
        found.append(
            [evaluate(Moved(), [batch], name, original=Padded())
             for name in ("cosine", "embedding", "agreement", "sqnr")]
        )  # fmt: skip
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[0][2] == 100.0
    # two samples by hand: the means over tokens that count, and their cosines
    a, b = (torch.tensor(v) for v in ([[1.0, 1, 0], [0, 0, 2]], [[1.0, 1.5, 0], [0, 0.5, 2]]))
    assert found[0][1] == pytest.approx(float(F.cosine_similarity(a, b).mean()), abs=1e-6)


def test_cosine_of_tokens_that_count_by_hand() -> None:
    x, mask = padded(torch.ones(2, 3, 3), 9.0)
    batch = {"x": x, "attention_mask": mask}
    same = torch.tensor([1.0, 1.5, 1.0])
    wanted = float(F.cosine_similarity(torch.ones(3), same, dim=0))
    assert evaluate(Moved(), [batch], "cosine", original=Padded()) == pytest.approx(wanted)
