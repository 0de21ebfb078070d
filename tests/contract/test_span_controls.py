"""Negative controls: a spanning method that breaks a point of the contract fails its check."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from tests.contract import spans
from tests.contract.checks import Case
from tests.contract.spans import case_of

from lamina.errors import FileError
from lamina.forms import Edit, Plain, find_tensor
from lamina.methods.base import Spanning, Stage, spanning


@dataclass(frozen=True)
class Fake:
    """A good method in which single functions can be replaced: by name, a function of it."""

    replaced: Any = field(default_factory=dict, hash=False)
    good: Spanning = field(default_factory=lambda: spanning()["layer_collapse"])
    name: str = "layer_collapse"
    stage: Stage = Stage.SHAPE
    kinds: tuple[str, ...] = ("chain",)
    needs: frozenset[str] = frozenset()
    reference: str = "a fake of the tests"
    final: bool = False
    number: int = 0  # tells two fakes apart in the cache of offers

    def call(self, name, *args):
        if name in self.replaced:
            return self.replaced[name](self.good, *args)
        return getattr(self.good, name)(*args)

    def places(self, sites):
        return self.call("places", sites)

    def refuse(self, site):
        return self.call("refuse", site)

    def propose(self, site, parts):
        return self.call("propose", site, parts)

    def leave(self, site, parts, settings):
        return self.call("leave", site, parts, settings)

    def structure(self, site, settings):
        return self.call("structure", site, settings)

    def apply(self, network, choice, parts):
        return self.call("apply", network, choice, parts)


NUMBERS = iter(range(1, 1000))


def fake(**replaced: Any) -> Fake:
    return Fake(replaced, number=next(NUMBERS))


def mlp() -> Case:
    case = case_of("mlp-modules")
    return replace(case, network=case.entry.network())


def fails(check, *args, match: str | None = None) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=match):
        check(*args)


def changed_by(amount):
    def propose(good, site, parts):
        return tuple(amount(c) for c in good.propose(site, parts))

    return propose


def more_edits(make):
    def apply(good, network, choice, parts):
        return [*good.apply(network, choice, parts), *make(network, choice)]

    return apply


def test_the_fake_itself_passes():
    case, method = mlp(), fake()
    assert isinstance(method, Spanning)
    spans.check_pure(method, case)
    assert spans.check_cost(method, case)
    spans.check_curve(method, case)
    spans.check_touch(method, case)
    spans.check_refusals(method, case)
    spans.check_file(case, *spans.everywhere(method, case))


def test_1_a_propose_that_is_random_or_writes_is_caught():
    noisy = changed_by(lambda c: replace(c, error=c.error + float(torch.rand(()))))
    fails(spans.check_pure, fake(propose=noisy), mlp(), match="random|differ")

    def writes(good, site, parts):
        offers = good.propose(site, parts)
        with torch.no_grad():
            parts.members[0].weights["weight"][0, 0] += 1e-3
        return offers

    fails(spans.check_pure, fake(propose=writes), mlp(), match="network changed|differ")


@pytest.mark.parametrize("what", ["params", "macs", "bits"])
def test_2_a_wrong_cost_is_caught(what):
    def wrong(c):
        value = getattr(c.cost, what)
        value += 1 if what != "bits" else 0.1 * value + 8 * 64 * 8
        return replace(c, cost=replace(c.cost, **{what: value}))

    fails(spans.check_cost, fake(propose=changed_by(wrong)), mlp())


def test_3_wrong_errors_are_caught():
    for wrong in (
        lambda c: replace(c, error=-c.error - 1e-9),
        lambda c: replace(c, error=1.0),
        lambda c: replace(c, error=float("nan")),
        lambda c: replace(c, site="elsewhere"),
    ):
        fails(spans.check_curve, fake(propose=changed_by(wrong)), mlp())


def test_5_touching_something_else_is_caught():
    def neighbour(network, choice):
        free = next(n for n in ("8.bias", "0.bias") if n[0] not in choice.site.members)
        return [Edit(free, "values", values=Plain(find_tensor(network.module, free) + 1))]

    places = lambda good, sites: [s for s in good.places(sites) if len(s.members) == 2]  # noqa: E731
    fails(
        spans.check_touch,
        fake(apply=more_edits(neighbour), places=places),
        mlp(),
        match="changed",
    )

    def at_once(good, network, choice, parts):
        with torch.no_grad():
            network.module.get_submodule(choice.site.members[0]).weight.mul_(2)
        return good.apply(network, choice, parts)

    fails(spans.check_touch, fake(apply=at_once), mlp(), match="itself changes")


def test_6_a_tie_that_is_lost_is_caught():
    case = case_of("gpt-small")
    method = spanning()["layer_fusion"]
    network, edits = spans.everywhere(method, case)
    spans.check_file(case, network, edits)
    apart = [e for e in edits if e.form != "tie"]
    with pytest.raises(FileError, match="the file lacks it"):
        spans.check_file(case, network, apart)
    untied = case.entry.build().eval()
    untied.head.weight = torch.nn.Parameter(untied.head.weight.detach().clone())
    entry = replace(case.entry, build=lambda: untied)
    with pytest.raises(FileError, match=r"head\.weight"):
        spans.check_file(replace(case, entry=entry), network, edits)


def test_8_silent_refusals_are_caught():
    fails(spans.check_refusals, fake(refuse=lambda good, site: "no"), mlp(), match="no reason")
    fails(spans.check_refusals, fake(refuse=lambda good, site: ""), mlp())

    def blind(good, site, parts):
        members = tuple(
            replace(m, weights={k: torch.nan_to_num(t) for k, t in m.weights.items()})
            for m in parts.members
        )
        return good.propose(site, replace(parts, members=members))

    fails(spans.check_refusals, fake(propose=blind), mlp())
