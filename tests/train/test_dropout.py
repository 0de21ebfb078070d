"""Scheduled dropout: the curve, every place a rate lives, and that all is put back."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lamina.errors import MethodError
from lamina.train.dropout import SCHEDULES, Dropout, dropout_follows


class Functional(nn.Module):
    """Dropout as a module, as a function of an attribute, and as one of a config's."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.off = nn.Dropout(0.3), nn.Dropout(0.0)
        self.attention_dropout = 0.2
        self.config = SimpleNamespace(hidden_dropout_prob=0.4, hidden_size=8, layer_dropout=0.0)
        self.p = 0.5  # somebody's own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.drop(x), self.attention_dropout, self.training)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_curve_is_monotone_between_its_ends(schedule: str) -> None:
    dropout = Dropout(schedule, 0.2, 0.05)
    rates = [dropout.at(i / 50) for i in range(51)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.2 if schedule == "constant" else 0.05)
    assert all(a >= b - 1e-12 for a, b in pairwise(rates))
    assert dropout.at(-1.0) == rates[0]
    assert dropout.at(7.0) == rates[-1]
    if schedule == "cosine":  # flat at the ends
        assert rates[0] - rates[1] < (rates[24] - rates[25]) / 5


def test_every_rate_follows_and_is_restored() -> None:
    net = Functional()
    rates: list[float] = []
    with dropout_follows(net, Dropout("linear", 0.6, 0.0)) as follow:
        follow(0.5)
        assert net.drop.p == net.attention_dropout == net.config.hidden_dropout_prob == 0.3
        assert net.off.p == net.config.layer_dropout == 0.0
        assert net.p == 0.5
        for share in (0.0, 1.0):
            follow(share)
            torch.manual_seed(0)
            rates.append(float((net(torch.ones(20_000)) == 0).float().mean()))
    assert rates[0] == pytest.approx(1 - 0.4**2, abs=0.02)
    assert rates[1] == 0.0
    with pytest.raises(KeyError), dropout_follows(net, Dropout("cosine", 0.9, 0.1)) as follow:
        follow(0.0)
        raise KeyError
    assert (net.drop.p, net.attention_dropout, net.config.hidden_dropout_prob) == (0.3, 0.2, 0.4)


def test_attention_of_a_transformer_follows() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.5,
    )  # fmt: skip
    net = transformers.BertModel(config).train()
    ids = torch.randint(0, 20, (2, 6))

    def spread() -> float:
        outs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            outs.append(net(ids).last_hidden_state.detach())
        return float((outs[0] - outs[1]).abs().max())

    assert spread() > 0
    with dropout_follows(net, Dropout("linear", 0.1, 0.0)) as follow:
        follow(1.0)
        assert spread() == 0
    assert spread() > 0


def test_bad_settings_are_named() -> None:
    with pytest.raises(MethodError, match="constant, linear, cosine"):
        Dropout("step")
    for rates in ({"first": 1.0}, {"last": -0.1}):
        with pytest.raises(MethodError, match="0 to under 1"):
            Dropout("linear", **rates)
