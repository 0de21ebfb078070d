"""Lossless structure: what is planted goes, what is not stable stays, and outputs are the same."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lamina import artifact
from lamina.errors import BudgetError, NetworkError, PlanError
from lamina.forms import install
from lamina.measure.bounds import Limits
from lamina.measure.bounds.witness import points_of
from lamina.network.source import Network
from lamina.plan.rewrite import compose, rewrite
from lamina.plan.stable import Box, Structure, differences, find_structure
from lamina.plan.stable.read import read_chain
from lamina.plan.stable.shrink import dependence

UNIT = Box((0.0,), (1.0,))


def mlp(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def network(module: nn.Module, *shape: int) -> Network:
    like = next(module.parameters())
    return Network(module.eval(), (torch.zeros(1, *shape, dtype=like.dtype),), name="net")


def close(before: Network, found: Structure, box: Box = UNIT, limit: float = 1e-5) -> None:
    """Outputs are the same at 10,000 points of the box, corners included."""
    assert found.rewritten is not None
    bounds = box.bounds(before.example_inputs[0].shape[1:])
    apart, size = differences(before, found.rewritten.network, points_of(bounds, 10_000, 7))
    assert apart <= limit * max(1.0, size)


def params(net: Network) -> int:
    return sum(p.numel() for p in net.module.parameters())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_outputs_are_the_same_on_the_box_and_may_differ_outside(
    dtype: torch.dtype, limit: float
) -> None:
    module = mlp(6, 12, 10, 3, dtype=dtype)
    with torch.no_grad():
        module[0].bias[2] = -1e3
        module[0].weight[5] = 0.7  # always on in the box, and not below it
        module[0].bias[5] = 0.1
        module[0].weight[6] = 1.4
        module[0].bias[6] = 0.3  # twice the other, and a shift: dependent, not proportional
        module[2].bias[:3] = -20.0
    before = network(module, 6)
    found = find_structure(before, UNIT)
    close(before, found, limit=limit)
    whats = {entry["what"] for entry in found.log["removed"]}
    assert {"inactive", "dependent"} <= whats
    made = found.rewritten.network  # type: ignore[union-attr]
    assert params(made) < params(before)
    far = 1e4 * module[0].weight[2].detach().sign()[None]  # on at last: the negative control
    assert float((before.forward(far) - made.forward(far)).abs().max()) > 0.01


def test_each_planted_unit_goes_by_name() -> None:
    module = mlp(5, 8, 6, 2, dtype=torch.float64)
    with torch.no_grad():
        first = module[0]
        first.bias[3] = -1e3
        first.weight[:3] = torch.rand(3, 5) + 0.1
        first.bias[:3] = torch.tensor([1.0, 2.0, 5.0])
        first.weight[2] = 2 * first.weight[0] + 4 * first.weight[1]
        first.weight[7], first.bias[7] = 4 * first.weight[6], 4 * first.bias[6]
        first.weight[6, 0], first.weight[7, 0] = 3.0, 12.0
        first.weight[6, 1], first.weight[7, 1] = -3.0, -12.0
    before = network(module, 5)
    found = find_structure(before, UNIT)
    close(before, found, limit=1e-10)
    gone = {(e["layer"], e["unit"]): e for e in found.log["removed"]}
    assert gone["0", 3]["what"] == "inactive" and gone["0", 3]["rung"] == "interval"
    assert gone["0", 3]["bound"] < -900
    (trio,) = [u for (layer, u), e in gone.items() if layer == "0" and e["what"] == "dependent"]
    assert trio in (0, 1, 2)  # one of the three, whichever pivoting leaves over
    (pair,) = [u for (layer, u), e in gone.items() if e["what"] == "proportional"]
    assert pair in (6, 7) and gone["0", pair]["rung"] == "algebra"
    before_, after = found.log["units"]["0"]
    assert (before_, after) == (8, 5)


def test_nothing_is_removed_when_nothing_is_stable() -> None:
    module = mlp(6, 8, 8, 2)
    with torch.no_grad():
        for layer in (module[0], module[2]):
            layer.bias.zero_()
            layer.weight.copy_(torch.randn_like(layer.weight))
    found = find_structure(network(module, 6), Box((-1.0,), (1.0,)))
    assert found.rewritten is None and found.log["removed"] == []
    assert all(a == b for a, b in found.log["units"].values())
    assert "none of 16 units" in found.describe()


@given(seed=st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_it_is_idempotent_and_never_grows(seed: int) -> None:
    torch.manual_seed(seed)
    module = mlp(4, 7, 6, 5, 2, seed=seed).double()
    with torch.no_grad():
        for layer in (module[0], module[2], module[4]):
            layer.bias += torch.randn_like(layer.bias)
    before = network(module, 4)
    found = find_structure(before, UNIT)
    assert all(after <= count for count, after in found.log["units"].values())
    if found.rewritten is None:
        return
    close(before, found, limit=1e-10)
    assert params(found.rewritten.network) <= params(before)
    again = find_structure(found.rewritten.network, UNIT)
    assert again.rewritten is None, again.log["removed"]


def test_a_layer_that_is_always_on_is_folded_away() -> None:
    module = mlp(6, 5, 4, 3)
    with torch.no_grad():
        module[0].bias += 5.0
        shift = module[2](module[0](torch.full((1, 6), 0.5)))[0]
        module[2].bias -= shift  # on and off
    before = network(module.double(), 6)
    found = find_structure(before, UNIT)
    made = found.rewritten.network.module  # type: ignore[union-attr]
    assert isinstance(made[0], nn.Identity) and isinstance(made[1], nn.Identity)
    assert made[2].in_features == 6 and made[2].out_features == 4
    close(before, found, limit=1e-10)
    edits = found.rewritten.edits  # type: ignore[union-attr]
    assert {e.form for e in edits} >= {"identity"}


class Called(nn.Module):
    """An MLP whose ReLUs are calls: they cannot become nothing."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        pairs = pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def test_where_the_relu_is_a_call_the_next_one_does_for_both() -> None:
    torch.manual_seed(0)
    module = Called(6, 5, 4, 3).double()
    with torch.no_grad():
        module.layers[0].bias += 5.0
        shift = module.layers[1](module.layers[0](torch.full((1, 6), 0.5).double()))[0]
        module.layers[1].bias -= shift
    before = network(module, 6)
    found = find_structure(before, UNIT)
    close(before, found, limit=1e-10)
    made = found.rewritten.network.module  # type: ignore[union-attr]
    assert isinstance(made.layers[1], nn.Identity)
    last = Called(6, 5, 3).double()  # no ReLU comes after: nothing is folded, and it is said
    with torch.no_grad():
        last.layers[0].bias += 1e3
    stays = find_structure(network(last, 6), UNIT)
    assert any("is a call" in note for note in stays.log["notes"])


def test_a_network_without_a_living_unit_is_a_constant() -> None:
    module = mlp(6, 5, 4, 3)
    with torch.no_grad():
        module[2].bias -= 1e3
    before = network(module, 6)
    found = find_structure(before, UNIT)
    close(before, found)
    made = found.rewritten.network  # type: ignore[union-attr]
    assert params(made) == (6 + 1) + (1 + 1) + (3 + 3)
    assert find_structure(made, UNIT).log["removed"] == []
    outputs = made.forward(points_of(UNIT.bounds((6,)), 50).float())
    assert float((outputs - outputs[:1]).abs().max()) == 0


def test_constant_units_become_biases_also_of_layers_without_one() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        module[0].weight[1] = 0.0
        module[0].bias[1] = 2.5
        module[0].weight[0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
        module[0].weight[2] = torch.tensor([1.0, 1.0, -1.0, -1.0])
        module[0].bias[0] = module[0].bias[2] = 0.0
    before = network(module, 4)
    found = find_structure(before, UNIT)
    close(before, found)
    assert [(e["unit"], e["what"]) for e in found.log["removed"]] == [(1, "constant")]
    made = found.rewritten.network.module  # type: ignore[union-attr]
    assert made[2].bias is not None and made[0].out_features == 2


# --- convolutions --------------------------------------------------------------------------------


def cnn(norm: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = [nn.Conv2d(2, 6, 3, padding=1, bias=not norm)]
    layers += [nn.BatchNorm2d(6)] if norm else []
    layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()]
    layers += [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).eval()


QUICK = Limits(rungs=("interval", "relaxed"))


@pytest.mark.parametrize("norm", [True, False])
def test_channels_that_are_never_on_go(norm: bool) -> None:
    module = cnn(norm)
    with torch.no_grad():
        if norm:
            module[1].running_mean.uniform_(-1, 1)
            module[1].running_var.uniform_(0.5, 2)
            module[1].bias[2] = -40.0
        else:
            module[0].bias[2] = -40.0
        conv = module[4 if norm else 3]
        conv.weight[5], conv.bias[5] = -conv.weight[5].abs(), -0.1
        conv.bias[6] = 50.0  # always on: a channel of a convolution stays
    before = network(module, 2, 8, 8)
    box = Box((-1.0, 0.0), (1.0, 2.0))
    found = find_structure(before, box, QUICK)
    close(before, found, box)
    assert {(e["layer"], e["unit"]) for e in found.log["removed"]} >= {
        ("0", 2), ("4" if norm else "3", 5)
    }  # fmt: skip
    assert {e["what"] for e in found.log["removed"] if e["layer"] != "8"} == {"inactive"}
    made = found.rewritten.network.module  # type: ignore[union-attr]
    assert made[0].out_channels == 5 and made[-3].in_features == 7 * 4


def test_padding_positions_count() -> None:
    """A channel that is off inside the image, and on at its border, stays."""
    module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    with torch.no_grad():
        module[0].weight[0], module[0].weight[1] = -1.0, 1.0
        module[0].bias[0] = 5.0  # nine pixels of at least .6 make -.4; at a corner four make 2.6
    box = Box((0.6,), (1.0,))
    before = network(module, 1, 4, 4)
    assert ("0", 0) not in {
        (e["layer"], e["unit"]) for e in find_structure(before, box, QUICK).log["removed"]
    }
    with torch.no_grad():
        module[0].bias[0] = 2.3
    assert ("0", 0) in {
        (e["layer"], e["unit"]) for e in find_structure(before, box, QUICK).log["removed"]
    }


# --- what is refused -----------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(F.relu(self.b(x)) + x)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(1, 2, 3), nn.Conv1d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.max_pool1d(self.a(x).relu(), 2))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x).relu()).relu())


@pytest.mark.parametrize(
    ("build", "shape", "why"),
    [
        (Residual, (4,), "read more than once"),
        (Pooled, (1, 8), "is a call"),
        (Twice, (4,), "no layer of its own"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), (4,), "gelu at 1"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (3, 4), "position"),
        (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), (4,), "no layer"),
    ],
)
def test_other_networks_are_refused_with_the_reason(
    build: Callable[[], nn.Module], shape: tuple[int, ...], why: str
) -> None:
    with pytest.raises(NetworkError, match=why):
        find_structure(network(build(), *shape), UNIT)


def test_of_one_layer_nothing_is_removed() -> None:
    assert find_structure(network(nn.Sequential(nn.Linear(4, 2)), 4), UNIT).rewritten is None


def test_what_follows_the_last_layer_may_be_anything() -> None:
    module = nn.Sequential(*mlp(4, 6, 3), nn.LogSoftmax(1))
    with torch.no_grad():
        module[0].bias[1] = -9.0
    before = network(module, 4)
    found = find_structure(before, UNIT)
    close(before, found)
    assert found.log["units"]["0"][1] < 6


def test_hooks_and_ties_are_left_alone() -> None:
    module = mlp(4, 6, 6, 3)
    module[2].weight = nn.Parameter(module[2].weight.detach())
    module[0].register_forward_hook(lambda *a: None)
    with pytest.raises(NetworkError, match="has hooks"):
        find_structure(network(module, 4), UNIT)
    tied = mlp(6, 6, 6, 3)
    tied[2].weight = tied[0].weight
    with pytest.raises(NetworkError, match="shares its weight"):
        find_structure(network(tied, 6), UNIT)


# --- edits, proofs, boxes ------------------------------------------------------------------------


def planted(seed: int = 0) -> Network:
    module = mlp(6, 12, 10, 3, seed=seed)
    with torch.no_grad():
        module[0].bias[:4] = -30.0
        module[2].bias[:3] = -30.0
    return network(module, 6)


def test_the_edits_make_the_same_network_of_the_original_and_survive_the_file() -> None:
    before = planted()
    digest = before.digest()
    made = find_structure(before, UNIT).rewritten
    assert made is not None and before.digest() == digest
    other = copy.deepcopy(before.module)
    install(other, (*made.edits, *made.values))
    assert Network(other).digest() == made.network.digest()
    assert made.names == ("stable 0.0,1.0",)
    file = artifact.pack(made.network.module, made.edits, "module", {}, made.network.box)
    package = artifact.unpack(file)
    assert package.box == "0.0,1.0"
    loaded = artifact.restore(package, mlp(6, 12, 10, 3, seed=9))
    assert Network(loaded).digest() == made.network.digest()


def test_a_plan_names_it_and_finds_it_again() -> None:
    before = planted()
    made = find_structure(before, UNIT).rewritten
    assert made is not None
    again = rewrite(before, made.names)
    assert again.network.digest() == made.network.digest() and again.names == made.names
    with pytest.raises(PlanError, match="not found again"):
        rewrite(network(mlp(6, 4, 3, seed=3), 6), ("stable -9.0,9.0",))
    module = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        module[0].bias[2] = -40.0
    both = rewrite(network(module, 2, 3, 3), ("stable 0.0,1.0", "channels_last"))
    assert both.names == ("stable 0.0,1.0", "channels_last") and both.last
    assert compose(both, both).names == both.names * 2


def test_proofs_can_be_given_instead_of_made(monkeypatch: pytest.MonkeyPatch) -> None:
    before = planted()
    found = find_structure(before, UNIT)
    log = json.loads(json.dumps(found.log))  # as a run folder keeps it
    stable = importlib.import_module("lamina.plan.stable")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("proven again")

    monkeypatch.setattr(stable, "decide", never)
    again = find_structure(before, UNIT, proven=log["rounds"])
    assert again.rewritten is not None and found.rewritten is not None
    assert again.rewritten.network.digest() == found.rewritten.network.digest()
    assert again.log["removed"] == found.log["removed"]


def test_the_log_says_of_every_unit_what_proved_it() -> None:
    log = find_structure(planted(), UNIT).log
    for layer, (count, _) in log["units"].items():
        first = log["rounds"][0]["layers"][layer]
        named = {*first["inactive"], *first["active"], *map(str, first["open"])}
        assert len(named) + sum(first["both"].values()) == count
    for entry in log["removed"]:
        assert entry["rung"] in ("interval", "relaxed", "lp", "milp", "algebra")
        if entry["what"] == "inactive":
            assert entry["bound"] < 0


def test_where_rounding_would_show_nothing_is_merged() -> None:
    """A basis so ill-conditioned that float32 cannot hold it is refused, not taken."""
    module = mlp(3, 3, 2)
    with torch.no_grad():
        module[0].bias.fill_(50.0)
        module[0].weight[0] = torch.tensor([1.0, 1.0, 0.0])
        module[0].weight[1] = torch.tensor([1.0, 1.0 + 2**-20, 0.0])
        module[0].weight[2] = torch.tensor([0.0, 1.0, 0.0])  # 2^20 times their difference
        module[2].weight.copy_(torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1e-3]]))
    before = network(module, 3)
    found = find_structure(before, UNIT)
    if found.rewritten is not None:
        close(before, found)
    rows = module[0].weight.detach().double()
    basis, others, factors = dependence(rows)
    assert len(basis) == 2 and torch.allclose(factors @ rows[basis], rows[others], atol=1e-12)


def test_a_dependence_is_exact_or_none() -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 9, generator=random, dtype=torch.float64)
    basis, others, _ = dependence(rows)
    assert len(basis) == 4 and not len(others)  # independent
    mixed = torch.cat([rows, torch.randn(3, 4, generator=random, dtype=torch.float64) @ rows])
    basis, others, factors = dependence(mixed)
    assert (len(basis), len(others)) == (4, 3)
    assert float((factors @ mixed[basis] - mixed[others]).abs().max()) < 1e-12
    basis, others, factors = dependence(torch.zeros(3, 5, dtype=torch.float64))
    assert not len(basis) and len(others) == 3 and factors.shape == (3, 0)


@pytest.mark.parametrize(
    "text", ["", "1", "1,0", "a,b", "0,1,2", "0,inf", "0,nan", "0,1;2", None, 3]
)
def test_what_is_no_box_is_refused(text: object) -> None:
    with pytest.raises(BudgetError, match="cannot read the box"):
        Box.parse(text)


@given(st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(0, 1e9)), min_size=1, max_size=4))
def test_a_box_comes_back_from_its_text(pairs: list[tuple[float, float]]) -> None:
    box = Box(tuple(a for a, _ in pairs), tuple(a + w for a, w in pairs))
    assert Box.parse(box.text()) == box
    assert Box.parse((box.low, box.high)) == box
    assert (
        Box.parse(
            (
                torch.tensor(box.low, dtype=torch.float64),
                torch.tensor(box.high, dtype=torch.float64),
            )
        )
        == box
    )
    assert box.meet(box) == box


def test_a_box_fits_the_channels() -> None:
    box = Box((0.0, -1.0), (1.0, 1.0))
    assert box.bounds((2, 3)).low.tolist() == [[0.0] * 3, [-1.0] * 3]
    with pytest.raises(NetworkError, match="2 channels"):
        box.bounds((3, 3))
    images = torch.rand(5, 2, 4, 4) * torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    found = Box.around([images])
    assert found is not None and len(found.low) == 2
    assert found.high[1] == float(images[:, 1].max().double())
    assert Box.around([]) is None and Box.around([torch.zeros(2, 3, dtype=torch.int64)]) is None


def test_the_chain_is_what_the_network_computes() -> None:
    module = cnn(norm=False)
    chain = read_chain(network(module, 2, 8, 8))
    assert not isinstance(chain, str)
    assert [layer.path for layer in chain.layers] == ["0", "3", "7", "9"]
    assert [layer.why for layer in chain.layers[:-1]] == ["", "", ""]
    assert [chain.relu_of(i) for i in range(4)] == [1, 4, 8, None]
