"""Group pressure: the penalty's gradient, levels, the controller, a network that comes apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.measure.blocks import Order, cut_costs, start_order, support
from lamina.train.shuffle import (
    Shuffled,
    Strength,
    final_levels,
    first_order,
    group_mask,
    group_penalty,
    group_sparsity,
    norms,
    reorder,
)


def planted(n: int, c: int, groups: int, noise: float = 0.0, taps: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(7)
    weight = torch.randn(n, c, taps, taps, generator=g)
    weight *= (support(n, c, groups).float() + noise)[:, :, None, None]
    return weight[torch.randperm(n, generator=g)][:, torch.randperm(c, generator=g)]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_gradient_is_the_sign_times_the_cost_of_the_place(level):
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    order = start_order(8, 4, 5)
    group_penalty({"w": weight}, {"w": Shuffled(order, level)}).backward()
    R = cut_costs(8, 4, depth=level)
    for a in range(8):
        for b in range(4):
            o, i = int(order.rows[a]), int(order.cols[b])
            wanted = weight.detach()[o, i].sign() * float(R[a, b])
            torch.testing.assert_close(weight.grad[o, i], wanted)


def test_only_the_next_cut_is_under_pressure_at_first():
    weight = torch.ones(4, 4)
    order = start_order(4, 4)
    assert float(group_penalty({"w": weight}, {"w": Shuffled(order)})) == 8.0
    assert float(group_penalty({"w": weight}, {"w": Shuffled(order, 2)})) == 8.0 + 0.5 * 4
    assert float(group_penalty({"w": weight}, {})) == 0.0


def test_norms_are_of_connections():
    weight = torch.randn(3, 2, 5)
    assert torch.allclose(norms(weight), weight.double().abs().sum(2))
    assert torch.allclose(norms(weight[:, :, 0]), weight[:, :, 0].double().abs())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_order_finds_planted_groups_and_its_mask_keeps_them(groups):
    weight = planted(16, 8, groups, noise=1e-4)
    layer = first_order(weight, cut=0.02, starts=20)
    assert layer.groups == groups
    mask = group_mask(weight.shape, layer)
    assert mask.shape == weight.shape
    assert float((weight * (1 - mask)).abs().sum()) <= 0.02 * float(weight.abs().sum())
    assert float(mask.mean()) == pytest.approx(1 / groups)
    again = reorder(weight, layer, cut=0.02)
    assert again.level == layer.level
    before, after = (group_penalty({"w": weight}, {"w": x}) for x in (layer, again))
    assert float(after) <= float(before) + 1e-5


def test_reordering_betters_a_bad_order():
    weight = planted(16, 8, 2, noise=0.01)
    bad = Shuffled(Order(torch.arange(16), torch.arange(8)))
    better = reorder(weight, bad)
    assert group_penalty({"w": weight}, {"w": Shuffled(better.order)}) < 0.9 * group_penalty(
        {"w": weight}, {"w": bad}
    )


def test_sparsity_counts_every_weight():
    layers = {"a": Shuffled(start_order(8, 8), 3), "b": Shuffled(start_order(8, 8))}
    assert group_sparsity({"a": 64, "b": 64}, layers) == pytest.approx(1 - (16 + 64) / 128)
    assert group_sparsity({"a": 64, "c": 192}, layers) == pytest.approx(48 / 256)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.1, 0.9), st.integers(0, 5))
def test_the_strength_is_never_negative_and_none_while_it_warms_up(seen, goal, warm):
    strength = Strength(goal, epochs=20, warm=warm)
    for epoch, sparsity in enumerate(seen):
        before = strength
        strength = strength.steer(sparsity)
        assert strength.value >= 0
        assert abs(strength.value - before.value) <= strength.delta * 1.000001
        if sparsity >= goal:
            assert strength.value <= before.value
        if epoch + 1 < warm:
            assert strength.value == 0.0


def test_the_strength_rises_while_too_little_is_gained_and_rests_otherwise():
    strength = Strength(0.5, epochs=10)
    slow = strength.steer(0.01)
    assert slow.value == pytest.approx(strength.delta)
    assert slow.steer(0.2).value == slow.value, "more than an even share: no change"
    assert slow.steer(0.6).value == 0.0
    assert slow.steer(0.6).steer(0.7).value == 0.0


@pytest.mark.parametrize("goal", [0.0, 0.2, 0.4, 0.6, 0.75])
def test_the_levels_at_the_end_reach_the_goal(goal):
    g = torch.Generator().manual_seed(1)
    weights = {f"w{k}": torch.randn(8, 8, generator=g).abs() ** k for k in (1, 3, 6, 9)}
    layers = {name: first_order(w) for name, w in weights.items()}
    sizes = dict.fromkeys(weights, 64)
    found, cut = final_levels(weights, layers, goal)
    reached = group_sparsity(sizes, found)
    assert reached >= goal
    cuts = [i / 256 for i in range(257)]
    least = min(
        s for s in (group_sparsity(sizes, levels_at(weights, layers, c)) for c in cuts) if s >= goal
    )
    assert reached <= max(least, goal + 0.01) + 0.15, "not far over it"
    assert 0 <= cut <= 1


def levels_at(weights, layers, cut):
    from lamina.measure.blocks import reached_level

    return {
        n: Shuffled(x.order, reached_level(x.order.of(norms(weights[n])), cut))
        for n, x in layers.items()
    }


def test_what_cannot_be_reached_takes_every_layer_to_its_end():
    weights = {"w": torch.rand(4, 4)}
    found, cut = final_levels(weights, {"w": first_order(weights["w"])}, 0.99)
    assert found["w"].groups == 4 and cut > 0.9


def test_a_network_under_pressure_comes_apart_and_one_without_does_not():
    """Every input comes twice: each half of the outputs can have its own copy, or mix both."""

    def train(strength: float) -> tuple[float, float]:
        g = torch.Generator().manual_seed(0)
        target = torch.randn(8, 4, generator=g)
        copies = torch.randperm(8, generator=g) % 4
        weight = (0.3 * torch.randn(8, 8, generator=g)).requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=0.02)
        state = first_order(weight)
        for step in range(400):
            z = torch.randn(64, 4, generator=g)
            loss = (z[:, copies] @ weight.T - z @ target.T).square().sum(1).mean()
            optimizer.zero_grad()
            (loss + strength * group_penalty({"w": weight}, {"w": state})).backward()
            optimizer.step()
            if step % 40 == 39:
                state = reorder(weight, state)
        S = state.order.of(norms(weight))
        return float((S * (1 - support(8, 8, 2))).sum() / S.sum()), float(loss.detach())

    (free, _), (pressed, loss) = train(0.0), train(0.2)
    assert pressed < 0.12 < 0.3 < free
    assert loss < 0.2, "and still does its task"
