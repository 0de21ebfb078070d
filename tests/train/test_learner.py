"""One learner: what a batch adds to the gradient, and which bits it asks to be saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.train.small import edit_all, edit_grids, make_batches, make_data, make_network, to_grid
from torch import nn

from lamina.data import Data
from lamina.errors import BudgetError
from lamina.measure.forward import Batch
from lamina.network.source import Network
from lamina.plan.apply import Edited
from lamina.train import Recovery, recover
from lamina.train.learner import Learner

CPU = torch.device("cpu")


def plain_parts() -> tuple[Network, Edited]:
    network = make_network(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 3)))
    return network, edit_grids(network, 0.1)


def gradients(learner: Learner) -> list[torch.Tensor]:
    return [p.grad.clone() for p in learner.parameters if p.grad is not None]


def test_parts_of_a_batch_add_up_to_its_gradient() -> None:
    network, edited = plain_parts()
    x, y = make_batches()[0]
    whole, parts = (Learner(network, edited, Recovery(), True, CPU) for _ in range(2))
    loss = whole.learn(Batch((x,), {}, y, 32), 1.0, 1e-6)
    sums = [parts.learn(Batch((x[a:b],), {}, y[a:b], b - a), (b - a) / 32, p)
            for a, b, p in ((0, 20, 1e-6), (20, 32, None))]  # fmt: skip
    assert sum(sums) == pytest.approx(loss, rel=1e-5)
    for a, b in zip(gradients(whole), gradients(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_accumulated_batches_are_one_larger_batch() -> None:
    network, edited = plain_parts()
    twice = [(torch.cat([a, c]), torch.cat([b, d])) for (a, b), (c, d) in
             zip(make_batches()[::2], make_batches()[1::2], strict=True)]  # fmt: skip
    settings = Recovery(epochs=4, lr=2e-3, rate=False)
    one = recover(network, edited, Data(train=twice), settings)
    two = recover(network, edited, make_data(), replace(settings, accumulate=2))
    assert one.steps == two.steps == 24
    for a, b in zip(one.history, two.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
    x = torch.cat([x for x, _ in make_batches()])
    ours, theirs = (Network(m.edited.model).forward(x) for m in (one, two))
    assert float((ours - theirs).abs().mean()) < 0.02 * float(ours.abs().mean())


def test_an_odd_number_of_batches_makes_whole_steps() -> None:
    network, edited = plain_parts()
    made = recover(network, edited, make_data(), Recovery(epochs=1, accumulate=5))
    assert made.steps == 3  # of 12 batches; the last one goes on into the next epoch


def test_a_clipped_gradient_moves_sgd_less() -> None:
    network, edited = plain_parts()
    bare = Edited(edited.network, ())
    settings = Recovery(epochs=1, optimizer="sgd", lr=0.5, rate=False)

    def moved(recovery: Recovery) -> float:
        made = recover(network, bare, make_data(), recovery).edited.model
        new, old = made.parameters(), edited.model.parameters()
        return sum(float((a - b).detach().norm()) for a, b in zip(new, old, strict=True))

    assert moved(replace(settings, clip=1e-3)) < 0.1 * moved(settings)
    assert moved(replace(settings, clip=1e6)) == moved(settings)


class Words(nn.Module):
    """Tokens to one vector; `tied`: the head is the table itself."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.head = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_no_text_uses_keep_their_bits(tied: bool) -> None:
    network = Network(Words(tied).eval(), (torch.zeros(1, 3, dtype=torch.long),), loss="logits")
    names = ["table.weight"] if tied else ["table.weight", "head.weight"]
    named = dict(network.module.named_parameters())
    edited = edit_all(network, {name: to_grid(named[name], 0.2) for name in names})
    learner = Learner(network, edited, Recovery(), True, CPU)
    learner.learn(Batch((torch.tensor([[1, 2, 2], [4, 1, 7]]),), {}, None, 2), 0.0, 1.0)
    table = dict(learner.net.held[0].named_parameters())["latent"].grad
    assert table is not None
    touched = table.abs().sum(1) > 0
    assert touched.tolist() == [tied or i in (1, 2, 4, 7) for i in range(12)]
    if not tied:
        head = dict(learner.net.held[1].named_parameters())["latent"].grad
        assert head is not None and bool((head.abs().sum(1) > 0).all())


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("epochs=2", {"epochs": 2.0}),
        ("half=true, clip=1.5,accumulate=4", {"half": True, "clip": 1.5, "accumulate": 4}),
        ("parts=scales,lr=1e-3,rate=False", {"parts": "scales", "lr": 1e-3, "rate": False}),
        ("seed=3", {"seed": 3}),
    ],
)
def test_settings_are_read_from_text(text: str, settings: dict[str, Any]) -> None:
    assert Recovery.parse(text, 7) == Recovery(**({"seed": 7} | settings))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("epoch=2", "epochs, optimizer"),
        ("half=2", "it is bool"),
        ("accumulate=1.5", "it is int"),
        ("accumulate=0", "whole number"),
        ("parts=small", "'all' or 'scales'"),
        ("epochs", "epochs="),
        ("clip=-1", "0 or more"),
    ],
)
def test_settings_that_cannot_be_read_say_why(text: str, why: str) -> None:
    with pytest.raises(BudgetError, match=why):
        Recovery.parse(text)


@pytest.mark.parametrize(
    ("labels", "settings", "loss", "noisy"),
    [
        (True, {}, "logits", True),
        (False, {}, "logits", False),
        (True, {"distill": 1.0}, "logits", False),
        (True, {"parts": "scales"}, "logits", False),
        (True, {}, "features", False),
    ],
)
def test_dropout_is_for_labels(
    labels: bool, settings: dict[str, Any], loss: str, noisy: bool
) -> None:
    """What the original says is drowned by it: two looks at one batch must agree."""
    module = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
    network = replace(make_network(module), loss=loss)
    learner = Learner(network, edit_grids(network, 0.1), Recovery(**settings), False, CPU)
    x, y = make_batches()[0]
    batch = Batch((x,), {}, y if labels else None, 32)
    losses = {learner.learn(batch, 1.0, None) for _ in range(3)}
    assert (len(losses) > 1) is noisy
