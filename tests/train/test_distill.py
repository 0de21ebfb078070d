from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamina.errors import DataError
from lamina.train.distill import Hidden, distillation_loss


def softened(ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> float:
    """T^2 KL(theirs || ours), row by row in Python's own floats, averaged."""
    total = 0.0
    rows = zip(
        ours.reshape(-1, ours.shape[-1]).tolist(),
        theirs.reshape(-1, theirs.shape[-1]).tolist(),
        strict=True,
    )
    for a, b in rows:
        za = sum(math.exp(v / temperature) for v in a)
        zb = sum(math.exp(v / temperature) for v in b)
        for x, y in zip(a, b, strict=True):
            p = math.exp(y / temperature) / zb
            total += p * (math.log(p) - math.log(math.exp(x / temperature) / za))
    return temperature**2 * total * ours.shape[-1] / ours.numel()


OURS, THEIRS = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).unbind()
LABELS = torch.tensor([0, 3, 1, 1, 2, 0])


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_closed_form_of_logits(temperature: float) -> None:
    soft = softened(OURS, THEIRS, temperature)
    hard = -sum(float(OURS.log_softmax(-1)[i, k]) for i, k in enumerate(LABELS.tolist())) / 6
    for weight in (0.0, 0.7, 1.0):
        got = distillation_loss(
            OURS, THEIRS, LABELS, "auto", weight=weight, temperature=temperature
        )
        assert float(got) == pytest.approx(weight * soft + (1 - weight) * hard, rel=1e-5)
    got = distillation_loss(OURS, THEIRS, None, "logits", weight=0.3, temperature=temperature)
    assert float(got) == pytest.approx(soft, rel=1e-5)  # without labels it is all


def test_nothing_is_left_to_learn_from_oneself() -> None:
    for kind in ("logits", "features"):
        assert float(distillation_loss(OURS, OURS, None, kind)) == pytest.approx(0, abs=1e-6)
        assert float(distillation_loss(OURS, THEIRS, None, kind)) > 0.01


def test_closed_form_of_features() -> None:
    wanted = (OURS - THEIRS).square().sum() / THEIRS.square().sum()
    for labels in (None, torch.randn(6), torch.randn(6, 4)):
        got = distillation_loss(OURS, THEIRS, labels, "auto")
        assert float(got) == pytest.approx(float(wanted), rel=1e-5)
    got = distillation_loss(OURS, THEIRS, LABELS, "features")
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)
    assert float(distillation_loss(OURS, 0 * THEIRS, None, "features")) < float("inf")


def test_outputs_with_logits_are_logits() -> None:
    ours, theirs = SimpleNamespace(logits=OURS), SimpleNamespace(logits=THEIRS)
    got = distillation_loss(ours, theirs, None, "auto")
    assert float(got) == pytest.approx(softened(OURS, THEIRS, 2.0), rel=1e-5)


def test_tokens_are_averaged_and_ignored_labels_left_out() -> None:
    ours, theirs = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    labels = torch.randint(0, 7, (2, 3, 5))
    got = distillation_loss(ours[0], theirs[0], labels[0], "auto", weight=0.5)
    hard = F.cross_entropy(ours[0].reshape(15, 7), labels[0].reshape(15))
    wanted = 0.5 * softened(ours[0], theirs[0], 2.0) + 0.5 * float(hard)
    assert float(got) == pytest.approx(wanted, rel=1e-5)
    ignored = torch.full_like(labels[0], -100)
    got = distillation_loss(ours[0], theirs[0], ignored, "logits", weight=0.0)
    assert float(got) == pytest.approx(softened(ours[0], theirs[0], 2.0), rel=1e-5)


def test_labels_that_are_the_tokens_mean_the_next_one() -> None:
    ours, theirs = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    tokens = torch.randint(0, 7, (3, 5))
    got = distillation_loss(ours, theirs, tokens, "logits", weight=0.0, tokens=tokens)
    wanted = F.cross_entropy(ours[:, :-1].reshape(12, 7), tokens[:, 1:].reshape(12))
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)
    shifted = (tokens + 1) % 7  # labels of their own are where they belong
    got = distillation_loss(ours, theirs, shifted, "logits", weight=0.0, tokens=tokens)
    wanted = F.cross_entropy(ours.reshape(15, 7), shifted.reshape(15))
    assert float(got) == pytest.approx(float(wanted), rel=1e-5)


def test_padding_teaches_nothing() -> None:
    ours, theirs = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    got = distillation_loss(ours, theirs, None, "logits", mask=mask)
    wanted = softened(ours[mask.bool()], theirs[mask.bool()], 2.0)
    assert float(got) == pytest.approx(wanted, rel=1e-5)


def test_maps_have_their_classes_in_dimension_1() -> None:
    ours, theirs = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    labels = torch.randint(0, 4, (2, 3, 5), dtype=torch.int32)
    got = distillation_loss(ours, theirs, labels, "auto", weight=0.4)
    soft = softened(ours.movedim(1, -1), theirs.movedim(1, -1), 2.0)
    wanted = 0.4 * soft + 0.6 * float(F.cross_entropy(ours, labels.long()))
    assert float(got) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("bad", [4, -1])
def test_a_label_that_is_no_class_is_named(bad: int) -> None:
    labels = LABELS.clone()
    labels[2] = bad
    with pytest.raises(DataError, match="it has 4 classes"):
        distillation_loss(OURS, THEIRS, labels, "logits")


def test_half_precision_is_compared_in_full() -> None:
    got = distillation_loss(OURS.bfloat16(), THEIRS.bfloat16(), LABELS, "logits")
    assert got.dtype == torch.float32


def test_hidden_outputs_are_compared_by_name_and_shape() -> None:
    teacher = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(2, 2))
    student = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(5, 2))
    hidden = Hidden(teacher, student)
    x = torch.randn(6, 3)
    teacher(x), student(x)
    a, b = student[0](x), teacher[0](x)
    first = (a - b).square().mean() / b.square().mean()
    hidden.ours.clear(), hidden.theirs.clear()
    c, d = student(x), teacher(x)
    last = (c - d).square().mean() / d.square().mean()
    loss = hidden.loss()
    assert torch.allclose(loss, (first + last) / 2)
    loss.backward()
    assert student[0].weight.grad.abs().sum() > 0
    assert float(hidden.loss()) == 0.0  # nothing is kept from the batch before
