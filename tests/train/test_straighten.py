"""Training with a pull: what is truly linear becomes so, what is not resists a weak pull."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lamina.data import Data, TensorLoader
from lamina.errors import DataError, MethodError
from lamina.network.source import Network
from lamina.train.slope import Blend, Pull
from lamina.train.straighten import Straightening, straighten


def problem(linear: bool) -> Data:
    """Two classes: by a plane, or by XOR of two signs."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1024, 4, generator=g)
    y = (x[:, 0] + x[:, 1] > 0) if linear else (x[:, 0] * x[:, 1] > 0)
    return Data(train=TensorLoader(x, y.long(), 64, shuffle=True))


def network(act: type[nn.Module] = nn.ReLU) -> Network:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 32), act(), nn.Linear(32, 2)).eval()
    return Network(module, (torch.zeros(1, 4),), loss="logits")


WEAK = Straightening(epochs=30, lr=1e-2, distill=0.0, reached=1.0, pull=Pull("penalty", 0.05))


def accuracy(module: nn.Module, data: Data) -> float:
    hits = [(module(x).argmax(1) == y).double() for x, y in data.train or ()]
    return 100 * float(torch.cat(hits).mean())


def test_a_linear_task_lets_go_of_the_activation_and_xor_does_not() -> None:
    for linear in (True, False):
        data = problem(linear)
        net = network()
        result = straighten(net, net.module, ["1"], data, WEAK)
        blend = result.module.get_submodule("1")
        assert isinstance(blend, Blend)
        assert accuracy(result.module, data) > 93
        if linear:
            assert result.bends["1"] < 0.05 and blend.bend == 0.0
        else:
            assert result.bends["1"] > 0.3 and blend.bend > 0.3
    strong = Straightening(epochs=30, lr=5e-3, distill=0.0)
    forced = straighten(net, net.module, ["1"], data, strong)
    assert accuracy(forced.module, data) < 75, "no linear map is XOR"


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU])
def test_it_starts_as_the_original_and_leaves_that_alone(act: type[nn.Module]) -> None:
    net, data = network(act), problem(True)
    before = copy.deepcopy(net.module.state_dict())
    state = torch.random.get_rng_state()
    settings = Straightening(epochs=1, lr=1e-9, pull=Pull(strength=0.0), reached=1.0)
    result = straighten(net, net.module, ["1"], data, settings)
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(result.module(x), net.module(x), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in net.module.state_dict().items())
    assert isinstance(net.module[1], act) and not result.module.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert result.history[0]["step"] == 1


def test_it_is_repeatable_and_a_seed_changes_it() -> None:
    net, data = network(), problem(True)
    net = replace(net, module=nn.Sequential(*net.module[:2], nn.Dropout(0.3), net.module[2]))  # type: ignore[index]
    rows = [
        straighten(net, net.module, ["1"], data, Straightening(epochs=2, seed=s)).module
        for s in (0, 0, 1)
    ]
    weights = [m[0].weight for m in rows]  # type: ignore[index]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_after_its_share_every_blend_is_the_identity_and_the_rest_is_linear() -> None:
    net, data = network(), problem(False)
    settings = Straightening(epochs=4, pull=Pull(strength=0.5), reached=0.5)
    result = straighten(net, net.module, ["1"], data, settings)
    assert result.bends["1"] > 0.3, "this pull is weak"
    assert result.module.get_submodule("1").bend == 0.0  # type: ignore[operator]
    shares = [row["bend"] for row in result.history]
    assert shares[0] > 0.9 and shares[-1] == 0.0
    x = torch.randn(3, 4)
    lines = result.module(x) - result.module(torch.zeros(3, 4))
    torch.testing.assert_close(
        result.module(2 * x) - result.module(torch.zeros(3, 4)), 2 * lines, rtol=1e-4, atol=1e-5
    )


def test_without_paths_it_is_plain_training() -> None:
    net, data = network(), problem(False)
    result = straighten(net, net.module, [], data, WEAK)
    assert not result.bends and not any(isinstance(m, Blend) for m in result.module.modules())
    assert accuracy(result.module, data) > 93 > accuracy(net.module, data)


def test_what_was_snapped_before_stays_snapped() -> None:
    net, data = network(), problem(True)
    first = straighten(net, net.module, ["1"], data, Straightening(epochs=2))
    second = straighten(net, first.module, ["1"], data, Straightening(epochs=2))
    blend = second.module.get_submodule("1")
    assert isinstance(blend, Blend) and blend.bend == 0.0 and not second.bends
    assert not torch.equal(first.module[0].weight, second.module[0].weight)  # type: ignore[index]


def test_decay_leaves_linearities_alone() -> None:
    net, data = network(), problem(True)
    nothing = Straightening(epochs=3, lr=1e-3, decay=100.0, pull=Pull(strength=0.0, tau=0.0),
                            reached=1.0, distill=1.0)  # fmt: skip
    start = copy.deepcopy(net.module)
    start[1] = Blend(nn.ReLU(), 0.5)
    result = straighten(net, start, ["1"], data, nothing)
    sizes = [m[0].weight.detach().norm() for m in (result.module, net.module)]  # type: ignore[index]
    assert sizes[0] < 0.2 * sizes[1]
    assert 0.3 < 1 - result.bends["1"] < 0.7


def test_it_refuses_what_cannot_be_trained() -> None:
    net, data = network(), problem(True)
    with pytest.raises(DataError, match="needs training data"):
        straighten(net, net.module, ["1"], Data(), Straightening())
    with pytest.raises(DataError, match="not finite"):
        straighten(net, net.module, ["1"], data, Straightening(epochs=20, lr=1e30, clip=0.0))
    with pytest.raises(MethodError, match="reached=2"):
        Straightening(reached=2)


def test_where_nothing_but_the_original_teaches_it_does() -> None:
    """Without labels, or for features, a weight of 0 would leave nothing to learn from."""
    net, data = network(), problem(True)
    bare = Data(train=[x for x, _ in data.train or ()])
    settings = replace(WEAK, epochs=3, pull=Pull(strength=5.0), reached=0.5)
    for given, loss in ((bare, "logits"), (data, "features")):
        taught = straighten(replace(net, loss=loss), net.module, ["1"], given, settings)
        blend = copy.deepcopy(net.module)
        blend[1] = nn.Identity()
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            away, before = ((m(x) - net.module(x)).norm() for m in (taught.module, blend))
        assert away < 0.95 * before, "without a teacher nothing but the activation changes"
