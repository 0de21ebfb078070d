"""Chains: joint curves against brute force, thinning, purity, data-free errors."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.contract.checks import case_of

from lamina.errors import MethodError
from lamina.measure.stats import Cost, Stats
from lamina.methods.base import (
    Candidate,
    Leaf,
    Stage,
    Step,
    get_method,
    registry,
    weights_of,
)
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
    every = {name for name, m in registry().items() if getattr(m, "asked", True)}
    assert {m.name for m in choose_methods(None)} == every
    assert set(registry()) - every >= {"sawb", "two_four"}
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
        # Not always the first: a pair of tiny layers has fewer parameters, but two heads to store.
        assert [c.steps for c in offers if c.error == 0] == [(Step("keep", name),)]
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


# --- extending ------------------------------------------------------------------------------------


def test_every_point_of_a_structure_is_ended_in_every_way(case):
    """Each rank (of a curve of up to 24) is kept as it is, and quantized in several ways."""
    site = case.sites["conv2"]
    weights, stats = weights_of(case.network, site), case.stats.of("conv2")
    ranks = pareto(get_method("alds").propose(site, weights, stats))
    methods = [get_method(name) for name in ("keep", "alds", "rdoq")]
    ended: dict[str, list] = {}
    for c in chains._chains(site, weights, stats, methods):
        if c.steps[0].method == "alds":
            ended.setdefault(str(c.steps[0]), []).append(c)
    assert len(ended) == len(thin(ranks, chains.EXTENDED[0])) > 12
    for line in ended.values():
        kept = [c for c in line if {s.method for s in c.steps[1:]} == {"keep"}]
        assert len(kept) == 1, "one lossless end"
        coded = [c for c in line if "rdoq" in {s.method for s in c.steps[1:]}]
        assert len(coded) >= 3
        lost = sorted(c.error - kept[0].error for c in coded)
        assert lost[0] >= 0
        assert sum(x <= chains.NEGLIGIBLE * kept[0].error for x in lost) <= 1, (
            "no finer than useful"
        )


def test_where_bytes_are_not_limited_only_structures_are_proposed(case):
    sites = type(case.sites)((case.sites["conv2"],))
    free = propose(case.network, sites, case.stats, bytes_count=False)["conv2"]
    used = {s.method for c in free for s in c.steps}
    assert {"keep", "alds"} <= used and not used & {"rdoq", "kmeans", "magnitude"}
    # Nothing is lost by it: at no number of MACs and parameters is another chain better.
    whole = propose(case.network, sites, case.stats, ["alds", "rdoq"])["conv2"]
    for c in whole:
        costs = (c.cost.macs, c.cost.params)
        assert any(
            f.error <= c.error and f.cost.macs <= costs[0] and f.cost.params <= costs[1]
            for f in free
        )


class Indexed:
    """A non-final method that leaves two layers, one of them with an index in the file."""

    name, stage, kinds, final = "indexed", Stage.SHAPE, ("layer",), False
    needs: frozenset[str] = frozenset()
    reference = ""

    def refuse(self, site):
        return ""

    def propose(self, site, weights, stats):
        step = Step(self.name, site.name, {})
        return (Candidate(site.name, (step,), Cost(params=7, bits=1000, macs=3), 0.5),)

    def leave(self, site, weights, stats, settings):
        half = {"weight": weights["weight"][: len(weights["weight"]) // 2]}
        left = replace(site, name="a", shape=tuple(half["weight"].shape))
        return Leaf(left, half, None, bits=96.0), Leaf(replace(left, name="b"), half, None)


def test_what_no_later_step_can_change_is_counted_once(case):
    site = case.sites["conv2"]
    weights = weights_of(case.network, site)
    rdoq = get_method("rdoq")
    found = chains._chains(site, weights, None, [get_method("keep"), Indexed(), rdoq])
    ended = [c for c in found if c.steps[0].method == "indexed"]
    kept = [c for c in ended if {s.method for s in c.steps[1:]} == {"keep"}]
    assert [(c.cost.bits, c.cost.params, c.error) for c in kept] == [(1000, 7, 0.5)]
    leaf = Indexed().leave(site, weights, None, {})[0]
    sizes = {
        c.steps[0].settings["step"]: c.cost.bits
        for c in rdoq.propose_alike([leaf, leaf], [0.5, 0.5])[0]
    }
    coded = [c for c in ended if {s.method for s in c.steps[1:]} == {"rdoq"}]
    assert coded
    for c in coded:
        parts = sum(sizes[s.settings["step"]] for s in c.steps[1:])
        assert c.cost.bits == pytest.approx(parts + 96.0, rel=0.02, abs=64)
        assert (c.cost.macs, c.cost.params) == (3, 7)


def test_a_method_that_only_prunes_gets_fewer_points():
    offers = tuple(offer(2.0**i, 40.0 - i) for i in range(40, 0, -1))
    alds, magnitude = get_method("alds"), get_method("magnitude")
    assert len(chains._points(alds, offers, 0)) == chains.EXTENDED[0]
    few = chains._points(magnitude, offers, 0)
    assert len(few) == chains.EXTENDED[0] // chains.VALUES_SHARE
    assert chains._points(magnitude, offers, 1) == (offers[20],), "one alone: from the middle"
