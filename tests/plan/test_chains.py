"""Chains: joint curves against brute force, thinning, purity, data-free errors."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.checks import case_of

from lamina.errors import MethodError
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import Candidate, Step, get_method, registry
from lamina.plan import chains, propose
from lamina.plan.chains import COMBINED, choose_methods, join, pareto, thin

NUMBERS = st.integers(0, 12).map(float)


def offer(bits, error, macs=0.0, name="m", params=0.0):
    return Candidate("s", (Step(name, "s"),), Cost(params=params, bits=bits, macs=macs), error)


OFFERS = st.lists(st.builds(offer, NUMBERS, NUMBERS, NUMBERS), max_size=12)
FEW = st.lists(st.builds(offer, NUMBERS, NUMBERS), min_size=1, max_size=4)


def beaten(a, others):
    """Whether another candidate is as good in all and better in something (brute force)."""
    mine = (a.error, a.cost.bits, a.cost.macs, a.cost.params)
    return any(
        theirs != mine and all(x <= y for x, y in zip(theirs, mine, strict=True))
        for theirs in ((o.error, o.cost.bits, o.cost.macs, o.cost.params) for o in others)
    )


def points(candidates):
    return {(c.cost.bits, c.cost.macs, c.error) for c in candidates}


@given(OFFERS)
def test_pareto_keeps_exactly_what_nothing_beats(offers):
    kept = pareto(offers)
    assert points(kept) == points(c for c in offers if not beaten(c, offers))
    assert len(points(kept)) == len(kept), "equal offers are kept once"
    bits = [c.cost.bits for c in kept]
    assert bits == sorted(bits, reverse=True)


@given(OFFERS, st.randoms())
def test_pareto_does_not_depend_on_the_order(offers, shuffle):
    mixed = list(offers)
    shuffle.shuffle(mixed)
    assert points(pareto(mixed)) == points(pareto(offers))


@given(st.lists(FEW, min_size=1, max_size=3), st.sampled_from(["sum", "max"]))
def test_join_is_the_front_of_all_combinations(curves, how):
    """Brute force: the Minkowski sum of the curves (errors by sum or maximum), then its front."""
    whole = []
    for chosen in itertools.product(*curves):
        errors = [c.error for c in chosen]
        bits = sum(c.cost.bits for c in chosen)
        whole.append(offer(bits, sum(errors) if how == "sum" else max(errors)))
    wanted = points(pareto(whole))
    found = join([pareto(c) for c in curves], how)
    assert points(found) <= wanted or len(wanted) > COMBINED
    if len(wanted) <= COMBINED:
        assert points(found) == wanted
    for c in found:
        assert len(c.steps) == len(curves)


def test_join_of_nothing_is_free():
    (nothing,) = join([])
    assert (nothing.error, nothing.cost, nothing.steps) == (0.0, Cost(), ())
    assert join([[offer(1, 1)], []]) == [], "a layer nobody can serve has no joint curve"


def test_join_keeps_to_its_size_and_ends():
    curves = [[offer(2.0**i * p, 100.0 - i) for i in range(30, 0, -1)] for p in (3, 5, 7)]
    found = join(curves)
    assert len(found) <= COMBINED
    assert found[0].cost.bits == 15 * 2.0**30
    assert found[-1].cost.bits == 30


@given(st.integers(1, 40), st.integers(0, 12), st.integers(0, 99))
def test_thin_keeps_the_ends_and_the_order(size, count, seed):
    offers = [offer(float(2 ** ((i * 7 + seed) % 50)), float(i)) for i in range(size)]
    offers.sort(key=lambda c: -c.cost.bits)
    kept = thin(offers, count)
    assert len(kept) <= max(count, 0)
    assert [c for c in offers if c in kept] == list(kept)
    if size <= count:
        assert list(kept) == offers
    if count >= 2:
        assert kept[0] == offers[0] and kept[-1] == offers[-1]


def test_thin_spreads_over_the_logarithm():
    offers = [offer(2.0**i, 40.0 - i) for i in range(40, -1, -1)]
    assert [c.cost.bits for c in thin(offers, 5)] == [2.0**i for i in (40, 30, 20, 10, 0)]


def test_offers_of_no_bits_are_thinned_too():
    offers = [offer(0.0, float(i)) for i in range(9)]
    assert thin(offers, 3) == (offers[0], offers[-1])
    assert thin(offers, 1) == (offers[0],) and thin(offers, 0) == ()


# --- proposing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case():
    return case_of("residual")


def test_methods_are_chosen_by_name_and_keep_is_always_asked():
    assert [m.name for m in choose_methods(["rdoq"])] == ["keep", "rdoq"]
    assert {m.name for m in choose_methods(None)} == set(registry())
    with pytest.raises(MethodError, match="svd"):
        choose_methods(["svd"])
    with pytest.raises(MethodError, match="list of names"):
        choose_methods("rdoq")


def test_every_site_gets_a_front_with_a_lossless_end(case, monkeypatch):
    monkeypatch.setattr(chains, "EXTENDED", (2, 1))
    told = []
    asked = ["alds", "kmeans"]
    found = propose(case.network, case.sites, case.stats, asked, lambda *a: told.append(a))
    assert list(found) == [s.name for s in case.sites.layers]
    assert case.network.digest() == case.digest
    for name, offers in found.items():
        assert points(offers) == points(pareto(offers))
        assert offers[0].error == 0 and offers[0].steps == (Step("keep", name),)
        assert all(c.site == name for c in offers)
        for c in offers:
            stages = [get_method(s.method).stage for s in c.steps if s.at == name]
            assert stages == sorted(stages)
    chained = [c for offers in found.values() for c in offers if len(c.steps) > 1]
    assert chained, "nothing was chained"
    for c in chained:
        assert c.steps[0].method == "alds"
        assert {s.at for s in c.steps[1:]} == {f"{c.site}.0", f"{c.site}.1"}
    sites = len(case.sites.layers)
    assert told[0][:2] == (0, sites) and told[-1] == (sites, sites, "")


def test_a_chain_costs_what_its_end_costs(case, monkeypatch):
    """Bits are those of the leaves, MACs and parameters those of the pair, and errors add up."""
    monkeypatch.setattr(chains, "EXTENDED", (3, 1))
    site = case.sites["conv2"]
    offers = propose(case.network, type(case.sites)((site,)), case.stats, ["alds"])["conv2"]
    from lamina.methods.base import weights_of

    pairs = {
        str(dict(c.steps[0].settings)): c
        for c in get_method("alds").propose(
            site, weights_of(case.network, site), case.stats.of("conv2")
        )
    }
    chained = [c for c in offers if c.steps[0].method == "alds"]
    assert chained
    for c in chained:
        pair = pairs[str(dict(c.steps[0].settings))]
        assert (c.cost.params, c.cost.macs) == (pair.cost.params, pair.cost.macs)
        assert c.cost.bits <= 1.02 * pair.cost.bits + 8 * 32, "what the end makes of it"
        assert c.error == pytest.approx(pair.error), "keeping the leaves adds nothing"


def test_data_free_offers_have_relative_errors(case, monkeypatch):
    monkeypatch.setattr(chains, "EXTENDED", (2, 1))
    sites = type(case.sites)(case.sites.layers[:2])
    found = propose(case.network, sites, Stats(), ["magnitude", "kmeans"])
    for offers in found.values():
        assert offers[0].error == 0
        assert all(0 <= c.error <= 2.5 for c in offers), "spectral errors are relative"


def test_refusals_are_listed_with_their_reasons():
    case = case_of("gpt")
    listed = chains.refusals(case.sites, [get_method("alds"), get_method("rdoq")])
    assert ("wpe", "alds") in {(site, method) for site, method, _ in listed}
    assert all(why for _, _, why in listed)
    assert not [name for _, name, _ in listed if name == "rdoq"]


def test_candidates_survive_the_run_folder(case):
    sites = type(case.sites)(case.sites.layers[:1])
    found = propose(case.network, sites, case.stats, ["kmeans", "rdoq"])
    assert chains.parse_candidates(chains.dump_candidates(found)) == found
