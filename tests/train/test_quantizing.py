"""The training loop: it learns, masks go where they are sent, and nothing is left behind."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from tests.train.quantizable import make_data, make_network

from lamina.data import Data
from lamina.errors import DataError, MethodError
from lamina.measure.quality import evaluate
from lamina.methods.two_four import in_fours
from lamina.network.discover import discover
from lamina.recipes.transformer import backbone
from lamina.train.dropout import Dropout
from lamina.train.quantized import QuantizedNetwork
from lamina.train.quantizing import Tuning, tune, zeros_at

QUICK = Tuning(epochs=3, lr=3e-3, dropout=None)


def make_net() -> QuantizedNetwork:
    network = make_network()
    return QuantizedNetwork(network.module, backbone(discover(network)))


def test_it_learns_and_is_repeatable() -> None:
    data = make_data()
    runs = []
    for _ in range(2):
        net = make_net()
        before = torch.get_rng_state()
        history = tune(net, None, data, QUICK, "logits")
        assert torch.equal(torch.get_rng_state(), before)
        assert not net.training
        runs.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert evaluate(net, data.validation, "accuracy") > 80
    other = make_net()
    tune(other, None, data, replace(QUICK, seed=1), "logits")
    assert any(not torch.equal(a, b) for a, b in zip(runs[0], other.parameters(), strict=True))


def test_without_labels_the_teacher_is_all() -> None:
    teacher = make_net()
    tune(teacher, None, make_data(), QUICK, "logits")
    student, data = make_net(), make_data(labels=False)
    with pytest.raises(DataError, match="no labels, and there is no teacher"):
        tune(student, None, data, QUICK, "logits")
    held = {k: v.clone() for k, v in teacher.state_dict().items()}
    tune(student, teacher, data, replace(QUICK, hidden=0.1), "logits")
    assert evaluate(student, make_data().validation, "accuracy") > 75
    assert all(torch.equal(v, held[k]) for k, v in teacher.state_dict().items())
    for module in (*teacher.modules(), *student.modules()):
        assert not module._forward_hooks


@pytest.mark.parametrize("masks", ["static", "gradual", "sr-ste"])
def test_every_schedule_ends_at_two_of_four(masks: str) -> None:
    net = make_net()
    if masks == "static":
        net.prune()
    first = [w.latent.detach().clone() for w in net.weights]
    tune(net, None, make_data(), replace(QUICK, masks=masks), "logits", sparse=True)
    for weight, latent in zip(net.weights, first, strict=True):
        four = in_fours(weight.site, weight.mask).reshape(-1, 4)
        assert bool((four.sum(1) == 2).all())
        assert weight.regrow == 0
        pruned = weight.mask == 0
        moved = not torch.equal(weight.latent.detach()[pruned], latent[pruned])
        assert moved == (masks != "static")


def test_the_cubic_ramp() -> None:
    zeros = [zeros_at(i / 20) for i in range(21)]
    assert zeros[0] == 0
    assert zeros[-1] == 2
    gains = [b - a for a, b in pairwise(zeros)]
    assert all(a >= b >= 0 for a, b in pairwise(gains))
    assert zeros_at(0.5) == 2 * (1 - 0.5**3)


def test_dropout_is_scheduled_and_restored() -> None:
    net, rates = make_net(), []
    drop = net.body.layers[0].drop
    drop.register_forward_pre_hook(lambda m, _: rates.append(m.p))
    tune(net, None, make_data(), replace(QUICK, dropout=Dropout("linear", 0.2, 0.0)), "logits")
    assert rates[0] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates))
    assert drop.p == 0.1


def test_ranges_have_a_group_of_their_own() -> None:
    from lamina.train.pact import InputQuantizer

    net = make_net()
    quantizer = InputQuantizer("asymmetric", 4, 2.0, -2.0)
    net.round_inputs([(["layers.0.fc1"], quantizer)])
    settings = replace(QUICK, epochs=1 / 12, range_lr=0.01, lr=1e-9, decay=0.5, norm=0.0)
    tune(net, None, make_data(), settings, "logits")
    # Adam's first step is the rate itself; nothing decays it towards zero.
    assert abs(float(quantizer.high.detach()) - 2.0) == pytest.approx(0.01, rel=1e-3)
    assert abs(float(quantizer.low.detach()) + 2.0) == pytest.approx(0.01, rel=1e-3)


def test_half_precision_trains() -> None:
    net, data = make_net(), make_data()
    net.prune()
    net.quantize(4, "statistics", False, True)
    tune(net, None, data, replace(QUICK, half=True), "logits")
    assert evaluate(net, data.validation, "accuracy") > 75
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="needs training data"):
        tune(make_net(), None, Data(), QUICK)
    net = make_net()
    next(net.weights[0].parameters()).data.fill_(torch.nan)
    with pytest.raises(DataError, match="not finite"):
        tune(net, None, make_data(), QUICK, "logits")
    for settings in ({"epochs": 0.0}, {"lr": -1.0}, {"masks": "none"}, {"distill": 1.5},
                     {"decay": -1.0}, {"ramp": 2.0}):  # fmt: skip
        with pytest.raises(MethodError, match=next(iter(settings))):
            Tuning(**settings)
    assert copy.deepcopy(QUICK) == QUICK
