"""Merging against running layers one by one, in float64; choices against brute force."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lamina.errors import InfeasibleError, MethodError
from lamina.methods.layer_merge.merging import (
    Conv,
    grown,
    merge,
    merge_two,
    no_identity,
    padded_first,
    regrouped,
    scaled,
    total_padding,
    with_identity,
)
from lamina.methods.layer_merge.search import (
    Entry,
    Layer,
    Solution,
    Subset,
    best_subsets,
    quickest,
    solve,
)

TIGHT = 1e-11


def draw(
    outputs: int, inputs: int, kernel: tuple[int, ...], stride=1, padding=0, groups: int = 1, seed=0
) -> Conv:
    g = torch.Generator().manual_seed(seed)
    axes = len(kernel)
    weight = torch.randn(outputs, inputs // groups, *kernel, generator=g, dtype=torch.float64)
    bias = torch.randn(outputs, generator=g, dtype=torch.float64)
    return Conv(weight, bias, (stride,) * axes, (padding,) * axes, groups)


def image(inputs: int, *size: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(9)
    return torch.randn(2, inputs, *size, generator=g, dtype=torch.float64)


def run(convs: list[Conv], x: torch.Tensor) -> torch.Tensor:
    for conv in convs:
        x = conv(x)
    return x


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    axes=st.integers(1, 2),
    count=st.integers(1, 4),
)
def test_the_merged_convolution_is_the_row_of_them(data, axes: int, count: int) -> None:
    """Any kernels, strides, paddings and groups, all padding at the first."""
    number = st.integers(1, 3)
    channels, convs = 4, []
    for i in range(count):
        groups = data.draw(st.sampled_from([1, 2, 4]))
        kernel = tuple(data.draw(number) for _ in range(axes))
        stride = tuple(data.draw(st.integers(1, 2 if i < 2 else 1)) for _ in range(axes))
        padding = tuple(data.draw(st.integers(0, k - 1)) for k in kernel)
        conv = draw(4, channels, kernel, groups=groups, seed=i)
        convs.append(replace(conv, stride=stride, padding=padding))
    x = image(4, *[23] * axes)
    one = merge(convs)
    assert one.kernel == grown([c.kernel for c in convs], [c.stride for c in convs])
    assert one.groups == math.gcd(*(c.groups for c in convs))
    assert apart(one(x), run(padded_first(convs), x)) < TIGHT
    assert one(x).shape == run(convs, x).shape  # moving the padding keeps every size


def test_three_axes() -> None:
    convs = [draw(3, 2, (2, 1, 3), 2, 1, seed=1), draw(4, 3, (1, 2, 2), 1, 0, seed=2)]
    x = image(2, 7, 8, 9)
    assert apart(merge(convs)(x), run(padded_first(convs), x)) < TIGHT


def test_padding_everywhere_differs_at_the_border_and_agrees_inside() -> None:
    """Negative control: without moving the padding it is not the same."""
    convs = [draw(3, 2, (3, 3), 1, 1, seed=1), draw(4, 3, (3, 3), 1, 1, seed=2)]
    x = image(2, 9, 9)
    one, two = merge(convs)(x), run(convs, x)
    assert apart(one, two) > 0.1
    assert apart(one[..., 1:-1, 1:-1], two[..., 1:-1, 1:-1]) < TIGHT


def test_depthwise_layers_stay_depthwise_among_themselves_and_become_dense_with_others() -> None:
    deep = [draw(6, 6, (3, 3), 1, 1, 6, seed=1), draw(6, 6, (3, 3), 1, 1, 6, seed=2)]
    one = merge(deep)
    assert (one.groups, tuple(one.weight.shape)) == (6, (6, 1, 5, 5))
    bottleneck = [draw(6, 2, (1, 1), seed=3), deep[0], draw(3, 6, (1, 1), seed=4)]
    dense = merge(bottleneck)
    assert (dense.groups, tuple(dense.weight.shape)) == (1, (3, 2, 3, 3))
    x = image(2, 8, 8)
    assert apart(dense(x), run(padded_first(bottleneck), x)) < TIGHT
    x = image(6, 8, 8)
    assert apart(one(x), run(padded_first(deep), x)) < TIGHT


def test_merging_is_associative() -> None:
    a, b, c = (
        draw(4, 4, (3, 3), s, 1, g, seed=i) for i, (s, g) in enumerate(((2, 2), (1, 4), (2, 1)))
    )
    left, right = merge_two(merge_two(a, b), c), merge_two(a, merge_two(b, c))
    assert apart(left.weight, right.weight) < TIGHT and apart(left.bias, right.bias) < TIGHT
    assert (left.stride, left.padding) == (right.stride, right.padding)


def test_a_folded_batch_norm_and_a_skip() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4).double().eval()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    first, second = draw(4, 4, (3, 3), 1, 1, seed=1), draw(4, 4, (1, 1), seed=2)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    shift = (norm.bias - scale * norm.running_mean).detach()
    one = with_identity(merge_two(scaled(first, scale, shift), second))
    x = image(4, 9, 9)
    with torch.no_grad():
        assert apart(one(x), x + second(norm(first(x)))) < TIGHT


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_skip_into_groups(groups: int) -> None:
    conv = draw(4, 4, (5, 3), 1, 0, groups)
    conv = replace(conv, padding=(2, 1))
    x = image(4, 9, 9)
    assert apart(with_identity(conv)(x), x + conv(x)) < TIGHT


@pytest.mark.parametrize(
    ("outputs", "kernel", "stride", "padding"),
    [(6, 3, 1, 1), (4, 3, 2, 1), (4, 3, 1, 0), (4, 2, 1, 1)],
)
def test_a_skip_that_does_not_fit_is_refused(outputs, kernel, stride, padding) -> None:
    conv = draw(outputs, 4, (kernel, kernel), stride, padding)
    with pytest.raises(MethodError, match="skip"):
        with_identity(conv)


def test_layers_that_do_not_follow_each_other() -> None:
    with pytest.raises(MethodError, match="gives 4 channels"):
        merge([draw(4, 2, (1,)), draw(2, 3, (1,))])


def test_fewer_groups_compute_the_same() -> None:
    conv = draw(8, 4, (3,), 1, 1, 4)
    for groups in (1, 2, 4):
        assert apart(regrouped(conv, groups)(image(4, 9)), conv(image(4, 9))) < TIGHT


def test_paddings_and_kernels_grow_with_the_strides_before_them() -> None:
    assert [grown(((3,), (3,)), ((s,), (1,))) for s in (1, 2, 3)] == [(5,), (7,), (9,)]
    assert total_padding([(1,), (1,), (2,)], [(2,), (3,), (1,)]) == (1 + 2 + 12,)
    assert no_identity(4, 4, (3,), (1,), (1,)) == ""


# --- the choice ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 3, 5]), st.integers(1, 2), st.sampled_from([1, 4]),
            st.integers(1, 50), st.booleans(),
        ),
        min_size=1,
        max_size=5,
    )
)  # fmt: skip
def test_the_best_subset_of_every_kernel(rows) -> None:
    """Against all subsets, one by one."""
    layers = [Layer((k,), (s,), g, float(n), r and s == 1) for k, s, g, n, r in rows]
    best: dict[tuple, float] = {}
    for kept in itertools.product([0, 1], repeat=len(layers)):
        if any(not k and not layer.reducible for k, layer in zip(kept, layers, strict=True)):
            continue
        taken = [layer for k, layer in zip(kept, layers, strict=True) if k]
        kernel = grown([v.kernel for v in taken], [v.stride for v in taken]) if taken else (1,)
        groups = math.gcd(*(v.groups for v in taken)) if taken else 0
        norm = sum(v.norm for v in taken)
        best[kernel, groups] = max(best.get((kernel, groups), -1.0), norm)
    found = best_subsets(layers)
    assert {(s.kernel, s.groups): s.norm for s in found} == best
    for subset in found:
        taken = [layers[i] for i in subset.kept]
        assert sum(v.norm for v in taken) == subset.norm
        assert all(layers[i].reducible for i in range(len(layers)) if i not in subset.kept)


def test_dropping_every_reducible_layer_leaves_one_convolution() -> None:
    kept = Layer((3,), (2,), 1, 1.0, False)
    gone = Layer((3,), (1,), 1, 9.0, True)
    found = best_subsets([gone, kept, gone])
    assert found[0] == Subset((1,), (3,), 1, 1.0)
    assert [s.kernel[0] for s in found] == [3, 5, 7, 9]


def brute(layers: int, entries: list[Entry], budget: float) -> Solution | None:
    """All rows of spans, one by one."""
    rows: list[list[tuple[Entry, ...]]] = [[()]] + [[] for _ in range(layers)]
    for j in range(1, layers + 1):
        for entry in entries:
            if entry.last == j:
                rows[j] += [(*before, entry) for before in rows[entry.first]]
    found = [
        Solution(r, math.fsum(e.seconds for e in r), math.fsum(e.error for e in r))
        for r in rows[layers]
    ]
    fits = [s for s in found if s.seconds <= budget]
    return min(fits, key=lambda s: (s.error, s.seconds), default=None)


def instance(layers: int, seed: int, ticks: bool) -> list[Entry]:
    g = torch.Generator().manual_seed(seed)
    entries = []
    for i, j in itertools.combinations(range(layers + 1), 2):
        for k in range(int(torch.randint(1, 3, (), generator=g))):
            time = (
                int(torch.randint(1, 30, (), generator=g))
                if ticks
                else 30 * float(torch.rand((), generator=g))
            )
            error = int(torch.randint(0, 1000, (), generator=g)) / 8
            entries.append(Entry(i, j, float(time), error, k))
    return entries


@pytest.mark.parametrize("seed", range(8))
def test_dynamic_programming_is_brute_force_for_all_budgets(seed: int) -> None:
    layers = 2 + seed % 4
    entries = instance(layers, seed, True)
    least = quickest(layers, entries)
    for budget in range(1, 130):
        if budget < least:
            with pytest.raises(InfeasibleError) as failed:
                solve(layers, entries, float(budget), 1.0)
            assert failed.value.nearest == {"seconds": least}
            continue
        found, best = solve(layers, entries, float(budget), 1.0), brute(layers, entries, budget)
        assert best is not None
        assert (found.error, found.seconds) == (best.error, best.seconds)


@pytest.mark.parametrize("seed", range(6))
def test_true_times_keep_to_the_budget_however_coarse_the_steps_are(seed: int) -> None:
    layers, entries = 5, instance(5, seed, False)
    least = quickest(layers, entries)
    for share in (1.0, 1.05, 1.3, 2.0):
        for precision in (None, 0.5, 7.0):
            budget = share * least
            found = solve(layers, entries, budget, precision)
            assert found.seconds <= budget
            assert [e.first for e in found.entries] == [0, *(e.last for e in found.entries[:-1])]
            best = brute(layers, entries, budget)
            assert best is not None and found.error >= best.error - 1e-9
            if precision is None:  # a thousandth of the budget: about as good as the best
                near = brute(layers, entries, budget * 0.99)
                assert near is None or found.error <= near.error + 1e-9


def test_any_time_gives_the_least_error_and_too_little_a_clear_error() -> None:
    entries = instance(4, 3, False)
    best = brute(4, entries, math.inf)
    assert best is not None
    assert solve(4, entries, math.inf).error == pytest.approx(best.error)
    with pytest.raises(InfeasibleError, match="the fastest choice takes"):
        solve(4, entries, 1e-6)


def test_a_row_with_a_gap_has_no_solution() -> None:
    assert math.isinf(quickest(3, [Entry(0, 1, 1.0, 0.0), Entry(2, 3, 1.0, 0.0)]))
    with pytest.raises(InfeasibleError):
        solve(3, [Entry(0, 1, 1.0, 0.0), Entry(2, 3, 1.0, 0.0)], 10.0)


def test_rounding_does_not_break_a_budget_that_is_just_met() -> None:
    """Truncation, as in the released code, counts 1.4 as 1 and lets 7.0 through."""
    entries = [Entry(i, i + 1, 1.4, 0.0) for i in range(5)]
    entries += [Entry(i, i + 1, 1.0, 1.0) for i in range(5)]
    assert solve(5, entries, 5.9, 1.0).seconds <= 5.9
    assert solve(5, entries, 5.9, 0.1).error == 3.0
