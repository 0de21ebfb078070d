"""layer_merge as a step of a plan: fits from moments, predicted errors, refusals, applying."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from tests.recipes.chained import images, make
from torch import nn

from lamina import artifact
from lamina.errors import MethodError, SiteError
from lamina.forms import install
from lamina.measure.calibrate import calibrate
from lamina.measure.cost import measured_macs, measured_params
from lamina.measure.stats import Cross, LayerStats, Stats
from lamina.methods.base import Choice, Leaf, Parts, Passage, Spanning, spanning
from lamina.methods.layer_merge import method
from lamina.methods.layer_merge.fits import Fits, fit_end, fit_link, supports_of
from lamina.methods.layer_merge.leaves import leaf_stats
from lamina.methods.layer_merge.merging import Conv, merge, padded_first
from lamina.network.sites import Site, Sites
from lamina.network.source import Network
from lamina.plan.apply import copy_module
from lamina.plan.spans import parts_of
from lamina.recipes.fitting import patches
from lamina.recipes.merge_tables import distance

discover = importlib.import_module("lamina.network.discover").discover


def row(*layers: nn.Module, size: int = 8, inputs: int = 3, seed: int = 0) -> tuple:
    """Return a network of some layers, its sites, statistics and data."""
    torch.manual_seed(seed)
    module = nn.Sequential(*layers)
    x = torch.randn(64, inputs, size, size)
    module.train()
    for _ in range(30):
        module(x)
    network = Network(module.eval(), (x[:2],), loss="features")
    sites = discover(network)
    stats = calibrate(network, sites, [(x,)], samples=64, seed=0)
    return network, sites, stats, x


def pair(act: nn.Module | None = None, **others) -> tuple:
    mid = [nn.BatchNorm2d(8), act] if act is not None else [nn.BatchNorm2d(8)]
    return row(nn.Conv2d(3, 8, 3, 1, 1), *mid, nn.Conv2d(8, 4, 3, 1, 1), **others)


def place(network: Network, sites: Sites, stats: Stats, number: int = 0) -> tuple[Site, Parts]:
    site = [s for s in method.places(sites) if not method.refuse(s)][number]
    return site, parts_of(network, sites, stats, site)


def edited(network: Network, site: Site, parts: Parts, settings) -> nn.Module:
    module = copy_module(network.module)
    install(module, method.apply(network, Choice(site, settings), parts))
    return module


def test_it_is_one_of_the_spanning_methods() -> None:
    assert isinstance(method, Spanning) and spanning()["layer_merge"] is method


# --- fits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 1])
def test_a_link_is_the_least_squares_fit(width: int) -> None:
    network, sites, stats, x = pair(nn.ReLU())
    with torch.no_grad():
        z = network.module[:3](x)
    conv, left = fit_link(sites["0"], stats.cross["0->3"], width, 1)
    pad = (width - 1) // 2
    seen = patches(x, (width, width), (1, 1), (pad, pad)).double()
    whole = torch.cat((seen, torch.ones(len(seen), 1)), 1)
    wanted = z.movedim(1, -1).reshape(-1, 8).double()
    best = torch.linalg.lstsq(whole, wanted).solution
    rest = wanted - whole @ best
    ours = wanted - conv(x.double()).movedim(1, -1).reshape(-1, 8)
    assert conv.kernel == (width, width) and conv.padding == (pad, pad)
    assert rest.square().sum() <= ours.square().sum() <= 1.01 * rest.square().sum()
    covariance = rest.T @ rest / len(rest)
    assert torch.allclose(left, covariance, atol=0.02 * float(covariance.abs().max()))


def test_where_nothing_bends_the_fit_is_exact_inside_the_border() -> None:
    network, sites, stats, x = pair()
    _site, parts = place(network, sites, stats)
    full = next(f for f in Fits(parts).all() if f.supports == (3, 3))
    with torch.no_grad():
        before, after = network.module(x), full.conv(x.double()).float()
    inner = (..., slice(1, -1), slice(1, -1))
    assert torch.allclose(before[inner], after[inner], atol=2e-2)
    assert not torch.allclose(before, after, atol=2e-2)


def test_supports_are_the_middle_of_a_kernel() -> None:
    assert supports_of(Site("a", kernel=(5, 5))) == [5, 3, 1]
    assert supports_of(Site("a", kernel=(2, 2))) == [2]
    assert supports_of(Site("a", kernel=(1, 7))) == [7, 1]


def test_a_kernel_held_to_its_middle_is_the_least_squares_fit() -> None:
    network, sites, stats, x = row(nn.Conv2d(3, 5, 3, 1, 1))
    weights = {"weight": network.module[0].weight, "bias": network.module[0].bias}
    leaf = Leaf(sites["0"], {k: v.detach() for k, v in weights.items()}, stats.of("0"))
    conv, error = fit_end(leaf, 1)
    same, nothing = fit_end(leaf, 3)
    assert nothing == 0.0 and torch.equal(same.weight.float(), weights["weight"])
    seen = patches(x, (1, 1), (1, 1), (0, 0)).double()
    whole = torch.cat((seen, torch.ones(len(seen), 1)), 1)
    wanted = network.module(x).detach().movedim(1, -1).reshape(-1, 5).double()
    best = torch.linalg.lstsq(whole, wanted).solution
    assert torch.allclose(conv.weight.reshape(5, 3), best[:-1].T, atol=2e-2)
    assert error > 0


def test_moments_of_a_larger_patch_come_from_a_smaller_one() -> None:
    """Of an image without edges, exactly where distances are known."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, 30, 30, generator=g, dtype=torch.float64)
    x = (x + x.roll(1, 3) + 0.5 * x.roll(1, 2)) / 2

    def moment(k: int) -> torch.Tensor:
        seen = patches(x, (k, k), (1, 1), (0, 0))
        return seen.T @ seen / len(seen)

    first = Site("a", op="conv", shape=(4, 2, 3, 3), kernel=(3, 3), padding=(1, 1), stride=(1, 1))
    left = replace(first, shape=(4, 2, 5, 5), kernel=(5, 5), padding=(2, 2))
    one = torch.eye(4, dtype=torch.float64)[None]
    stats = LayerStats(moment(3)[None], one, torch.zeros(1, 18, dtype=torch.float64))
    made = leaf_stats(Leaf(first, {}, stats), Leaf(first, {}, stats), left)
    assert made is not None and made.H.shape == (1, 50, 50)
    wanted = moment(5)
    apart = (made.H[0] - wanted).abs()
    assert float(apart.max()) < 0.1 * float(wanted.max())
    assert float(torch.linalg.eigvalsh(made.H[0]).min()) > -1e-9
    again = leaf_stats(Leaf(first, {}, stats), Leaf(first, {}, stats), first)
    assert again is not None and torch.equal(again.H, stats.H)


# --- offers --------------------------------------------------------------------------------------


def test_offers_predict_what_happens() -> None:
    """Errors against the measured distance, over kernels and activations; costs exactly."""
    ratios = []
    for act in (nn.ReLU(), nn.LeakyReLU(0.3), nn.ELU()):
        network, sites, stats, x = pair(act)
        site, parts = place(network, sites, stats)
        offers = method.propose(site, parts)
        assert [c.steps[0].settings["kernel"] for c in offers] == [1, 3, 5]
        errors = [c.error for c in offers]
        assert errors == sorted(errors, reverse=True)
        for offer in offers:
            module = edited(network, site, parts, offer.steps[0].settings)
            assert measured_params(module) == offer.cost.params
            assert measured_macs(module, (x[:1],)) == offer.cost.macs
            with torch.no_grad():
                was = network.module(x)
                lost = 0.5 * float((module(x) - was).square().sum()) / len(x)
            ratios.append(offer.error / (lost / float(was.square().sum() / len(x))))
    # All in the same unit, whatever the loss of features is scaled by.
    assert max(ratios) / min(ratios) < 2.0


def test_what_bends_less_costs_less() -> None:
    found = []
    for slope in (0.0, 0.5, 0.9):
        network, sites, stats, _ = pair(nn.LeakyReLU(slope))
        _site, parts = place(network, sites, stats)
        fit = next(f for f in Fits(parts).all() if f.supports == (3, 3))
        last = parts.members[-1].stats
        assert last is not None
        found.append(fit.error / (last.scale * float(last.G.diagonal(dim1=1, dim2=2).mean())))
    assert found[0] > found[1] > found[2]


def test_depthwise_layers_become_dense_or_stay_depthwise() -> None:
    network, sites, stats, _ = row(
        nn.Conv2d(4, 12, 1), nn.ReLU6(), nn.Conv2d(12, 12, 3, 1, 1, groups=12), nn.ReLU6(),
        nn.Conv2d(12, 4, 1), inputs=4,
    )  # fmt: skip
    names = {s.name: s for s in method.places(sites) if not method.refuse(s)}
    assert list(names) == ["0..2", "0..4", "2..4"]
    parts = parts_of(network, sites, stats, names["0..4"])
    offers = method.propose(names["0..4"], parts)
    assert {c.steps[0].settings["kernel"] for c in offers} == {1, 3}
    assert all("groups" not in c.steps[0].settings for c in offers)
    deep, sites, stats, _x = row(
        nn.Conv2d(6, 6, 3, 1, 1, groups=6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1, groups=6), inputs=6
    )
    site, parts = place(deep, sites, stats)
    for offer in method.propose(site, parts):
        (leaf,) = method.leave(site, parts, offer.steps[0].settings)
        assert leaf.site.groups == 6 and leaf.site.shape[1] == 1
        module = edited(deep, site, parts, offer.steps[0].settings)
        assert measured_params(module) == offer.cost.params


def test_a_stride_in_front() -> None:
    network, sites, stats, x = row(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, 1, 1), size=9
    )
    _site, parts = place(network, sites, stats)
    kernels = set()
    for fit in Fits(parts).all():
        assert fit.conv(x.double()).shape == network.module(x).shape
        kernels.add(fit.conv.kernel[0])
    assert kernels == {1, 3, 5, 7}


# --- apply ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chained() -> tuple:
    network = make()
    sites = discover(network)
    data = images(network)
    return network, sites, calibrate(network, sites, data, samples=96, seed=0), data


def test_a_merged_network_saves_and_loads_bit_for_bit(chained) -> None:
    network, sites, stats, data = chained
    score = distance(network, data.calibration, 96)
    x = torch.randn(3, 1, 12, 12)
    done = 0
    for site in method.places(sites):
        if method.refuse(site):
            continue
        parts = parts_of(network, sites, stats, site)
        for offer in method.propose(site, parts):
            settings = offer.steps[0].settings
            edits = method.apply(network, Choice(site, settings), parts)
            module = copy_module(network.module)
            install(module, edits)
            kinds = [e.form == "values" for e in edits]
            assert kinds == sorted(kinds)  # structure first
            file = artifact.pack(module, edits, network.source, {})
            loaded = artifact.restore(artifact.unpack(file), make().module).eval()
            with torch.no_grad():
                assert torch.equal(loaded(x), module(x))
            assert 0 < score(replace(network, module=module)) < 3.0
            done += 1
    program = torch.export.export(module.eval(), (x,))
    assert torch.equal(program.module()(x), module(x))
    assert done >= 3


def test_the_leaf_is_what_apply_puts_in(chained) -> None:
    network, sites, stats, _ = chained
    site, parts = place(network, sites, stats)
    settings = method.propose(site, parts)[0].steps[0].settings
    (leaf,) = method.leave(site, parts, settings)
    module = edited(network, site, parts, settings)
    layer = module.get_submodule(leaf.site.module)
    assert torch.equal(layer.weight, leaf.weights["weight"])
    assert (tuple(layer.kernel_size), tuple(layer.stride)) == (leaf.site.kernel, leaf.site.stride)
    assert leaf.stats is not None and leaf.stats.H.shape[-1] == leaf.site.matrix_shape[2]


def test_merging_the_merged_maps_is_merging_all(chained) -> None:
    """The product of the fits is the convolution that is put in."""
    network, sites, stats, _ = chained
    site = next(s for s in method.places(sites) if len(s.members) == 3)
    parts = parts_of(network, sites, stats, site)
    fits = Fits(parts)
    full = tuple(max(leaf.site.kernel) for leaf in parts.members)
    convs: list[Conv] = [fits._link(i, w)[0] for i, w in enumerate(full[:-1])]
    convs.append(fits._end(full[-1])[0])
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    y = x
    for conv in padded_first(convs):
        y = conv(y)
    assert torch.allclose(fits.fit(full).conv(x), y)
    assert torch.allclose(merge(convs).weight, fits.fit(full).conv.weight)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ((nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3)), "max_pool2d"),
        ((nn.Conv2d(3, 4, 3, dilation=2), nn.ReLU(), nn.Conv2d(4, 3, 3)), "dilation"),
        (
            (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")),
            "reflect",
        ),
        ((nn.Conv2d(3, 4, 8), nn.Flatten(), nn.Linear(4, 3)), "flatten"),
    ],
)
def test_refusals_name_the_place_and_the_reason(layers, why: str) -> None:
    network = Network(nn.Sequential(*layers), (torch.randn(2, 3, 8, 8),))
    refused = [method.refuse(s) for s in method.places(discover(network))]
    assert any(why in r for r in refused) and all(refused)


def test_what_is_not_for_it_is_not_offered() -> None:
    ones = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    network = Network(ones, (torch.randn(2, 3, 8, 8),))
    assert not [s for s in method.places(discover(network)) if not method.refuse(s)]
    assert "one layer" in method.refuse(Site("a", "chain", members=("a",)))
    assert "not a chain" in method.refuse(Site("a"))


def test_an_activation_that_is_a_call_is_refused(chained) -> None:
    _, sites, _, _ = chained
    refused = [method.refuse(s) for s in method.places(sites) if s.members[0] == "a.c1"]
    assert refused and "a call in a forward" in refused[0]


def test_without_statistics_there_are_no_offers_and_clear_errors() -> None:
    network, sites, stats, _ = pair(nn.ReLU())
    site, parts = place(network, sites, Stats())
    assert method.propose(site, parts) == ()
    settings = {"supports": [1, 3], "inputs": 3, "outputs": 4, "kernel": 3, "padding": 1}
    with pytest.raises(MethodError, match="measure on data"):
        method.leave(site, parts, settings)
    site, parts = place(network, sites, stats)
    for wrong in (
        {"supports": [2, 3]}, {"supports": [3]}, {"supports": "all"}, {"kernel": 5},
        {"inputs": 2}, {"kernel": "three"},
    ):  # fmt: skip
        with pytest.raises(MethodError, match="does not have these settings"):
            method.leave(site, parts, settings | wrong)
    with pytest.raises(SiteError, match="cannot serve"):
        method.apply(network, Choice(replace(site, rigid="no"), settings), parts)


def test_weights_that_are_not_finite() -> None:
    network, sites, stats, _ = pair(nn.ReLU())
    site, parts = place(network, sites, stats)
    broken = replace(parts.members[0], weights={"weight": torch.full((8, 3, 3, 3), torch.nan)})
    with pytest.raises(SiteError, match="finite"):
        method.propose(site, replace(parts, members=(broken, parts.members[1])))


def test_passages_do_not_matter_but_moments_do() -> None:
    """Everything between is in the moments: an unknown activation is as good as a ReLU."""
    network, sites, stats, _ = pair(nn.ReLU())
    site, parts = place(network, sites, stats)
    other = replace(parts, passages=((Passage("mish", "2"),),))
    assert method.propose(site, other) == method.propose(site, parts)
    cross = parts.cross[0]
    assert isinstance(cross, Cross)
    double = replace(cross, second=2 * cross.second)
    worse = method.propose(site, replace(parts, cross=(double,)))
    assert worse[0].error > method.propose(site, parts)[0].error
