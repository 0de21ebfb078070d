"""layer_collapse: exact where nothing bends, best where something does, and refusals by name."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lamina.errors import MethodError, SiteError
from lamina.forms import install
from lamina.measure.calibrate import calibrate
from lamina.measure.cost import measured_macs, measured_params
from lamina.measure.stats import Stats
from lamina.methods.base import Candidate, Choice, Parts, Spanning, find_method
from lamina.methods.layer_collapse import FITS, fits_of, method
from lamina.methods.layer_collapse.merging import merge
from lamina.network.discover import discover
from lamina.network.sites import Site, Sites, as_matrix
from lamina.network.source import Network
from lamina.plan.spans import find_spans, parts_of, span_refusals


class Conv1D(nn.Module):
    """Stored [in, out], as GPT-2 has it; known by its name and where it comes from."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


def prelu(slope: float = 1.0) -> nn.PReLU:
    return nn.PReLU(init=slope)


def norm(kind: type[nn.Module], width: int) -> nn.Module:
    made: nn.Module = kind(width)
    for name, tensor in made.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(width) + 0.5 if "var" in name else torch.randn(width))
    return made


def seq(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


CHAINS = {
    "plain": lambda a: (seq(nn.Linear(6, 24), a(), nn.Linear(24, 5)), (40, 6)),
    "bare": lambda a: (
        seq(nn.Linear(6, 24, bias=False), a(), nn.Linear(24, 5, bias=False)), (40, 6)),
    "half bare": lambda a: (seq(nn.Linear(6, 24), a(), nn.Linear(24, 5, bias=False)), (40, 6)),
    "after": lambda a: (
        seq(nn.Linear(6, 24), a(), norm(nn.BatchNorm1d, 24), nn.Linear(24, 5)), (40, 6)),
    "before": lambda a: (
        seq(nn.Linear(6, 24), norm(nn.BatchNorm1d, 24), a(), nn.Linear(24, 5, bias=False)),
        (40, 6)),
    "dropout": lambda a: (seq(nn.Linear(6, 24), a(), nn.Dropout(0.5), nn.Linear(24, 5)), (40, 6)),
    "tokens": lambda a: (seq(nn.Linear(6, 24), a(), nn.Linear(24, 5)), (40, 3, 6)),
    "conv": lambda a: (
        seq(nn.Conv2d(6, 24, 1), norm(nn.BatchNorm2d, 24), a(), nn.Conv2d(24, 5, 1)),
        (40, 6, 3, 2)),
    "conv 1d": lambda a: (
        seq(nn.Conv1d(6, 24, 1, bias=False), a(), nn.Conv1d(24, 5, 1)), (40, 6, 4)),
    "hf": lambda a: (seq(Conv1D(24, 6), a(), Conv1D(5, 24)), (40, 2, 6)),
    "triple": lambda a: (
        seq(nn.Linear(6, 24), a(), nn.Linear(24, 16), a(), nn.Dropout(), nn.Linear(16, 5)),
        (40, 6)),
}  # fmt: skip


def make(name: str, act: object = prelu, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Return a network, its sites, its one longest chain, and data."""
    torch.manual_seed(seed)
    module, shape = CHAINS[name](act)
    module = module.to(dtype).eval()
    x = torch.randn(shape, dtype=dtype)
    network = Network(module, (x[:2],), name=name)
    return network, discover(network), x


def seen(network: Network, sites: Sites, x: Tensor) -> Stats:
    return calibrate(network, sites, [x], samples=len(x), probe=False, loss="features")


def longest(sites: Sites) -> Site:
    spans = [s.site for s in find_spans(sites, [method])]
    return max(spans, key=lambda site: len(site.members))


def collapsed(network: Network, site: Site, parts: Parts, settings: object) -> nn.Module:
    module = copy.deepcopy(network.module)
    install(module, method.apply(network, Choice(site, settings), parts))  # type: ignore[arg-type]
    return module


def dense_of(offers: tuple[Candidate, ...]) -> dict[str, object]:
    return next(dict(c.steps[0].settings) for c in offers if "rank" not in c.steps[0].settings)


# --- exact where nothing bends -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["32", "64"])
@pytest.mark.parametrize("name", CHAINS)
def test_slope_one_is_exact(name: str, dtype: torch.dtype) -> None:
    network, sites, x = make(name, prelu, dtype)
    site = longest(sites)
    parts = parts_of(network, sites, Stats(), site)
    bias = 0 if name == "bare" else 1
    small = collapsed(network, site, parts, {"fit": "slope", "inputs": 6, "bias": bias})
    with torch.no_grad():
        before, after = network.module(x), small(x)
    close = 1e-5 if dtype == torch.float32 else 1e-10
    assert float((before - after).abs().max()) <= close * float(before.abs().max())
    left = [m for m in small.modules() if not isinstance(m, (nn.Identity, nn.Sequential))]
    assert len(left) == 1, "one layer is left, and nothing else"
    assert sum(p.numel() for p in small.parameters()) == 6 * 5 + 5 * bias
    assert all(p.dtype == dtype for p in small.parameters())


@pytest.mark.parametrize("name", CHAINS)
def test_every_fit_finds_the_linear_network(name: str) -> None:
    network, sites, x = make(name)
    site = longest(sites)
    parts = parts_of(network, sites, seen(network, sites, x), site)
    assert fits_of(parts) == FITS
    for fit in FITS:
        small = collapsed(network, site, parts, {"fit": fit, "inputs": 6, "bias": 1})
        torch.testing.assert_close(small(x), network.module(x), rtol=1e-8, atol=1e-8)
        assert merge(parts, fit).error < 1e-12


def test_layers_without_an_activation_are_one_without_data_and_cost_nothing() -> None:
    network, sites, x = make("plain", nn.Dropout)
    parts = parts_of(network, sites, Stats(), longest(sites))
    offers = method.propose(longest(sites), parts)
    assert offers[-1].error == 0.0 and offers[-1].steps[0].settings["fit"] == "slope"
    with_data = parts_of(network, sites, seen(network, sites, x), longest(sites))
    assert method.propose(longest(sites), with_data)[-1].error == 0.0


def test_a_full_rank_pair_is_the_dense_map_where_that_would_be_larger() -> None:
    torch.manual_seed(0)
    module = seq(nn.Linear(20, 4), prelu(0.2), nn.Linear(4, 30)).double().eval()
    x = torch.randn(300, 20, dtype=torch.float64)
    network = Network(module, (x[:2],))
    sites = discover(network)
    site = longest(sites)
    parts = parts_of(network, sites, seen(network, sites, x), site)
    offers = method.propose(site, parts)
    assert all("rank" in c.steps[0].settings for c in offers), "dense is 600 of 200"
    assert max(c.cost.params for c in offers) < measured_params(module)
    most = {"fit": "full", "inputs": 20, "bias": 1}
    dense, pair = (collapsed(network, site, parts, s) for s in (most, most | {"rank": 4}))
    torch.testing.assert_close(dense(x), pair(x), rtol=1e-6, atol=1e-6)


# --- the error -----------------------------------------------------------------------------------


def measured_error(network: Network, small: nn.Module, x: Tensor, parts: Parts) -> float:
    """`scale/2 E[d^T G d]` of the difference of outputs d, summed over positions."""
    stats = parts.members[-1].stats
    assert stats is not None
    with torch.no_grad():
        d = small(x) - network.module(x)
    if parts.members[0].site.op == "conv":
        d = d.movedim(1, -1)
    d = d.reshape(-1, d.shape[-1]).double()
    return 0.5 * stats.scale * float(torch.einsum("ni,ij,nj->", d, stats.G[0], d)) / len(x)


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Tanh, lambda: prelu(0.3)])
@pytest.mark.parametrize("name", ["plain", "after", "before", "tokens", "conv", "hf"])
def test_the_predicted_error_is_that_of_the_calibration_data(name: str, act: object) -> None:
    network, sites, x = make(name, act)
    site = longest(sites)
    parts = parts_of(network, sites, seen(network, sites, x), site)
    errors = []
    for fit in FITS:
        merged = merge(parts, fit)
        small = collapsed(network, site, parts, {"fit": fit, "inputs": 6, "bias": 1})
        measured = measured_error(network, small, x, parts)
        if fit == "slope":
            assert merged.error == pytest.approx(measured, rel=1e-6)
        else:  # other data is expected to be worse
            assert measured * (1 - 1e-6) <= merged.error < 3 * measured
        errors.append(measured)
    assert errors[2] <= errors[0] * (1 + 1e-9)
    assert errors[2] < 0.9 * errors[0]


def test_the_offer_is_the_best_fit_and_ranks_cost_more_error() -> None:
    network, sites, x = make("plain", nn.GELU)
    site = longest(sites)
    parts = parts_of(network, sites, seen(network, sites, x), site)
    offers = method.propose(site, parts)
    assert offers == method.propose(site, parts)
    assert min(merge(parts, fit).error for fit in FITS) == offers[-1].error
    params = [c.cost.params for c in offers]
    errors = [c.error for c in offers]
    assert params == sorted(params) and errors == sorted(errors, reverse=True)
    assert len(set(params)) == len(params) > 2
    for offer in offers:
        small = collapsed(network, site, parts, offer.steps[0].settings)
        assert measured_params(small) == offer.cost.params
        assert measured_macs(small, (x[:1],)) == offer.cost.macs
        assert measured_error(network, small, x, parts) <= offer.error * (1 + 1e-6)


def test_ranks_are_best_in_the_metric() -> None:
    network, sites, x = make("plain", nn.ReLU)
    site = longest(sites)
    parts = parts_of(network, sites, seen(network, sites, x), site)
    merged = merge(parts, "full")
    pair = merged.truncated(2)
    G, C = merged.G, merged.covariance
    left, right = torch.linalg.cholesky(G), torch.linalg.cholesky(C)
    s = torch.linalg.svdvals(left.T @ merged.map.weight @ right)
    tail = float(s[2:].square().sum())
    assert pair.error - merged.error == pytest.approx(merged.unit * tail, rel=0.02)
    plain = torch.linalg.svd(merged.map.weight)
    cut = (plain.U[:, :2] * plain.S[:2]) @ plain.Vh[:2]
    change = merged.map.weight - cut
    assert float(((left.T @ change @ right) ** 2).sum()) > 1.02 * tail


def test_a_longer_part_adds_up_what_its_links_leave() -> None:
    network, sites, x = make("triple", nn.ReLU)
    x = torch.randn(4000, 6, dtype=torch.float64)
    site = longest(sites)
    assert site.name == "0..5" and len(site.members) == 3
    parts = parts_of(network, sites, seen(network, sites, x), site)
    for fit in ("units", "full"):
        small = collapsed(network, site, parts, {"fit": fit, "inputs": 6, "bias": 1})
        measured = measured_error(network, small, x, parts)
        assert 0.4 * measured < merge(parts, fit).error < 2.5 * measured


def test_neighbouring_collapses_compose_in_either_order() -> None:
    network, sites, x = make("triple")
    once = collapsed(network, longest(sites), parts_of(network, sites, Stats(), longest(sites)),
                     {"fit": "slope", "inputs": 6, "bias": 1})  # fmt: skip
    results = []
    for first in ("0..2", "2..5"):
        now = network
        for _ in range(2):
            found = discover(now)
            chain = found.chains[0]
            site = next(s.site for s in find_spans(found, [method])
                        if s.site.name == first or len(chain.members) == 2)  # fmt: skip
            parts = parts_of(now, found, Stats(), site)
            inputs = parts.members[0].site.matrix_shape[2]
            module = collapsed(now, site, parts, {"fit": "slope", "inputs": inputs, "bias": 1})
            now = replace(now, module=module)
        results.append(now.module)
    for module in (*results, once):
        torch.testing.assert_close(module(x), network.module(x), rtol=1e-9, atol=1e-9)
        assert not find_spans(discover(replace(network, module=module)), [method]), (
            "what is collapsed does not collapse again"
        )


# --- without data --------------------------------------------------------------------------------


def test_without_data_the_error_is_a_share_and_bends_cost() -> None:
    errors = []
    for slope in (0.0, 0.5, 0.9, 1.0):
        network, sites, _ = make("plain", lambda s=slope: prelu(s))
        parts = parts_of(network, sites, Stats(), longest(sites))
        offers = method.propose(longest(sites), parts)
        assert all(0 <= c.error <= 1.5 for c in offers)
        errors.append(offers[-1].error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 and 0.2 < errors[0] < 1
    network, sites, _ = make("plain", nn.Softshrink)
    parts = parts_of(network, sites, Stats(), longest(sites))
    assert method.propose(longest(sites), parts) == ()


def test_without_data_the_units_are_those_of_normal_inputs() -> None:
    network, sites, _ = make("plain", nn.ReLU)
    site = longest(sites)
    parts = parts_of(network, sites, Stats(), site)
    x = torch.randn(20_000, 6, dtype=torch.float64)
    fits = [
        collapsed(network, site, parts_of(network, sites, stats, site),
                  {"fit": "units", "inputs": 6, "bias": 1})
        for stats in (Stats(), seen(network, sites, x))
    ]  # fmt: skip
    with torch.no_grad():
        one, two = (m(x) for m in fits)
    assert float((one - two).square().mean()) < 0.02 * float(two.var())
    assert parts.members[0].stats is None


# --- what is left --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "tokens", "conv", "hf"])
@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_left_is_described_as_discovery_and_calibration_find_it(
    name: str, rank: int
) -> None:
    network, sites, x = make(name, nn.GELU)
    site = longest(sites)
    parts = parts_of(network, sites, seen(network, sites, x), site)
    settings = {"fit": "full", "inputs": 6, "bias": 1} | ({"rank": rank} if rank else {})
    leaves = method.leave(site, parts, settings)
    small = replace(network, module=collapsed(network, site, parts, settings))
    found = discover(small)
    after = seen(small, found, x)
    assert [leaf.site.name for leaf in leaves] == [s.name for s in found.layers]
    for leaf, there in zip(leaves, found.layers, strict=True):
        here = replace(leaf.site, extent=there.extent)
        assert here == there
        for key, tensor in leaf.weights.items():
            path = {"weight": there.weight, "bias": there.bias}[key]
            assert torch.equal(tensor, small.module.get_parameter(path))
        stats = after.of(there.name)
        assert leaf.stats is not None and stats is not None
        torch.testing.assert_close(leaf.stats.H, stats.H, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(leaf.stats.mean, stats.mean, rtol=1e-6, atol=1e-6)
        assert leaf.stats.G.shape == stats.G.shape
        assert leaf.stats.positions == stats.positions
    if rank:  # the gradients of the encoder are those of the outputs, through the decoder
        decode = as_matrix(leaves[1].site, leaves[1].weights["weight"])[0]
        assert leaves[0].stats is not None and leaves[1].stats is not None
        torch.testing.assert_close(leaves[0].stats.G[0], decode.T @ leaves[1].stats.G[0] @ decode)


def test_apply_leaves_the_network_alone_and_keeps_what_is_outside() -> None:
    torch.manual_seed(0)
    module = seq(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6),
                 nn.LayerNorm(6), nn.Linear(6, 3)).eval()  # fmt: skip
    x = torch.randn(64, 4)
    network = Network(module, (x[:2],))
    sites = discover(network)
    site = longest(sites)
    assert site.name == "2..4"
    before = {k: v.clone() for k, v in module.state_dict().items()}
    parts = parts_of(network, sites, seen(network, sites, x), site)
    settings = method.propose(site, parts)[-1].steps[0].settings
    edits = method.apply(network, Choice(site, settings), parts)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    forms = [e.form for e in edits]
    assert forms == sorted(forms, key=lambda f: f == "values"), "structure first"
    structural = tuple(e for e in edits if e.form != "values")
    assert structural == method.structure(site, settings)
    small = copy.deepcopy(module)
    install(small, edits)
    assert {e.path.split(".")[0] for e in edits} == {"2", "3", "4"}
    for path in ("0", "1", "5", "6"):
        for key, tensor in small.get_submodule(path).state_dict().items():
            assert torch.equal(tensor, before[f"{path}.{key}"])


# --- refusals ------------------------------------------------------------------------------------


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Gated(nn.Module):
    """The MLP of LLaMA: `down(silu(gate(x)) * up(x))`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(16, 4)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Twice(nn.Module):
    """One activation module that runs in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.act = (
            nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 4), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.a(x)))))


def conv(*args: int, **kw: object) -> nn.Conv2d:
    return nn.Conv2d(*args, **kw)  # type: ignore[arg-type]


REFUSED = {
    "call": (Called(), (2, 4), ("relu between a and b", "call")),
    "twice": (Twice(), (2, 4), ("relu between", "used elsewhere")),
    "kernel": (seq(conv(3, 8, 3), nn.ReLU(), conv(8, 3, 1)), (2, 3, 6, 6), ("0 has", "3x3")),
    "kernel after": (seq(conv(3, 8, 1), nn.ReLU(), conv(8, 3, 3)), (2, 3, 6, 6), ("2 has", "3x3")),
    "stride": (seq(conv(3, 8, 1, 2), nn.ReLU(), conv(8, 3, 1)), (2, 3, 6, 6), ("0", "stride")),
    "padding": (
        seq(conv(3, 8, 1), nn.ReLU(), conv(8, 3, 1, padding=1)), (2, 3, 6, 6), ("2 pads",)),
    "groups": (
        seq(conv(4, 8, 1), nn.ReLU(), conv(8, 4, 1, groups=2)), (2, 4, 6, 6), ("2 has 2 groups",)),
    "pool": (
        seq(conv(3, 8, 1), nn.ReLU(), nn.MaxPool2d(2), conv(8, 3, 1)), (2, 3, 6, 6),
        ("2 between 0 and 3", "max_pool2d")),
    "flat": (
        seq(conv(3, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 3)), (2, 3, 2, 2),
        ("flatten",)),
    "layer norm": (
        seq(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4)), (2, 4),
        ("1 between", "layer_norm")),
    "token norm": (
        seq(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)), (2, 8, 4),
        ("0", "positions")),
    "growth": (seq(nn.Linear(9, 1), nn.ReLU(), nn.Linear(1, 9)), (2, 9), ("grow", "18")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_with_the_place_and_the_reason(name: str) -> None:
    module, shape, words = REFUSED[name]
    network = Network(module.eval(), (torch.randn(shape),))
    sites = discover(network)
    assert not find_spans(sites, [method])
    (refusal, *_) = span_refusals(sites, [method])
    assert refusal[1] == "layer_collapse"
    assert all(word in refusal[2] for word in words), refusal
    site = sites[refusal[0]]
    parts = parts_of(network, sites, Stats(), site)
    assert method.propose(site, parts) == () or name in ("growth", "token norm")
    if name not in ("growth", "token norm"):
        with pytest.raises(SiteError, match="layer_collapse cannot serve this site at"):
            method.apply(network, Choice(site, {"fit": "slope", "inputs": 3, "bias": 1}), parts)


def test_a_gated_mlp_is_no_chain() -> None:
    sites = discover(Network(Gated(), (torch.randn(2, 4),)))
    assert not sites.chains and not list(method.places(sites))


def test_a_norm_without_moments_is_refused_by_name() -> None:
    module = seq(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 4))
    network = Network(module.eval(), (torch.randn(3, 4),))
    sites = discover(network)
    chain = sites.chains[0]
    parts = parts_of(network, sites, Stats(), chain)
    assert method.propose(chain, parts) == ()
    with pytest.raises(SiteError, match="1 has no moments"):
        method.apply(network, Choice(chain, {"fit": "slope", "inputs": 4, "bias": 1}), parts)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fit": "best", "inputs": 6},
        {"fit": "slope", "inputs": 7},
        {"fit": "slope", "inputs": 6, "bias": 0},
        {"fit": "slope", "inputs": 6, "rank": 6},
        {"fit": "slope", "inputs": 6, "rank": -1},
        {"fit": "slope", "inputs": True},
        {"fit": "full", "inputs": 6},
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object]) -> None:
    network, sites, _ = make("plain")
    site = longest(sites)
    parts = parts_of(network, sites, Stats(), site)
    with pytest.raises(MethodError, match="layer_collapse does not have these settings"):
        method.leave(site, parts, settings)


def test_weights_that_are_not_finite_are_named() -> None:
    network, sites, _ = make("plain")
    network.module[2].weight.data[0, 0] = torch.nan
    with pytest.raises(SiteError, match=r"not finite at 2 in 0\.\.2"):
        method.propose(longest(sites), parts_of(network, sites, Stats(), longest(sites)))


def test_it_is_a_spanning_method_that_joins_by_itself() -> None:
    assert isinstance(method, Spanning) and find_method("layer_collapse") is method
    assert method.refuse(Site("a")).startswith("it is a layer")
    assert "already" in method.refuse(Site("a", "chain", members=("a",)))
