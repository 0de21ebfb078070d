"""The nine points for methods that span layers, and small networks with chains and families.

As `checks`, which holds methods of single layers to them: everything is carried out here, by the
protocol alone, so that a mistake in the planner does not hide one in a method.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from tests.contract.checks import (
    Case,
    bits,
    carry,
    flags_of,
    listen,
    loss_increase,
    state_of,
    ties_of,
)
from tests.contract.models import Entry
from torch import nn

from lamina.artifact import pack, restore, unpack
from lamina.errors import SiteError
from lamina.forms import Edit, install
from lamina.measure.calibrate import calibrate
from lamina.measure.cost import measured_macs, measured_params
from lamina.measure.stats import Stats
from lamina.methods.base import Candidate, Choice, Leaf, Parts, Spanning, get_method, weights_of
from lamina.network.discover import discover
from lamina.network.sites import Site
from lamina.network.source import Network
from lamina.plan.apply import settle
from lamina.plan.spans import parts_of
from lamina.zoo.gpt import GPT
from lamina.zoo.mixer import Mixer
from lamina.zoo.vit import ViT

SAMPLES = 96  # of calibration
MOST = 4  # places of a network that are looked at
FLOOR = 1e-5  # nats: measured increases below are rounding noise of the forward pass


class Conv(nn.Module):
    """Stages of convolutions with BatchNorm, a depthwise one, and 1x1 layers; all in modules."""

    def __init__(self) -> None:
        super().__init__()

        def normed(a: int, b: int, kernel: int, groups: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(a, b, kernel, padding=kernel // 2, groups=groups, bias=False)
            return [conv, nn.BatchNorm2d(b), nn.ReLU()]

        self.stem = nn.Sequential(*normed(3, 8, 3), *normed(8, 8, 3), *normed(8, 8, 3))
        self.narrow = nn.Sequential(*normed(8, 32, 1), *normed(32, 8, 1), *normed(8, 8, 3, 8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.narrow(self.stem(x)).mean((2, 3)))


def mlp() -> nn.Module:
    """Activations that are modules; two of the layers are alike."""
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.GELU()]
    layers += [nn.Linear(16, 32), nn.PReLU(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10)]
    return nn.Sequential(*layers)


def gpt() -> nn.Module:
    return lively(GPT(width=16, depth=3, heads=2, vocabulary=40, context=6))


def lively(module: nn.Module) -> nn.Module:
    """Give weights the scale of their inputs, and outputs one at which predictions differ."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
        if isinstance(part, nn.LayerNorm):
            last = part
    with torch.no_grad():
        last.weight.mul_(3.0)
    return module


NETWORKS = {
    entry.name: entry
    for entry in (
        Entry("mlp-modules", mlp, (16,)),
        Entry("vit-small", lambda: lively(ViT(width=16, depth=3, heads=2)), (1, 28, 28)),
        Entry("mixer-small", lambda: lively(Mixer(width=16, depth=2)), (1, 28, 28)),
        Entry("conv-norm", Conv, (3, 8, 8)),
        Entry("gpt-small", gpt, (6,), tokens=40),
    )
}


@cache
def case_of(name: str) -> Case:
    entry = NETWORKS[name]
    network = entry.network()
    sites = discover(network)
    stats = calibrate(network, sites, [entry.inputs(SAMPLES)], samples=SAMPLES)
    return Case(entry, network, sites, stats, network.digest())


def places_of(method: Spanning, case: Case) -> list[Site]:
    """A few of the places that a method takes, the longest among them."""
    taken = [s for s in method.places(case.sites) if s.kind in method.kinds]
    taken = [site for site in taken if not method.refuse(site)]
    taken.sort(key=lambda site: -len(site.members))
    return taken if len(taken) <= MOST else [*taken[:1], *taken[1 :: len(taken) // (MOST - 1)]]


def parts_at(case: Case, site: Site, data_free: bool = False) -> Parts:
    return parts_of(case.network, case.sites, Stats() if data_free else case.stats, site)


@cache
def offers_of(method: Spanning, name: str, site: str, data_free: bool) -> tuple[Candidate, ...]:
    case = case_of(name)
    place = next(s for s in method.places(case.sites) if s.name == site)
    offers = method.propose(place, parts_at(case, place, data_free))
    return tuple(sorted(offers, key=lambda c: (c.cost.bits, c.cost.params, c.cost.macs)))


def served(method: Spanning, case: Case) -> list[tuple[Site, tuple[Candidate, ...]]]:
    found = [
        (s, offers_of(method, case.entry.name, s.name, False)) for s in places_of(method, case)
    ]
    return [(site, offers) for site, offers in found if offers]


def ends(offers: Sequence[Candidate]) -> list[Candidate]:
    return [offers[i] for i in sorted({0, len(offers) // 2, len(offers) - 1})]


def carry_span(network: Network, site: Site, method: Spanning, settings, parts) -> list[Edit]:
    """Carry out one step on `network`, in place; what it leaves is kept as it is."""
    leaves = method.leave(site, parts, settings)
    edits = list(method.apply(network, Choice(site, settings), parts))
    install(network.module, edits)
    for leaf in leaves:
        edits += carry(network, leaf.site, get_method("keep"), {}, leaf.stats)
    return settle(edits)


def mine(case: Case, site: Site, edits: Sequence[Edit]) -> tuple[set[str], list[str]]:
    """Names of the tensors a span may change or drop, and the paths it may replace."""
    layers = [case.sites[name] for name in site.members]
    paths = [layer.module for layer in layers]
    paths += [path for between in site.through for path in between if path]
    blocks = [e.path for e in edits if e.form == "identity" and e.path not in paths]
    for path in blocks:  # a whole block that does not run any more
        assert any(layer.module.startswith(f"{path}.") for layer in layers), f"{path} is replaced"
    paths += blocks
    names = {name for layer in layers for name in (layer.weight, layer.bias) if name}
    names |= {n for n in state_of(case.network.module) if any(n.startswith(f"{p}.") for p in paths)}
    return names, paths


# --- 1 to 3 ---------------------------------------------------------------------------------------


def check_pure(method: Spanning, case: Case) -> None:
    for site in places_of(method, case)[:2]:
        parts, runs = parts_at(case, site), []
        held = [bits(t) for m in parts.members for t in (m.stats.H, m.stats.G)]
        held += [bits(c.moment) for c in parts.cross if c is not None]
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            runs.append(list(method.propose(site, parts)))
            assert torch.equal(state, torch.get_rng_state()), "propose draws global random numbers"
        assert runs[0] == runs[1], f"{site.name}: two runs differ"
        again = [bits(t) for m in parts.members for t in (m.stats.H, m.stats.G)]
        again += [bits(c.moment) for c in parts.cross if c is not None]
        assert held == again, f"{site.name}: statistics changed"
    assert case.network.digest() == case.digest, "the network changed"


def check_cost(method: Spanning, case: Case) -> int:
    """Apply some offers of every place, each alone; return how many."""
    inputs, original = case.network.example_inputs, case.network.module
    params, macs = measured_params(original), measured_macs(original, inputs)
    header = unpack(pack(original, (), "module", {})).ledger["header"]
    count = 0
    for site, offers in served(method, case):
        layers = [case.sites[name] for name in site.members]
        dense = sum(t.numel() for s in layers for t in weights_of(case.network, s).values())
        for offer in ends(offers):
            network, where = case.fresh(), f"{site.name} {offer.steps[0]}"
            settings = offer.steps[0].settings
            edits = carry_span(network, site, method, settings, parts_at(case, site))
            names, paths = mine(case, site, edits)
            between = sum(  # norms that have gone with the layers
                p.numel()
                for e in edits
                if e.form == "identity" and e.path not in site.members
                for p in original.get_submodule(e.path).parameters()
            )
            found = measured_params(network.module)
            unique = {id(p): p.numel() for p in network.module.parameters()}
            assert found == sum(unique.values()), "the count itself"
            if not _drops(case, site, edits):
                assert found == params - dense - between + offer.cost.params, f"{where}: parameters"
            wanted = macs - sum(s.macs for s in layers) + offer.cost.macs
            assert measured_macs(network.module, inputs) == pytest.approx(wanted, abs=1e-6), where
            ledger = unpack(pack(network.module, tuple(edits), "module", {})).ledger
            held = sum(
                size
                for name, size in ledger.items()
                if name in names or any(name.startswith(f"{p}.") for p in paths)
            )
            size, claim = held + ledger["header"] - header, offer.cost.bits / 8
            shaped = sum(e.form != "values" for e in edits)
            slack = 0.02 * size + 64 + 64 * shaped
            assert abs(size - claim) <= slack, f"{where}: {claim} bytes, really {size}"
            count += 1
    return count


def _drops(case: Case, site: Site, edits: Sequence[Edit]) -> bool:
    """Whether whole blocks have gone, with what else they hold."""
    inside = {path for between in site.through for path in between} | set(site.members)
    return any(e.form == "identity" and e.path not in inside for e in edits)


def check_curve(method: Spanning, case: Case) -> None:
    for site in places_of(method, case):
        for data_free in (False, True):
            offers = offers_of(method, case.entry.name, site.name, data_free)
            where = f"{site.name}{' (data-free)' if data_free else ''}"
            for offer in offers:
                (step,), cost = offer.steps, offer.cost
                assert (offer.site, step.at, step.method) == (site.name, site.name, method.name)
                assert 0 <= offer.error < float("inf"), f"{where}: {offer.error}"
                assert min(cost.params, cost.bits, cost.macs, cost.seconds) >= 0, where
            for a in offers:
                for b in offers:
                    if a is b:
                        continue
                    less = a.cost.bits <= b.cost.bits and a.cost.macs <= b.cost.macs
                    less = less and a.cost.params <= b.cost.params
                    assert not (less and a.error <= b.error), f"{where}: {b.steps[0]} for nothing"


# --- 4 --------------------------------------------------------------------------------------------


def predicted_and_measured(method: Spanning, case: Case) -> list[tuple[float, float]]:
    """Predicted and measured loss increase of single offers, above the floor."""
    pairs, inputs = [], case.entry.inputs(SAMPLES)
    for site, offers in served(method, case):
        for offer in ends(offers):
            network = case.fresh()
            carry_span(network, site, method, offer.steps[0].settings, parts_at(case, site))
            measured = loss_increase(case, network.module, inputs)
            if measured > FLOOR and offer.error > 0:
                pairs.append((offer.error, measured))
    return pairs


# --- 5 --------------------------------------------------------------------------------------------


def check_touch(method: Spanning, case: Case) -> None:
    for site, offers in served(method, case)[:2]:
        settings, parts = offers[len(offers) // 2].steps[0].settings, parts_at(case, site)
        network = case.fresh()
        last = network.module.get_submodule(site.members[-1])
        called = listen(last)
        for i, module in enumerate(network.module.modules()):
            module.training = i % 2 == 0
        for i, p in enumerate(network.module.parameters()):
            p.requires_grad_(i % 2 == 0)
        for name in site.members:
            network.module.get_submodule(name).requires_grad_(False)
        before, flags, ties = state_of(network.module), flags_of(network.module), ties_of(network)
        needed = {n: p.requires_grad for n, p in network.module.named_parameters()}

        method.apply(network, Choice(site, settings), parts)
        assert state_of(network.module) == before, f"{site.name}: apply itself changes the network"
        edits = carry_span(network, site, method, settings, parts)

        after = state_of(network.module)
        names, paths = mine(case, site, edits)
        for name in set(before) - names:
            assert after.get(name) == before[name], f"{site.name}: {name} changed"
        for name in set(after) - set(before):
            assert any(name.startswith(f"{p}.") for p in paths), f"{site.name}: {name} appeared"
        kinds = {dtype for dtype, _, _ in before.values()}
        assert {dtype for dtype, _, _ in after.values()} <= kinds, f"{site.name}: a new dtype"
        devices = {p.device for p in network.module.parameters()}
        assert devices == {p.device for p in case.network.module.parameters()}
        for name, flag in flags_of(network.module).items():
            at = name if name in flags else max((p for p in paths if name.startswith(p)), key=len)
            assert flag == flags[at], f"{site.name}: training flag of {name!r}"
        for name, p in network.module.named_parameters():
            inside = any(name.startswith(f"{m}.") for m in site.members)
            assert p.requires_grad == (False if inside else needed[name]), f"{name}: requires_grad"
        kept = [t for t in ties if t <= set(after)]
        assert all(any(t <= now for now in ties_of(network)) for t in kept), "a tie is broken"
        network.module.eval()(*case.network.example_inputs)
        if not _drops(case, site, edits):
            assert called == ["before", "after"], f"{site.name}: hooks ran {called}"
    assert case.network.digest() == case.digest


# --- 6 --------------------------------------------------------------------------------------------


def everywhere(method: Spanning, case: Case) -> tuple[Network, list[Edit]]:
    """The network with the middle offer at every place (of a few) that no other has taken."""
    network, edits, taken = case.fresh(), list[Edit](), set[str]()
    for site, offers in served(method, case):
        if taken.isdisjoint(site.members):
            taken.update(site.members)
            settings = offers[len(offers) // 2].steps[0].settings
            edits += carry_span(network, site, method, settings, parts_at(case, site))
    return network, edits


def check_file(case: Case, network: Network, edits: Sequence[Edit]) -> bytes:
    """Saved and loaded bit for bit, ties kept, and as many parameters as are in the file."""
    file = pack(network.module, tuple(edits), "module", {})
    package = unpack(file)
    assert sum(package.ledger.values()) == len(file)
    with torch.random.fork_rng():
        torch.manual_seed(4321)
        skeletons = [case.entry.build().eval()]
        with torch.device("meta"):
            skeletons.append(case.entry.build().eval())
    inputs = case.entry.inputs(8, seed=5)
    for skeleton in skeletons:
        loaded = restore(package, skeleton)
        assert state_of(loaded) == state_of(network.module), "a tensor differs"
        with torch.no_grad():
            assert bits(loaded(inputs)) == bits(network.module(inputs)), "outputs differ"
        again = Network(loaded, case.network.example_inputs)
        assert ties_of(again) == ties_of(network), "ties differ"
        names = dict(loaded.named_parameters(remove_duplicate=False))
        stored = sum(r.elements for name, r in package.records.items() if name in names)
        assert stored == measured_params(loaded), "the file holds another number of parameters"
    return file


# --- 8 --------------------------------------------------------------------------------------------


def check_refusals(method: Spanning, case: Case) -> None:
    wrong = "family" if "family" not in method.kinds else "chain"
    refused = [Site("fc", module="fc"), Site("a..b", wrong, members=("a", "b"))]
    refused += [s for s in method.places(case.sites) if method.refuse(s)]
    for site in refused:
        why = method.refuse(site)
        assert len(why.split()) >= 3, f"{site.name}: no reason in {why!r}"
        with pytest.raises(SiteError) as caught:
            method.apply(case.fresh(), Choice(site, {}), Parts(()))
        assert site.name in str(caught.value) and why in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)
    for site in places_of(method, case)[:1]:
        parts = parts_at(case, site)
        members = tuple(
            Leaf(m.site, {k: torch.full_like(t, torch.nan) for k, t in m.weights.items()}, m.stats)
            for m in parts.members
        )
        with pytest.raises(SiteError) as caught:
            list(method.propose(site, Parts(members, parts.passages, parts.cross)))
        assert any(name in str(caught.value) for name in (site.name, *site.members))
