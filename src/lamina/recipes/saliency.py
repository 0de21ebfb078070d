"""How much a channel matters, and in which order channels go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lamina.errors import DataError
from lamina.forms import find_tensor
from lamina.measure.stats import LayerStats, Stats
from lamina.network.source import Network
from lamina.recipes.widths import Width

NORMS = ("l1", "l2")
SCOPES = ("uniform", "global", "currency")
RIDGE = 1e-4  # of the mean variance
Removal = tuple[float, int, int]  # key, number of the width, channel: the smallest key goes first


def filter_norms(network: Network, width: Width, norm: str) -> torch.Tensor:
    """Return the norm of every filter of a width's first layer [channels], float64.

    Reference: Li, Kadav, Durdanovic, Samet, Graf 2017, arXiv:1608.08710, section 3.1 (l1).
    """
    weight = find_tensor(network.module, width.producer.weight).detach().double().flatten(1).cpu()
    return weight.abs().sum(1) if norm == "l1" else weight.square().sum(1).sqrt()


def removal_losses(stats: LayerStats, weight: torch.Tensor, width: Width) -> torch.Tensor:
    """Return what the next layer loses with each pair of channels [channels, channels].

    Without channel i its output lacks `W_i (x_i - E x_i)`, the mean being put into the bias. In the
    planner's currency, `1/2 tr(G D H D^T)` with `D = -[W_i for i in S]`, a set S of channels costs
    the sum of `M[i, j]` over i, j in S. Where only the diagonal of H is known, `M` is diagonal.

    Args:
        stats: of the consumer.
        weight: of the consumer.
        width: whose channels they are.
    """
    w = weight.detach().double().flatten(1).cpu()
    G, H = stats.G[0].cpu(), covariance(stats)
    left = G[:, None] * w if G.dim() == 1 else G @ w
    if H.dim() == 1:
        each = 0.5 * stats.scale * (left * w).sum(0) * H
        return torch.diag(each.reshape(width.channels, -1).sum(1))
    whole = 0.5 * stats.scale * (w.T @ left) * H
    c = width.channels
    return whole.reshape(c, whole.shape[0] // c, c, -1).sum((1, 3))


def covariance(stats: LayerStats) -> torch.Tensor:
    """Return the second moment of a layer's inputs about their mean, summed over positions.

    `[in, in]`, or its diagonal `[in]`; about zero, where the mean was not collected.
    """
    H = stats.H[0].cpu()
    if stats.mean is None:
        return H
    mean = stats.mean[0].cpu()
    if H.dim() == 1:
        return (H - mean.square() / stats.positions).clamp_min(0)
    return H - torch.outer(mean, mean) / stats.positions


def with_ridge(spread: torch.Tensor) -> torch.Tensor:
    """Add to the diagonal of a covariance what keeps channels apart that say the same."""
    ridge = RIDGE * float(spread.diagonal().mean()) + 1e-12
    return spread + ridge * torch.eye(len(spread), dtype=spread.dtype)


def regressed_order(
    stats: LayerStats, weight: torch.Tensor, width: Width
) -> tuple[list[int], list[float]]:
    """Return in which order channels go if those that stay stand in for them, and what each costs.

    With `P` the inverse covariance of the next layer's inputs, a channel `i` that goes costs
    `1/2 tr(G W_i P_ii^-1 W_i^T)`; then `W -= W_i P_ii^-1 P_i` and `P -= P_i^T P_ii^-1 P_i`.

    Args:
        stats: of the consumer, its H not a diagonal.
        weight: of the consumer.
        width: whose channels they are.

    Returns:
        as `greedy_order`.

    Reference: Hassibi, Stork 1992, Optimal brain surgeon, for whole groups of inputs.
    """
    c = width.channels
    w = weight.detach().double().flatten(1).cpu()
    G = stats.G[0].cpu()
    if G.dim() == 1:
        w = G.clamp_min(0).sqrt()[:, None] * w
    else:  # any root of G serves: only `w^T G w` is looked at
        values, vectors = torch.linalg.eigh(G)
        w = values.clamp_min(0).sqrt()[:, None] * (vectors.T @ w)
    taps = w.shape[1] // c
    P = torch.cholesky_inverse(torch.linalg.cholesky(with_ridge(covariance(stats))))
    every, alive = torch.arange(c), torch.ones(c, dtype=torch.bool)
    order: list[int] = []
    costs: list[float] = []
    for _ in range(c):
        inner = P.view(c, taps, c, taps)[every, :, every, :]
        inner[~alive] = torch.eye(taps, dtype=P.dtype)
        inverse = torch.linalg.inv(inner)
        parts = w.view(-1, c, taps).transpose(0, 1)
        losses = ((parts.transpose(1, 2) @ parts) * inverse).sum((1, 2))
        i = int(losses.masked_fill(~alive, float("inf")).argmin())
        cost = 0.5 * stats.scale * max(0.0, float(losses[i]))
        costs.append(max(cost, costs[-1] if costs else 0.0))
        order.append(i)
        alive[i] = False
        here = slice(i * taps, (i + 1) * taps)
        row = inverse[i] @ P[here]
        w = w - w[:, here] @ row
        P = P - P[here].T @ row
        P[here], P[:, here], w[:, here] = 0.0, 0.0, 0.0
    return order, costs


def greedy_order(losses: torch.Tensor) -> tuple[list[int], list[float]]:
    """Return in which order channels go, each the one that then costs least, and its cost.

    Args:
        losses: of `removal_losses`.

    Returns:
        channels, and the loss that each adds to those before it (never falling: a channel that goes
        is no excuse for the next one to look cheap).

    Example:
        >>> greedy_order(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
        ([1, 0], [1.0, 3.0])
    """
    own, shared = losses.diagonal().clone(), torch.zeros(len(losses), dtype=losses.dtype)
    order: list[int] = []
    costs: list[float] = []
    alive = torch.ones(len(losses), dtype=torch.bool)
    for _ in range(len(losses)):
        marginal = (own + 2 * shared).masked_fill(~alive, float("inf"))
        i = int(marginal.argmin())
        costs.append(max(float(marginal[i]), costs[-1] if costs else 0.0))
        order.append(i)
        alive[i] = False
        shared += losses[:, i]
    return order, costs


def order_removals(
    network: Network,
    found: Sequence[Width],
    stats: Stats,
    norm: str,
    scope: str,
    regressed: bool = False,
) -> list[Removal]:
    """Return every channel of every width, in the order in which they go.

    Args:
        network: the original.
        found: its widths.
        stats: of its layers; only the scope `"currency"` looks at them.
        norm: `"l1"` or `"l2"`.
        scope: `"uniform"`: every width loses the same share; `"global"`: the smallest norms over
            the mean norm of their layer; `"currency"`: the least predicted loss per parameter.
        regressed: channels that stay will stand in for those that go.

    Raises:
        DataError: the scope needs statistics, and there are none.
    """
    removals: list[Removal] = []
    for number, width in enumerate(found):
        if scope == "currency":
            layer = stats.of(width.consumer.name)
            if layer is None:
                raise DataError(
                    "the scope 'currency' needs calibration data", width.consumer.name,
                    "a predicted loss follows from what was measured", "give data, or scope=global",
                )  # fmt: skip
            weight = find_tensor(network.module, width.consumer.weight)
            if regressed and layer.H.dim() > 2 and layer.mean is not None:
                order, costs = regressed_order(layer, weight, width)
            else:
                order, costs = greedy_order(removal_losses(layer, weight, width))
            each = channel_params(network, width)
            keys = [cost / each for cost in costs]
        else:
            norms = filter_norms(network, width, norm)
            order = norms.sort(stable=True).indices.tolist()
            if scope == "uniform":
                keys = [(i + 1) / width.channels for i in range(width.channels)]
            else:
                mean = float(norms.mean()) or 1.0
                keys = [float(norms[i]) / mean for i in order]
        removals += [(key, number, i) for key, i in zip(keys, order, strict=True)]
    # Ties keep the order within a width: sorting is stable.
    return sorted(removals, key=lambda r: (r[0], r[1]))


def channel_params(network: Network, width: Width) -> int:
    """Return how many parameters one channel is worth, while all others stay."""
    row = find_tensor(network.module, width.producer.weight)[0].numel()
    weight = find_tensor(network.module, width.consumer.weight)
    column = weight[:, : width.repeat].numel()
    norms = (network.module.get_submodule(path) for path in width.norms)
    extra = sum(
        len(norm._parameters) for norm in norms if norm._parameters.get("weight") is not None
    )
    return row + column + extra + bool(width.producer.bias)


def count_params(network: Network, found: Sequence[Width], counts: Mapping[str, int]) -> int:
    """Return the parameters of the whole network when widths are left with so many channels.

    Args:
        network: the original.
        found: its widths.
        counts: channels left, by name of the width; of others all.

    Example:
        >>> count_params(Network(torch.nn.Linear(3, 2)), (), {})
        8
    """
    module = network.module
    rows: dict[str, float] = {}
    columns: dict[str, float] = {}
    for width in found:
        share = counts.get(width.name, width.channels) / width.channels
        rows[width.producer.module] = columns[width.consumer.module] = share
        for path in width.norms:
            rows[path] = share
    total = sum(p.numel() for p in module.parameters())
    for path in dict.fromkeys((*rows, *columns)):
        for tensor in module.get_submodule(path)._parameters.values():
            if tensor is not None:
                share = rows.get(path, 1.0) * (columns.get(path, 1.0) if tensor.dim() > 1 else 1.0)
                total += round(tensor.numel() * share) - tensor.numel()
    return total
