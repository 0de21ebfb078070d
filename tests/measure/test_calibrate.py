"""Calibration against brute force in float64, and against what the loss really does."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.errors import DataError
from lamina.measure.calibrate import calibrate
from lamina.measure.loss import Loss, divergence
from lamina.measure.stats import Stats, predict_error
from lamina.network.sites import Site, Sites, as_matrix, from_matrix
from lamina.network.source import Network, digest


def layer(module: nn.Module, name: str = "layer", **changes: object) -> Site:
    """Describe one module of a test network."""
    m = module.get_submodule(name)
    kinds = {"ConvTranspose": "conv_transpose", "Conv": "conv", "Embedding": "embedding"}
    op = next((v for k, v in kinds.items() if type(m).__name__.startswith(k)), "linear")
    fields: dict = {
        "op": op,
        "module": name,
        "weight": f"{name}.weight",
        "shape": tuple(m.weight.shape),
    }
    if "conv" in op:
        padding = ("same",) if m.padding == "same" else m.padding
        fields |= {
            "kernel": m.kernel_size,
            "stride": m.stride,
            "padding": padding,
            "dilation": m.dilation,
            "groups": m.groups,
            "padding_mode": m.padding_mode,
        }
    return Site(name, **(fields | changes))  # type: ignore[arg-type]


class Single(nn.Module):
    """One layer, its outputs summed with fixed weights into one number a sample."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layer = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).flatten(1)
        return y @ torch.sin(torch.arange(y.shape[1], dtype=y.dtype))[:, None]


def weight_gradients(module: nn.Module, x: Tensor) -> Tensor:
    """Per-sample gradients of Single's one output by the layer's weight, by autograd."""
    rows = []
    for sample in x:
        module.zero_grad()
        module(sample[None]).sum().backward()
        rows.append(module.layer.weight.grad.clone())  # type: ignore[union-attr]
    module.zero_grad()
    return torch.stack(rows)


def run(module: nn.Module, x: Tensor, *sites: Site, **options: object) -> Stats:
    options = {"probe": False, "loss": "features"} | options
    return calibrate(Network(module, (x[:1],)), Sites(sites), [x], **options)  # type: ignore[arg-type]


CONVS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 9)),
    (lambda: nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (2, 7, 6)),
    (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    (lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2), (4, 7, 7)),
    (lambda: nn.Conv2d(2, 3, 4, padding="same", dilation=1), (2, 5, 6)),
    (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    (lambda: nn.Conv3d(1, 2, 2, padding=1), (1, 3, 3, 4)),
]


def brute_patches(conv: nn.Module, x: Tensor) -> Tensor:
    """Columns `[groups, n * positions, in]` by convolving with one-hot kernels."""
    inside = conv.weight.shape[1] * conv.weight[0, 0].numel()  # type: ignore[union-attr,index]
    columns = []
    for j in range(inside):
        one = torch.zeros(inside, dtype=torch.float64)
        one[j] = 1
        with torch.no_grad():
            conv.weight.copy_(one.view(conv.weight.shape[1:]).expand_as(conv.weight))  # type: ignore
            if conv.bias is not None:
                conv.bias.zero_()  # type: ignore[operator]
            y = conv(x)
        per = y.shape[1] // conv.groups  # type: ignore[operator]
        columns.append(y[:, ::per].flatten(2))  # [n, groups, positions]
    return torch.stack(columns, -1).transpose(0, 1).flatten(1, 2)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("build, shape", CONVS)
def test_conv_inputs_match_convolution_with_one_hot_kernels(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    net = Single(build()).double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    stats = run(net, x, layer(net)).layers["layer"]
    columns = brute_patches(net.layer, x)
    torch.testing.assert_close(stats.H, columns.transpose(1, 2) @ columns / 3)
    torch.testing.assert_close(stats.mean, columns.sum(1) / 3)
    assert stats.positions == columns.shape[1] / 3


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("build, shape", CONVS)
def test_conv_gradients_match_autograd(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    net = Single(build()).double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    stats = run(net, x, layer(net)).layers["layer"]
    y = net.layer(x)
    weights = torch.sin(torch.arange(y[0].numel(), dtype=torch.float64)).view_as(y[0])
    groups = stats.G.shape[0]
    g = weights.unflatten(0, (groups, -1)).flatten(2)  # the same in every sample; signs square away
    torch.testing.assert_close(stats.G, g @ g.transpose(1, 2) / g.shape[2])


@pytest.mark.parametrize(
    "build, shape",
    [
        (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 3, 4)),
        (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, groups=2), (4, 5)),
        (lambda: nn.ConvTranspose2d(1, 2, 2, dilation=2), (1, 3, 3)),
    ],
)
def test_conv_transpose_columns_rebuild_the_weight_gradient(
    build: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    """With one input pixel the Kronecker form is exact: E[dW dW^T] = G (x) H."""
    net = Single(build()).double()
    x = torch.zeros(4, *shape, dtype=torch.float64)
    pixel = tuple(n // 2 for n in shape[1:])
    x[(slice(None), slice(None), *pixel)] = torch.randn(4, shape[0], dtype=torch.float64)
    site = layer(net)
    stats = run(net, x, site).layers["layer"]
    delta = torch.randn(site.shape, dtype=torch.float64)
    gradients = weight_gradients(net, x)
    exact = (gradients * delta).flatten(1).sum(1).square().mean() / 2
    # Only one of P pixels is lit, but G averages over all; redo it for the lit one.
    y = net.layer(x)
    weights = torch.sin(torch.arange(y[0].numel(), dtype=torch.float64)).view_as(y[0])
    one = torch.zeros(1, *shape, dtype=torch.float64).requires_grad_()
    g = []
    for row in range(site.matrix_shape[1]):
        basis = torch.zeros(site.matrix_shape, dtype=torch.float64)
        basis[:, row, 0] = 1
        grad = []
        for group in range(site.groups):
            only = torch.zeros_like(basis)
            only[group] = basis[group]
            kernel = from_matrix(site, only)
            convolve = getattr(F, f"conv_transpose{len(shape) - 1}d")
            m = net.layer
            lit = torch.zeros_like(one)
            channel = group * site.matrix_shape[2]
            lit[(0, channel, *pixel)] = 1
            out = convolve(
                lit, kernel, None, m.stride, m.padding, m.output_padding, m.groups, m.dilation
            )
            grad.append((out[0] * weights).sum())
        g.append(torch.stack(grad))
    g_lit = torch.stack(g, 1)  # [groups, out * K]
    matrix = as_matrix(site, delta)
    pixels = x[(slice(None), slice(None), *pixel)]
    pixels = pixels.unflatten(1, (site.groups, -1))
    by_hand = torch.einsum("go,goi,ngi->n", g_lit, matrix, pixels).square().mean() / 2
    torch.testing.assert_close(by_hand, exact)
    H = torch.einsum("ngi,ngj->gij", pixels, pixels) / 4
    torch.testing.assert_close(stats.H, H)
    assert stats.G.shape[1] == site.matrix_shape[1]
    assert torch.linalg.eigvalsh(stats.G).min() > -1e-9
    trace = stats.G.diagonal(dim1=1, dim2=2).sum()
    unfolded = _spread(net.layer, weights)
    torch.testing.assert_close(trace, unfolded)


def _spread(m: nn.Module, weights: Tensor) -> Tensor:
    """Mean over input pixels of the squared gradients at all outputs a pixel reaches."""
    space = [
        (n + 2 * p - d * (k - 1) - 1 - o) // s + 1
        for n, p, d, k, o, s in zip(
            weights.shape[1:],
            m.padding,
            m.dilation,
            m.kernel_size,
            m.output_padding,
            m.stride,
            strict=True,
        )
    ]  # type: ignore[arg-type]
    total = 0.0
    for place in itertools.product(*map(range, space)):
        for tap in itertools.product(*map(range, m.kernel_size)):  # type: ignore[arg-type]
            at = [
                q * s + t * d - p
                for q, s, t, d, p in zip(place, m.stride, tap, m.dilation, m.padding, strict=True)
            ]  # type: ignore[arg-type]
            if all(0 <= a < n for a, n in zip(at, weights.shape[1:], strict=True)):
                total += float(weights[(slice(None), *at)].square().sum())
    pixels = 1
    for n in space:
        pixels *= n
    return torch.tensor(total / pixels, dtype=torch.float64)


def test_linear_with_tokens_sums_inputs_and_averages_gradients() -> None:
    net = Single(nn.Linear(3, 2)).double()
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    stats = run(net, x, layer(net)).layers["layer"]
    H, G = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    g = torch.sin(torch.arange(10, dtype=torch.float64)).view(5, 2)
    for n in range(4):
        for t in range(5):
            H += torch.outer(x[n, t], x[n, t]) / 4
            G += torch.outer(g[t], g[t]) / 20
    torch.testing.assert_close(stats.H[0], H)
    torch.testing.assert_close(stats.G[0], G)
    assert stats.positions == 5
    assert stats.samples == 4


def test_embedding_counts_tokens() -> None:
    net = Single(nn.Embedding(6, 2)).double()
    x = torch.tensor([[0, 1, 1], [5, 1, 0]])
    stats = run(net, x, layer(net)).layers["layer"]
    # 2, 3 and 1 times; a third of a count of each of the three is shared by all six.
    wanted = torch.tensor([[2.0, 3.0, 0.0, 0.0, 0.0, 1.0]]).double()
    wanted = (wanted - 1 / 3).clamp_min(0) + 1 / 6
    # How much each is felt comes on top, and hardly differs here.
    torch.testing.assert_close(stats.H, wanted / 2, rtol=0.25, atol=0)
    assert stats.G.shape == (1, 2, 2)


def test_prediction_is_exact_for_one_linear_output() -> None:
    net = nn.Sequential(nn.Linear(5, 1)).double()
    x = torch.randn(40, 5, dtype=torch.float64)
    stats = run(net, x, layer(net, "0"))
    delta = torch.randn(1, 5, dtype=torch.float64)
    measured = divergence(Loss("features"), net(x), net(x) + x @ delta.T).mean().detach()
    predicted = predict_error(stats.of("0"), net[0].weight[None], delta[None])
    assert predicted == pytest.approx(float(measured), rel=1e-9)


def test_prediction_is_close_to_measured_kl_of_softmax_regression() -> None:
    net = nn.Sequential(nn.Linear(6, 4)).double()
    x = torch.randn(6000, 6, dtype=torch.float64)
    stats = run(net, x, layer(net, "0"), loss="logits", samples=6000)
    ratios, wrong = [], []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        delta = 0.03 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
        after = net(x) + x @ delta.T
        measured = float(divergence(Loss("logits"), net(x), after).mean().detach())
        s = stats.of("0")
        assert s is not None
        ratios.append(predict_error(s, delta[None], delta[None]) / measured)
        scrambled = s.G.flip(1) * 3  # negative control: another G must not do as well
        wrong.append(predict_error(type(s)(s.H, scrambled), delta[None], delta[None]) / measured)
    assert max(abs(r - 1) for r in ratios) < 0.25
    assert max(abs(r - 1) for r in wrong) > 0.5


class InPlace(nn.Module):
    """A layer whose output is overwritten, called twice, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.layer(x), inplace=True)
        x = self.drop(self.norm(F.relu_(self.layer(x)))).add_(x)
        return self.head(x)


@pytest.mark.parametrize("frozen", [False, True])
def test_module_is_left_bit_identical(frozen: bool) -> None:
    net = InPlace().train()
    net.norm.eval()
    for p in net.parameters():
        p.requires_grad_(not frozen)
    net.layer.weight.grad = torch.ones(4, 4)
    x = torch.randn(8, 4)
    before, state = digest(net), torch.get_rng_state()
    stats = run(net, x, layer(net), layer(net, "head"), probe=True, loss="logits")
    assert digest(net) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and net.drop.training and not net.norm.training
    assert torch.equal(net.layer.weight.grad, torch.ones(4, 4))
    assert all(p.requires_grad is not frozen for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())
    assert stats.layers["layer"].positions == 2  # both calls count
    assert stats.layers["layer"].G.any()


def test_in_place_relu_does_not_change_the_statistics() -> None:
    torch.manual_seed(1)
    tame = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    wild = nn.Sequential(tame[0], nn.ReLU(inplace=True), tame[2])
    x = torch.randn(16, 4)
    for a, b in itertools.product(["0", "2"], [False, True]):
        for p in wild.parameters():
            p.requires_grad_(b)
        one = run(tame, x, layer(tame, a)).layers[a]
        two = run(wild, x, layer(wild, a)).layers[a]
        assert torch.equal(one.H, two.H) and torch.equal(one.G, two.G)


def test_seed_decides_and_batches_do_not() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x = torch.randn(37, 4, dtype=torch.float64)
    network, sites = Network(net, (x[:1],)), Sites((layer(net, "0"), layer(net, "2")))
    whole = calibrate(network, sites, [x], loss="logits", probe=False)
    parts = calibrate(network, sites, list(x.split(5)), loss="logits", probe=False)
    other = calibrate(network, sites, [x], loss="logits", probe=False, seed=1)
    again = calibrate(network, sites, [x], loss="logits", probe=False)
    for name in ("0", "2"):
        torch.testing.assert_close(whole.layers[name].H, parts.layers[name].H)
        torch.testing.assert_close(whole.layers[name].G, parts.layers[name].G)
        assert torch.equal(whole.layers[name].G, again.layers[name].G)
        assert not torch.equal(whole.layers[name].G, other.layers[name].G)


def test_samples_cut_the_last_batch() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    stats = calibrate(
        Network(net), Sites((layer(net, "0"),)), [torch.ones(5, 4)] * 3, samples=7, probe=False
    )
    assert stats.samples == stats.layers["0"].samples == 7


def test_labels_only_tell_what_the_outputs_are() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    x, sites = torch.randn(6, 4), Sites((layer(net, "0"),))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    one = calibrate(Network(net), sites, [(x, labels)], probe=False)
    two = calibrate(Network(net), sites, [(x, 2 - labels)], probe=False)
    three = calibrate(Network(net), sites, [(x, labels + 9)], probe=False)
    assert one.loss == two.loss == "logits"
    assert torch.equal(one.layers["0"].G, two.layers["0"].G)
    assert three.loss == calibrate(Network(net), sites, [x], probe=False).loss == "features"


def test_drawn_positions_give_the_same_moments_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Single(nn.Conv2d(1, 2, 3))
    x = torch.randn(20, 1, 20, 20)
    full = run(net, x, layer(net), samples=20).layers["layer"]
    module = importlib.import_module("lamina.measure.calibrate")  # `lamina.measure` is a verb too
    monkeypatch.setattr(module, "FEWEST", 2000)
    drawn = run(net, x, layer(net), samples=20).layers["layer"]
    assert drawn.positions == pytest.approx(full.positions)
    assert not torch.equal(drawn.H, full.H)
    assert float((drawn.H - full.H).norm() / full.H.norm()) < 0.1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: type[nn.Module]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(3, 4, num_layers=2, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    net, x = Net(), torch.randn(5, 6, 3)
    sites = [
        Site(f"rnn.{n}", op="recurrent", module="rnn", weight=f"rnn.{n}", shape=tuple(p.shape))
        for n, p in net.rnn.named_parameters()
        if n.startswith("weight")
    ]
    stats = run(net, x, *sites, probe=True)
    inputs = x.reshape(-1, 3).double()
    torch.testing.assert_close(stats.layers["rnn.weight_ih_l0"].H[0], inputs.T @ inputs / 5)
    states = net.rnn(x)[0][:, :-1].detach().reshape(-1, 4).double()
    torch.testing.assert_close(stats.layers["rnn.weight_hh_l1"].H[0], states.T @ states / 5)
    middle = stats.layers["rnn.weight_ih_l1"].H[0]
    assert torch.equal(middle, middle[0, 0] * torch.eye(4, dtype=torch.float64))
    assert all(s.scale > 0 and s.G.any() for s in stats.layers.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_attention_that_reads_its_weights_raw(frozen: bool) -> None:
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten())
    for p in net.parameters():
        p.requires_grad_(not frozen)
    x = torch.randn(5, 3, 8)
    name = "0.self_attn.in_proj_weight"
    inner = Site(name, module="0.self_attn", weight=name, shape=(24, 8))
    out = layer(net, "0.self_attn.out_proj")
    stats = run(net, x, inner, out, layer(net, "0.linear1"), probe=True)
    flat = x.reshape(-1, 8).double()
    torch.testing.assert_close(stats.layers[name].H[0], flat.T @ flat / 5)
    assert all(s.H.any() and s.G.any() for s in stats.layers.values())
    assert torch.backends.mha.get_fastpath_enabled()
    assert stats.notes == ()


def test_a_layer_that_is_only_read_raw_is_not_free() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.raw, self.dead = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.seen(x), self.raw.weight)

    net = Raw()
    sites = [layer(net, n) for n in ("seen", "raw", "dead")]
    stats = run(net, torch.randn(20, 4), *sites, probe=True)
    eye = torch.eye(4)[None]
    errors = {s.name: predict_error(stats.of(s.name), eye, 0.1 * eye) for s in sites}
    measured = 0.5 * float((0.1 * net.seen(torch.randn(4000, 4))).square().sum(1).mean().detach())
    assert errors["raw"] == pytest.approx(measured, rel=0.7)
    assert errors["dead"] < 1e-6 * errors["raw"]
    assert len(stats.notes) == 2


def test_bad_data_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    sites = Sites((layer(net, "0"), layer(net, "1")))
    network = Network(net, (torch.zeros(1, 4),))
    with pytest.raises(DataError, match=r"\[2, 5\].*\[1, 4\]"):
        calibrate(network, sites, [torch.zeros(2, 5)])
    with pytest.raises(DataError, match="empty"):
        calibrate(network, sites, [])
    with pytest.raises(DataError, match="no calibration data"):
        calibrate(network, sites, None)
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="layer '1'"):
        calibrate(network, sites, [torch.ones(2, 4)])
    assert not net[0]._forward_hooks


class Encoder(nn.Module):
    """Tokens, each alone: padding changes nothing but itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 6)
        self.layer = nn.Linear(6, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.table(input_ids)))


@pytest.mark.parametrize("loss", ["embedding", "features"])
def test_padding_is_not_seen(loss: str) -> None:
    torch.manual_seed(0)
    module = Encoder()
    ids = torch.randint(1, 12, (6, 4))
    sites = Sites((
        Site("table", module="table", op="embedding", weight="table.weight", shape=(12, 6)),
        Site("layer", module="layer", weight="layer.weight", bias="layer.bias", shape=(5, 6)),
    ))  # fmt: skip

    def seen(padding: int, masked: bool) -> Stats:
        rows = torch.cat([ids, torch.zeros(6, padding, dtype=torch.long)], 1)
        mask = (torch.arange(4 + padding) < 4).long().expand(6, -1) if masked else None
        mask = torch.ones_like(rows) if mask is None else mask
        batch = {"input_ids": rows, "attention_mask": mask}
        network = Network(module, example_kwargs=batch, loss=loss)
        return calibrate(network, sites, [batch], samples=6, probe=False)

    whole, padded, blind = seen(0, True), seen(3, True), seen(3, False)
    for name in ("table", "layer"):
        a, b, c = (stats.of(name) for stats in (whole, padded, blind))
        assert a is not None and b is not None and c is not None
        if name == "layer" or loss == "embedding":  # features draw other signs for longer outputs
            torch.testing.assert_close(a.H, b.H, rtol=1e-4, atol=1e-9)
        assert a.positions == b.positions == 4 and c.positions == 7
        assert not torch.allclose(a.H, c.H)
        if loss == "embedding":
            torch.testing.assert_close(a.G, b.G, rtol=1e-4, atol=1e-9)


def test_wide_moments_in_single_precision_are_close_to_double() -> None:
    torch.manual_seed(0)
    narrow, x = nn.Linear(300, 4), torch.randn(500, 300)
    module = nn.Sequential(narrow)
    found = run(module, x, layer(module, "0")).of("0")
    assert found is not None
    wanted = x.double().T @ x.double() / 500
    assert float((found.H[0] - wanted).abs().max()) < 1e-6 * float(wanted.diagonal().max())


def test_links_are_measured_only_where_asked_for() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    network = Network(module, (torch.zeros(1, 4),))
    from lamina.network.discover import discover

    sites, x = discover(network), [torch.randn(8, 4)]
    assert calibrate(network, sites, x, probe=False).cross
    assert not calibrate(network, sites, x, probe=False, cross=False).cross
