"""The nine points every method is held to, as functions that raise AssertionError.

They know methods only by the protocol, and carry edits out by themselves (`carry`), so that a
mistake in the planner does not hide one in a method. `test_controls` breaks each point on purpose.
"""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from tests.contract.models import SAMPLES, ZOO, Entry
from torch import nn

from lamina.artifact import pack, records, restore, unpack
from lamina.errors import SiteError
from lamina.forms import Edit, install
from lamina.measure.calibrate import calibrate
from lamina.measure.cost import measured_macs, measured_params
from lamina.measure.stats import Stats
from lamina.methods.base import Candidate, Choice, Method, Stage, get_method, weights_of
from lamina.network.discover import discover
from lamina.network.sites import Site, Sites
from lamina.network.source import Network

FLOOR = 1e-5  # nats: measured increases below are rounding noise of the forward pass
MOST_SITES = 4


@dataclass(frozen=True)
class Case:
    """One network of the zoo, measured once; nobody may change it."""

    entry: Entry
    network: Network
    sites: Sites
    stats: Stats
    digest: str

    @property
    def few(self) -> tuple[Site, ...]:
        """A few sites, of every operation the network has."""
        seen: dict[tuple[str, bool, bool], Site] = {}
        for site in self.sites.layers:
            seen.setdefault((site.op, site.groups > 1, bool(site.rigid)), site)
        rest = [site for site in self.sites.layers if site not in seen.values()]
        chosen = [*seen.values(), *rest][: max(MOST_SITES, len(seen))]
        return tuple(site for site in self.sites.layers if site in chosen)

    def fresh(self) -> Network:
        """A copy to change."""
        return replace(self.network, module=copy.deepcopy(self.network.module))


@cache
def case_of(name: str) -> Case:
    entry = ZOO[name]
    network = entry.network()
    sites = discover(network)
    stats = calibrate(network, sites, [entry.inputs(SAMPLES)], samples=SAMPLES)
    return Case(entry, network, sites, stats, network.digest())


@cache
def offers_of(method: Method, name: str, site_name: str, data_free: bool) -> tuple[Candidate, ...]:
    """What a method offers for a site, cheapest first; empty where it refuses."""
    case = case_of(name)
    site = case.sites[site_name]
    if method.refuse(site):
        return ()
    stats = None if data_free else case.stats.of(site_name)
    offers = method.propose(site, weights_of(case.network, site), stats)
    return tuple(sorted(offers, key=lambda c: (c.cost.bits, c.cost.params)))


def served(method: Method, case: Case) -> list[tuple[Site, tuple[Candidate, ...]]]:
    """The sites (of a few) that a method serves, with its offers."""
    found = [(s, offers_of(method, case.entry.name, s.name, False)) for s in case.few]
    return [(site, offers) for site, offers in found if offers]


def spread(offers: Sequence[Candidate]) -> list[Candidate]:
    """The cheapest, the dearest, and three between: sizes are interpolated there."""
    last = len(offers) - 1
    return [offers[i] for i in sorted({0, last // 4, last // 2, 3 * last // 4, last})]


def carry(network: Network, site: Site, method: Method, settings, stats) -> list[Edit]:
    """Carry out one step on `network`, in place; what it leaves is kept as it is."""
    leaves = () if method.final else method.leave(site, weights_of(network, site), stats, settings)
    edits = method.apply(network, Choice(site, settings), stats)
    install(network.module, edits)
    for leaf in leaves:
        edits = edits + carry(network, leaf.site, get_method("keep"), {}, leaf.stats)
    last = {e.path: e for e in edits if e.form == "values"}
    return [e for e in edits if e.form != "values"] + list(last.values())


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def state_of(module: nn.Module) -> dict[str, tuple]:
    return {n: (t.dtype, tuple(t.shape), bits(t)) for n, t in module.state_dict().items()}


# --- 1. propose is pure and deterministic ---------------------------------------------------------


def check_pure(method: Method, case: Case, sites: Sequence[Site]) -> None:
    for site in sites:
        if method.refuse(site):
            continue
        weights = weights_of(case.network, site)
        stats = case.stats.of(site.name)
        moments = [bits(stats.H), bits(stats.G)]
        runs = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            state = torch.get_rng_state()
            runs.append(list(method.propose(site, weights, stats)))
            assert torch.equal(state, torch.get_rng_state()), "propose draws global random numbers"
        assert runs[0] == runs[1], f"{site.name}: two runs differ"
        assert moments == [bits(stats.H), bits(stats.G)], f"{site.name}: statistics changed"
    assert case.network.digest() == case.digest, "the network changed"


# --- 2. predicted cost is the measured one --------------------------------------------------------


def check_cost(method: Method, case: Case) -> int:
    """Apply some offers of every site, each alone; return how many."""
    inputs = case.network.example_inputs
    params, macs = measured_params(case.network.module), measured_macs(case.network.module, inputs)
    count = 0
    for site, offers in served(method, case):
        dense = sum(t.numel() for t in weights_of(case.network, site).values())
        for offer in spread(offers):
            network, stats = case.fresh(), case.stats.of(site.name)
            edits = carry(network, site, method, offer.steps[0].settings, stats)
            where = f"{site.name} {offer.steps[0]}"
            found = measured_params(network.module)
            assert found == params - dense + offer.cost.params, f"{where}: parameters"
            unique = {id(p): p.numel() for p in network.module.parameters()}
            assert found == sum(unique.values()), "the count itself"
            found = measured_macs(network.module, inputs)
            assert found == pytest.approx(macs - site.macs + offer.cost.macs, abs=1e-6), where
            size = sum(len(records.encode(e.values)) for e in edits if e.values is not None)
            claim = offer.cost.bits / 8
            assert abs(size - claim) <= 0.02 * size + 64, f"{where}: {claim} bytes, really {size}"
            count += 1
    return count


# --- 3. the error falls as the cost rises ---------------------------------------------------------


def check_curve(method: Method, case: Case) -> None:
    for site in case.few:
        for data_free in (False, True):
            offers = offers_of(method, case.entry.name, site.name, data_free)
            where = f"{site.name}{' (data-free)' if data_free else ''}"
            for offer in offers:
                cost = offer.cost
                assert offer.site == site.name and offer.steps[0].at == site.name
                assert offer.steps[0].method == method.name
                assert math.isfinite(offer.error) and offer.error >= 0, f"{where}: {offer.error}"
                assert min(cost.params, cost.bits, cost.macs, cost.seconds) >= 0, where
            for cheap, dear in pairwise(offers):
                assert dear.error < cheap.error, f"{where}: {dear.steps[0]} costs more for nothing"


# --- 4. predicted and measured loss rank alike ----------------------------------------------------


def loss_increase(case: Case, module: nn.Module, inputs: torch.Tensor) -> float:
    """KL from the original's predictions, or half the squared distance [nats / sample]."""
    with torch.no_grad():
        before = case.network.module(inputs).double()
        after = module(inputs).double()
    if case.entry.loss == "features":
        return float((after - before).square().sum()) / 2 / len(inputs)
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    return float((p.exp() * (p - q)).sum()) / len(inputs)


def predicted_and_measured(method: Method, case: Case) -> list[tuple[float, float]]:
    """Predicted and measured loss increase of single edits, above the floor."""
    inputs = case.entry.inputs(SAMPLES)
    pairs = []
    for site, offers in served(method, case):
        for offer in offers[:: max(1, len(offers) // 4)]:
            network = case.fresh()
            carry(network, site, method, offer.steps[0].settings, case.stats.of(site.name))
            measured = loss_increase(case, network.module, inputs)
            if measured > FLOOR and offer.error > 0:
                pairs.append((offer.error, measured))
    return pairs


def check_ranks(pairs: Sequence[tuple[float, float]], floor: float) -> float:
    """Spearman's correlation, from its definition: Pearson's of the ranks."""
    assert len(pairs) >= 8, "too few edits to compare"
    from scipy.stats import rankdata

    a, b = (rankdata(column) for column in zip(*pairs, strict=True))
    rho = float(np.corrcoef(a, b)[0, 1])
    assert rho >= floor, f"Spearman {rho:.3f} of {len(pairs)} edits"
    return rho


# --- 5. apply touches only what the site claims ---------------------------------------------------


def check_touch(method: Method, case: Case) -> None:
    for site, offers in served(method, case)[:2]:
        settings, stats = offers[len(offers) // 2].steps[0].settings, case.stats.of(site.name)
        network = case.fresh()
        called = listen(network.module.get_submodule(site.module))
        for i, module in enumerate(network.module.modules()):
            module.training = i % 2 == 0
        for i, p in enumerate(network.module.parameters()):
            p.requires_grad_(i % 2 == 0)
        weight = dict(network.module.named_parameters(remove_duplicate=False))[site.weight]
        weight.requires_grad_(False)
        before, flags, ties = state_of(network.module), flags_of(network.module), ties_of(network)
        needed = {n: p.requires_grad for n, p in network.module.named_parameters()}

        method.apply(network, Choice(site, settings), stats)
        assert state_of(network.module) == before, f"{site.name}: apply itself changes the network"
        carry(network, site, method, settings, stats)

        after = state_of(network.module)
        inside = (site.module + ".") if site.module else ""
        mine = {site.weight, site.bias, *site.aliases}
        for name in before:
            if name in mine:
                continue
            assert after.get(name) == before[name], f"{site.name}: {name} changed"
        for name in set(after) - set(before):
            assert name.startswith(inside), f"{site.name}: {name} appeared"
        for name in mine & set(after) & set(before):
            assert after[name][:2] == before[name][:2], f"{name}: dtype or shape"
        kinds = {dtype for dtype, _, _ in before.values()} | {torch.int64}  # an index
        assert {dtype for dtype, _, _ in after.values()} <= kinds, f"{site.name}: a new dtype"
        devices = {p.device for p in network.module.parameters()}
        assert devices == {p.device for p in case.network.module.parameters()}
        for name, flag in flags_of(network.module).items():
            at = name if name in flags else site.module
            assert flag == flags[at], f"{site.name}: training flag of {name!r}"
        for name, p in network.module.named_parameters():
            if name in needed:
                assert p.requires_grad == needed[name], f"{name}: requires_grad"
            elif name.endswith("weight"):
                assert not p.requires_grad, f"{name}: was frozen"
        assert ties_of(network) >= {t for t in ties if t <= set(after)}, "a tie is broken"
        network.module.eval()(*case.network.example_inputs)
        if not site.rigid and site.op != "recurrent" and not site.aliases:
            assert called == ["before", "after"], f"{site.name}: hooks ran {called}"
    assert case.network.digest() == case.digest


def listen(module: nn.Module) -> list[str]:
    """Register hooks; return the list they write to."""
    called: list[str] = []
    module.register_forward_pre_hook(lambda *_: called.append("before"))
    module.register_forward_hook(lambda *_: called.append("after"))
    return called


def flags_of(module: nn.Module) -> dict[str, bool]:
    return {name: m.training for name, m in module.named_modules()}


def ties_of(network: Network) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, p in network.module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


# --- 6. save and load are bit-exact ---------------------------------------------------------------


def everywhere(method: Method, case: Case) -> tuple[Network, list[Edit]]:
    """The network with the middle offer at every site that the method serves."""
    network, edits = case.fresh(), []
    for site, offers in served(method, case):
        settings = offers[len(offers) // 2].steps[0].settings
        edits += carry(network, site, method, settings, case.stats.of(site.name))
    return network, edits


def other_skeleton(entry: Entry) -> nn.Module:
    """The same class with other weights, so that whatever is not restored shows."""
    with torch.random.fork_rng():
        torch.manual_seed(4321)
        return entry.build().to(entry.dtype).eval()


def check_file(case: Case, network: Network, edits: Sequence[Edit]) -> bytes:
    file = pack(network.module, tuple(edits), "module", {})
    package = unpack(file)
    assert sum(package.ledger.values()) == len(file)
    loaded = restore(package, other_skeleton(case.entry))
    assert state_of(loaded) == state_of(network.module), "a tensor differs"
    inputs = case.entry.inputs(16, seed=5)
    with torch.no_grad():
        assert bits(loaded(inputs)) == bits(network.module(inputs)), "outputs differ"
    return file


# --- 8. refusals name the site and the reason -----------------------------------------------------


def check_refusals(method: Method, case: Case) -> list[str]:
    """Return the names of the refused sites."""
    chain = Site("a -> b", kind="chain", members=("a", "b"))
    refused = [s for s in (*case.sites.layers, chain) if method.refuse(s)]
    if "chain" not in method.kinds:
        assert chain in refused, "a chain is taken for a layer"
    for site in refused:
        why = method.refuse(site)
        assert len(why.split()) >= 3, f"{site.name}: no reason in {why!r}"
        with pytest.raises(SiteError) as caught:
            method.apply(case.fresh(), Choice(site, {}), None)
        assert site.name in str(caught.value) and why in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)
    for site in case.few:
        if not method.refuse(site):
            weights = {
                k: torch.full_like(t, torch.nan) for k, t in weights_of(case.network, site).items()
            }
            if method.name != "keep":  # which keeps whatever there is
                with pytest.raises(SiteError) as caught:
                    list(method.propose(site, weights, None))
                assert site.name in str(caught.value)
    return [site.name for site in refused]


# --- 9. the card is complete ----------------------------------------------------------------------

SECTIONS = (
    "**What.**",
    "**Where.**",
    "**Costs and predicts.**",
    "**Does not help**",
    "**Reference.**",
)


def check_card(method: Method) -> None:
    module = inspect.getmodule(type(method))
    assert module is not None
    card = module.__doc__ or ""
    first = card.split("\n", 1)[0]
    assert first.startswith(f"{method.name}: ") and first.endswith("."), first
    places = [card.find(section) for section in SECTIONS]
    assert -1 not in places, f"missing: {SECTIONS[places.index(-1)]}"
    assert places == sorted(places), "the sections are in another order"
    assert "arXiv" in card or "doi" in card, "no reference can be found"
    assert isinstance(method.stage, Stage)
    assert method.kinds and set(method.kinds) <= {"layer", "chain", "group", "family", "model"}
    assert isinstance(method.needs, frozenset)
    assert isinstance(method.final, bool)
    assert len(method.reference) > 10
