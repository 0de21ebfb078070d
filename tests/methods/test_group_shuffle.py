"""group_shuffle: blocks that are there are found, what is built is the masked layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lamina.artifact.records import encode
from lamina.errors import MethodError, SiteError
from lamina.forms import install
from lamina.measure.stats import LayerStats, predict_error
from lamina.methods.base import Choice, Method, get_method
from lamina.methods.group_shuffle import connection_importance, method
from lamina.network.layers import describe
from lamina.network.sites import as_matrix
from lamina.network.source import Network

LAYERS = {
    "linear": lambda: (nn.Linear(12, 8), (3, 12)),
    "no bias": lambda: (nn.Linear(8, 4, bias=False), (3, 8)),
    "stride": lambda: (nn.Conv2d(4, 8, 3, stride=2, padding=1), (2, 4, 7, 8)),
    "dilation": lambda: (nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 7, 8)),
    "1d": lambda: (nn.Conv1d(8, 6, 3), (2, 8, 7)),
    "3d": lambda: (nn.Conv3d(4, 4, 2), (2, 4, 3, 4, 5)),
}


def moment(size: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * size, size, generator=g, dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=g, dtype=torch.float64)
    return x.T @ x / len(x)


def setting(name: str, data: bool = True):
    torch.manual_seed(3)
    layer, shape = LAYERS[name]()
    (site,) = describe("c", layer, None)
    n, N = site.matrix_shape[1:]
    mean = torch.randn(1, N, dtype=torch.float64)
    stats = LayerStats(moment(N, 1)[None], moment(n, 2)[None], mean, 5.0, 2.0, 48)
    return site, layer, shape, stats if data else None


def tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach() for k, v in layer.named_parameters()}


def network(layer: nn.Module) -> Network:
    root = nn.Module()
    root.c = copy.deepcopy(layer)
    return Network(root)


def dense_of(site, module: nn.Sequential, weight: torch.Tensor) -> torch.Tensor:
    """The dense matrix of a shuffled layer, entry by entry."""
    groups = module[1].groups
    n = weight.shape[0]
    c = weight.shape[1] * groups
    flat = weight.reshape(n, weight.shape[1], -1).double()
    whole = torch.zeros(n, c, flat.shape[2], dtype=torch.float64)
    for o in range(n):
        at = int(module[2].index[o])
        for i in range(weight.shape[1]):
            source = int(module[0].index[at // (n // groups) * weight.shape[1] + i])
            whole[o, source] = flat[at, i]
    return whole.flatten(1)


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_offers_say_what_is_built(name, data):
    site, layer, shape, stats = setting(name, data)
    weights = tensors(layer)
    matrix = as_matrix(site, weights["weight"]).double()
    offers = method.propose(site, weights, stats)
    assert isinstance(method, Method) and get_method("group_shuffle") is method
    assert offers and offers == method.propose(site, weights, stats)
    assert [c.steps[0].settings["groups"] for c in offers] == [
        g for g in (8, 4, 2) if not (matrix.shape[1] % g or layer.weight.shape[1] % g)
    ]
    bias = sum(t.numel() for k, t in weights.items() if k == "bias")
    for offer in offers:
        settings = offer.steps[0].settings
        net = network(layer)
        edits = method.apply(net, Choice(site, settings), stats)
        install(net.module, edits)
        delta = dense_of(site, net.module.c, net.module.c[1].weight.detach())[None] - matrix
        assert offer.error == pytest.approx(predict_error(stats, matrix, delta), rel=1e-4)
        assert offer.cost.params == sum(p.numel() for p in net.module.parameters())
        assert offer.cost.params == layer.weight.numel() // settings["groups"] + bias
        (leaf,) = method.leave(site, weights, stats, settings)
        assert offer.cost.macs == leaf.site.macs
        size = sum(len(encode(e.values)) for e in edits if e.values is not None)
        assert abs(size - offer.cost.bits / 8) <= 0.02 * size + 64
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.weight.copy_((matrix + delta)[0].reshape(twin.weight.shape))
            x = torch.randn(shape)
            torch.testing.assert_close(net.module.c(x), twin(x), rtol=1e-4, atol=1e-4)
        for index in net.module.buffers():
            assert sorted(index.tolist()) == list(range(len(index)))


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("data", [False, True])
def test_blocks_that_are_there_are_found_at_no_loss(groups, data):
    site, layer, shape, stats = setting("stride", data)
    rows, cols = torch.randperm(8), torch.randperm(4)
    mask = torch.zeros(8, 4)
    for r, c in zip(rows.chunk(groups), cols.chunk(groups), strict=True):
        mask[r[:, None], c] = 1
    with torch.no_grad():
        layer.weight.mul_(mask[:, :, None, None])
    offers = {c.steps[0].settings["groups"]: c for c in method.propose(site, tensors(layer), stats)}
    assert offers[groups].error < 1e-7 + 1e-3 * offers.get(2 * groups, offers[groups]).error
    net = network(layer)
    install(net.module, method.apply(net, Choice(site, {"groups": groups}), stats))
    x = torch.randn(shape)
    torch.testing.assert_close(net.module.c(x), layer(x), rtol=1e-3, atol=1e-3)


def test_values_are_solved_again_where_there_is_data():
    site, layer, _, stats = setting("linear")
    weights = tensors(layer)
    matrix = as_matrix(site, weights["weight"]).double()
    net = network(layer)
    install(net.module, method.apply(net, Choice(site, {"groups": 2}), stats))
    solved = dense_of(site, net.module.c, net.module.c[1].weight.detach())
    cut = torch.where(solved != 0, matrix[0], 0)
    before, after = (predict_error(stats, matrix, d[None] - matrix) for d in (cut, solved))
    assert after < 0.8 * before


def test_importance_is_predicted_loss_or_the_norm():
    site, layer, _, stats = setting("stride")
    matrix = as_matrix(site, layer.weight.detach())[0].double()
    S = connection_importance(matrix, 4, stats)
    g, h = stats.G[0].diagonal(), stats.H[0].diagonal().reshape(4, 9)
    wanted = float(g[3] * (h[2] * matrix.reshape(8, 4, 9)[3, 2] ** 2).sum())
    assert float(S[3, 2]) == pytest.approx(wanted)
    plain = connection_importance(matrix, 4, None)
    assert torch.allclose(plain, layer.weight.detach().abs().sum((2, 3)).double())


@pytest.mark.parametrize("diagonal", [False, True])
def test_the_leaf_sees_its_own_channels(diagonal):
    site, layer, _, stats = setting("stride")
    if diagonal:
        stats = LayerStats(
            stats.H.diagonal(dim1=1, dim2=2), stats.G.diagonal(dim1=1, dim2=2), stats.mean,
            5.0, 2.0, 48,
        )  # fmt: skip
    weights = tensors(layer)
    net = network(layer)
    install(net.module, method.apply(net, Choice(site, {"groups": 2}), stats))
    (leaf,) = method.leave(site, weights, stats, {"groups": 2})
    assert (leaf.site.name, leaf.site.groups, leaf.site.shape) == ("c.1", 2, (8, 2, 3, 3))
    assert torch.equal(leaf.weights["weight"], net.module.c[1].weight)
    assert torch.equal(leaf.weights["bias"], net.module.c[1].bias)
    # A change inside one group costs what it costs in the dense matrix.
    noise = torch.zeros(8, 2, 3, 3)
    noise[4:] = torch.randn(4, 2, 3, 3)
    own = predict_error(leaf.stats, noise, as_matrix(leaf.site, noise).double())
    delta = dense_of(site, net.module.c, noise)
    matrix = as_matrix(site, weights["weight"]).double()
    assert own == pytest.approx(predict_error(stats, matrix, delta[None]), rel=1e-9)
    cols = net.module.c[0].index.reshape(2, 2)
    wanted = stats.mean[0].reshape(4, 9)[cols[1]].flatten()
    assert torch.equal(leaf.stats.mean[1], wanted)
    assert leaf.bits > 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"groups": 1}, {"groups": 3}, {"groups": 8}, {"groups": "2"}, {"groups": -2},
     {"groups": 2, "seed": -1}, {"groups": 2, "seed": "x"}, {"groups": 2, "seed": 1 << 40}],
)  # fmt: skip
def test_odd_settings_are_refused(settings):
    site, layer, _, _ = setting("stride")
    with pytest.raises(MethodError, match="group_shuffle"):
        method.apply(network(layer), Choice(site, settings), None)


def test_refusals():
    grouped = nn.Conv2d(4, 4, 3, groups=2)
    (site,) = describe("c", grouped, None)
    with pytest.raises(SiteError, match="c: it has 2 groups already"):
        method.apply(network(grouped), Choice(site, {"groups": 2}), None)
    (odd,) = describe("c", nn.Linear(5, 4), None)
    assert "not both even" in method.refuse(odd)
    assert method.propose(odd, tensors(nn.Linear(5, 4)), None) == ()
