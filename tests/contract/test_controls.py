"""Negative controls: a method that breaks one point of the contract fails that point's check."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tests.contract import checks
from tests.contract.checks import Case, case_of
from tests.contract.models import ZOO

from lamina.forms import Edit, Plain, find_tensor
from lamina.measure.stats import LayerStats
from lamina.methods.base import Method, Stage, get_method, weights_of


@dataclass(frozen=True)
class Fake:
    """A good method (kmeans, or another) in which single functions can be replaced.

    replaced: by name, a function of (the good method, its arguments).
    """

    replaced: Any = field(default_factory=dict, hash=False)
    good: Method = field(default_factory=lambda: get_method("kmeans"))
    name: str = "kmeans"
    stage: Stage = Stage.VALUES
    kinds: tuple[str, ...] = ("layer",)
    needs: frozenset[str] = frozenset()
    reference: str = "Han, Mao, Dally 2016, arXiv:1510.00149"
    final: bool = True
    number: int = 0  # tells two fakes apart in the cache of offers

    def call(self, name, *args):
        if name in self.replaced:
            return self.replaced[name](self.good, *args)
        return getattr(self.good, name)(*args)

    def refuse(self, site):
        return self.call("refuse", site)

    def propose(self, site, weights, stats):
        return self.call("propose", site, weights, stats)

    def leave(self, site, weights, stats, settings):
        return self.call("leave", site, weights, stats, settings)

    def structure(self, site, settings):
        return ()

    def apply(self, network, choice, stats):
        return self.call("apply", network, choice, stats)


NUMBERS = iter(range(1, 1000))


def fake(**replaced: Any) -> Fake:
    return Fake(replaced, number=next(NUMBERS))


def mlp() -> Case:
    """A case of its own: some of the fakes damage it."""
    case = case_of("mlp")
    return replace(case, network=case.entry.network())


def fails(check, *args, match: str | None = None) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=match):
        check(*args)


def test_the_fake_itself_passes():
    case, method = mlp(), fake()
    assert isinstance(method, Method)
    checks.check_pure(method, case, case.few)
    checks.check_cost(method, case)
    checks.check_curve(method, case)
    checks.check_touch(method, case)
    checks.check_refusals(method, case)
    checks.check_file(case, *checks.everywhere(method, case))


# --- 1 --------------------------------------------------------------------------------------------


def changed_by(amount):
    """Offers whose error or cost is changed a little."""

    def propose(good, site, weights, stats):
        return tuple(amount(c) for c in good.propose(site, weights, stats))

    return propose


def test_1_a_propose_that_writes_is_caught():
    def propose(good, site, weights, stats):
        offers = good.propose(site, weights, stats)
        weights["weight"].view(-1)[0] += 1e-3
        return offers

    case = mlp()
    fails(checks.check_pure, fake(propose=propose), case, case.few)

    def last(good, site, weights, stats):
        offers = good.propose(site, weights, stats)
        if "bias" in weights:
            weights["bias"].zero_()
        return offers

    case = mlp()
    fails(checks.check_pure, fake(propose=last), case, case.few, match="network changed|differ")


def test_1_a_propose_that_writes_to_the_statistics_is_caught():
    def propose(good, site, weights, stats):
        copied = replace(stats, H=stats.H.clone())
        offers = good.propose(site, weights, copied)
        stats.G[..., 0] *= 1.0000001
        return offers

    case = mlp()
    site = case.sites.layers[0]
    stats = case.stats.of(site.name)
    own: dict[str, LayerStats] = {site.name: replace(stats, G=stats.G.clone())}
    case = replace(case, stats=replace(case.stats, layers=own))
    fails(checks.check_pure, fake(propose=propose), case, [site])


def test_1_a_random_propose_is_caught():
    noisy = changed_by(lambda c: replace(c, error=c.error + float(torch.rand(()))))
    fails(checks.check_pure, fake(propose=noisy), mlp(), mlp().few, match="random|differ")
    count = iter(range(10**6))
    drifting = changed_by(lambda c: replace(c, error=c.error + next(count)))
    fails(checks.check_pure, fake(propose=drifting), mlp(), mlp().few, match="two runs differ")


# --- 2 and 3 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["params", "macs", "bits"])
def test_2_a_wrong_cost_is_caught(what):
    def wrong(c):
        value = getattr(c.cost, what)
        value += 1 if what != "bits" else 0.03 * value + 8 * 65
        return replace(c, cost=replace(c.cost, **{what: value}))

    fails(checks.check_cost, fake(propose=changed_by(wrong)), mlp())


def test_3_wrong_errors_are_caught():
    for wrong in (
        lambda c: replace(c, error=-c.error),
        lambda c: replace(c, error=1.0),
        lambda c: replace(c, error=1 / (c.error + 1e-9)),
        lambda c: replace(c, error=float("nan")),
        lambda c: replace(c, error=float("inf")),
        lambda c: replace(c, site="elsewhere"),
    ):
        fails(checks.check_curve, fake(propose=changed_by(wrong)), mlp())


# --- 4 --------------------------------------------------------------------------------------------


def test_4_predictions_without_sense_are_caught():
    method = get_method("kmeans")
    pairs = checks.predicted_and_measured(method, mlp())
    assert checks.check_ranks(pairs, 0.8) >= 0.8
    measured = [b for _, b in pairs]
    for predicted in ([1 / a for a, _ in pairs], [hash(a) % 97 for a, _ in pairs]):
        fails(checks.check_ranks, list(zip(predicted, measured, strict=True)), 0.8, match="Spear")


def test_4_the_measured_loss_is_what_torch_says():
    """KL by `torch.distributions`, half squared distance by hand; 0 for the network itself."""
    for name in ("mlp", "decoder"):
        case = case_of(name)
        inputs = case.entry.inputs(8)
        other = checks.other_skeleton(case.entry)
        assert checks.loss_increase(case, case.network.module, inputs) == 0
        with torch.no_grad():
            a, b = case.network.module(inputs).double(), other(inputs).double()
        if name == "mlp":
            p, q = (torch.distributions.Categorical(logits=t) for t in (a, b))
            wanted = torch.distributions.kl_divergence(p, q).mean()
        else:
            wanted = ((a - b) ** 2).flatten(1).sum(1).mean() / 2
        assert checks.loss_increase(case, other, inputs) == pytest.approx(float(wanted))


# --- 5 --------------------------------------------------------------------------------------------


def more_edits(make):
    def apply(good, network, choice, stats):
        return [*good.apply(network, choice, stats), *make(network, choice)]

    return apply


def test_5_an_apply_that_touches_its_neighbour_is_caught():
    def neighbour(network, choice):
        other = "fc3.bias" if choice.site.name != "fc3" else "fc1.bias"
        return [Edit(other, "values", values=Plain(find_tensor(network.module, other) + 1))]

    fails(checks.check_touch, fake(apply=more_edits(neighbour)), mlp(), match="changed")


def test_5_an_apply_that_edits_at_once_is_caught():
    def apply(good, network, choice, stats):
        with torch.no_grad():
            find_tensor(network.module, choice.site.weight).mul_(2)
        return good.apply(network, choice, stats)

    fails(checks.check_touch, fake(apply=apply), mlp(), match="itself changes")


@pytest.mark.parametrize("what", ["train", "frozen", "hooks", "dtype", "ties"])
def test_5_what_is_not_kept_is_caught(what, monkeypatch):
    """`install` puts edits in; one that forgets something must show."""
    from lamina.forms import install

    def careless(root, edits):
        edits = list(edits)
        flags = {m: m.training for m in root.modules()}
        install(root, edits)
        for edit in edits:
            module = root.get_submodule(edit.path.rpartition(".")[0])
            if what == "train":
                module.training = not flags[module]
            elif what == "frozen":
                module.weight.requires_grad_(True)
            elif what == "hooks":
                module._forward_hooks.clear()
            elif what == "dtype":
                module.to(torch.float64)
            else:
                module.weight = torch.nn.Parameter(module.weight.detach().clone(), False)

    monkeypatch.setattr(checks, "install", careless)
    fails(checks.check_touch, fake(), case_of("gpt") if what == "ties" else mlp())


# --- 6 --------------------------------------------------------------------------------------------


def test_6_a_file_of_other_values_is_caught():
    case = mlp()
    network, edits = checks.everywhere(get_method("kmeans"), case)
    checks.check_file(case, network, edits)
    with torch.no_grad():
        network.module.fc2.weight[0, 0] *= 1 + 2**-20
    fails(checks.check_file, case, network, edits, match="tensor differs")


# --- 8 --------------------------------------------------------------------------------------------


def test_8_silent_refusals_are_caught():
    case = mlp()
    fails(checks.check_refusals, fake(refuse=lambda good, site: "no"), case, match="no reason")
    fails(checks.check_refusals, fake(refuse=lambda good, site: ""), case, match="chain")

    def quiet(good, network, choice, stats):
        if choice.site.kind == "chain":
            return []
        return good.apply(network, choice, stats)

    fails(checks.check_refusals, fake(apply=quiet), case)

    def nameless(good, network, choice, stats):
        from lamina.errors import SiteError

        raise SiteError("cannot serve this site")

    fails(checks.check_refusals, fake(apply=nameless), case)


def test_8_taking_nonfinite_weights_is_caught():
    def propose(good, site, weights, stats):
        clean = {k: torch.nan_to_num(t) for k, t in weights.items()}
        return good.propose(site, clean, stats)

    fails(checks.check_refusals, fake(propose=propose), mlp())


# --- 9 --------------------------------------------------------------------------------------------


def test_9_an_incomplete_card_is_caught():
    fails(checks.check_card, fake(), match="Negative controls")


# --- the zoo itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ZOO)
def test_the_zoo_is_the_same_every_time_and_not_flat(model):
    case, again = case_of(model), ZOO[model].network()
    assert again.digest() == case.digest
    outputs = case.network.forward(case.entry.inputs(64)).float()
    assert torch.isfinite(outputs).all()
    assert outputs.std(0).mean() > 0.05, "inputs make no difference"
    assert len(case.few) >= 3
    assert all(case.stats.of(site.name) is not None for site in case.sites.layers)
    assert weights_of(case.network, case.few[0])["weight"].dtype == case.entry.dtype
