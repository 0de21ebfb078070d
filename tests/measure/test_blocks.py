"""Permutations into blocks: known matrices, planted problems, and least squares inside blocks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import MethodError
from lamina.measure.blocks import (
    Order,
    arrange,
    assign,
    cut_costs,
    find_groups,
    levels,
    reached_level,
    refit_groups,
    start_order,
    support,
)


def test_the_costs_of_cuts_8_by_8():
    wanted = [
        [0, 0.25, 0.5, 0.5, 1, 1, 1, 1],
        [0.25, 0, 0.5, 0.5, 1, 1, 1, 1],
        [0.5, 0.5, 0, 0.25, 1, 1, 1, 1],
        [0.5, 0.5, 0.25, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0.25, 0.5, 0.5],
        [1, 1, 1, 1, 0.25, 0, 0.5, 0.5],
        [1, 1, 1, 1, 0.5, 0.5, 0, 0.25],
        [1, 1, 1, 1, 0.5, 0.5, 0.25, 0],
    ]
    assert cut_costs(8, 8).tolist() == wanted


def test_costs_stop_at_a_depth_and_where_a_side_is_odd():
    shallow = cut_costs(8, 8, depth=1)
    assert torch.equal(shallow, 1 - support(8, 8, 2))
    assert cut_costs(8, 8, depth=0).sum() == 0
    assert torch.equal(cut_costs(6, 4), 1 - support(6, 4, 2)), "3 x 2 cannot be halved"
    assert cut_costs(3, 4).sum() == 0
    assert cut_costs(4, 8, decay=0.25).unique().tolist() == [0.0, 0.25, 1.0]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 4))
def test_levels_are_those_whose_groups_divide_both_sides(rows, cols, twos):
    n, c = rows * 2**twos, cols * 2**twos
    level = levels(n, c)
    assert n % 2 ** (level - 1) == 0 and c % 2 ** (level - 1) == 0
    assert n % 2**level or c % 2**level


def test_supports_are_blocks():
    assert torch.equal(support(4, 4, 1), torch.ones(4, 4, dtype=torch.float64))
    mask = support(4, 8, 4)
    assert float(mask.sum()) == 8 and float(mask[1, 2]) == 1 and float(mask[0, 2]) == 0


@given(st.integers(0, 1000))
def test_the_level_rule_is_monotone_and_honest(seed):
    S = torch.rand(8, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    S = S * (0.02 + support(8, 16, 2) + support(8, 16, 4))
    found = [reached_level(S, cut) for cut in (0.0, 0.05, 0.2, 0.5, 0.9, 1.0)]
    assert found == sorted(found) and found[-1] == 4
    for cut, level in zip((0.0, 0.05, 0.2, 0.5, 0.9), found, strict=False):
        lost = float((S * (1 - support(8, 16, 2 ** (level - 1)))).sum() / S.sum())
        assert lost <= cut + 1e-12


def brute_assignment(cost: torch.Tensor) -> float:
    from itertools import permutations

    n = len(cost)
    return min(sum(float(cost[a, p[a]]) for a in range(n)) for p in permutations(range(n)))


@given(st.integers(2, 5), st.integers(0, 1000))
def test_an_assignment_is_optimal(n, seed):
    cost = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = assign(cost)
    assert sorted(p.tolist()) == list(range(n))
    assert float(cost[torch.arange(n), p].sum()) == pytest.approx(brute_assignment(cost))
    soft = assign(cost, "sinkhorn")
    assert sorted(soft.tolist()) == list(range(n))


def test_sinkhorn_finds_a_clear_optimum_and_others_are_unknown():
    p = torch.randperm(12)
    cost = torch.rand(12, 12)
    cost[torch.arange(12), p] -= 3
    assert torch.equal(assign(cost, "sinkhorn"), p)
    assert torch.equal(assign(cost), p)
    with pytest.raises(MethodError, match="exact"):
        assign(cost, "emd")


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
@pytest.mark.parametrize("seed", range(5))
def test_no_half_step_raises_the_objective(seed, solver):
    S = torch.rand(16, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    R = cut_costs(16, 8)
    order, history = arrange(S, R, start_order(16, 8, seed), solver=solver)
    assert all(b <= a + 1e-9 for a, b in pairwise(history))
    assert sorted(order.rows.tolist()) == list(range(16))
    assert sorted(order.cols.tolist()) == list(range(8))
    assert float((order.of(S) * R).sum()) == pytest.approx(history[-1])
    assert history[-1] < history[0]


def test_an_order_and_its_inverse():
    order = start_order(6, 4, 3)
    S = torch.randn(6, 4)
    assert torch.equal(order.undo(order.of(S)), S)
    state = torch.get_rng_state()
    assert torch.equal(start_order(6, 4, 3).rows, order.rows)
    assert torch.equal(torch.get_rng_state(), state)
    tidy = order.sorted(2)
    for a, b in ((order.rows, tidy.rows), (order.cols, tidy.cols)):
        assert a.reshape(2, -1).sort(1).values.flatten().tolist() == b.tolist()


def planted(n: int, c: int, groups: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    S = support(n, c, groups) * (0.5 + torch.rand(n, c, generator=g, dtype=torch.float64))
    return S[torch.randperm(n, generator=g)][:, torch.randperm(c, generator=g)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("n", "c", "groups"), [(16, 16, 2), (8, 16, 4), (24, 12, 2)])
def test_planted_blocks_are_found(n, c, groups, seed):
    S = planted(n, c, groups, seed)
    order, lost = find_groups(S, groups, starts=8)
    assert lost == 0
    assert float((order.of(S) * (1 - support(n, c, groups))).sum()) == 0
    assert find_groups(S, groups, starts=8)[0].rows.tolist() == order.rows.tolist()


def test_what_is_not_there_is_not_found():
    """Negative control: a matrix without blocks loses about what its order says."""
    S = torch.rand(16, 16, dtype=torch.float64)
    _, lost = find_groups(S, 2)
    assert 0.3 < lost < 0.5
    assert find_groups(S, 4)[1] > lost


# --- values inside blocks ------------------------------------------------------------------------


def moment(size: int) -> torch.Tensor:
    x = torch.randn(3 * size, size, dtype=torch.float64) @ torch.randn(size, size).double()
    return x.T @ x / len(x)


def loss_of(matrix, H, G, rows, columns, blocks) -> float:
    delta = -matrix.clone()
    for r, c, values in zip(rows, columns, blocks, strict=True):
        delta[r[:, None], c] += values
    return float(torch.einsum("ij,ik,kl,jl->", delta, G, delta, H))


def test_values_inside_blocks_are_the_least_squares_of_all_at_once():
    n, N = 4, 6
    matrix, H, G = torch.randn(n, N, dtype=torch.float64), moment(N), moment(n)
    rows, columns = torch.randperm(n).reshape(2, 2), torch.randperm(N).reshape(2, 3)
    # All free entries as one vector x, loss |L (E x - w)|^2 with the Kronecker product of roots.
    root = torch.kron(torch.linalg.cholesky(G).T, torch.linalg.cholesky(H).T)
    mask = torch.zeros(n, N, dtype=torch.bool)
    for r, c in zip(rows, columns, strict=True):
        mask[r[:, None], c] = True
    free = mask.flatten().nonzero().flatten()
    x = torch.linalg.lstsq(root[:, free], root @ matrix.flatten()[:, None]).solution
    best = float((root[:, free] @ x - root @ matrix.flatten()[:, None]).square().sum())

    def found(sweeps):
        blocks = refit_groups(matrix, H, G, rows, columns, sweeps)
        return loss_of(matrix, H, G, rows, columns, blocks)

    losses = [found(s) for s in (1, 2, 4, 400)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == pytest.approx(best, rel=1e-6)
    cut = torch.stack([matrix[r][:, c] for r, c in zip(rows, columns, strict=True)])
    assert losses[0] < loss_of(matrix, H, G, rows, columns, cut), "better than cutting"


def test_one_sweep_is_exact_without_cross_gradients_and_nothing_changes_without_moments():
    matrix, H = torch.randn(4, 6, dtype=torch.float64), moment(6)
    rows, columns = torch.arange(4).reshape(2, 2), torch.arange(6).reshape(2, 3)
    g = torch.rand(4, dtype=torch.float64) + 0.1
    one, many = (refit_groups(matrix, H, G, rows, columns, s) for G, s in ((g, 1), (g.diag(), 50)))
    torch.testing.assert_close(one, many)
    plain = refit_groups(matrix, None, None, rows, columns)
    assert torch.equal(plain[1], matrix[2:, 3:])
    assert torch.equal(refit_groups(matrix, H.diagonal(), None, rows, columns), plain)


def test_an_order_is_rows_and_columns():
    order = Order(torch.tensor([1, 0]), torch.tensor([0, 1]))
    assert order.of(torch.tensor([[1, 2], [3, 4]])).tolist() == [[3, 4], [1, 2]]
