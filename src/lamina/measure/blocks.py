"""Permutations that make a matrix nearly block-diagonal, for grouped layers behind shuffles.

Structured sparsification: Zhang et al. 2021, UAI, arXiv:2002.08127 ("MASS"). Rows are outputs,
columns are input channels, an entry says how much a connection matters. A *level* g stands for
`2^(g-1)` groups of equal size; level 1 is the dense layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lamina.errors import MethodError

DECAY = 0.5  # of the cost of a cut, per level
ROUNDS = 20
SOFTNESS = 0.1  # of Sinkhorn's solver, as a share of the mean cost
SOLVERS = ("exact", "sinkhorn")


# --- blocks --------------------------------------------------------------------------------------


def cut_costs(rows: int, cols: int, depth: int | None = None, decay: float = DECAY) -> torch.Tensor:
    """Return the cost matrix R `[rows, cols]`: what an entry costs at its place.

    The two quadrants off the diagonal cost 1, the two on it are cut again, at `decay` times the
    cost, while both sides are even. The innermost blocks cost nothing.

    Args:
        rows, cols: its sides.
        depth: number of cuts at most; None: as many as there are.
        decay: from one cut to the next.

    Example:
        >>> cut_costs(4, 4)[0].tolist()
        [0.0, 0.5, 1.0, 1.0]
    """
    R = torch.zeros(rows, cols, dtype=torch.float64)
    cost, cut = 1.0, 0
    r, c = rows, cols
    while r % 2 == 0 and c % 2 == 0 and r and c and (depth is None or cut < depth):
        for start in range(rows // r):
            top, left = start * r, start * c
            R[top : top + r // 2, left + c // 2 : left + c] = cost
            R[top + r // 2 : top + r, left : left + c // 2] = cost
        r, c, cut, cost = r // 2, c // 2, cut + 1, cost * decay
    return R


def support(rows: int, cols: int, groups: int) -> torch.Tensor:
    """Return the 0/1 block-diagonal matrix `[rows, cols]` of so many equal groups.

    Example:
        >>> support(2, 4, 2).tolist()
        [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """
    block = torch.ones(rows // groups, cols // groups, dtype=torch.float64)
    return torch.block_diag(*[block] * groups)


def levels(rows: int, cols: int) -> int:
    """Return the highest level: `2^(g-1)` divides both sides.

    Example:
        >>> levels(8, 12)
        3
    """
    level = 1
    while rows % 2 == 0 and cols % 2 == 0 and rows and cols:
        rows, cols, level = rows // 2, cols // 2, level + 1
    return level


def reached_level(ordered: torch.Tensor, cut: float) -> int:
    """Return the highest level whose blocks hold at least `1 - cut` of an ordered matrix's sum.

    Args:
        ordered: `[rows, cols]`, rows and columns permuted, not negative.
        cut: share that may be lost; the paper's p.
    """
    total = float(ordered.sum())
    best = 1
    shape = (ordered.shape[0], ordered.shape[1])
    for level in range(2, levels(*shape) + 1):
        inside = float((ordered * support(*shape, 2 ** (level - 1))).sum())
        if inside >= (1 - cut) * total:
            best = level
    return best


# --- assignments ---------------------------------------------------------------------------------


def assign(cost: torch.Tensor, solver: str = "exact") -> torch.Tensor:
    """Return the permutation p that minimises `sum_a cost[a, p(a)]`.

    The linear programme over doubly stochastic matrices has a permutation among its optima
    (Birkhoff), so `"exact"` loses nothing. `"sinkhorn"` solves it with an entropy added, many
    times faster for thousands of channels on an accelerator, and rounds by an assignment.

    Args:
        cost: `[n, n]`.
        solver: `"exact"` or `"sinkhorn"`.

    Example:
        >>> assign(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
        [1, 0]
    """
    from scipy.optimize import linear_sum_assignment

    if solver not in SOLVERS:
        raise MethodError("unknown solver", repr(solver), "", f"choose from {SOLVERS}")
    cost = cost.detach().to(torch.float64)
    if solver == "sinkhorn":
        cost = -_soften(cost)
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, dtype=torch.int64)


def _soften(cost: torch.Tensor, rounds: int = 200) -> torch.Tensor:
    """Return the doubly stochastic matrix of Sinkhorn's iteration."""
    scale = SOFTNESS * float((cost - cost.min()).mean()) or 1.0
    logs = -(cost - cost.min()) / scale
    for _ in range(rounds):
        logs = logs - logs.logsumexp(1, keepdim=True)
        logs = logs - logs.logsumexp(0, keepdim=True)
    return logs.exp()


@dataclass(frozen=True)
class Order:
    """Which row and which column lies at each place.

    Args:
        rows: `[n]`, cols: `[c]`, permutations.
    """

    rows: torch.Tensor
    cols: torch.Tensor

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a matrix in this order."""
        return matrix[self.rows][:, self.cols]

    def undo(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return a matrix `[n, c]` in this order as it was before."""
        return matrix[torch.argsort(self.rows)][:, torch.argsort(self.cols)]

    def sorted(self, groups: int) -> Order:
        """Return the same groups, each in rising order, which is a shorter index."""
        return Order(
            *(p.reshape(groups, -1).sort(1).values.flatten() for p in (self.rows, self.cols))
        )


def start_order(rows: int, cols: int, seed: int | None = None) -> Order:
    """Return the order as it is, or a random one by seed; global random numbers are not drawn."""
    if seed is None:
        return Order(torch.arange(rows), torch.arange(cols))
    generator = torch.Generator().manual_seed(seed)
    return Order(*(torch.randperm(k, generator=generator) for k in (rows, cols)))


def arrange(
    matrix: torch.Tensor,
    costs: torch.Tensor,
    start: Order | None = None,
    rounds: int = ROUNDS,
    solver: str = "exact",
) -> tuple[Order, list[float]]:
    """Minimise `sum(ordered * costs)` by turns over rows and columns, each exactly.

    Args:
        matrix: `[n, c]`, not negative.
        costs: `[n, c]`, of the places (`cut_costs`).
        start: where to begin; None: the order as it is.
        rounds: at most; it stops when a round gains nothing.
        solver: as `assign`.

    Returns:
        the order, and the objective before and after every half round.

    Example:
        >>> S = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> arrange(S, cut_costs(2, 2))[1][-1]
        0.0
    """
    matrix = matrix.detach().to(torch.float64).cpu()
    order = start or start_order(*matrix.shape)
    history = [float((order.of(matrix) * costs).sum())]
    for _ in range(rounds):
        rows = assign(costs @ matrix[:, order.cols].mT, solver)
        order = _better(matrix, costs, order, Order(rows, order.cols), history)
        cols = assign(costs.mT @ matrix[order.rows], solver)
        order = _better(matrix, costs, order, Order(order.rows, cols), history)
        if history[-3] - history[-1] <= 1e-12 * max(1.0, history[0]):
            break
    return order, history


def _better(
    matrix: torch.Tensor, costs: torch.Tensor, old: Order, new: Order, history: list[float]
) -> Order:
    """Take the new order unless it is worse (an approximate solver's may be)."""
    value = float((new.of(matrix) * costs).sum())
    taken = new if value <= history[-1] else old
    history.append(min(value, history[-1]))
    return taken


def find_groups(
    matrix: torch.Tensor,
    groups: int,
    starts: int = 5,
    rounds: int = ROUNDS,
    solver: str = "exact",
    seed: int = 0,
) -> tuple[Order, float]:
    """Return the order whose blocks hold most of a matrix, and the share they lose.

    The alternation has local optima: it is begun in the order as it is and in random ones, with
    the paper's costs of all cuts and again, from there, with those of these blocks alone.

    Args:
        matrix: `[n, c]`, not negative; groups: divides both.
        starts: random ones.
        rounds, solver: as `arrange`.
        seed: of the first random start.

    Example:
        >>> S = torch.eye(4)[[2, 0, 3, 1]]
        >>> find_groups(S, 2)[1]
        0.0
    """
    matrix = matrix.detach().to(torch.float64).cpu()
    shape = (matrix.shape[0], matrix.shape[1])
    inside = support(*shape, groups)
    nested = cut_costs(*shape, depth=groups.bit_length() - 1)  # not a power of two: fewer cuts
    total = float(matrix.sum()) or 1.0
    best, least = start_order(*shape), float("inf")
    for start in (None, *range(seed, seed + starts)):
        order, _ = arrange(matrix, nested, start_order(*shape, start), rounds, solver)
        order, history = arrange(matrix, 1 - inside, order, rounds, solver)
        if history[-1] < least - 1e-12 * total:
            best, least = order, history[-1]
        if least <= 1e-12 * total:
            break
    return best.sorted(groups), least / total


# --- values inside blocks ------------------------------------------------------------------------


def refit_groups(
    matrix: torch.Tensor,
    H: torch.Tensor | None,
    G: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    sweeps: int = 4,
) -> torch.Tensor:
    """Return the best values `[g, n/g, N/g]` inside blocks for `tr(G E H E^T)`.

    Each block in turn is solved exactly, the errors of the others held: `W_a = (W - G_aa^-1 G_ar
    E_r) H[:, C_a] H[C_a, C_a]^-1`. The sum is convex, and no step raises it.

    Args:
        matrix: `[n, N]`, float64; H: `[N, N]` or `[N]`; G: `[n, n]` or `[n]`; None: identity.
        rows: `[g, n/g]`, columns: `[g, N/g]`, which lie in each block.
        sweeps: over all blocks; one is exact where G is diagonal.
    """
    blocks = torch.stack([matrix[r][:, c] for r, c in zip(rows, columns, strict=True)])
    if H is None or H.dim() == 1:
        return blocks
    solvers = [
        torch.linalg.solve(H[c][:, c], H[:, c], left=False) for c in columns
    ]  # [N, N/g]: what the least squares makes of a row
    coupled = G is not None and G.dim() == 2
    error = -matrix.clone()
    for r, c, values in zip(rows, columns, blocks, strict=True):
        error[r[:, None], c] += values
    for _ in range(sweeps if coupled else 1):
        for a, (r, c) in enumerate(zip(rows, columns, strict=True)):
            goal = matrix[r]
            if coupled and G is not None:
                others = G[r].clone()
                others[:, r] = 0
                goal = goal - torch.linalg.solve(G[r][:, r], others @ error)
            blocks[a] = goal @ solvers[a]
            error[r] = -matrix[r]
            error[r[:, None], c] += blocks[a]
    return blocks
