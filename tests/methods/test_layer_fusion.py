"""Layer Fusion as a method: ties, files, training, candidates; and what can be dropped."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lamina.artifact import pack, restore, unpack
from lamina.errors import MethodError, SiteError
from lamina.forms import install
from lamina.measure.calibrate import calibrate
from lamina.measure.cost import measured_macs, measured_params
from lamina.measure.stats import Stats
from lamina.methods.base import Choice, Spanning, find_method, get_method, weights_of
from lamina.methods.layer_fusion import method, offer, read_settings
from lamina.methods.layer_fusion.drop import block_of, check_droppable, undroppable
from lamina.network.discover import discover
from lamina.network.sites import Site
from lamina.network.source import Network
from lamina.plan.spans import parts_of

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A residual block of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.fc(x))


class Mlp(nn.Module):
    """Residual blocks of one layer each, a head, and something to drop them wrongly."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(Block() for _ in range(count)))
        self.plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.plain(self.blocks(x)))


class Net:
    """A network with all that a method sees of it."""

    def __init__(self, module: nn.Module, x: torch.Tensor = X, data: bool = True) -> None:
        self.x = x
        self.network = Network(module.eval(), (x[:2],), source="", loss="logits")
        self.sites = discover(self.network)
        self.stats = calibrate(self.network, self.sites, [x], samples=32) if data else Stats()

    def parts(self, site: Site):
        return parts_of(self.network, self.sites, self.stats, site)

    def applied(self, site: Site, **settings) -> tuple[nn.Module, list]:
        module = copy.deepcopy(self.network.module)
        edits = method.apply(self.network, Choice(site, settings), self.parts(site))
        install(module, edits)
        return module, edits


@pytest.fixture(scope="module")
def net() -> Net:
    return Net(Mlp())


@pytest.fixture(scope="module")
def family(net) -> Site:
    return net.sites["blocks.*.fc"]


def test_it_joins_as_a_spanning_method() -> None:
    assert isinstance(find_method("layer_fusion"), Spanning) and not method.final


def test_its_places_are_the_families(net, family) -> None:
    assert family in tuple(method.places(net.sites)) and method.refuse(family) == ""
    assert "it is a layer" in method.refuse(net.sites["head"])
    assert "nobody to share" in method.refuse(Site("f", "family", members=("a",)))
    assert "embedding" in method.refuse(Site("f", "family", op="embedding", members=("a", "b")))


# --- ties ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["mean", "freeze", "max", "solve"])
def test_tied_layers_hold_one_parameter_and_one_copy_goes(net, family, how) -> None:
    module, _ = net.applied(family, groups=[0, 1, 0, 0], combine=how)
    fc = [block.fc for block in module.blocks]
    assert fc[2].weight is fc[0].weight and fc[3].weight is fc[0].weight
    assert fc[1].weight is not fc[0].weight
    whole = measured_params(net.network.module)
    assert measured_params(module) == whole - 2 * 36
    for old, new in zip(net.network.module.blocks, module.blocks, strict=True):
        assert torch.equal(old.fc.bias, new.fc.bias)  # biases stay each layer's own
    assert torch.equal(fc[1].weight, net.network.module.blocks[1].fc.weight)


@pytest.mark.parametrize("how", ["mean", "freeze", "max", "solve"])
def test_equal_layers_share_without_a_difference(how) -> None:
    module = Mlp()
    with torch.no_grad():
        for block in module.blocks[1:]:
            block.fc.weight.copy_(module.blocks[0].fc.weight)
    net = Net(module)
    site = net.sites["blocks.*.fc"]
    fused, _ = net.applied(site, groups=[0, 0, 0, 0], combine=how)
    assert torch.equal(fused(X), net.network.module(X))
    assert measured_params(fused) == measured_params(module) - 3 * 36
    (last,) = [
        c
        for c in method.propose(site, net.parts(site))
        if set(c.steps[0].settings["groups"]) == {0}
    ]
    assert last.error == 0.0


def test_ties_are_kept_in_training_and_gradients_are_sums(net, family) -> None:
    module, _ = net.applied(family, groups=[0, 0, 0, 0], combine="mean")
    apart = copy.deepcopy(module)
    for block in apart.blocks[1:]:
        block.fc.weight = nn.Parameter(block.fc.weight.detach().clone())
    module.double()(X.double()).pow(2).mean().backward()
    apart.double()(X.double()).pow(2).mean().backward()
    total = sum(block.fc.weight.grad for block in apart.blocks)
    grad = module.blocks[0].fc.weight.grad
    torch.testing.assert_close(grad, total, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(grad, apart.blocks[0].fc.weight.grad)  # one use alone is not it

    def loss(shift: float) -> float:
        with torch.no_grad():
            module.blocks[0].fc.weight[1, 2] += shift
            value = float(module(X.double()).pow(2).mean())
            module.blocks[0].fc.weight[1, 2] -= shift
        return value

    assert float(grad[1, 2]) == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-5)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    before = module.blocks[0].fc.weight.detach().clone()
    for _ in range(10):
        optimizer.zero_grad()
        module(X.double()).pow(2).mean().backward()
        optimizer.step()
    weights = [block.fc.weight for block in module.blocks]
    assert all(w is weights[0] for w in weights) and not torch.equal(weights[0], before)


def test_files_keep_ties_and_store_one_copy(net, family) -> None:
    module, edits = net.applied(family, groups=[0, 1, 0, 1], combine="solve")
    assert [e.form for e in edits] == ["tie", "tie", "values", "values"]
    package = unpack(pack(module, tuple(edits), "", {}))
    names = [name for name in package.tensors if name.startswith("blocks.") and "weight" in name]
    assert names == ["blocks.0.fc.weight", "blocks.1.fc.weight"]
    loaded = restore(package, Mlp()).eval()
    assert torch.equal(loaded(X), module(X))
    assert loaded.blocks[2].fc.weight is loaded.blocks[0].fc.weight
    stored = sum(package.tensors[n].dense().numel() for n in package.tensors)
    assert stored == measured_params(loaded) == measured_params(module)
    again = unpack(pack(loaded, tuple(edits), "", {}))
    assert torch.equal(restore(again, Mlp()).eval()(X), module(X))


def test_ties_survive_copies_and_moves(net, family) -> None:
    module, _ = net.applied(family, groups=[0, 0, 0, 0])
    for other in (copy.deepcopy(module), copy.deepcopy(module).to(torch.bfloat16)):
        assert other.blocks[3].fc.weight is other.blocks[0].fc.weight


# --- candidates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [True, False])
def test_offers_cost_what_they_take(data) -> None:
    net = Net(Mlp(), data=data)
    for site in net.sites.families:
        offers = method.propose(site, net.parts(site))
        assert offers == method.propose(site, net.parts(site))  # pure
        assert 1 <= len(offers) <= len(site.members) - 1
        others = measured_params(net.network.module) - sum(
            t.numel() for m in net.parts(site).members for t in m.weights.values()
        )
        for one in offers:
            module, edits = net.applied(site, **one.steps[0].settings)
            assert measured_params(module) == others + one.cost.params
            assert one.cost.macs == sum(net.sites[m].macs for m in site.members)
            leaves = method.leave(site, net.parts(site), one.steps[0].settings)
            assert (
                sum(t.numel() for leaf in leaves for t in leaf.weights.values()) <= one.cost.params
            )
            assert sum(leaf.site.macs for leaf in leaves) == pytest.approx(one.cost.macs)
            for leaf in leaves:
                found = weights_of(replace(net.network, module=module), leaf.site)
                assert torch.equal(found["weight"], leaf.weights["weight"])
            assert all(e.form in ("tie", "values") for e in edits)
        errors, params = [c.error for c in offers], [c.cost.params for c in offers]
        assert errors == sorted(errors, reverse=True) and params == sorted(params)


def test_planted_duplicates_are_tied_first() -> None:
    module = Mlp(5)
    with torch.no_grad():
        noise = 1e-4 * torch.randn(6, 6, generator=torch.Generator().manual_seed(2))
        module.blocks[3].fc.weight.copy_(module.blocks[1].fc.weight + noise)
    for data in (True, False):
        net = Net(module, data=data)
        site = net.sites["blocks.*.fc"]
        dearest = method.propose(site, net.parts(site))[-1]
        assert dearest.steps[0].settings["groups"] == [0, 1, 2, 1, 3]
        assert dearest.error < 1e-2 * method.propose(site, net.parts(site))[0].error


def test_the_predicted_loss_is_that_of_small_differences() -> None:
    module = Mlp(3)
    with torch.no_grad():
        for i, block in enumerate(module.blocks):
            noise = torch.randn(6, 6, generator=torch.Generator().manual_seed(i))
            block.fc.weight.copy_(module.blocks[0].fc.weight + 0.02 * noise)
    net = Net(module, torch.randn(400, 6, generator=torch.Generator().manual_seed(5)))
    site = net.sites["blocks.*.fc"]
    before = module(net.x).log_softmax(-1)
    for partition in ((0, 0, 1), (0, 1, 0), (0, 0, 0)):
        one = offer(site, net.parts(site), partition, "mean")
        fused, _ = net.applied(site, **one.steps[0].settings)
        with torch.no_grad():
            measured = float((before.exp() * (before - fused(net.x).log_softmax(-1))).sum(1).mean())
        assert one.error == pytest.approx(measured, rel=1.0)  # the same loss, within twice
        best = offer(site, net.parts(site), partition, "solve")
        assert best.error <= one.error


def test_later_methods_see_all_uses_of_a_shared_weight(net, family) -> None:
    settings = {"groups": [0, 1, 0, 0], "combine": "mean"}
    shared, alone = method.leave(family, net.parts(family), settings)
    assert shared.site.positions == 3 and shared.site.aliases == (
        "blocks.2.fc.weight",
        "blocks.3.fc.weight",
    )
    assert alone.site == net.sites["blocks.1.fc"] and alone.bits == 0 < shared.bits
    rdoq = get_method("rdoq")
    assert rdoq.refuse(shared.site) == ""
    offers = list(rdoq.propose(shared.site, shared.weights, shared.stats))
    single = list(
        rdoq.propose(net.sites["blocks.0.fc"], shared.weights, net.stats.of("blocks.0.fc"))
    )
    assert min(o.cost.bits for o in offers) > 0
    assert shared.stats.scale > 0 and len(single) > 0


def test_settings_that_do_not_fit_are_refused(net, family) -> None:
    for settings in (
        {}, {"groups": [0, 0]}, {"groups": [0, 0, 0, "a"]}, {"groups": [0] * 4, "combine": "sum"},
        {"groups": [0] * 4, "mode": "loop"}, {"groups": [True] * 4},
    ):  # fmt: skip
        with pytest.raises(MethodError, match="does not have these settings"):
            read_settings(family, settings)
    with pytest.raises(SiteError, match="it is a layer"):
        net.applied(net.sites["head"], groups=[0])
    free = Net(Mlp(), data=False)
    with pytest.raises(SiteError, match="no statistics"):
        free.applied(family, groups=[0] * 4, combine="solve")


def test_weights_that_are_not_finite_are_refused() -> None:
    module = Mlp()
    with torch.no_grad():
        module.blocks[1].fc.weight[0, 0] = torch.nan
    net = Net(module, data=False)
    site = net.sites["blocks.*.fc"]
    with pytest.raises(SiteError, match=r"blocks\.1\.fc"):
        method.propose(site, net.parts(site))


# --- dropping ------------------------------------------------------------------------------------


def test_dropped_blocks_do_not_run(net, family) -> None:
    settings = {"groups": [0, 0, 1, 1], "mode": "drop"}
    module, edits = net.applied(family, **settings)
    assert [(e.path, e.form) for e in edits[:2]] == [
        ("blocks.1", "identity"),
        ("blocks.3", "identity"),
    ]
    assert tuple(edits[:2]) == method.structure(family, settings)
    before = measured_macs(net.network.module, (X[:2],))
    assert measured_macs(module, (X[:2],)) == before - 2 * 36
    weight = (net.network.module.blocks[0].fc.weight + net.network.module.blocks[1].fc.weight) / 2
    torch.testing.assert_close(module.blocks[0].fc.weight, weight)
    leaves = method.leave(family, net.parts(family), settings)
    assert [leaf.site.name for leaf in leaves] == ["blocks.0.fc", "blocks.2.fc"]
    loaded = restore(unpack(pack(module, tuple(edits), "", {})), Mlp()).eval()
    assert torch.equal(loaded(X), module(X))


def test_illegal_places_to_drop_are_refused(net) -> None:
    plain = net.sites["plain.*"]
    with pytest.raises(SiteError, match="no skip leads past it"):
        net.applied(plain, groups=[0, 0], mode="drop")


class Deep(nn.Module):
    """Blocks with two layers; `kind` says what is wrong with them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        width = 3 if kind == "narrow" else 6
        self.one = nn.Linear(6, width)
        self.two = nn.Linear(width, 6)
        self.more = nn.Linear(6, 6)

    def forward(self, x):
        y = self.two(torch.relu(self.one(x)))
        if self.kind == "concatenated":
            return torch.cat([x[:, :3], y[:, 3:]], 1)
        if self.kind == "gated":
            return x * torch.sigmoid(y)
        if self.kind == "scaled":
            return torch.relu(x + y)
        return x + y + self.more(y)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("", ""), ("concatenated", "no skip"), ("gated", "no skip"), ("scaled", "no skip")],
)
def test_only_residual_blocks_can_be_dropped(kind, why) -> None:
    module = nn.Sequential(nn.Linear(6, 6), Deep(kind), nn.Linear(6, 2))
    network = Network(module.eval(), (X[:2],))
    found = undroppable(network, "1")
    assert found.startswith(why) and bool(found) == bool(why)
    if not why:
        check_droppable(network, "1")
        covered = ("1.one.weight", "1.two.weight")
        with pytest.raises(SiteError, match=r"1\.more\.weight, which is of another family"):
            check_droppable(network, "1", covered)


def test_a_relu_block_after_a_relu_is_residual() -> None:
    """ResNet: `relu(x + f(x))` with nothing in f is x, where x is not negative."""
    from lamina.zoo import untrained

    network = untrained("resnet20")
    assert undroppable(network, "blocks.1") == ""
    assert "into" in undroppable(network, "blocks.3")  # it halves the image


def test_what_shares_memory_or_runs_nowhere_stays() -> None:
    module = nn.Sequential(nn.Linear(6, 6), Deep(""), nn.Linear(6, 6))
    module[2].weight = module[1].more.weight
    network = Network(module.eval(), (X[:2],))
    assert "tied to a tensor outside" in undroppable(network, "1")
    assert "nothing runs" in undroppable(network, "9")
    assert "not known" in undroppable(replace(network, example_inputs=()), "1")


def test_blocks_are_where_members_part() -> None:
    site = Site("f", "family", members=("net.a.0.x.fc", "net.a.1.x.fc", "net.b.0.x.fc"))
    assert [block_of(site, i) for i in range(3)] == ["net.a", "net.a", "net.b"]
    assert block_of(Site("f", "family", members=("a", "b")), 1) == "b"
