"""The form "int8": against float64, its life as a module, and what it refuses."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lamina.artifact import pack, restore, unpack
from lamina.errors import FileError
from lamina.forms import Edit, Grid, GroupedLinear, find_grid, grid_of, install
from lamina.forms import integer_product as product
from lamina.forms import integer_rows as rows
from lamina.forms.integer import Integer, build_int8, exponents_of, round_weight, scales_of
from lamina.forms.values import exponent_scale


class Conv1D(nn.Module):
    """Hugging Face's, in all that is looked at: it is known by its name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def layer(inputs: int = 64, outputs: int = 24, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias)


def exact(module: Integer, x: torch.Tensor) -> torch.Tensor:
    """The same arithmetic in float64, from the definition alone."""
    integers, scale = module.integers()
    weight = integers.double() * scale.double()[:, None]
    wide = x.double()
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    center, step = (low + high) / 2, ((high - low) / 254).clamp(min=1e-30)
    rounded = torch.round((wide - center) / step) * step + center
    bias = 0 if module.bias is None else module.bias.detach().double()
    return rounded @ weight.T + bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (1, 2, 1, 2)])
def test_it_computes_what_its_definition_says(shape, bias):
    module = build_int8(layer(bias=bias), {"bits": 8}).eval()
    x = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = module(x)
    assert y.shape == (*shape, 24)
    # A value on the edge between two integers may go either way: one step of one input.
    edge = float(x.abs().max()) / 127 * float(module.weight.detach().abs().max())
    assert float((y - exact(module, x)).abs().max()) < 1.5 * edge
    # Negative control: the weight of another row does not pass.
    assert float((y.roll(1, -1) - exact(module, x)).abs().max()) > 10 * edge


def test_it_is_near_the_float_layer():
    dense = layer(256, 64).eval()
    x = torch.randn(40, 256)
    with torch.no_grad():
        y, z = dense(x), build_int8(dense, {}).eval()(x)
    assert 0.001 < float((y - z).norm() / y.norm()) < 0.012


@pytest.mark.parametrize("way", ["numba", "torch"])
def test_rows_are_rounded_as_defined(way, monkeypatch):
    if way == "torch":
        monkeypatch.setattr(rows, "_compiled", lambda loop: None)
    x = torch.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None] + torch.linspace(-5, 5, 7)[:, None]
    u, step, center = rows.round_rows(x)
    back = center + step * (u.float() - 128)
    assert float(((back - x).abs() / step).max()) <= 0.5 + 1e-3
    assert u.min(dim=1).values.tolist() == [1] * 7
    assert u.max(dim=1).values.tolist() == [255] * 7


def test_both_ways_of_rows_agree(monkeypatch):
    if rows._compiled(rows._round) is None:
        pytest.skip("no numba")
    x = torch.randn(9, 50)
    bias, sums = torch.randn(50), torch.randn(50)
    u, step, center = rows.round_rows(x)
    y = rows.scale_rows(x.clone(), step, center, sums, bias)
    monkeypatch.setattr(rows, "_compiled", lambda loop: None)
    v, step2, center2 = rows.round_rows(x)
    assert torch.equal(u, v) and torch.equal(step, step2) and torch.equal(center, center2)
    assert torch.allclose(rows.scale_rows(x.clone(), step, center, sums, bias), y, atol=1e-6)


@pytest.mark.parametrize("way", ["numba", "torch"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, -torch.nan])
def test_a_row_that_is_not_finite_shows_and_harms_no_other(way, bad, monkeypatch):
    if way == "torch":
        monkeypatch.setattr(rows, "_compiled", lambda loop: None)
    module = build_int8(layer(), {}).eval()
    x = torch.randn(3, 64)
    x[1, 5] = bad
    with torch.no_grad():
        y = module(x)
    assert not bool(y[1].isfinite().any())
    assert bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize(
    "row",
    [
        torch.zeros(64),
        torch.full((64,), 3.0),
        torch.linspace(1, 1 + 2e-7, 64),
        torch.full((64,), 1e-42),
        torch.randn(64) * 3e37,
        -torch.rand(64) * 1e-20,
    ],
    ids=["zero", "constant", "nearly constant", "denormal", "huge", "tiny"],
)
def test_odd_rows(row):
    module = build_int8(layer(bias=False), {}).eval()
    x = torch.stack([row, torch.randn(64)])
    with torch.no_grad():
        y = module(x)
    wanted = x.double() @ module.matrix().detach().double().T
    assert bool(y.isfinite().all())
    # What 8-bit weights and 255 levels of this row may lose, and no more.
    bound = 0.02 * float(row.double().norm() * module.matrix().detach().double().norm(dim=1).max())
    assert float((y[0] - wanted[0]).abs().max()) <= bound + 1e-30


def test_a_sample_does_not_depend_on_those_beside_it():
    module = build_int8(layer(), {}).eval()
    x = torch.randn(4, 9, 64)
    x[2] *= 1000
    with torch.no_grad():
        whole = module(x)
        assert torch.equal(module(x[:2]), whole[:2])
        assert torch.equal(module(x[1:, 3:5]), whole[1:, 3:5])


def test_one_row_alone_agrees_to_a_step():
    module = build_int8(layer(), {}).eval()
    x = torch.randn(6, 64)
    with torch.no_grad():
        whole = module(x)
        one = torch.cat([module(row[None]) for row in x])
    step = (x.amax(1) - x.amin(1)) / 254
    size = module.matrix().detach().abs().sum(1).max() * step.max()
    assert float((one - whole).abs().max()) < float(size)
    assert float((one - whole).norm() / whole.norm()) < 0.02


@pytest.mark.parametrize("missing", [True, False])
def test_without_the_kernel_results_are_equal(missing, monkeypatch):
    """To 1e-5 of |x| |W|; what is multiplied is the same."""
    module = build_int8(layer(512, 16), {}).eval()
    x = torch.randn(8, 512)
    with torch.no_grad():
        y = module(x)
        if missing:
            monkeypatch.setattr(product, "has_kernel", lambda: False)
        module.eval()  # packs anew
        z = module(x)
        assert (module._packed.blob is None) == (missing or not product.has_kernel())
    bound = 1e-5 * float((x.abs() @ module.matrix().detach().abs().T).max())
    assert float((y - z).abs().max()) <= bound


def test_a_kernel_that_saturates_is_not_taken(monkeypatch):
    wrong = lambda u, blob, scale, zeros: torch.full((2, 4), 32767.0)  # noqa: E731
    monkeypatch.setattr(product, "_qlinear", wrong)
    product.has_kernel.cache_clear()
    try:
        assert not product.has_kernel()
    finally:
        product.has_kernel.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_it_keeps_the_dtype_of_its_input(dtype):
    module = build_int8(layer(), {}).to(dtype).eval()
    x = torch.randn(5, 64, dtype=dtype)
    with torch.no_grad():
        y = module(x)
    assert y.dtype == dtype
    wanted = x.double() @ module.matrix().detach().double().T + module.bias.detach().double()
    assert float((y.double() - wanted).norm() / wanted.norm()) < 0.02


def test_empty_batches_and_layers():
    module = build_int8(layer(), {}).eval()
    with torch.no_grad():
        assert module(torch.zeros(0, 64)).shape == (0, 24)
        assert module(torch.zeros(2, 0, 64)).shape == (2, 0, 24)
        dense = layer()
        dense.weight = nn.Parameter(torch.zeros(24, 0))
        empty = build_int8(dense, {}).eval()
        assert torch.equal(empty(torch.zeros(2, 0)), empty.bias.expand(2, 24))


def test_weights_that_are_not_finite_show():
    module = build_int8(layer(), {}).eval()
    with torch.no_grad():
        module.weight[3, 3] = torch.nan
        y = module(torch.ones(2, 64))
    assert bool(y[:, 3].isnan().all()) and not bool(y[:, 4].isnan().any())


# --- the packed weight follows the weight ---------------------------------------------------------


def same(module: nn.Module, fresh: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(module(x), fresh(x))


def test_a_changed_weight_is_packed_anew():
    module, x = build_int8(layer(), {}).eval(), torch.randn(3, 64)
    changes = [
        lambda m: m.weight.mul_(-2),
        lambda m: m.load_state_dict(layer(seed=7).state_dict()),
        lambda m: setattr(m, "weight", nn.Parameter(torch.randn(24, 64))),
        lambda m: m.double().float(),
        lambda m: (m.weight.data.add_(0.5), m.eval()),
    ]
    for i, change in enumerate(changes):
        with torch.no_grad():
            before = module(x)
            change(module)
        plain = nn.Linear(64, 24)
        plain.load_state_dict(module.state_dict())
        assert same(module, build_int8(plain, {}).eval(), x), i
        with torch.no_grad():
            assert torch.equal(before, module(x)) == (i == 3), i


def test_copies_and_state_dicts():
    module, x = build_int8(layer(), {}).eval(), torch.randn(3, 64)
    with torch.no_grad():
        y = module(x)
    twin = copy.deepcopy(module)
    assert twin._packed is None and same(twin, module, x)
    with torch.no_grad():
        twin.weight.zero_()
        assert torch.equal(module(x), y), "the copy has its own weight"
    assert list(module.state_dict()) == ["weight", "bias"]
    held = io.BytesIO()
    torch.save(module, held)
    held.seek(0)
    assert same(torch.load(held, weights_only=False), module, x)


def test_parameters_stay_tied():
    net = nn.Module()
    net.table, net.head = nn.Embedding(24, 64), nn.Linear(64, 24, bias=False)
    net.head.weight = net.table.weight
    install(net, [Edit("head", "int8", {"bits": 8})])
    assert net.head.weight is net.table.weight and isinstance(net.head, Integer)


def test_released_it_computes_the_same_without_its_floats():
    module, x = build_int8(layer(), {}).eval(), torch.randn(3, 64)
    with torch.no_grad():
        y = module(x)
        module.release()
        assert module.weight.is_meta and torch.equal(module(x), y)
        assert torch.equal(copy.deepcopy(module)(x), y)
        assert torch.equal(module.train().eval()(x), y)


def test_training_passes_gradients_straight_through():
    dense = layer()
    module = build_int8(copy.deepcopy(dense), {}).train()
    x = torch.randn(5, 64, requires_grad=True)
    y = module(x)
    y.sum().backward()
    with torch.no_grad():
        assert torch.allclose(y, copy.deepcopy(module).eval()(x), atol=1e-5)
    assert torch.allclose(x.grad, module.matrix().sum(0).expand(5, 64), atol=0.05)
    assert torch.allclose(module.weight.grad, x.sum(0).expand(24, 64), atol=0.1)
    assert torch.equal(module.bias.grad, torch.full((24,), 5.0))
    assert module.eval()(x).requires_grad, "evaluation has gradients too, where they are asked for"


def test_autocast_does_not_reach_in():
    module, x = build_int8(layer(), {}), torch.randn(5, 64)
    for mode in (True, False):
        module.train(mode)
        plain = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), plain)


# --- Hugging Face's Conv1D, files, exporters ------------------------------------------------------


def test_conv1d_keeps_its_orientation():
    torch.manual_seed(3)
    dense = Conv1D(24, 64).eval()
    net = nn.Sequential(copy.deepcopy(dense))
    install(net, [Edit("0", "int8", {"bits": 8})])
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        y, z = dense(x), net.eval()(x)
    assert net[0].weight.shape == (64, 24) and net[0].nf == 24
    assert any(kind.__name__ == "Conv1D" for kind in type(net[0]).__mro__)
    assert 0 < float((y - z).norm() / y.norm()) < 0.02
    assert same(copy.deepcopy(net[0]), net[0], x)


@pytest.mark.parametrize("values", ["own", "coarse", "plain"])
def test_a_file_gives_the_same_bits(values):
    net = nn.Sequential(layer()).eval()
    x = torch.randn(4, 64)
    weight = net[0].weight.detach()
    coarse = torch.round(weight / 0.01).to(torch.int32)
    edits = [Edit("0", "int8", {"bits": 8})]
    if values == "own":
        edits.append(Edit("0.weight", "values", values=grid_of(weight)))
    if values == "coarse":
        edits.append(Edit("0.weight", "values", values=Grid(coarse, 0.01)))
    install(net, edits)
    loaded = restore(unpack(pack(net, tuple(edits), "module", {})), nn.Sequential(layer(seed=9)))
    assert same(loaded.eval(), net, x)
    if values == "coarse":
        integers, scale = net[0].integers()
        assert torch.equal(integers.int(), coarse) and scale.unique().numel() == 1


def test_an_exportable_layer_is_plain_operations():
    module, x = build_int8(layer(), {}).eval(), torch.randn(3, 64)
    plain = module.exportable()
    assert plain.integers.dtype == torch.int8 and plain.integers.shape == (24, 64)
    with torch.no_grad():
        assert torch.allclose(plain(x), module(x), atol=1e-5)
        program = torch.export.export(plain, (x,))
        assert torch.allclose(program.module()(x), module(x), atol=1e-5)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("onednn" in name or "quantized" in name for name in names), names


def test_a_layer_can_be_exported_as_it_is():
    module, x = build_int8(layer(), {}).eval(), torch.randn(3, 64)
    with torch.no_grad():
        program = torch.export.export(module, (x,))
        assert torch.allclose(program.module()(x), module(x), atol=1e-5)


# --- rounding weights -----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 40), st.floats(1e-6, 1e6))
def test_a_rounded_weight_rounds_to_itself(seed, outputs, inputs, size):
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=source) * size
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        if dtype == torch.float16 and not 1e-2 < size < 1e2:
            continue
        grid = grid_of(weight.to(dtype))
        dense = grid.dense()
        again = grid_of(dense)
        assert torch.equal(again.symbols, grid.symbols) and torch.equal(again.dense(), dense)
        assert torch.equal(again.exponents, grid.exponents)
        found = find_grid(dense)
        assert found is not None and torch.equal(found.dense(), dense)


def test_scales_are_those_of_a_grid():
    exponents = torch.arange(-80, 60, dtype=torch.int32)
    assert torch.equal(scales_of(exponents), exponent_scale(exponents))
    weight = torch.randn(8, 32)
    q, scale = round_weight(weight, search=False)
    assert torch.equal(q * scale[:, None], grid_of(weight).dense())
    assert torch.equal(scale, exponent_scale(exponents_of(weight)))
    assert int(q.abs().max()) <= 127
    assert bool((q.abs().amax(1) >= 104).all()), "a scale is more than 2^(1/4) too large"


def test_float_weights_are_on_no_grid():
    weight = torch.randn(16, 64)
    assert find_grid(weight) is None and find_grid(weight[0]) is None
    dense = grid_of(weight).dense()
    dense[3, 3] = torch.nextafter(dense[3, 3], torch.tensor(9.0))
    assert find_grid(dense) is None
    assert find_grid(grid_of(weight.T, True).dense()).axis == 1
    dense = grid_of(weight).dense()
    dense[0, 0] = -0.0
    assert find_grid(dense) is None, "a negative zero would not come back"


def test_columns_may_have_scales_of_their_own():
    """Values that no scale per row can hold are rounded, not taken for a grid."""
    columns = Grid(torch.randint(-7, 8, (8, 64)).int(), 1.0, torch.randint(-6, 7, (64,)).int())
    q, scale = round_weight(columns.dense())
    assert float((q * scale[:, None] - columns.dense()).abs().max()) <= float(scale.max()) / 2


@pytest.mark.parametrize(
    ("module", "given"),
    [
        (GroupedLinear(4, 4, 2), {}),
        (nn.Conv2d(1, 1, 1), {}),
        (nn.Linear(2, 2), {"bits": 4}),
        (nn.Linear(2, 2), {"rank": 1}),
    ],
    ids=["grouped", "conv", "bits", "setting"],
)
def test_it_refuses_by_name(module, given):
    with pytest.raises(FileError) as caught:
        install(nn.Sequential(module), [Edit("0", "int8", given)])
    assert "0" in str(caught.value) and "\n" not in str(caught.value)
